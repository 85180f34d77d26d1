"""Data sets: the shipped subsets of Fashion-MNIST, the full data set, and reference samples."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .batches import Data, distinct, fingerprints, labels_of, samples, whole

ASSETS = Path(str(files("pxp") / "assets"))

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

# Imagenette's ten classes of ImageNet: WordNet id → index and name
IMAGENETTE_CLASSES = {
    "n01440764": (0, "tench"), "n02102040": (217, "English springer"), "n02979186": (482, "cassette player"),
    "n03000684": (491, "chain saw"), "n03028079": (497, "church"), "n03394916": (566, "French horn"),
    "n03417042": (569, "garbage truck"), "n03425413": (571, "gas pump"), "n03445777": (574, "golf ball"),
    "n03888257": (701, "parachute"),
}  # fmt: skip

# SHA-256 over the raw bytes of (train images, train labels, test images, test labels) of the original release.
FASHION_MNIST_SHA256 = "ca3ab2a37f845e1b8ae23cab1b51749a3011ba3bf1d9016176d75cbaabac376f"

_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


_TRAINING: set[str] = set()  # filled by load_dataset, see training_images


class Split(NamedTuple):
    """Images with their labels; unpacks as ``images, labels = split``.

    Attributes
    ----------
    images : Tensor
        float32, (samples, channels, height, width), of Fashion-MNIST in [0, 1].
    labels : Tensor
        int64, (samples,).
    """

    images: Tensor
    labels: Tensor

    def __repr__(self) -> str:
        counts = torch.bincount(self.labels)
        return (
            f"Split({len(self.labels):,} images of shape {tuple(self.images.shape[1:])}, "
            f"{int((counts > 0).sum())} classes)"
        )


class Photographs(Dataset):
    """Images of a folder that has a subfolder per class, read when asked for; labels are ImageNet's class indices.

    An item is (image, label): float32 (3, 224, 224), as torchvision's pretrained networks take it, and int. The labels
    of all items are ``targets``.
    """

    def __init__(self, folder: Path, start: int = 0, step: int = 1) -> None:
        from torchvision.datasets import ImageFolder
        from torchvision.models import VGG16_BN_Weights

        everything = ImageFolder(folder, transform=VGG16_BN_Weights.DEFAULT.transforms())
        unknown = sorted(set(everything.classes) - set(IMAGENETTE_CLASSES))
        if unknown:
            raise ValueError(f"{folder} holds no Imagenette: unknown class folders {', '.join(unknown)}")
        self._images = everything
        self._members = range(start, len(everything), step)
        labels = [IMAGENETTE_CLASSES[name][0] for name in everything.classes]
        self.targets = [labels[everything.targets[i]] for i in self._members]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images[self._members[index]][0], self.targets[index]

    def __repr__(self) -> str:
        return f"Photographs({len(self):,} images, {len(set(self.targets))} classes)"


@dataclass(frozen=True, repr=False)
class ImageData:
    """Three disjoint splits of one data set.

    Attributes
    ----------
    name : str
        Name that was given to :func:`load_dataset`.
    classes : tuple of str
        Class names.
    labels : tuple of int
        The label of each class.
    reference : Split or Photographs
        Training images; reference samples are drawn from here.
    tune : Split or Photographs
        Disjoint from the two others; hyperparameters are chosen here.
    eval : Split or Photographs
        Test images; only used for what is reported.
    """

    name: str
    classes: tuple[str, ...]
    labels: tuple[int, ...]
    reference: Split | Photographs
    tune: Split | Photographs
    eval: Split | Photographs

    def __repr__(self) -> str:
        rows = "\n".join(f"  {part:<10}{getattr(self, part)!r}" for part in ("reference", "tune", "eval"))
        return f"{self.name}, {len(self.classes)} classes\n{rows}"


def shipped_file(path: str | Path, folder: str) -> Path:
    """The file at ``path``, or the shipped one: ``folder`` is ``"studies"``, ``"curves"`` or ``"evidence"``."""
    shipped = ASSETS / folder
    file = next((p for p in (Path(path), shipped / f"{path}.json") if p.is_file()), None)
    if file is None:
        names = ", ".join(sorted(repr(p.stem) for p in shipped.glob("*.json")))
        raise FileNotFoundError(f"no file {path} and nothing shipped of this name; shipped {folder}: {names}")
    return file


def load_evidence(name: str) -> Any:
    """Read a table of results that ships with the package; the recipe of its name made it.

    Parameters
    ----------
    name : str
        ``"coverage"``: how often intervals hold what they promise, by world, draws and images. ``"samplers"``: the
        best value that each sampler had found among the 512 composites of the VGG after so many trials, seed by seed.
        ``"oracle-vgg"``, ``"oracle-resnet"``, ``"oracle-vit-heads"``, ``"oracle-vit-neurons"``: what silencing each
        component alone does to the loss, and every criterion's rank correlation with it. ``"finetuned-vgg"``, … of the
        same four: what repair and training give back.

    Returns
    -------
    dict or list
        As in the JSON file.

    Raises
    ------
    FileNotFoundError
        Nothing of this name ships; the message names what does.
    """
    return json.loads(shipped_file(name, "evidence").read_text(encoding="utf8"))


def load_dataset(name: str = "fashion-mnist", *, full: bool = False, root: str | Path | None = None) -> ImageData:
    """Load a data set, split so that nothing is tuned on what is reported.

    Parameters
    ----------
    name : {"fashion-mnist", "imagenette"}
        Fashion-MNIST: 28 × 28 grey images of ten kinds of clothes. Imagenette: 13,394 photographs of ten classes of
        ImageNet, for networks with pretrained weights; reference and tune are the two halves of the training images
        (which such a network has seen), eval the validation images.
    full : bool, default False
        Of Fashion-MNIST only. False: the balanced subsets that ship with the package: reference 100 images per
        class, tune 100 per class (no network was trained on them), eval 200 per class (test images). No file but the
        package's is read. True: all 70,000 images; reference is the 59,000 training images, tune the same 1,000 as
        above, eval the 10,000 test images.
    root : path, optional
        Of the full Fashion-MNIST: a folder with the four original ``*-ubyte`` files (gzipped or not), or one in
        torchvision's layout. Of Imagenette: a folder that holds ``imagenette2-320``. Default: torchvision downloads
        into ``~/.cache/pxp`` (30 and 330 MB).

    Returns
    -------
    ImageData
        With the splits ``reference``, ``tune`` and ``eval``. Of Fashion-MNIST all images are in memory, float32
        (N, 1, 28, 28) in [0, 1]; of Imagenette they are read when drawn, see :class:`pxp.data.Photographs`.

    Raises
    ------
    ValueError
        Unknown name, or files whose content is not the original release (checked by hash).
    FileNotFoundError
        ``root`` holds no copy of the files and they cannot be downloaded.

    Notes
    -----
    Fashion-MNIST: Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747, MIT licence. Imagenette: fast.ai; the photographs are
    ImageNet's and are not redistributed here.
    """
    if name == "imagenette":
        if full:
            raise ValueError("full=True is for 'fashion-mnist'; 'imagenette' is always whole")
        return _read_imagenette(root)
    if name != "fashion-mnist":
        raise ValueError(f"unknown data set {name!r}; available: 'fashion-mnist', 'imagenette'")
    if root is not None and not full:
        raise ValueError("root is only read with full=True; the shipped subsets need none")
    packed = _read_subsets(ASSETS / "fashion-mnist.npz")
    if full:
        train_images, train_labels, test_images, test_labels = _read_full(root)
        tune = packed["tune_index"]
        rest = np.setdiff1d(np.arange(len(train_labels)), tune)
        parts = {
            "reference": _split(train_images[rest], train_labels[rest]),
            "tune": _split(train_images[tune], train_labels[tune]),
            "eval": _split(test_images, test_labels),
        }
    else:
        parts = {
            part: _split(packed[f"{part}_images"], packed[f"{part}_labels"]) for part in ("reference", "tune", "eval")
        }
    _TRAINING.update(fingerprints(parts["reference"].images))
    return ImageData(name, FASHION_MNIST_CLASSES, tuple(range(10)), **parts)


def load_photographs() -> Split:
    """Four photographs, to look at what a network of ImageNet sees in them; too few to measure anything.

    A cat (Chelsea), a cup of coffee, a rocket and an astronaut, from scikit-image's data (CC0 and public domain, see
    the card beside the file).

    Returns
    -------
    Split
        Images float32 (4, 3, 224, 224) in [-1, 1], as ``pxp.load_model("efficientnet-lite0")`` takes them: 0 is grey,
        −1 black. Labels are those of ImageNet's 1,000 classes that come nearest: Egyptian cat (285), espresso (967),
        missile (657); an astronaut is none of them, and has the class that this network gives it, bobsled (450), which
        would flatter an accuracy on the four.

    Raises
    ------
    ValueError
        The file is damaged.
    FileNotFoundError
        The file or its card is missing.
    """
    path = ASSETS / "photographs.npz"
    verify(path)
    with np.load(path, allow_pickle=False) as archive:
        images = torch.from_numpy(archive["images"]).permute(0, 3, 1, 2).float() / 127.5 - 1
        return Split(images.contiguous(), torch.from_numpy(archive["labels"]))


def training_images() -> set[str]:
    """Fingerprints of training images of Fashion-MNIST: the shipped ones, and all that were loaded with ``full=True``.

    The shipped networks were trained on 59,000 images, of which only 1,000 ship with the package. Of others, read in
    another way, every 59th is one of these: a set with many of them is recognised by these few.
    """
    if not _TRAINING:
        load_dataset()
    return _TRAINING


def reference_samples(data: Data, per_class: int = 10, classes: Sequence[int] | None = None, seed: int = 0) -> Split:
    """Draw the images whose explanations score the components: the same number of each class.

    Parameters
    ----------
    data : (images, labels), map-style Dataset or DataLoader
        Images (N, ...) and integer labels (N,) or (N, 1), as for :func:`pxp.attribute`. Of a Dataset that has
        ``targets`` (torchvision's name) only the drawn images and one of each class are read, else all; the labels are
        always those that its samples have, behind ``target_transform``.
    per_class : int, default 10
        Samples per class; the paper's headline runs use 10.
    classes : sequence of int, optional
        Classes to draw from; default all that occur.
    seed : int, default 0
        The same seed draws the same samples; with the same seed, a smaller ``per_class`` draws a subset.

    Returns
    -------
    Split
        ``len(classes) * per_class`` samples, ordered by class.

    Raises
    ------
    ValueError
        If a class has too few samples, does not occur or is given twice, if ``per_class`` is below 1, if ``data`` is
        empty; images or labels that :func:`pxp.attribute` would refuse.
    TypeError
        Data of another type; samples that are no pairs (image, label).
    """
    if per_class < 1:
        raise ValueError(f"per_class must be at least 1, got {per_class}")
    images, labels = (torch.empty(0), labels_of(data)) if isinstance(data, Dataset) else whole(data)
    if len(labels) == 0:
        raise ValueError("cannot draw reference samples: the data are empty")
    wanted = labels.unique().tolist() if classes is None else distinct(classes)
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for c in wanted:
        members = (labels == c).nonzero().flatten()
        if len(members) < per_class:
            raise ValueError(f"class {c} has {len(members)} samples, fewer than per_class={per_class}")
        chosen.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    index = torch.cat(chosen)
    if isinstance(data, Dataset):
        return Split(*samples(data, index.tolist()))
    return Split(images[index], labels[index])


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    return Split(
        torch.from_numpy(np.array(images)).unsqueeze(1).float() / 255, torch.from_numpy(np.array(labels)).long()
    )


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verify(path: Path) -> dict:
    """Return the card (``path`` with suffix ``.json``) of a shipped file after comparing the file with its hash."""
    card_path = path.with_suffix(".json")
    for needed in (path, card_path):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed} is missing; reinstall pxp (its data files ship with the package)")
    try:
        card = json.loads(card_path.read_text())
        expected = card["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{card_path} is damaged ({error}); reinstall pxp") from error
    if sha256(path) != expected:
        raise ValueError(f"{path} does not have the SHA-256 of its card {card_path.name}: damaged or replaced file")
    return card


def _read_subsets(path: Path) -> dict[str, np.ndarray]:
    verify(path)
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def _read_full(root: str | Path | None) -> tuple[np.ndarray, ...]:
    from torchvision.datasets import FashionMNIST

    with tempfile.TemporaryDirectory() as scratch:
        base = Path.home() / ".cache" / "pxp" if root is None else Path(root)
        packed = [next(base.glob(f"{stem}*"), None) for stem in _IDX_FILES]
        download = root is None
        try:
            if all(packed):
                # torchvision reads only its own layout of unpacked files, and root may be read-only
                raw = Path(scratch) / "FashionMNIST" / "raw"
                raw.mkdir(parents=True)
                for file, stem in zip(packed, _IDX_FILES, strict=True):
                    assert file is not None
                    with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as source:
                        with open(raw / stem, "wb") as target:
                            shutil.copyfileobj(source, target)
                base = Path(scratch)
            train, test = (FashionMNIST(str(base), train=part, download=download) for part in (True, False))
        except Exception as error:
            raise FileNotFoundError(
                f"no readable copy of Fashion-MNIST in {base} ({error}). Put the four original files "
                f"({', '.join(stem + '.gz' for stem in _IDX_FILES)}) into a folder and pass root=<that folder>; "
                "Debian's package dataset-fashion-mnist installs them in /usr/share/datasets/fashion-mnist"
            ) from error
        arrays = tuple(a.numpy() for a in (train.data, train.targets, test.data, test.targets))
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(a, dtype=np.uint8).tobytes() for a in arrays)).hexdigest()
    if digest != FASHION_MNIST_SHA256:
        raise ValueError(f"the files in {root} are not the original release of Fashion-MNIST (SHA-256 {digest})")
    return arrays


def _read_imagenette(root: str | Path | None) -> ImageData:
    from torchvision.datasets import Imagenette

    base = Path.home() / ".cache" / "pxp" if root is None else Path(root)
    try:
        if root is None:
            base.mkdir(parents=True, exist_ok=True)
            Imagenette(base, "train", "320px", download=True)
        train, val = base / "imagenette2-320" / "train", base / "imagenette2-320" / "val"
        parts = Photographs(train, 0, 2), Photographs(train, 1, 2), Photographs(val)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"no readable copy of Imagenette in {base} ({error}). Unpack imagenette2-320.tgz from "
            "https://github.com/fastai/imagenette into a folder and pass root=<that folder>"
        ) from error
    indices, names = zip(*IMAGENETTE_CLASSES.values(), strict=True)
    return ImageData("imagenette", names, indices, *parts)
