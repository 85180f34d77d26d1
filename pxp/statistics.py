"""Intervals and comparisons: whether a difference is more than chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .rates import fraction


@dataclass(frozen=True, repr=False)
class Comparison:
    """Paired difference of two curves' A_PR over the same seeds.

    Attributes
    ----------
    difference : float
        Mean of first minus second.
    low, high : float
        95 % bootstrap interval of the mean.
    p_value : float
        Two-sided sign-flip permutation test of no difference.
    runs : int
    """

    difference: float
    low: float
    high: float
    p_value: float
    runs: int

    def __repr__(self) -> str:
        return (
            f"A_PR difference {self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}], "
            f"p = {self.p_value:.3f}, {self.runs} paired runs"
        )


def paired(difference: np.ndarray) -> Comparison:
    """Test whether the mean of paired differences, one per run (runs,), is 0."""
    from scipy import stats  # slow to import, and only needed here and below

    low, high = bootstrap(difference[:, None], 0.95)
    test = stats.permutation_test((difference,), np.mean, permutation_type="samples", n_resamples=9999, rng=0)
    return Comparison(float(difference.mean()), float(low[0]), float(high[0]), float(test.pvalue), len(difference))


def bootstrap(values: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of the mean over the first axis; (columns,) each; ``level`` is a fraction."""
    level = fraction("level", level)
    if len(values) < 2:
        return values[0], values[0]
    from scipy import stats

    result = stats.bootstrap((values,), np.mean, axis=0, confidence_level=level, method="percentile", rng=0)
    return result.confidence_interval.low, result.confidence_interval.high
