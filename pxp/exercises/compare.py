"""Compares answers, and says what differs without saying what is right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

RELATIVE, ABSOLUTE = 1e-3, 1e-5  # for a GPU's float32, too

MANY = 6  # numbers that fit into a sentence


def difference(found: Any, expected: Any) -> str:
    """What differs, "" where nothing does."""
    if isinstance(expected, Mapping):
        return _of_mappings(found, expected)
    if isinstance(expected, str | bool):
        return "" if found == expected else f"{found!r} is not right"
    if isinstance(expected, list | tuple) and not _is_numeric(expected):
        return _of_lists(found, expected)
    try:
        one, other = _array(found), _array(expected)
    except (TypeError, ValueError, RuntimeError):
        return f"{type(found).__name__} is not what is asked for"
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
        return f"{type(found).__name__} is not what is asked for"
    if set(found) != set(expected):
        odd = [key for key in expected if key not in found]
        if odd:
            return f"{odd[0]!r} is missing"
        odd = [key for key in found if key not in expected]
        return f"{odd[0]!r} is not asked for"
    for key in expected:
        part = difference(found[key], expected[key])
        if part:
            return f"at {key!r} {part}"
    return ""


def _of_lists(found: Any, expected: list | tuple) -> str:
    if not isinstance(found, list | tuple):
        return f"{type(found).__name__} is not what is asked for"
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
    if isinstance(value, Tensor):
        value = value.detach().cpu()
    if isinstance(value, str | Mapping):
        raise TypeError
    return np.asarray(value, dtype=np.float64)


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
    """A value in a few words."""
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


def states(values: tuple) -> list[tuple[str, list]]:
    """What each argument is now: its name in words, and its parts."""
    return [(_word(value), _parts(value)) for value in values]


def changed(before: list, after: list) -> str:
    """The first argument that is not what it was; "" where there is none."""
    for (word, old), (_, new) in zip(before, after, strict=True):
        same = len(old) == len(new) and all(
            torch.equal(a, b) if isinstance(a, Tensor) else a == b
            for a, b in zip(old, new, strict=True)
        )
        if not same:
            return f"the {word}"
    return ""


def _word(value: Any) -> str:
    if isinstance(value, nn.Module):
        return "network"
    if isinstance(value, Tensor):
        return "tensor"
    return type(value).__name__


def _parts(value: Any) -> list:
    if isinstance(value, nn.Module):
        tensors = [t.detach().clone() for t in value.state_dict().values()]
        hooks = sum(len(m._forward_hooks) for m in value.modules())
        return [*tensors, [m.training for m in value.modules()], hooks]
    if isinstance(value, Tensor):
        return [value.detach().clone()]
    if isinstance(value, np.ndarray):
        return [torch.as_tensor(value).clone()]
    if isinstance(value, Mapping):
        inside = [part for each in value.values() for part in _parts(each)]
        return [list(value), *inside]
    if isinstance(value, list | tuple):
        return [part for each in value for part in _parts(each)]
    return []
