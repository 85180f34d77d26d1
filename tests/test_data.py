"""The shipped images, the full data set, and reference samples."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import FASHION
from torch.utils.data import Dataset, TensorDataset
from torchvision.models import VGG16_BN_Weights

import pxp
from pxp import data as pxp_data
from pxp.batches import fingerprints
from pxp.data import ASSETS, FASHION_MNIST_CLASSES, load_dataset, reference_samples
from pxp.models import trained_on

PARTS = {"reference": 100, "tune": 100, "eval": 200}


def _keys(images: torch.Tensor) -> list[bytes]:
    return [hashlib.sha256((255 * image).round().byte().numpy().tobytes()).digest() for image in images]


def test_splits_are_balanced_and_in_range(data):
    for part, per_class in PARTS.items():
        images, labels = getattr(data, part)
        assert images.shape == (10 * per_class, 1, 28, 28) and images.dtype == torch.float32
        assert labels.dtype == torch.int64 and torch.bincount(labels).tolist() == [per_class] * 10
        assert float(images.min()) == 0 and float(images.max()) == 1
        assert torch.equal((255 * images).round() / 255, images)
    assert data.classes == FASHION_MNIST_CLASSES and len(set(data.classes)) == 10


def test_splits_are_disjoint(data):
    keys = {part: set(_keys(getattr(data, part).images)) for part in PARTS}
    assert all(len(found) == 10 * PARTS[part] for part, found in keys.items())
    assert not keys["reference"] & keys["tune"]
    assert not keys["reference"] & keys["eval"] and not keys["tune"] & keys["eval"]


def test_photographs():
    images, labels = pxp.load_photographs()
    assert images.shape == (4, 3, 224, 224) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert -1 <= images.min() < -0.9 and 0.9 < images.max() <= 1
    # the astronaut's suit is orange, the sky above the rocket blue
    red, _, blue = images[3, :, 120:180, 60:120].mean((1, 2))
    assert red > blue + 0.5
    red, _, blue = images[2, :, :60].mean((1, 2))
    assert blue > red


def test_hashes_of_the_assets():
    for card in ASSETS.glob("*.json"):
        entry = json.loads(card.read_text())
        (file,) = [p for p in ASSETS.glob(f"{card.stem}.*") if p.suffix != ".json"]
        assert hashlib.sha256(file.read_bytes()).hexdigest() == entry["sha256"]
    assert (ASSETS / "fashion-mnist.npz").stat().st_size < 2.1e6


def test_printing(data):
    assert repr(data.tune) == "Split(1,000 images of shape (1, 28, 28), 10 classes)"
    assert repr(data).splitlines() == [
        "fashion-mnist, 10 classes",
        "  reference Split(1,000 images of shape (1, 28, 28), 10 classes)",
        "  tune      Split(1,000 images of shape (1, 28, 28), 10 classes)",
        "  eval      Split(2,000 images of shape (1, 28, 28), 10 classes)",
    ]


@pytest.fixture
def assets(tmp_path, monkeypatch):
    folder = tmp_path / "assets"
    shutil.copytree(ASSETS, folder)
    monkeypatch.setattr(pxp_data, "ASSETS", folder)
    return folder


@pytest.mark.parametrize("name", ["fashion-mnist.npz", "fashion-mnist.json"])
def test_missing_files(assets, name):
    (assets / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing; reinstall pxp"):
        load_dataset()


def test_damaged_files(assets):
    path = assets / "fashion-mnist.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"fashion-mnist\.npz does not have the SHA-256 of its card fashion-mnist\.json"
    ):
        load_dataset()
    path.write_bytes(content[:1000])
    with pytest.raises(ValueError, match="does not have the SHA-256"):
        load_dataset()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_damaged_cards(assets, text):
    (assets / "fashion-mnist.json").write_text(text)
    with pytest.raises(ValueError, match=r"fashion-mnist\.json"):
        load_dataset()


def test_names_and_arguments():
    with pytest.raises(ValueError, match="unknown data set 'mnist'; available: 'fashion-mnist'"):
        load_dataset("mnist")
    with pytest.raises(ValueError, match="root is only read with full=True"):
        load_dataset(root="/tmp")


# --- the full data set -------------------------------------------------------------------------------------------


def _idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def _write(folder, pack, train: int = 6, test: int = 4) -> None:
    generator = np.random.default_rng(0)
    for stem, array in {
        "train-images-idx3-ubyte": generator.integers(0, 256, (train, 28, 28)),
        "train-labels-idx1-ubyte": generator.integers(0, 10, train),
        "t10k-images-idx3-ubyte": generator.integers(0, 256, (test, 28, 28)),
        "t10k-labels-idx1-ubyte": generator.integers(0, 10, test),
    }.items():
        if pack:
            (folder / f"{stem}.gz").write_bytes(gzip.compress(_idx(array)))
        else:
            (folder / stem).write_bytes(_idx(array))


@pytest.mark.parametrize("pack", [True, False])
def test_other_content_is_refused(tmp_path, pack):
    _write(tmp_path, pack)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"are not the original release of Fashion-MNIST \(SHA-256 [0-9a-f]{64}\)"):
        load_dataset(full=True, root=tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_unreadable_content_says_what_to_do(tmp_path):
    for expected in ("nothing there", "damaged", "one file missing"):
        if expected == "damaged":
            _write(tmp_path, True)
            (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x03 too short"))
        elif expected == "one file missing":
            (tmp_path / "train-images-idx3-ubyte.gz").unlink()
        with pytest.raises((FileNotFoundError, ValueError), match=r"Fashion-MNIST.*pass root=<that folder>"):
            load_dataset(full=True, root=tmp_path)


def test_files_that_do_not_unpack_say_what_to_do(tmp_path):
    _write(tmp_path, True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises((FileNotFoundError, ValueError), match=r"Fashion-MNIST.*pass root=<that folder>"):
        load_dataset(full=True, root=tmp_path)


@pytest.mark.parametrize("pack", [True, False])
def test_the_split_of_the_full_data_set(tmp_path, monkeypatch, pack):
    """On a small copy that is made up: tuning images are training images that are not among the references."""
    _write(tmp_path, pack, train=40, test=7)
    index = np.array([31, 2, 17], dtype=np.int32)
    monkeypatch.setattr(pxp_data, "_read_subsets", lambda path: {"tune_index": index})
    with pytest.raises(ValueError, match="not the original release") as refused:
        load_dataset(full=True, root=tmp_path)
    digest = re.search(r"SHA-256 (\w+)", str(refused.value))[1]
    monkeypatch.setattr(pxp_data, "FASHION_MNIST_SHA256", digest)
    images, labels, test_images, test_labels = (torch.from_numpy(part) for part in pxp_data._read_full(tmp_path))
    full = load_dataset(full=True, root=tmp_path)
    rest = [i for i in range(40) if i not in index]
    for part, pixels, wanted in (
        (full.reference, images[rest], labels[rest]),
        (full.tune, images[[31, 2, 17]], labels[[31, 2, 17]]),
        (full.eval, test_images, test_labels),
    ):
        assert part.images.dtype == torch.float32 and torch.equal(part.images, pixels[:, None].float() / 255)
        assert part.labels.dtype == torch.int64 and torch.equal(part.labels, wanted)
    assert set(fingerprints(full.reference.images)) <= trained_on(pxp.load_model("vgg"))
    assert not set(fingerprints(full.tune.images)) & trained_on(pxp.load_model("vgg"))


@pytest.mark.skipif(not FASHION.is_dir(), reason=f"the original files are not in {FASHION}")
def test_the_original_release(data):
    full = load_dataset(full=True, root=FASHION)
    assert [len(getattr(full, part).labels) for part in PARTS] == [59_000, 1_000, 10_000]
    assert torch.equal(full.tune.images, data.tune.images) and torch.equal(full.tune.labels, data.tune.labels)
    tune, train = set(_keys(data.tune.images)), set(_keys(full.reference.images))
    assert not tune & train
    assert set(_keys(data.reference.images)) <= train
    assert set(_keys(data.eval.images)) <= set(_keys(full.eval.images))
    assert torch.bincount(full.reference.labels).tolist() == [5_900] * 10


# --- reference samples -------------------------------------------------------------------------------------------


def test_reference_samples(data):
    one, again, other = (reference_samples(data.reference, 4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.images, again.images) and not torch.equal(one.images, other.images)
    assert one.labels.tolist() == [c for c in range(10) for _ in range(4)]
    pool = dict(zip(_keys(data.reference.images), data.reference.labels.tolist(), strict=True))
    assert [pool[key] for key in _keys(one.images)] == one.labels.tolist()
    assert len(set(_keys(one.images))) == 40
    fewer = reference_samples(data.reference, 2, seed=0)
    assert set(_keys(fewer.images)) <= set(_keys(one.images))
    some = reference_samples(data.reference, 3, classes=[7, 2])
    assert some.labels.tolist() == [7] * 3 + [2] * 3
    assert len(reference_samples(data.reference).labels) == 100


def test_reference_samples_of_a_dataset_read_only_what_is_drawn():
    class Counting(Dataset):
        def __init__(self, targets: bool) -> None:
            self.read = 0
            self.labels = [0, 1, 0, 1, 1, 0]
            if targets:
                self.targets = self.labels

        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int):
            self.read += 1
            if i >= 6:
                raise IndexError
            return torch.full((1, 2, 2), float(i)), self.labels[i]

    counting = Counting(targets=True)
    drawn = reference_samples(counting, 2)
    assert counting.read == 2 + 4 and drawn.images.shape == (4, 1, 2, 2) and drawn.labels.tolist() == [0, 0, 1, 1]
    assert all(counting.labels[int(image[0, 0, 0])] == label for image, label in zip(*drawn, strict=True))
    slow = reference_samples(Counting(targets=False), 2)
    assert torch.equal(slow.images, drawn.images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per_class": 0}, "per_class must be at least 1, got 0"),
        ({"per_class": 101}, "class 0 has 100 samples, fewer than per_class=101"),
        ({"classes": [3, 10]}, "class 10 has 0 samples, fewer than per_class=10"),
        ({"classes": [-1]}, "class -1 has 0 samples"),
    ],
)
def test_impossible_reference_samples(data, arguments, message):
    with pytest.raises(ValueError, match=message):
        reference_samples(data.reference, **arguments)


def test_reference_samples_of_bad_data():
    with pytest.raises(ValueError, match="non-empty batch"):
        reference_samples((torch.zeros(0, 1, 2, 2), torch.zeros(0).long()))
    with pytest.raises(ValueError, match="the data are empty"):
        reference_samples(TensorDataset(torch.zeros(0, 1, 2, 2), torch.zeros(0).long()))
    with pytest.raises(ValueError, match="got 3 images but 2 labels"):
        reference_samples((torch.zeros(3, 1, 2, 2), torch.zeros(2).long()))


def test_public_names_exist():
    assert all(hasattr(pxp, name) for name in pxp.__all__)
    assert len(set(pxp.__all__)) == len(pxp.__all__)


# --- photographs ------------------------------------------------------------------------------------------------------


def test_imagenette(photographs):
    data = pxp.load_dataset("imagenette", root=photographs)
    assert data.labels == (0, 217, 482, 491, 497, 566, 569, 571, 574, 701) and data.classes[2] == "cassette player"
    assert [len(part) for part in (data.reference, data.tune, data.eval)] == [30, 30, 60]
    images, labels = pxp.reference_samples(data.reference, per_class=3)
    assert images.shape == (30, 3, 224, 224) and labels.unique().tolist() == list(data.labels)
    others, _ = pxp.reference_samples(data.tune, per_class=3)
    assert not any(torch.equal(a, b) for a in images for b in others)
    assert repr(data) == (
        "imagenette, 10 classes\n  reference Photographs(30 images, 10 classes)\n"
        "  tune      Photographs(30 images, 10 classes)\n  eval      Photographs(60 images, 10 classes)"
    )
    # the names are those that torchvision's networks give to these outputs
    assert tuple(VGG16_BN_Weights.DEFAULT.meta["categories"][i] for i in data.labels) == data.classes


def test_imagenette_that_is_not_there_or_another(photographs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no readable copy of Imagenette in .*imagenette2-320\.tgz"):
        pxp.load_dataset("imagenette", root=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="'imagenette' is always whole"):
        pxp.load_dataset("imagenette", full=True)
    (photographs / "imagenette2-320" / "train" / "n01440764").rename(photographs / "imagenette2-320" / "train" / "dog")
    with pytest.raises(ValueError, match="holds no Imagenette: unknown class folders dog"):
        pxp.load_dataset("imagenette", root=photographs)
