"""Fractions and pruning rates: numbers in [0, 1], from whatever holds them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

RATES = tuple(round(0.05 * step, 2) for step in range(20))


def fraction(name: str, value: Any) -> float:
    """A number as a float, if it is a fraction.

    Parameters
    ----------
    name : str
        What the error calls it.
    value : number, NumPy scalar or Tensor of one number
        In [0, 1]. One of few bits counts as the shortest decimal that it stands for: 0.2, not 0.20000000298.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        Outside [0, 1], such as 95 for 95 %.
    TypeError
        No number.
    """
    number = value
    if isinstance(number, Tensor) and number.ndim == 0:
        number = (number.float() if number.dtype == torch.bfloat16 else number).detach().cpu().numpy()
    if isinstance(number, np.ndarray) and number.ndim == 0:
        number = number[()]
    if not isinstance(number, Real) or isinstance(number, bool):
        raise TypeError(f"{name} must be a number in [0, 1], got {value!r}")
    found = float(str(number) if isinstance(number, np.floating) else number)
    if not 0 <= found <= 1:
        hint = f"; {found:g} % is {found / 100:g}" if 1 < found <= 100 else ""
        raise ValueError(f"{name} must be in [0, 1], got {found:g}{hint}")
    return found


def as_rates(rates: Iterable[Any]) -> tuple[float, ...]:
    """Pruning rates as floats.

    Parameters
    ----------
    rates : iterable of numbers
        A sequence, array, 1-D Tensor or generator of fractions, see :func:`fraction`, each higher than the one before.

    Returns
    -------
    tuple of float

    Raises
    ------
    ValueError
        One outside [0, 1]; rates that do not grow.
    TypeError
        Something that is no number, or a single number.
    """
    try:
        several = list(rates)
    except TypeError as error:
        raise TypeError(f"rates must be several numbers in [0, 1], such as [0, 0.1, 0.2], got {rates!r}") from error
    found = tuple(fraction("rate", rate) for rate in several)
    for before, after in pairwise(found):
        if after <= before:
            raise ValueError(f"rates must grow, got {after:g} after {before:g}")
    return found
