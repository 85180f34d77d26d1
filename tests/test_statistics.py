"""Intervals and comparisons, against analyses by hand and simulations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

import pxp
from pxp.statistics import FEWEST, estimate, holm, mean_squares, of_draws, unpaired
from recipes.coverage import WORLDS, covered, resampled
from recipes.how_sure import PAGE, page, stored

# draws × images; means of draws ½, 1, 0, of images ⅔, ⅓; sums of squares 1, 1/6 and 1/3
BY_HAND = np.array([[1, 0], [1, 1], [0, 0]], dtype=float)


def curve(right: np.ndarray, draws: tuple[str, ...], images: str = "images", **other) -> pxp.Curve:
    return pxp.Curve.of_hits((0.0, 0.5), right.astype(bool), images, draws=draws, **other)


def some_hits(draws: int, images: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((draws, 2, images)) < 0.7


def test_the_two_way_analysis_by_hand():
    ms = mean_squares(BY_HAND)
    assert (ms.draws, ms.images, ms.rest) == (pytest.approx(1 / 2), pytest.approx(1 / 6), pytest.approx(1 / 6))
    found = estimate(BY_HAND)
    assert found.mean == pytest.approx(1 / 2) and found.variance == pytest.approx((1 / 2 + 1 / 6 - 1 / 6) / 6)
    assert found.freedom == pytest.approx((1 / 2) ** 2 / (1 / 8 + 1 / 36 + 1 / 72))
    low, high = found.interval()
    half = stats.t.ppf(0.975, 1.5) * (1 / 12) ** 0.5
    assert (low, high) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    assert found.p_value() == pytest.approx(2 * stats.t.sf(0.5 * 12**0.5, 1.5))


def test_draws_and_images_are_not_mistaken_for_each_other():
    """Many images that differ and few draws that hardly do, and the other way round."""
    images = np.repeat([[0.0, 1.0] * 20], 4, axis=0)
    found = estimate(images)  # draws are equal: the binomial variance of 40 images
    assert found.variance == pytest.approx(np.var(images[0], ddof=1) / 40) and found.freedom == pytest.approx(39)
    draws = np.repeat([[0.0], [1.0], [1.0], [0.0]], 40, axis=1)
    found = estimate(draws)
    assert found.variance == pytest.approx(np.var(draws[:, 0], ddof=1) / 4) and found.freedom == pytest.approx(3)


def test_the_variance_never_falls_below_what_is_left_over():
    x = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])  # nothing but interaction
    ms = mean_squares(x)
    assert ms.draws == 0 and ms.images == 0
    found = estimate(x)
    assert found.variance == pytest.approx(ms.rest / 8) and found.freedom == pytest.approx(3)


def test_tables_are_analysed_side_by_side():
    x = some_hits(5).astype(float).transpose(1, 0, 2)
    both = estimate(x)
    for index, table in enumerate(x):
        one = estimate(table)
        assert (both.mean[index], both.variance[index], both.freedom[index]) == (one.mean, one.variance, one.freedom)


def test_wilson_on_the_effective_number():
    x = (np.arange(50) < 45).astype(float)[None]
    found = estimate(x, depends=False)
    variance = np.var(x, ddof=1) / 50
    assert found.variance == pytest.approx(variance) and found.freedom == 49
    low, high = found.proportion()
    # Wilson's interval holds the p for which (m − p)² = t² p (1 − p) / n
    t, n = stats.t.ppf(0.975, 49), 0.9 * 0.1 / variance
    for p in (low, high):
        assert (0.9 - p) ** 2 == pytest.approx(t**2 * p * (1 - p) / n)
    assert low < 0.9 < high < 1
    # all right: the bound is that of as many independent images
    low, high = estimate(np.ones((4, 100))).proportion()
    t = stats.t.ppf(0.975, 3 * 99)
    assert high == 1 and low == pytest.approx(1 / (1 + t**2 / 100)) and 0.95 < low < 0.97
    low, high = estimate(np.zeros((4, 100))).proportion()
    assert low == 0 and high == pytest.approx(1 - 1 / (1 + t**2 / 100))


def test_what_shares_no_draws_adds_up():
    first, second = some_hits(6, 50).mean(1), some_hits(4, 50, seed=1).mean(1)
    found = unpaired(first, second)
    parts = [np.var(first.mean(0) - second.mean(0), ddof=1) / 50]
    for x in (first, second):
        ms = mean_squares(x)
        parts.append(max(0, ms.draws - ms.rest) / 50 / len(x))
    assert found.mean == pytest.approx(first.mean() - second.mean()) and found.variance == pytest.approx(sum(parts))
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 49 + parts[1] ** 2 / 5 + parts[2] ** 2 / 3)
    assert found.freedom == pytest.approx(freedom)


def test_which_analysis_two_curves_get():
    references = tuple(f"{i:04x}" for i in range(5))
    seeds = tuple(f"|{i}" for i in range(5))
    first = curve(some_hits(5), references)
    other = curve(some_hits(5, seed=1), references)
    paired = pxp.compare(first, other)
    expected = estimate(first.right.mean(1) - other.right.mean(1))
    assert paired.paired and paired.draws == (5, 5) and paired.images == 40 and paired.runs == 5
    assert (paired.low, paired.high) == tuple(map(float, expected.interval()))
    assert paired.p_value == paired.adjusted == float(expected.p_value())
    assert "5 paired draws, 40 images (below 10 draws" in repr(paired)

    chance = curve(some_hits(5, seed=1), seeds)  # the same hits, by lottery
    apart = pxp.compare(first, chance)
    expected = unpaired(first.right.mean(1), chance.right.mean(1))
    assert not apart.paired and apart.difference == paired.difference
    assert (apart.low, apart.high) == tuple(map(float, expected.interval())) != (paired.low, paired.high)
    assert "5 draws and 5 draws, 40 images" in repr(apart)

    shuffled = curve(some_hits(5, seed=2), tuple(f"{mark}|{i}" for i, mark in enumerate(references)))
    assert pxp.compare(first, shuffled).paired  # the same references, whatever was drawn besides
    swapped = curve(some_hits(5, seed=1), references[::-1])
    assert not pxp.compare(first, swapped).paired

    norm = curve(some_hits(1, seed=3), ("",))
    mixed = pxp.compare(first, norm)
    expected = estimate(first.right.mean(1) - norm.right.mean(1))
    assert mixed.draws == (5, 0) and (mixed.low, mixed.high) == tuple(map(float, expected.interval()))
    back = pxp.compare(norm, first)
    assert back.low == pytest.approx(-mixed.high) and back.draws == (0, 5)
    many = curve(np.repeat(some_hits(1, seed=3), 5, axis=0), ("",) * 5)  # the same five times
    assert repr(pxp.compare(first, many)) == repr(mixed)
    second = curve(some_hits(1, seed=4), ("",))
    alone = pxp.compare(norm, second)
    difference = (norm.right.mean(1) - second.right.mean(1))[0]
    half = stats.t.ppf(0.975, 39) * np.std(difference, ddof=1) / 40**0.5
    assert alone.draws == (0, 0) and alone.high - alone.difference == pytest.approx(half)
    assert "no draws and no draws" in repr(alone)


def test_too_few_draws_give_no_interval():
    two = curve(some_hits(2), ("a", "b"))
    assert np.isnan(two.interval()).all() and np.isnan(two.a_pr_interval()).all()
    assert repr(two).endswith(f"; no interval below {FEWEST} draws)") and "[" not in repr(two)
    other = curve(some_hits(2, seed=1), ("a", "b"))
    found = pxp.compare(two, other)
    assert np.isnan([found.low, found.high, found.p_value]).all() and "no interval below 3 draws" in repr(found)
    apart = pxp.compare(two, curve(some_hits(5, seed=1), tuple("vwxyz")))
    assert np.isnan(apart.low)
    assert np.isnan(of_draws(np.array([0.4, 0.6])).variance)


def test_curves_that_do_not_know_their_images():
    runs = ((0.6, 0.5), (0.7, 0.7), (0.8, 0.3), (0.9, 0.5))
    old = pxp.Curve((0.0, 0.5), runs)
    values = np.mean(runs, axis=1)
    half = stats.t.ppf(0.975, 3) * np.std(values, ddof=1) / 2
    found = pxp.compare(old, pxp.Curve((0.0, 0.5), ((0.5, 0.5),)))
    assert found.high - found.difference == pytest.approx(half) and found.draws == (4, 0) and found.images == 0
    assert "images unknown, so only the draws vary" in repr(found)
    hits = curve(some_hits(4), tuple("abcd"))
    assert pxp.compare(old, hits).images == 0
    low, high = old.interval()
    assert low.shape == (2,) and (low < old.accuracy).all() and (old.accuracy < high).all()
    narrow = old.interval(0.5)
    assert (narrow[0] > low).all() and (narrow[1] < high).all()


def test_what_cannot_be_compared():
    rates = pxp.Curve((0.0, 0.6), ((0.1, 0.2),) * 2)
    with pytest.raises(ValueError, match="different rates"):
        pxp.compare(curve(some_hits(2), ("a", "b")), rates)
    with pytest.raises(ValueError, match="cannot pair 2 runs with 3"):
        pxp.compare(pxp.Curve((0.0,), ((0.5,), (0.6,))), pxp.Curve((0.0,), ((0.5,), (0.6,), (0.7,))))
    one, other = curve(some_hits(3), tuple("abc")), curve(some_hits(3), tuple("abc"), images="others")
    with pytest.raises(ValueError, match="measured on different images"):
        pxp.compare(one, other)
    with pytest.raises(ValueError, match="nothing to compare in 1 curve"):
        pxp.compare_all({"one": one})
    with pytest.raises(ValueError, match="against must be one of 'one', 'two', got 'three'"):
        pxp.compare_all({"one": one, "two": one}, against="three")


def test_holm_by_hand():
    # smallest × 3, next × 2, largest × 1, never below the one before
    assert holm([0.04, 0.01, 0.03]) == [pytest.approx(p) for p in (0.06, 0.03, 0.06)]
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    found = holm([0.01, float("nan")])
    assert found[0] == pytest.approx(0.02) and np.isnan(found[1])


def test_a_table_of_comparisons():
    references = tuple(f"{i:04x}" for i in range(5))
    curves = {name: curve(some_hits(5, seed=i), references) for i, name in enumerate(["a", "bc", "d"])}
    curves["a"] = curve(some_hits(5) | True, references)
    found = pxp.compare_all(curves)
    assert list(found) == [("a", "bc"), ("a", "d"), ("bc", "d")] and len(found) == 3
    single = pxp.compare(curves["a"], curves["d"])
    assert found["a", "d"].difference == single.difference and found["a", "d"].p_value == single.p_value
    assert [row.adjusted for row in found.values()] == holm([row.p_value for row in found.values()])
    lines = repr(found).splitlines()
    assert len(lines) == 5 and lines[0].endswith("adjusted for 3") and lines[-1].startswith("5 paired draws, 40 images")
    assert list(pxp.compare_all(curves, against="bc")) == [("a", "bc"), ("d", "bc")]


@pytest.mark.parametrize("name", WORLDS)
def test_intervals_cover(name):
    """The simulation of ``recipes/coverage.py``, shorter; its table is shipped."""
    world = WORLDS[name]
    low, high = world.expected
    share = covered(world, draws=10, images=500, repetitions=300, seed=1)
    margin = 3 * (0.05 * 0.95 / 300) ** 0.5  # three standard errors
    assert low - margin <= share <= high + margin


def test_what_is_drawn_from_real_hits_varies():
    hits = np.random.default_rng(0).random((40, 300)) < np.where(np.arange(40) < 6, 0.1, 0.9)[:, None]  # some collapse
    assert 0.3 < resampled(hits.astype(float), 3, 100, 200, paired=False) < 0.8
    assert resampled(hits.astype(float), 20, 100, 200, paired=False) > 0.85


def test_five_draws_were_not_enough():
    """The percentile bootstrap over draws, which these intervals replaced, covers far less than it says."""
    generator = np.random.default_rng(0)
    number = 0
    for _ in range(400):
        values = generator.normal(0.5, 0.05, 5)
        means = generator.choice(values, (500, 5)).mean(1)
        number += np.quantile(means, 0.025) <= 0.5 <= np.quantile(means, 0.975)
    assert 0.78 < number / 400 < 0.9
    assert 0.9 < covered(WORLDS["symmetric"], draws=5, images=500, repetitions=300, seed=2) <= 1


def test_a_curve_keeps_its_hits(tmp_path):
    model = pxp.load_model("vgg")
    data = pxp.load_dataset()
    images = pxp.reference_samples(data.eval, per_class=3)
    units = pxp.find_components(model)
    refs = [pxp.reference_samples(data.reference, per_class=2, seed=seed) for seed in range(3)]
    found = pxp.pruning_curve(model, pxp.attribute_draws(model, refs, units, pxp.Taylor()), images, rates=(0, 0.3))
    assert found.right.shape == (3, 2, 30) and len(set(found.draws)) == 3
    with torch.no_grad():
        assert (found.right[0, 0] == (model(images[0]).argmax(1) == images[1]).numpy()).all()
    assert found.runs == tuple(tuple(row) for row in found.right.mean(2).tolist())
    path = tmp_path / "curve.json"
    found.save(path)
    again = pxp.Curve.load(path)
    assert again == found and (again.right == found.right).all() and path.stat().st_size < 1500
    norm = pxp.pruning_curve(model, pxp.attribute(model, refs[0], units, pxp.Magnitude()), images, rates=(0, 0.3))
    assert norm.draws == ("",) and not norm.depends
    assert pxp.compare(found, norm).draws == (3, 0)
    chance = pxp.attribute(model, refs[0], units, pxp.Random(3))
    assert chance.draw == "|3" and pxp.pruning_curve(model, chance, images, rates=(0, 0.3)).depends


def test_a_loader_that_shuffles_gives_no_hits(caplog):
    model, data = pxp.load_model("vgg"), pxp.load_dataset()
    images = pxp.reference_samples(data.eval, per_class=3)
    units = pxp.find_components(model)
    seeds = [pxp.attribute(model, images, units, pxp.Random(seed)) for seed in range(3)]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*images), batch_size=10, shuffle=True)
    found = pxp.pruning_curve(model, seeds, loader, rates=(0.2,))
    assert found.hits is None and "shuffle=False" in caplog.text
    assert found.runs == pxp.pruning_curve(model, seeds, images, rates=(0.2,)).runs


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"draws": ("a",)}, "1 draws do not belong to 3 runs"),
        ({"rates": (0.0,), "runs": ((0.5,),) * 3}, "do not belong to 3 runs at 1 rates"),
        ({"runs": ((0.5, 0.5),) * 3}, "do not follow from the hits"),
    ],
)
def test_a_curve_that_contradicts_itself_is_refused(changed, message):
    whole = curve(some_hits(3), tuple("abc"))
    own = {name: getattr(whole, name) for name in ("rates", "runs", "draws", "hits")}
    with pytest.raises(ValueError, match=message):
        pxp.Curve(**own | changed)


def test_damaged_hits_are_refused(tmp_path):
    path = tmp_path / "curve.json"
    curve(some_hits(3), tuple("abc")).save(path)
    text = path.read_text()
    for old, new in (('"changes": "', '"changes": "AAAA'), ("40\n", "4000\n")):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match="is no curve written by pxp"):
            pxp.Curve.load(path)


def test_the_page_is_made_of_the_table():
    assert PAGE.read_text(encoding="utf8") == page(stored())


def test_the_shipped_table_is_what_the_recipe_gives():
    """A few of its cells again, with other random numbers."""
    share = {(row["world"], row["draws"], row["images"]): row["covered"] for row in stored()["rows"]}
    for name, draws, images in (("symmetric", 10, 500), ("skewed draws", 5, 100), ("15 % of draws collapse", 3, 500)):
        found = covered(WORLDS[name], draws, images, repetitions=300, seed=5)
        assert found == pytest.approx(share[name, draws, images], abs=0.07)
    for world in ("symmetric", "paired difference"):  # what the text claims
        for draws in (10, 20):
            assert all(0.92 <= share[world, draws, images] <= 0.98 for images in (500, 2000))


def by_hand(runs: list[float], draws: tuple[str, ...] = ()) -> pxp.Curve:
    return pxp.Curve((0.0, 0.5), tuple((0.9, value) for value in runs), draws=draws)


def test_draws_count_where_images_are_unknown():
    values = [0.0, 0.1, 0.2, 0.3, 0.4]
    first, apart = by_hand(values, tuple("abcde")), by_hand(values, tuple("fghij"))
    found = pxp.compare(first, apart)
    half = stats.t.ppf(0.975, 8) * (2 * np.var(np.array(values) / 2, ddof=1) / 5) ** 0.5
    assert not found.paired and found.difference == 0 and found.high == pytest.approx(half)
    assert pxp.compare(first, by_hand(values[::-1], tuple("abcde"))).paired
    assert np.isnan(pxp.compare(first, by_hand([0.3], ("z",))).low)  # one draw tells nothing of draws
    norm = by_hand([0.3] * 5, ("",) * 5)
    assert pxp.compare(first, norm).draws == (5, 0) and pxp.compare(norm, by_hand(values[:3], tuple("abc"))).draws == (
        0,
        3,
    )
    with pytest.raises(ValueError, match="cannot pair 5 runs with 3; draws= would tell"):
        pxp.compare(by_hand(values), by_hand(values[:3]))


def test_the_same_draw_again_tells_nothing_new():
    hits = some_hits(1)
    again = curve(np.repeat(hits, 5, axis=0), ("h",) * 5)
    assert again.rows == [0] and np.isnan(again.a_pr_interval()).all() and "no interval below 3 draws" in repr(again)
    three = some_hits(3)
    more = curve(np.concatenate([three, three[:1]]), ("a", "b", "c", "a"))
    assert more.a_pr_interval() == curve(three, tuple("abc")).a_pr_interval()


def test_what_nobody_knows_is_no_pair():
    unknown = [curve(some_hits(5, seed=seed), ("unknown",) * 5) for seed in (0, 1)]
    found = pxp.compare(*unknown)
    assert not found.paired and found.draws == (5, 5)
    assert not pxp.compare(unknown[0], curve(some_hits(5), ())).paired
    assert np.isnan(curve(some_hits(1), ()).a_pr_interval()).all()  # perhaps a draw, perhaps none


def test_ends_of_the_scale():
    assert curve(some_hits(4), tuple("abcd")).a_pr_interval(1.0) == pytest.approx((0, 1), abs=1e-6)
    low, high = curve(np.ones((4, 2, 50)), tuple("abcd")).interval()
    assert (high == 1).all() and (low < 1).all()
    with pytest.raises(ValueError, match="are those of no image"):
        pxp.Curve.of_hits((0.0,), np.zeros((1, 1, 0), dtype=bool))
