"""Intervals and comparisons."""

from __future__ import annotations

import pytest

import pxp


def test_intervals():
    runs = tuple((0.5 + 0.1 * i, 0.2) for i in range(5))
    curve = pxp.Curve((0.0, 0.5), runs)
    low, high = curve.interval()
    assert low.shape == high.shape == (2,)
    assert low[0] < 0.7 < high[0] and low[0] >= 0.5 and high[0] <= 0.9
    assert low[1] == pytest.approx(0.2) and high[1] == pytest.approx(0.2)
    narrow = curve.interval(0.5)
    assert narrow[0][0] > low[0] and narrow[1][0] < high[0]
    again = curve.interval()
    assert (low == again[0]).all() and (high == again[1]).all()
    a, b = curve.a_pr_interval()
    assert a < curve.a_pr < b
    # the bootstrap distribution of the mean of two values is 1/4, 1/2, 1/4
    two = pxp.Curve((0.0,), ((0.0,), (1.0,)))
    assert two.a_pr_interval() == (0.0, 1.0)
    single = pxp.Curve((0.0,), ((0.4,),))
    assert single.a_pr_interval() == (0.4, 0.4) and "[" not in repr(single)


def _curve(values):
    return pxp.Curve((0.0, 0.5), tuple((v, v) for v in values))


def test_sign_flips_by_hand():
    base = (0.5, 0.5, 0.5)
    # differences 0.1, 0.2, 0.3: of 8 sign patterns only the observed one has this mean or a larger one, and one the
    # mirrored: p = 2/8
    found = pxp.compare(_curve((0.6, 0.7, 0.8)), _curve(base))
    assert found.p_value == pytest.approx(2 / 8) and found.difference == pytest.approx(0.2) and found.runs == 3
    # differences −0.1, 0.2, 0.3, sum 0.4: ≥ 0.4 for (−,+,+) and (+,+,+), and their mirrors: p = 4/8
    assert pxp.compare(_curve((0.4, 0.7, 0.8)), _curve(base)).p_value == pytest.approx(4 / 8)
    # differences 0.1, 0.2, −0.3, sum 0: nothing found
    assert pxp.compare(_curve((0.6, 0.7, 0.2)), _curve(base)).p_value == pytest.approx(1.0)
    # the other way round
    back = pxp.compare(_curve(base), _curve((0.6, 0.7, 0.8)))
    assert back.p_value == pytest.approx(2 / 8) and back.difference == pytest.approx(-0.2)
    assert found.low <= found.difference <= found.high and 0.1 - 1e-9 <= found.low and found.high <= 0.3 + 1e-9
    assert back.low == pytest.approx(-found.high) and back.high == pytest.approx(-found.low)


def test_comparing_with_a_single_run():
    found = pxp.compare(_curve((0.6, 0.7, 0.8, 0.9, 0.8)), _curve((0.5,)))
    assert found.runs == 5 and found.difference == pytest.approx(0.26) and found.p_value == pytest.approx(2 / 32)
    assert repr(found).startswith("A_PR difference +0.260 [") and "p = 0.062, 5 paired runs" in repr(found)


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match="different rates"):
        pxp.compare(_curve((0.5, 0.6)), pxp.Curve((0.0, 0.6), ((0.1, 0.2),) * 2))
    with pytest.raises(ValueError, match="cannot pair 2 runs with 3"):
        pxp.compare(_curve((0.5, 0.6)), _curve((0.5, 0.6, 0.7)))
    with pytest.raises(ValueError, match="at least two runs"):
        pxp.compare(_curve((0.5,)), _curve((0.6,)))
