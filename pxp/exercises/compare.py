"""Compares answers, and says what differs without saying what is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

RELATIVE, ABSOLUTE = 1e-3, 1e-5  # for a GPU's float32, too

MANY = 6  # numbers that fit into a sentence


def difference(found: Any, expected: Any) -> str:
    """What differs, "" where nothing does; whatever is found."""
    try:
        return _difference(found, expected)
    except Exception:  # an answer may be anything
        return f"{type(found).__name__} cannot be compared"


def _difference(found: Any, expected: Any) -> str:
    if isinstance(expected, Mapping):
        return _of_mappings(found, expected)
    if isinstance(expected, set | frozenset):
        same = not isinstance(found, str) and set(found) == expected
        return "" if same else f"{shown(found)} is not right"
    if isinstance(expected, str | bool):
        return "" if found == expected else f"{shown(found)} is not right"
    if isinstance(expected, list | tuple) and not _is_numeric(expected):
        return _of_lists(found, expected)
    try:
        one, other = _array(found), _array(expected)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return f"{type(found).__name__} does not hold the numbers asked for"
    if one.shape != other.shape:
        return f"the shape {tuple(one.shape)} is not what is asked for"
    close = np.isclose(one, other, RELATIVE, ABSOLUTE * _scale(other), True)
    if close.all():
        return ""
    if one.ndim == 0:
        return "the value is not right"
    place = tuple(int(i) for i in np.argwhere(~close)[0])
    where = place[0] if len(place) == 1 else place
    return f"the value at {where}, {one[place]:.4g}, is not right"


def _of_mappings(found: Any, expected: Mapping) -> str:
    if not isinstance(found, Mapping):
        return f"it is a {type(found).__name__}, a dict is asked for"
    odd = [key for key in expected if key not in found]
    if odd:
        return f"{odd[0]!r} is missing"
    odd = [key for key in found if key not in expected]
    if odd:
        return f"{shown(odd[0])} is not asked for"
    for key in expected:
        part = difference(found[key], expected[key])
        if part:
            return f"at {key!r} {part}"
    return ""


def _of_lists(found: Any, expected: list | tuple) -> str:
    if not isinstance(found, list | tuple):
        kind = type(expected).__name__
        return f"it is a {type(found).__name__}, a {kind} is asked for"
    if len(found) != len(expected):
        return f"{len(found)} values are not what is asked for"
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        part = difference(one, other)
        if part:
            return f"at {place} {part}"
    return ""


def _is_numeric(values: list | tuple) -> bool:
    return all(
        isinstance(value, int | float | np.number) and value is not True
        for value in values
    )


def _array(value: Any) -> np.ndarray:
    if isinstance(value, str | Mapping):
        raise TypeError
    return np.asarray(_plain(value), dtype=np.float64)


def _plain(value: Any) -> Any:
    """Tensors, also inside lists, as arrays."""
    if isinstance(value, Tensor):
        value = value.detach().to_dense() if value.is_sparse else value.detach()
        return value.cpu().double().numpy()
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _scale(values: np.ndarray) -> float:
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max(initial=0)) or 1.0


def described(value: Any) -> str:
    """An argument in a few words."""
    if isinstance(value, Tensor | np.ndarray):
        size = tuple(value.shape)
        if int(np.prod(size)) > MANY:
            return f"<{type(value).__name__} of shape {size}>"
    if isinstance(value, nn.Module):
        return f"<{type(value).__name__}>"
    return shown(value)


def shown(value: Any) -> str:
    """A value in a few words, whatever it is."""
    try:
        return _shown(value)
    except Exception:  # its repr may fail, too
        return f"<{type(value).__name__}>"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray | np.number):
        if value.ndim and np.prod(value.shape) > MANY:
            return f"values of shape {tuple(value.shape)}"
        return _rounded(value.tolist())
    if isinstance(value, float):
        return _rounded(value)
    text = repr(value)
    short = len(text) <= 60 and "\n" not in text
    return text if short else f"<{type(value).__name__}>"


def _rounded(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_rounded, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def states(values: tuple) -> list[list]:
    """What each argument is now, part by part."""
    return [_parts(value) for value in values]


def changed(names: Sequence[str], before: list, after: list) -> str:
    """The name of the first that is not what it was; "" if there is none."""
    for name, old, new in zip(names, before, after, strict=False):
        if len(old) != len(new) or not all(map(_same, old, new)):
            return name
    return ""


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        return alike and bool(torch.equal(one, other))
    return type(one) is type(other) and bool(one == other)


def _parts(value: Any) -> list:
    if isinstance(value, nn.Module):
        tensors = value.state_dict(keep_vars=True).values()
        wanted = [t.requires_grad for t in tensors]
        modules = [
            (m.training, *(len(v) for k, v in vars(m).items() if "hooks" in k))
            for m in value.modules()
        ]
        return [*(t.detach().clone() for t in tensors), wanted, modules]
    if isinstance(value, Tensor):
        return [value.detach().clone(), value.requires_grad]
    if isinstance(value, np.ndarray):
        return [torch.as_tensor(value).clone()]
    if isinstance(value, Mapping):
        parts = [list(value), *(p for v in value.values() for p in _parts(v))]
        return parts + _parts(getattr(value, "signed", None))  # of scores
    if isinstance(value, list | tuple):
        return [len(value), *(part for each in value for part in _parts(each))]
    accuracy = getattr(value, "accuracy", None)  # of a curve
    return [] if accuracy is None else [torch.as_tensor(accuracy).clone()]
