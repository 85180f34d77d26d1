"""The door for data: every function takes the same images and labels, and refuses the same with the same words."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
import pytest
import torch
from conftest import same, snapshot
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchvision.datasets import FakeData, ImageFolder, VisionDataset
from torchvision.transforms.functional import to_tensor

import pxp
from pxp.batches import batches, fingerprints, shared, whole
from pxp.data import Split

CLASSES = 4


@pytest.fixture(scope="module")
def ready():
    """A small network, its components, and images with the network's own labels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, CLASSES)
    ).eval()
    images = torch.rand(24, 1, 8, 8)
    with torch.no_grad():
        model[4].bias -= model(images).mean(0)
        labels = model(images).argmax(1)
    return model, pxp.find_components(model, example=images[:1]), images, labels


def flat(*tensors) -> torch.Tensor:
    return torch.cat([torch.as_tensor(tensor).double().flatten() for tensor in tensors])


def everywhere(model, units, other):
    """What takes data, as functions from data to a tensor; ``other`` is for what takes two sets."""
    random = pxp.attribute(model, None, units, pxp.Random())
    few = {"rates": (0, 0.5), "progress": False}
    tune = {"n_trials": 1, "space": {"low": ["epsilon"]}, **few}
    return {
        "accuracy": lambda data: flat(pxp.accuracy(model, data)),
        "pruning_curve": lambda data: flat(pxp.pruning_curve(model, random, data, **few).runs),
        "attribute": lambda data: flat(*pxp.attribute(model, data, units, pxp.Taylor()).values()),
        "tune": lambda data: flat(pxp.tune(model, other, units, data, **tune).best_value),
        "tune's references": lambda data: flat(pxp.tune(model, data, units, other, **tune).best_value),
        "finetune": lambda data: flat(*pxp.finetune(model, data, progress=False).parameters()).detach(),
        "prune_gradually": lambda data: flat(*pxp.prune_gradually(model, data, units, pxp.Taylor(), 0.5).values()),
        "reference_samples": lambda data: flat(*pxp.reference_samples(data, 2)),
    }


DOORS = (
    "accuracy", "pruning_curve", "attribute", "tune", "tune's references", "finetune", "prune_gradually",
    "reference_samples",
)  # fmt: skip


@pytest.fixture
def door(ready, request):
    """One of the functions; the model is as before afterwards."""
    model, units, _, _ = ready
    before = snapshot(model)
    yield everywhere(model, units, (torch.rand(9, 1, 8, 8), torch.arange(9) % CLASSES))[request.param]
    assert same(before, snapshot(model))


class Items(Dataset):
    """What a function makes of every index."""

    def __init__(self, make, number: int = 24) -> None:
        self.make, self.number = make, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int):
        return self.make(index)


SAME = {
    "column": lambda x, y: (x, y[:, None]),
    "column of int16": lambda x, y: (x, y[:, None].short()),
    "column of numpy": lambda x, y: (x.numpy(), y[:, None].numpy()),
    "column of lists": lambda x, y: [x, [[label] for label in y.tolist()]],
    "uint8 labels": lambda x, y: (x, y.byte()),
    "samples with (1,) labels": lambda x, y: TensorDataset(x, y[:, None]),
    "samples of numpy": lambda x, y: Items(lambda i: (x[i].numpy(), np.int32(y[i]))),
    "loader of columns": lambda x, y: DataLoader(TensorDataset(x, y[:, None].int()), batch_size=5),
}


@pytest.mark.parametrize("door", DOORS, indirect=True)
def test_one_class_for_each_image_is_a_label(ready, door):
    _, _, x, y = ready
    expected = door((x, y))
    for name, make in SAME.items():
        torch.testing.assert_close(door(make(x, y)), expected, rtol=1e-4, atol=1e-5, msg=name)


def soft(y: torch.Tensor, number: int = CLASSES) -> torch.Tensor:
    return nn.functional.one_hot(y, number)


def item(x, y, of):
    return Items(lambda i: of(x[i], y[i]), len(x))


Row = namedtuple("Row", ["image", "label", "weight"])
PAIRS = r"must be \(images, labels\), got "
WRONG = {
    "one-hot": (lambda x, y: (x, soft(y)), r"1-D tensor of class indices, got torch\.int64 of shape \(24, 4\).*argmax"),
    "one-hot, as many images as classes": (lambda x, y: (x[:4], soft(y[:4])), r"of shape \(4, 4\); of one-hot or soft"),
    "soft": (lambda x, y: (x, soft(y) * 0.9 + 0.025), r"got torch\.float32 of shape \(24, 4\); of one-hot or soft"),
    "one-hot samples": (lambda x, y: TensorDataset(x, soft(y)), r"got torch\.int64 of shape \(\d+, 4\)"),
    "float": (lambda x, y: (x, y.numpy() / 1), r"class indices, got torch\.float64 of shape \(24,\)"),
    "a float column": (lambda x, y: (x, y[:, None].float()), r"class indices, got torch\.float32 of shape \(24, 1\)"),
    "a row": (lambda x, y: (x, y[None]), r"class indices, got torch\.int64 of shape \(1, 24\)"),
    "a deep column": (lambda x, y: (x, y[:, None, None]), r"class indices, got torch\.int64 of shape \(24, 1, 1\)"),
    "one label": (lambda x, y: (x, y[0]), r"class indices, got torch\.int64 of shape \(\)"),
    "words": (lambda x, y: (x, ["cat"] * 24), "class indices, got a list of str, str"),
    "negative": (lambda x, y: (x, y - 100), "class indices from 0, got -"),
    "uint8": (lambda x, y: ((255 * x).byte(), y), r"floating-point tensor, got torch\.uint8; scale them.*/ 255"),
    "numpy bytes": (lambda x, y: ((255 * x).byte().numpy(), y), r"floating-point tensor, got torch\.uint8; scale them"),
    "samples of bytes": (lambda x, y: TensorDataset((255 * x).byte(), y), r"tensor, got torch\.uint8; scale them"),
    "int32": (lambda x, y: (x.int(), y), r"floating-point tensor, got torch\.int32"),
    "one NaN": (lambda x, y: (torch.where(x == x.max(), torch.nan, x), y), "images contain NaN or infinite"),
    "infinite samples": (lambda x, y: TensorDataset(x / 0, y), "images contain NaN or infinite"),
    "none": (lambda x, y: (x[:0], y[:0]), "non-empty batch"),
    "too few": (lambda x, y: (x, y[:-1]), "got 24 images but 23 labels"),
    "dict": (lambda x, y: {"image": x, "label": y}, r"expected \(images, labels\).*, got a dict of image, label"),
    "dict samples": (lambda x, y: item(x, y, lambda a, b: {"pixel_values": a, "labels": b}), PAIRS + "a dict of pixel"),
    "dict batches": (lambda x, y: DataLoader(item(x, y, lambda a, b: {"img": a, "target": b})), PAIRS + "a dict of img"),
    "triples": (lambda x, y: DataLoader(TensorDataset(x, y, y)), PAIRS + "a list of Tensor, Tensor, Tensor; let the"),
    "named triples": (lambda x, y: item(x, y, lambda a, b: Row(a, b, 1.0)), PAIRS + "a Row of Tensor, Tensor, "),
    "images only": (lambda x, y: TensorDataset(x), PAIRS + "a (list|tuple) of Tensor;"),
    "bare images": (lambda x, y: DataLoader(item(x, y, lambda a, b: a)), PAIRS + "Tensor"),
    "two batches": (lambda x, y: [(x[:12], y[:12]), (x[12:], y[12:])], "must be .*, got a tuple of Tensor, Tensor"),
    "three batches": (lambda x, y: [(x, y)] * 3, r"expected \(images, labels\).*, got a list of tuple, tuple, tuple"),
    "a generator": (lambda x, y: iter([(x, y)]), r"expected \(images, labels\).*, got list_iterator"),
}  # fmt: skip


@pytest.mark.parametrize("door", DOORS, indirect=True)
@pytest.mark.parametrize("case", WRONG)
def test_what_else_is_refused_with_what_came_and_what_is_expected(ready, door, case):
    make, message = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=message):
        door(make(*ready[2:]))


@pytest.mark.parametrize("door", [name for name in DOORS if name != "reference_samples"], indirect=True)
def test_classes_that_the_model_does_not_have(ready, door):
    _, _, x, y = ready
    for labels in (torch.where(torch.arange(24) == 17, CLASSES, y), y + 1000):
        with pytest.raises(ValueError, match=r"labels reach \d+, but the model has 4 classes \(0 to 3\)"):
            door((x, labels))


def test_targets_of_heatmaps(ready):
    model, _, x, _ = ready
    expected = pxp.heatmap(model, x[:3], torch.tensor([2, 2, 2]))
    for targets in (2, np.int64(2), torch.tensor(2), [2, 2, 2], torch.full((3, 1), 2), np.full(3, 2, np.uint8)):
        assert torch.equal(pxp.heatmap(model, x[:3], targets), expected)
        assert pxp.conservation(model, x[:3], targets).input == pytest.approx(float(expected.sum()) / 3, rel=1e-5)
    for targets, message in ((2.0, "class indices"), ([2, 2], "got 3 images but 2 labels"), (4, "labels reach 4")):
        with pytest.raises(ValueError, match=message):
            pxp.heatmap(model, x[:3], targets)


# --- what a Dataset's transforms give is what counts ------------------------------------------------------------------


class Pictures(VisionDataset):
    """Four grey levels, five pictures of each, as torchvision's data sets are: bytes, ``targets``, transforms."""

    def __init__(self, **transforms) -> None:
        super().__init__("", **transforms)
        self.targets = torch.arange(20) % 4

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int):
        picture, target = Image.new("L", (6, 6), 60 * int(self.targets[index]) + index), int(self.targets[index])
        return (picture, target) if self.transforms is None else self.transforms(picture, target)


class Odd(Pictures):
    """Its samples have other labels than ``targets`` says."""

    def __getitem__(self, index: int):
        picture, target = super().__getitem__(index)
        return picture, target % 2


RELABELLED = {
    "target_transform": lambda: Pictures(transform=to_tensor, target_transform=lambda k: 3 - k),
    "target_transform that merges": lambda: Pictures(transform=to_tensor, target_transform=lambda k: k // 2),
    "target_transform to tensors": lambda: Pictures(transform=to_tensor, target_transform=lambda k: torch.tensor([k + 5])),
    "one transform of both": lambda: Pictures(transforms=lambda picture, k: (to_tensor(picture), (k + 1) % 4)),
    "a class of one's own": lambda: Odd(transform=to_tensor),
    "a subset": lambda: torch.utils.data.Subset(Pictures(transform=to_tensor, target_transform=lambda k: 3 - k), range(16)),
}  # fmt: skip


@pytest.mark.parametrize("case", RELABELLED)
def test_references_have_the_labels_that_the_samples_have(case):
    data = RELABELLED[case]()
    label_of = {fingerprints(image[None])[0]: int(label) for image, label in (data[i] for i in range(len(data)))}
    members = {c: list(label_of.values()).count(c) for c in label_of.values()}
    for seed in range(3):
        images, labels = pxp.reference_samples(data, min(members.values()), seed=seed)
        assert images.dtype == torch.float32 and labels.tolist() == [label_of[mark] for mark in fingerprints(images)]
        assert labels.unique().tolist() == sorted(members)
    # drawn from all of a class, not only from those that were in it before
    highest = max(members, key=members.get)
    assert len(pxp.reference_samples(data, members[highest], [highest]).labels) == members[highest]
    images, labels = whole(data)
    assert labels.tolist() == [label_of[mark] for mark in fingerprints(images)]


def test_few_samples_are_read_where_targets_are_known():
    read = []

    class Counting(Pictures):
        def __getitem__(self, index: int):
            read.append(index)
            return super().__getitem__(index)

    for transform in (None, lambda k: 3 - k, lambda k: k + 7):
        read.clear()
        pxp.reference_samples(Counting(transform=to_tensor, target_transform=transform), 2)
        assert len(read) == 4 + 8  # one of each class, and what is drawn


def test_classes_are_those_behind_the_transform():
    data = Pictures(transform=to_tensor, target_transform=lambda k: 100 * k)
    assert pxp.reference_samples(data, 1, [300, 0]).labels.tolist() == [300, 0]
    with pytest.raises(ValueError, match="class 3 has 0 samples"):
        pxp.reference_samples(data, 1, [3])
    with pytest.raises(ValueError, match=r"classes must be distinct class indices, got \[0, 0\]"):
        pxp.reference_samples(data, 1, [0, 0])


def test_pictures_that_no_transform_has_made_a_tensor(ready):
    model = ready[0]
    for data in (Pictures(), FakeData(8, (1, 8, 8), 4)):
        with pytest.raises(ValueError, match="images must be a floating-point tensor, got Image"):
            pxp.reference_samples(data, 1)
        for function in (pxp.accuracy, pxp.finetune):
            with pytest.raises(TypeError, match="found <class 'PIL.Image.Image'>"):
                function(model, data)
    with pytest.raises(TypeError, match="samples of Stream cannot be drawn"):
        pxp.reference_samples(Stream(), 1)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.rand(1, 8, 8), 0)] * 3)


def test_streams_are_read_in_batches(ready):
    assert [len(labels) for _, labels in batches(Stream(), 2)] == [2, 1]
    assert pxp.accuracy(ready[0], Stream()) in (0, 1)


def test_image_folders(tmp_path):
    for k, name in enumerate("abc"):
        for i in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (4, 4), (80 * k, i, 0)).save(tmp_path / name / f"{i}.png")
    data = ImageFolder(tmp_path, to_tensor, target_transform=lambda k: (k + 1) % 3)
    images, labels = pxp.reference_samples(data, 2)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert ((255 * images[:, 0, 0, 0]).round() / 80).tolist() == [2, 2, 0, 0, 1, 1]
    data.targets = data.targets[:-1]  # no labels of these samples
    assert pxp.reference_samples(data, 3).labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3


# --- batches ----------------------------------------------------------------------------------------------------------


def test_batches():
    x, y = torch.arange(7.0)[:, None], torch.arange(7)
    pairs = TensorDataset(x, y)
    for data, sizes in (
        ((x, y), [3, 3, 1]),
        ([x, y], [3, 3, 1]),
        (Split(x, y), [3, 3, 1]),
        (pairs, [3, 3, 1]),
        (DataLoader(pairs, batch_size=5), [5, 2]),
        ((x.numpy(), y.numpy()), [3, 3, 1]),
        ((x, y.tolist()), [3, 3, 1]),
    ):
        found = list(batches(data, 3))
        assert [len(labels) for _, labels in found] == sizes
        assert all(torch.equal(torch.cat(parts), whole(data)[i]) for i, parts in enumerate(zip(*found, strict=True)))
        assert all(torch.equal(*both) for both in zip(whole(data), (x, y), strict=True))
    for bad in (None, 3, x, (x,), "data"):
        with pytest.raises(TypeError, match=r"expected \(images, labels\), a Dataset or a DataLoader, got"):
            list(batches(bad, 3))
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
            list(batches((x, y), size))
    with pytest.raises(ValueError, match="the data are empty"):
        whole(DataLoader(TensorDataset(x[:0], y[:0])))
    assert batches((x, y > 3), 7).__next__()[1].tolist() == [0, 0, 0, 0, 1, 1, 1]


# --- images in two sets -----------------------------------------------------------------------------------------------


def test_shared_images_are_counted_against_the_smaller_set():
    many = [str(i) for i in range(1000)]
    for few, expected in (
        (["7"], 1),
        (["7", "x"], 1),
        (many[:10], 10),
        ([*many[:1], *"abcdefghi"], 1),
        ([*many[:2], *(f"x{i}" for i in range(150))], 2),
        ([*many[:1], *(f"x{i}" for i in range(150))], 0),  # fewer than 1 %
        ([*many[:10], *(f"x{i}" for i in range(2000))], 0),
        ([*many[:11], *(f"x{i}" for i in range(2000))], 11),
        (["7"] * 500 + ["x"], 1),  # an image that is there several times is one
        ([], 0),
    ):
        assert shared(few, many) == shared(many, few) == expected


def test_fingerprints_are_of_values():
    images = torch.rand(3, 2, 4, 4)
    marks = fingerprints(images)
    assert len(set(marks)) == 3 and fingerprints(images[1:]) == marks[1:]
    assert fingerprints(images.double()) == fingerprints(images.to(memory_format=torch.channels_last)) == marks
    assert not set(fingerprints(images * 2)) & set(marks)
