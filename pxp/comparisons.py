"""Whether two criteria differ, by their curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from .curve import Curve
from .statistics import ENOUGH, FEWEST, Estimate, estimate, holm, of_draws, unpaired


@dataclass(frozen=True, repr=False)
class Comparison:
    """Difference of two curves' A_PR on the same images.

    Attributes
    ----------
    difference : float
        First minus second.
    low, high : float
        95 % interval of it; NaN where there are too few draws.
    p_value : float
        Of no difference, two-sided.
    draws : tuple of int
        How many the first and the second has; 0 for a criterion that depends on none.
    images : int
        On how many images both were measured; 0 where the curves do not tell, and then only the draws are in the
        interval.
    paired : bool
        Whether run i of both used the same reference samples.
    adjusted : float
        ``p_value`` adjusted for the other comparisons of :func:`pxp.compare_all` (Holm 1979); else the same.
    """

    difference: float
    low: float
    high: float
    p_value: float
    draws: tuple[int, int]
    images: int
    paired: bool
    adjusted: float

    @property
    def runs(self) -> int:
        """Number of pairs, or the smaller number of draws."""
        return min((number for number in self.draws if number), default=1)

    def __repr__(self) -> str:
        return f"A_PR difference {self._numbers()}; {self._basis()}"

    def _numbers(self) -> str:
        if np.isnan(self.low):
            return f"{self.difference:+.3f}, no interval below {FEWEST} draws"
        return f"{self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}], {_p(self.p_value)}"

    def _basis(self) -> str:
        first, second = self.draws
        if self.paired and first and second:
            draws = f"{first} paired draws"
        else:
            draws = " and ".join(f"{number} draws" if number else "no draws" for number in self.draws)
        few = min((number for number in self.draws if number), default=ENOUGH) < ENOUGH
        images = f"{self.images:,} images" if self.images else "images unknown, so only the draws vary"
        return f"{draws}, {images}{f' (below {ENOUGH} draws intervals may be too short)' if few else ''}"


@dataclass(frozen=True, repr=False)
class Comparisons(Mapping[tuple[str, str], Comparison]):
    """Comparisons by the names of the two curves; prints as a table."""

    rows: dict[tuple[str, str], Comparison]

    def __getitem__(self, names: tuple[str, str]) -> Comparison:
        return self.rows[names]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        first, second = (max(len(pair[i]) for pair in self.rows) for i in range(2))
        lines = [f"{'first':<{first}}  {'second':<{second}}  A_PR difference          adjusted for {len(self)}"]
        for (one, other), row in self.rows.items():
            found = f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
            found = f"{row.difference:+.3f} no interval      " if np.isnan(row.low) else found
            lines.append(f"{one:<{first}}  {other:<{second}}  {found}  {_p(row.adjusted)}")
        return "\n".join([*lines, *sorted({row._basis() for row in self.rows.values()})])


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def compare(first: Curve, second: Curve) -> Comparison:
    """Test whether two criteria differ in A_PR.

    Both sources of variation are in the interval: the draws of reference samples (or seeds) and the test images. Where
    run i of both used the same references, the difference is analysed draw by draw and image by image; where the draws
    have nothing in common, as a random choice's and a criterion's, their parts add up; a criterion that depends on no
    draw, as the magnitude of weights, has only the images' part.

    Parameters
    ----------
    first, second : Curve
        On the same images, at the same rates. Curves that do not know their images (written by pxp 0.1, or made by
        hand) are compared draw by draw; the interval then covers the draws only.

    Returns
    -------
    Comparison
        With NaN for interval and p-value below three draws.

    Raises
    ------
    ValueError
        Other rates; other images; without known images, other numbers of runs.
    """
    if len(first.rates) != len(second.rates) or not np.allclose(first.rates, second.rates, rtol=0, atol=1e-9):
        raise ValueError("the two curves have different rates")
    depends, together = (first.depends, second.depends), first.same_draws(second)
    if first.hits is None or second.hits is None:
        return _by_runs(first, second, depends, together)
    if first.hits.images != second.hits.images or first.images != second.images:
        raise ValueError("the two curves were measured on different images, so they cannot be compared image by image")
    a, b = first.hits.array()[first.rows].mean(1), second.hits.array()[second.rows].mean(1)
    if together or not all(depends):
        found = estimate(a - b, depends=any(depends))
    else:
        found = unpaired(a, b)
    return _comparison(found, (len(a), len(b)), depends, a.shape[1], together)


def _by_runs(first: Curve, second: Curve, depends: tuple[bool, bool], together: bool) -> Comparison:
    a, b = first.a_pr_runs[first.rows], second.a_pr_runs[second.rows]
    if not first.draws and not second.draws:  # made by hand: one run of a criterion without samples, or pairs
        if len(a) != len(b) and 1 not in (len(a), len(b)):
            raise ValueError(f"cannot pair {len(a)} runs with {len(b)}; draws= would tell that they are no pairs")
        depends, together = (len(a) > 1, len(b) > 1), True
    if together or not all(depends):
        found = of_draws(a - b)
    else:
        one, other = of_draws(a), of_draws(b)
        variance = one.variance + other.variance
        parts = one.variance**2 / one.freedom + other.variance**2 / other.freedom
        found = Estimate(a.mean() - b.mean(), variance, variance**2 / parts if parts > 0 else one.freedom)  # Welch 1947
    return _comparison(found, (len(a), len(b)), depends, 0, together)


def _comparison(
    found: Estimate, runs: tuple[int, int], depends: tuple[bool, bool], images: int, paired: bool
) -> Comparison:
    draws = (runs[0] if depends[0] else 0, runs[1] if depends[1] else 0)
    low, high = found.interval()
    p = float(found.p_value())
    return Comparison(float(found.mean), float(low), float(high), p, draws, images, paired, p)


def compare_all(curves: Mapping[str, Curve], against: str | None = None) -> Comparisons:
    """Compare several criteria, with p-values adjusted for the number of comparisons.

    Parameters
    ----------
    curves : mapping of str to Curve
    against : str, optional
        The one that all others are compared with: their difference to it. Default: every pair, in the order of
        ``curves``.

    Returns
    -------
    Comparisons
        ``found["LRP-ε", "Taylor"]`` is a :class:`Comparison`; Holm's (1979) step-down adjustment holds the chance of
        any false claim of a difference at the level.

    Raises
    ------
    ValueError
        Fewer than two curves; an ``against`` that is none of them; as :func:`compare`.
    """
    names = list(curves)
    if len(names) < 2:
        raise ValueError(f"there is nothing to compare in {len(names)} curve{'s' * (len(names) != 1)}")
    if against is not None and against not in curves:
        raise ValueError(f"against must be one of {', '.join(map(repr, names))}, got {against!r}")
    if against is None:
        pairs = [(one, other) for i, one in enumerate(names) for other in names[i + 1 :]]
    else:
        pairs = [(other, against) for other in names if other != against]
    rows = {pair: compare(curves[pair[0]], curves[pair[1]]) for pair in pairs}
    adjusted = holm([row.p_value for row in rows.values()])
    return Comparisons({pair: replace(row, adjusted=p) for (pair, row), p in zip(rows.items(), adjusted, strict=True)})
