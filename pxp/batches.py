"""The door for data: what is given as images and labels is judged here, once, and nowhere else."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

Data: TypeAlias = tuple[Tensor, Tensor] | DataLoader | Dataset

BATCH_SIZE = 64  # the default wherever images are read: a small batch stays in the processor's cache

SHARED = 0.01  # two splits of one collection may hold a few equal images


def checked(images: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """One batch, as every function takes it.

    Parameters
    ----------
    images : Tensor, array or nested list
        Floating point, (samples, ...), finite, in the scale that the network was trained on.
    labels : Tensor, array or list
        Class indices from 0, (samples,) or (samples, 1): integers of any width; bool counts as 0 and 1.

    Returns
    -------
    images : Tensor
        As they came.
    labels : Tensor
        int64, (samples,).

    Raises
    ------
    ValueError
        Anything else: other types (uint8 images, one-hot or soft labels), no sample, NaN or infinite images, labels
        below 0 or of another number than the images.
    """
    images, labels = _tensor("images", images), as_labels(labels)
    if not images.is_floating_point():
        hint = "; scale them as for training, such as images.float() / 255" if images.dtype == torch.uint8 else ""
        raise ValueError(f"images must be a floating-point tensor, got {images.dtype}{hint}")
    if images.ndim < 2 or len(images) == 0:
        raise ValueError(f"images must be a non-empty batch (samples, ...), got shape {tuple(images.shape)}")
    if len(images) != len(labels):
        raise ValueError(f"got {len(images)} images but {len(labels)} labels")
    if not bool(images.isfinite().all()):
        raise ValueError("images contain NaN or infinite values")
    return images, labels


def as_labels(given: Any) -> Tensor:
    """Labels as int64, (samples,), see :func:`checked`."""
    labels = _tensor("labels", given)
    one_each = labels.ndim == 1 or (labels.ndim == 2 and labels.shape[1] == 1)
    if labels.is_floating_point() or labels.is_complex() or not one_each:
        hint = "; of one-hot or soft labels give labels.argmax(1)" if labels.ndim == 2 and not one_each else ""
        raise ValueError(
            f"labels must be a 1-D tensor of class indices, got {labels.dtype} of shape {tuple(labels.shape)}{hint}"
        )
    labels = labels.long().flatten()
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(f"labels must be class indices from 0, got {int(labels.min())}")
    return labels


def check_classes(labels: Tensor, logits: Tensor, what: str = "labels") -> None:
    """Raise a ValueError if the model's logits (samples, classes) lack the class of a label."""
    highest, number = int(labels.max()), logits.shape[1]
    if highest >= number:
        raise ValueError(f"{what} reach {highest}, but the model has {number} classes (0 to {number - 1})")


def distinct(classes: Iterable[int]) -> list[int]:
    """Classes as a list; a ValueError if there is none, or one of them twice."""
    found = [int(c) for c in classes]
    if not found or len(set(found)) < len(found):
        raise ValueError(f"classes must be distinct class indices, got {found}")
    return found


def batches(data: Data, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over ``data`` in order as (images, labels), see :func:`checked`; a DataLoader keeps its own batches.

    Parameters
    ----------
    data : (images, labels), DataLoader or Dataset
        Samples of a Dataset and batches of a DataLoader are pairs (image, label); what a Dataset's transforms give is
        what counts.
    batch_size : int

    Raises
    ------
    TypeError
        Other data; samples that are no pairs, such as dictionaries and triples.
    ValueError
        As :func:`checked`; a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(data, DataLoader | Dataset):
        for batch in data if isinstance(data, DataLoader) else DataLoader(data, batch_size=batch_size):
            yield checked(*_pair("a batch", batch))
    elif is_pair(data):
        images, labels = checked(*data)
        yield from zip(images.split(batch_size), labels.split(batch_size), strict=True)
    else:
        raise TypeError(f"expected (images, labels), a Dataset or a DataLoader, got {_described(data)}")


def whole(data: Data) -> tuple[Tensor, Tensor]:
    """All images and labels in memory, see :func:`batches`."""
    if is_pair(data):
        return checked(*data)  # type: ignore[misc]
    parts = list(batches(data, 256))
    if not parts:
        raise ValueError("the data are empty: there are no images")
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def samples(data: Dataset, index: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Some samples of a map-style Dataset, as its transforms give them, see :func:`checked`."""
    pairs = [_pair(f"sample {i}", data[i]) for i in index]
    return checked(torch.stack([_tensor("images", image) for image, _ in pairs]), _stack(label for _, label in pairs))


def labels_of(data: Dataset) -> Tensor:
    """The labels of all samples of a map-style Dataset, see :func:`as_labels`.

    Those in ``targets`` (torchvision's name), with its ``target_transform``, spare reading every sample. They count
    only if the first sample of every class gives the same.
    """
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        raise TypeError(f"samples of {type(data).__name__} cannot be drawn: it has no length")
    size = len(data)
    targets, transform = getattr(data, "targets", None), getattr(data, "target_transform", None)
    if targets is not None and len(targets) == size:
        try:
            plain = _tensor("labels", targets).tolist()
            labels = as_labels(plain if transform is None else _stack(map(transform, plain)))
            _, first = np.unique(labels.numpy(), return_index=True)
            if torch.equal(_read_labels(data, first.tolist()), labels[first]):
                return labels
        except ValueError:  # no such labels; what the samples give counts
            pass
    return _read_labels(data, range(size))


def _read_labels(data: Dataset, index: Iterable[int]) -> Tensor:
    return as_labels(_stack(_pair(f"sample {i}", data[i])[1] for i in index))


def _stack(labels: Iterable[Any]) -> Tensor:
    found = [_tensor("labels", label) for label in labels]
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.long)


def is_pair(data: object) -> bool:
    return isinstance(data, tuple | list) and len(data) == 2


def fingerprints(images: Tensor, values: float = 4096) -> list[str]:
    """A short hash of every image, to see whether two sets share some.

    It is of at most so many ``values`` of each, in equal steps and in float32: an image that was scaled, cropped or
    stored with fewer bits is another one.
    """
    step = max(1, math.ceil(images.shape[1:].numel() / values))
    rows = images.detach().flatten(1)[:, ::step].to("cpu", torch.float32).contiguous().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=6).hexdigest() for row in rows]


def shared(one: Collection[str], other: Collection[str]) -> int:
    """How many images two sets of fingerprints share; 0 where that is not more than 1 % of the smaller set."""
    found, smaller = len(set(one) & set(other)), min(len(set(one)), len(set(other)))
    return found if found > SHARED * smaller else 0


def refuse_shared(marks: Collection[str], seen: Collection[str], purpose: str) -> None:
    """Raise a ValueError if images with these marks are :func:`shared` with those that were seen for some purpose."""
    number = shared(marks, seen)
    if number:
        raise ValueError(
            f"{number} of these {len(set(marks))} images were used {purpose}; a curve on them would report what was "
            "optimised. Use images that nothing has seen, such as data.eval, or say allow_shared=True"
        )


def _pair(what: str, given: Any) -> tuple[Any, Any]:
    if not is_pair(given):
        raise TypeError(
            f"{what} must be (images, labels), got {_described(given)}; let the Dataset, or the DataLoader's "
            "collate_fn, return just these two"
        )
    return given[0], given[1]


def _tensor(what: str, given: Any) -> Tensor:
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:  # torch knows no better
        kind = "a floating-point tensor" if what == "images" else "a 1-D tensor of class indices"
        raise ValueError(f"{what} must be {kind}, got {_described(given)}") from error


def _described(given: Any) -> str:
    if isinstance(given, dict):
        return f"a dict of {', '.join(map(str, given))}"
    if isinstance(given, tuple | list):
        return f"a {type(given).__name__} of {', '.join(type(part).__name__ for part in given[:4])}"
    return type(given).__name__
