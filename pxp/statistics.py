"""Intervals and comparisons: whether a difference is more than chance.

Two things vary when a criterion is measured: which reference samples (or seeds) were drawn, and which images the
accuracy is measured on. What was seen is a table X of draws × images, right or wrong (a mean over pruning rates, or a
difference of two criteria); both margins are samples of something larger. Its mean has the variance of a two-way
layout with two random factors and one value in each cell (Searle, Casella, McCulloch 1992, "Variance Components",
chapter 4), and t's distribution with Satterthwaite's (1946) degrees of freedom.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .rates import fraction

FEWEST = 3  # draws below which nothing is said of their spread
ENOUGH = 10  # draws from which on the intervals cover about what they claim, see the page of the book


@dataclass(frozen=True)
class Estimate:
    """A mean over draws and images, and how sure it is; each a number or an array of them.

    Attributes
    ----------
    mean, variance : array
        The mean and the estimated variance of it; NaN where there are too few draws to tell.
    freedom : array
        Degrees of freedom of the variance.
    images : int
        How many images the mean is over; 0 if that is not known.
    """

    mean: np.ndarray
    variance: np.ndarray
    freedom: np.ndarray
    images: int = 0

    def interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Interval of the mean, symmetric: for differences. ``level`` is a fraction."""
        half = self._quantile(level) * np.sqrt(self.variance)
        return self.mean - half, self.mean + half

    def proportion(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Interval of a mean that lies between 0 and 1: Wilson's (1927), on n = m(1 − m) / variance as if independent.

        In the middle it is the symmetric one; near 0 and 1 it stays within, and a mean of exactly 0 or 1 over so many
        images has an interval, too.
        """
        m = np.clip(self.mean, 0.0, 1.0)
        t = np.minimum(self._quantile(level), 1e9)  # of the level 1 it is infinite
        spread = m * (1 - m)
        with np.errstate(divide="ignore", invalid="ignore"):
            number = np.where(self.variance > 0, spread / self.variance, float(self.images or np.inf))
            number = np.where(spread > 0, number, float(self.images or np.inf))
        number = np.where(np.isnan(self.variance), np.nan, number)
        share = t**2 / number
        centre = (m + share / 2) / (1 + share)
        half = np.sqrt(share * (spread + share / 4)) / (1 + share)
        return np.clip(centre - half, 0.0, m), np.clip(centre + half, m, 1.0)

    def p_value(self) -> np.ndarray:
        """Of the mean being 0, two-sided."""
        from scipy import stats  # slow to import, and only needed here and below

        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.abs(self.mean) / np.sqrt(self.variance)
        t = np.where((self.mean == 0) & (self.variance == 0), 0.0, t)
        return 2 * stats.t.sf(t, np.maximum(self.freedom, 1.0))

    def _quantile(self, level: float) -> np.ndarray:
        from scipy import stats

        return stats.t.ppf(0.5 + fraction("level", level) / 2, np.maximum(self.freedom, 1.0))


@dataclass(frozen=True)
class MeanSquares:
    """Mean squares of tables (..., draws, images) with one value in each cell: of draws, of images, of the rest."""

    draws: np.ndarray
    images: np.ndarray
    rest: np.ndarray


def mean_squares(x: np.ndarray) -> MeanSquares:
    """The two-way analysis of variance of each table (..., draws, images); at least two of both."""
    number, images = x.shape[-2:]
    total = x.mean((-2, -1), keepdims=True)
    by_draw, by_image = x.mean(-1, keepdims=True), x.mean(-2, keepdims=True)
    rest = ((x - by_draw - by_image + total) ** 2).sum((-2, -1)) / ((number - 1) * (images - 1))
    return MeanSquares(
        images * ((by_draw - total) ** 2).sum((-2, -1)) / (number - 1),
        number * ((by_image - total) ** 2).sum((-2, -1)) / (images - 1),
        rest,
    )


def estimate(x: np.ndarray, depends: bool = True) -> Estimate:
    """The mean of each table (..., draws, images).

    Parameters
    ----------
    x : array
        (..., draws, images).
    depends : bool, default True
        Whether what is measured depends on a draw at all; if not, there is one row, and the images alone vary.

    Returns
    -------
    Estimate
        Var = (MS_draws + MS_images − MS_rest) / cells, never below MS_rest / cells. With fewer than three draws of a
        criterion that depends on them NaN.
    """
    number, images = x.shape[-2:]
    mean = x.mean((-2, -1))
    if not depends:
        return Estimate(mean, _of_images(x.mean(-2)), np.full_like(mean, images - 1), images)
    if number < FEWEST or images < 2:
        return Estimate(mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan), images)
    ms = mean_squares(x)
    least = ms.rest
    both = ms.draws + ms.images - ms.rest
    parts = _squared(ms.draws, number - 1) + _squared(ms.images, images - 1)
    parts = parts + _squared(ms.rest, (number - 1) * (images - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = np.where(parts > 0, both**2 / parts, number - 1)
    freedom = np.where(both > least, freedom, (number - 1) * (images - 1))
    return Estimate(mean, np.maximum(both, least) / (number * images), np.maximum(freedom, 1.0), images)


def of_draws(values: np.ndarray) -> Estimate:
    """The mean over draws (..., draws) where nothing is known of single images: the images' part is missing."""
    number = values.shape[-1]
    mean = values.mean(-1)
    if number < FEWEST:
        return Estimate(mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan))
    return Estimate(mean, values.var(-1, ddof=1) / number, np.full_like(mean, number - 1))


def unpaired(first: np.ndarray, second: np.ndarray, depends: tuple[bool, bool] = (True, True)) -> Estimate:
    """The difference of two means over the same images, whose draws have nothing in common; tables (draws, images).

    Var = s²(difference of the means over draws, by image) / images + σ²_first / draws + σ²_second / draws, where σ² is
    the component of the draws, (MS_draws − MS_rest) / images; the first part holds what is left over in each cell.
    """
    images = first.shape[-1]
    difference = first.mean(0) - second.mean(0)
    parts = [(float(_of_images(difference)), images - 1)]
    for x, needed in zip((first, second), depends, strict=True):
        if not needed:
            continue
        if len(x) < FEWEST:
            parts.append((np.nan, len(x)))
        else:
            ms = mean_squares(x)
            parts.append((max(0.0, float(ms.draws - ms.rest) / images) / len(x), len(x) - 1))
    variance = sum(part for part, _ in parts)
    squared = sum(part**2 / max(freedom, 1) for part, freedom in parts)
    freedom = variance**2 / squared if squared > 0 else images - 1
    return Estimate(difference.mean(), np.asarray(variance), np.asarray(freedom), images)


def _of_images(values: np.ndarray) -> np.ndarray:
    images = values.shape[-1]
    return values.var(-1, ddof=1) / images if images > 1 else np.full(values.shape[:-1], np.nan)


def _squared(part: np.ndarray, freedom: int) -> np.ndarray:
    return part**2 / freedom


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given; NaN stays so and counts as a comparison."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")  # NaN last
    stepped = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    found = np.empty_like(p)
    found[order] = np.minimum(1.0, stepped)
    return found.tolist()
