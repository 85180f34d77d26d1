"""Baselines: what counts as black, and the straight way from there to an image."""

from __future__ import annotations

import math
from numbers import Real

from torch import Tensor

Baseline = float | tuple[float, ...]  # a value for all channels, or one for each


def as_baseline(given: object) -> Baseline:
    """A baseline as floats, which are compared and printed by value, whatever numbers were given.

    Raises
    ------
    TypeError
        Neither a number nor a tuple of numbers.
    ValueError
        An empty tuple; a number that is not finite.
    """
    values = given if isinstance(given, tuple) else (given,)
    if not all(isinstance(value, Real) and not isinstance(value, bool) for value in values):
        raise TypeError(f"baseline must be a number or a tuple with one for each channel, got {given!r}")
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"baseline must be a finite number or a tuple with one for each channel, got {given!r}")
    floats = tuple(float(value) for value in values)
    return floats if isinstance(given, tuple) else floats[0]


def on_the_way(images: Tensor, baseline: Baseline, share: float) -> Tensor:
    """The images at a share of the straight way from black to them: baseline + (x − baseline) · share.

    Raises
    ------
    ValueError
        A baseline of another number of channels than the images, which is their second dimension.
    """
    if isinstance(baseline, tuple) and len(baseline) != images.shape[1]:
        raise ValueError(
            f"baseline has {len(baseline)} values, {baseline}, but images of shape {tuple(images.shape)} have "
            f"{images.shape[1]} channels; give one value for each, or one number for all"
        )
    black = images.new_tensor(baseline)
    if isinstance(baseline, tuple):
        black = black.reshape(-1, *[1] * (images.ndim - 2))
    return images * share + black * (1 - share)  # which is the image itself at the end
