"""What settings are told apart by: all their values, never a name or a ``repr`` that leaves some out."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from zennit.core import Hook

# what a zennit hook or composite holds only while it is in place, and where a criterion comes from
_PASSING = {*vars(Hook()), "handles", "hook_refs", "tuned_on"}


class ByValue:
    """Compared, hashed and printed by what its constructor takes, which it keeps under the same names.

    ``eval(repr(x)) == x`` where ``from pxp import *`` was run.
    """

    def arguments(self) -> dict[str, Any] | None:
        """What the constructor takes, by name; None if not all of it is kept."""
        parameters = inspect.signature(type(self)).parameters
        return {name: vars(self)[name] for name in parameters} if parameters.keys() <= vars(self).keys() else None

    def __eq__(self, other: object) -> bool:
        if self is other or type(self) is not type(other):
            return self is other
        known = identity(self)
        return known is not None and known == identity(other)

    def __hash__(self) -> int:
        return hash(identity(self) or id(self))

    def __repr__(self) -> str:
        given = self.arguments()
        if given is None:
            return object.__repr__(self)
        shown, placed = [], True
        for parameter in inspect.signature(type(self)).parameters.values():
            value = given[parameter.name]
            placed = placed and parameter.kind is not parameter.KEYWORD_ONLY and value is not None
            if placed:
                shown.append(_short(value))
            elif value != parameter.default:
                shown.append(f"{parameter.name}={_short(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _short(value: Any) -> str:
    """The shortest text of a number that gives it back."""
    short = f"{value:g}" if isinstance(value, float) else ""
    return short if short and float(short) == value else repr(value)


def identity(value: Any) -> str | None:
    """A text that equal values share and others do not, in this process and in later ones.

    Values are followed through containers and attributes, tensors and arrays by their elements, functions of modules by
    their code and what they enclose. So two zennit composites are equal if all their rules are, with all parameters.

    Returns
    -------
    str or None
        None where it cannot be told: functions that a user wrote in a notebook or script, whose surroundings may
        change, classes made inside functions, and what Python cannot copy.
    """
    try:
        text = "".join(_parts(value, ()))
    except _Unknown:
        return None
    return f"{type(value).__name__} {hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"


class _Unknown(Exception):
    """A value that nothing tells from others."""


def _parts(value: Any, above: tuple[int, ...]) -> Iterator[str]:
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        yield f"{value!r},"
        return
    if id(value) in above:  # a composite whose map is its own method
        yield f"^{above.index(id(value))},"
        return
    yield f"{type(value).__qualname__}("
    for part in _inside(value):
        yield from part if isinstance(part, _Text) else _parts(part, (*above, id(value)))
    yield ")"


class _Text(list):
    """What is already a text."""


def _inside(value: Any) -> list[Any]:
    """The values that make a value what it is."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        array = value.detach().cpu() if isinstance(value, Tensor) else np.asarray(value)
        # numpy lacks some of torch's types
        raw = array.contiguous().reshape(-1).view(torch.uint8).numpy() if isinstance(array, Tensor) else array
        if raw.dtype.hasobject:
            raise _Unknown
        return [_Text([f"{array.dtype}{tuple(array.shape)}{hashlib.blake2b(raw.tobytes()).hexdigest()}"])]
    if isinstance(value, type):
        if "<locals>" in value.__qualname__:
            raise _Unknown
        return [value.__module__, value.__qualname__]
    if isinstance(value, set | frozenset):
        return [_Text(sorted("".join(_parts(each, ())) for each in value))]
    if isinstance(value, dict):
        return [part for item in value.items() for part in item]
    if isinstance(value, list | tuple):
        return [type(value), *value]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, FunctionType):
        return _of_function(value)
    if isinstance(value, CodeType):
        return [value.co_code, value.co_names, value.co_freevars, value.co_consts]
    if isinstance(value, ByValue) and (given := value.arguments()) is not None:
        return [type(value), given]
    try:
        reduced = value.__reduce_ex__(4)  # as it would be copied
    except (TypeError, AttributeError) as error:
        raise _Unknown from error
    if isinstance(reduced, str):
        return [type(value), reduced]
    parts: list[Any] = [type(value)]
    for part in reduced:  # what makes it, of what, its state, and what it contains
        if isinstance(part, dict):
            part = {name: each for name, each in part.items() if name not in _PASSING}
        parts.append(list(part) if isinstance(part, Iterator) else part)
    return parts


def _of_function(value: FunctionType) -> list[Any]:
    if value.__module__ == "__main__":
        raise _Unknown
    found: Any = sys.modules.get(value.__module__)
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    if found is value:
        return [value.__module__, value.__qualname__]
    try:
        enclosed = [cell.cell_contents for cell in value.__closure__ or ()]
    except ValueError as error:  # a variable that has no value yet
        raise _Unknown from error
    return [value.__module__, value.__code__, value.__defaults__, value.__kwdefaults__, enclosed]
