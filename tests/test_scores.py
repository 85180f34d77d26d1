"""Ranking and choosing: scores to masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import made, pruned
from hypothesis import given, settings
from hypothesis import strategies as st

import pxp
from pxp.network.components import Components, Layer
from pxp.network.trace import Trace


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rate": 0.4}, {("a", 2), ("b", 1)}),
        ({"count": 3}, {("a", 2), ("b", 1), ("a", 0)}),
        ({"rate": 0.4, "order": "most"}, {("a", 1), ("b", 0)}),
        ({"rate": 0.4, "by": "signed"}, {("b", 0), ("a", 0)}),
        ({"rate": 0.4, "by": "signed", "order": "most"}, {("a", 1), ("b", 1)}),
        ({"rate": 0.5, "scope": "layer"}, {("a", 2), ("a", 0), ("b", 1)}),
        ({"rate": 0.3, "scope": "layer"}, {("a", 2), ("b", 1)}),
        ({"rate": 0.2, "scope": "layer"}, {("a", 2)}),
        ({"count": 1, "scope": "layer"}, {("a", 2), ("b", 1)}),
        ({"count": 1, "scope": "layer", "order": "most"}, {("a", 1), ("b", 0)}),
        ({"count": 3, "scope": "layer", "min_keep": 1}, {("a", 2), ("a", 0), ("b", 1)}),
        ({"rate": 1.0, "min_keep": 1}, {("a", 0), ("a", 2), ("b", 1)}),
        ({"rate": 1.0, "min_keep": 1, "order": "most"}, {("a", 0), ("a", 1), ("b", 0)}),
        ({"rate": 0.6, "min_keep": 2}, {("a", 2)}),
        ({"rate": 0.0}, set()),
        ({"rate": 1.0}, {("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)}),
        ({"count": 0}, set()),
        ({"rate": 0.09}, set()),
        ({"rate": 0.11}, {("a", 2)}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_select(scores, options, expected):
    before = {name: values.clone() for name, values in scores.items()}
    mask = scores.select(**options)
    assert pruned(mask) == expected
    assert mask.kept == 5 - len(expected) and mask.rate == pytest.approx(len(expected) / 5)
    assert all(torch.equal(scores[name], values) for name, values in before.items())


def test_select_by_cost():
    cheap = Layer("cheap", 3, ("cheap",), parameters=1, flops=10)
    dear = Layer("dear", 2, ("dear",), parameters=4, flops=2)
    units = Components("filter", [cheap, dear], Trace(("cheap", "dear"), {"cheap": ("",), "dear": ("",)}))
    values = {"cheap": torch.tensor([1.0, 3.0, 2.0]), "dear": torch.tensor([6.0, 2.0])}
    scores = pxp.Scores(units, values, values)
    # per parameter 1, 3, 2 and 1.5, 0.5; all together cost 11
    assert pruned(scores.select(4 / 11, cost="parameters")) == {("dear", 1)}
    assert pruned(scores.select(5 / 11, cost="parameters")) == {("dear", 1), ("cheap", 0)}
    assert pruned(scores.select(8 / 11, cost="parameters")) == {("dear", 1), ("cheap", 0)}  # never more than asked
    assert pruned(scores.select(9 / 11, cost="parameters")) == {("dear", 1), ("cheap", 0), ("dear", 0)}
    assert pruned(scores.select(1.0, cost="parameters", min_keep=1)) == {("dear", 1), ("cheap", 0), ("cheap", 2)}
    # per operation 0.1, 0.3, 0.2 and 3, 1; all together cost 34
    assert pruned(scores.select(0.9, cost="flops")) == {("cheap", 0), ("cheap", 1), ("cheap", 2)}
    assert pruned(scores.select(0.9)) != pruned(scores.select(0.9, cost="flops"))
    assert pruned(scores.select(0.2, cost="flops", order="most")) == {("dear", 0), ("dear", 1)}
    assert pruned(scores.select(0.5, cost="flops", scope="layer")) == {("cheap", 0), ("dear", 1)}
    assert not pruned(scores.select(0, cost="flops")) and scores.select(1, cost="flops").kept == 0
    with pytest.raises(ValueError, match="a cost has no meaning"):
        scores.select(count=1, cost="flops")
    with pytest.raises(
        ValueError, match="cost must be one of None, 'parameters', 'flops' or a cost per layer, .*, got 'time'"
    ):
        scores.select(0.5, cost="time")
    with pytest.raises(ValueError, match="parameters of these layers are unknown: a, b"):
        made({"a": [1.0], "b": [1.0]}).select(0.5, cost="parameters")


def test_ties_go_to_the_earlier_layer_and_lower_index():
    scores = made({"late": [1.0, 1.0], "early": [1.0, 1.0]})
    assert pruned(scores.select(count=1)) == {("late", 0)}
    assert pruned(scores.select(count=3)) == {("late", 0), ("late", 1), ("early", 0)}
    assert pruned(scores.select(count=1, order="most")) == {("late", 0)}
    assert pruned(scores.select(1.0, min_keep=1)) == {("late", 0), ("early", 0)}


LAYERS = st.lists(st.lists(st.floats(-5, 5, allow_nan=False, width=16), min_size=1, max_size=7), min_size=1, max_size=4)


OPTIONS = st.fixed_dictionaries(
    {
        "by": st.sampled_from(["magnitude", "signed"]),
        "order": st.sampled_from(["least", "most"]),
        "scope": st.sampled_from(["global", "layer"]),
        "min_keep": st.integers(0, 3),
    }
)


@settings(max_examples=150, deadline=None)
@given(LAYERS, OPTIONS, st.floats(0, 1), st.floats(0, 1))
def test_masks_are_nested_and_of_the_right_size(layers, options, one, other):
    signed = {f"layer{i}": values for i, values in enumerate(layers)}
    scores = made({name: [abs(v) for v in values] for name, values in signed.items()}, signed)
    low, high = sorted((one, other))
    small, large = scores.select(low, **options), scores.select(high, **options)
    assert pruned(small) <= pruned(large)
    guard = options["min_keep"]
    for _name, kept in large.items():
        assert int(kept.sum()) >= min(guard, len(kept))
    sizes = [len(values) for values in layers]
    if options["scope"] == "global":
        free = sum(max(0, size - guard) for size in sizes)
        assert len(pruned(large)) == min(round(high * sum(sizes)), free)
    else:
        for _name, kept in large.items():
            assert int((~kept).sum()) == min(round(high * len(kept)), max(0, len(kept) - guard))
    assert pruned(scores.select(low, **options)) == pruned(small)


@settings(max_examples=100, deadline=None)
@given(LAYERS, OPTIONS, st.floats(0, 1))
def test_what_is_pruned_never_ranks_above_what_is_kept(layers, options, rate):
    options |= {"min_keep": 0}
    signed = {f"layer{i}": values for i, values in enumerate(layers)}
    scores = made({name: [abs(v) for v in values] for name, values in signed.items()}, signed)
    mask = scores.select(rate, **options)
    values = scores if options["by"] == "magnitude" else scores.signed
    sign = 1 if options["order"] == "least" else -1
    groups = [list(scores)] if options["scope"] == "global" else [[name] for name in scores]
    for names in groups:
        gone = torch.cat([sign * values[n][~mask[n]] for n in names])
        left = torch.cat([sign * values[n][mask[n]] for n in names])
        assert not len(gone) or not len(left) or float(gone.max()) <= float(left.min())


def test_repr(scores):
    assert repr(scores).splitlines()[0] == "5 filters scored by by hand, 3 reference samples"
    assert "a         3        0.5          3       33%" in repr(scores)
    mask = scores.select(0.4)
    assert repr(mask).splitlines() == [
        "3 of 5 filters kept (40.0% pruned)", "  layer  kept  of", "  a         2  3", "  b         1  2",
    ]  # fmt: skip


def test_mappings(scores):
    assert list(scores) == ["a", "b"] and len(scores) == 2 and "a" in scores and "c" not in scores
    assert scores.signed["b"].tolist() == [-2.0, 0.2]
    with pytest.raises(KeyError, match="no layer 'c'; there are a, b"):
        scores["c"]
    assert np.isclose(scores["a"].sum(), 3.6)


@settings(max_examples=150, deadline=None)
@given(LAYERS, OPTIONS, st.floats(0, 1), st.integers(0, 5), st.booleans())
def test_shuffled_scores_prune_as_many_of_each_layer(layers, options, rate, seed, costly):
    signed = {f"layer{i}": values for i, values in enumerate(layers)}
    scores = made({name: [abs(v) for v in values] for name, values in signed.items()}, signed)
    if costly:
        options = options | {"cost": {name: 1.0 + i % 3 for i, name in enumerate(scores)}}
    control = scores.shuffled(seed)
    for name in scores:
        pairs = [sorted(zip(s[name].tolist(), s.signed[name].tolist(), strict=True)) for s in (scores, control)]
        assert pairs[0] == pairs[1]
    counts = [[int(kept.sum()) for kept in s.select(rate, **options).values()] for s in (scores, control)]
    assert counts[0] == counts[1]


@given(st.data())
def test_arranged_scores_take_the_layers_of_one_and_the_components_of_another(data):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    order = data.draw(st.permutations(range(sum(sizes))))
    where = data.draw(st.lists(st.floats(0, 10), min_size=sum(sizes), max_size=sum(sizes), unique=True))
    cut = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    one, other = (
        made({f"layer{i}": [float(v) for v in values[cut[i] : cut[i + 1]]] for i in range(len(sizes))})
        for values in (where, order)
    )
    both = one.arranged_by(other)
    rate = data.draw(st.floats(0, 1))
    mask, expected = both.select(rate), one.select(rate)
    for name in one:
        assert int(mask[name].sum()) == int(expected[name].sum())
        kept, gone = other[name][mask[name]], other[name][~mask[name]]
        assert not len(kept) or not len(gone) or gone.max() < kept.min()
    same = one.arranged_by(one)
    assert all(torch.equal(same[name], one[name]) for name in one)


def test_arranged_scores_say_what_they_are():
    one = made({"a": [1.0, 2.0, 3.0], "b": [4.0]}, {"a": [-1.0, 2.0, -3.0], "b": [4.0]})
    other = made({"a": [5.0, 1.0, 3.0], "b": [4.0]})
    both = one.arranged_by(other)
    assert both["a"].tolist() == [3.0, 1.0, 2.0] and both.signed["a"].tolist() == [-3.0, -1.0, 2.0]
    assert both.criterion == "by hand, arranged by by hand"
    with pytest.raises(ValueError, match="no sign"):
        both.select(0.5, by="signed")
    with pytest.raises(ValueError, match="these scores are of other components: a"):
        one.arranged_by(made({"a": [1.0, 2.0], "b": [4.0]}))
    with pytest.raises(TypeError, match="other must be pxp.Scores, got Mask"):
        one.arranged_by(one.select(0.5))


def test_shuffled_scores_are_others_and_say_so(tmp_path):
    values = {"a": [float(i) for i in range(50)], "b": [100.0 + i for i in range(50)]}
    scores = made(values)
    control = scores.shuffled(3)
    assert pruned(control.select(0.2)) != pruned(scores.select(0.2))
    assert all(torch.equal(control[name], scores.shuffled(3)[name]) for name in scores)
    assert not torch.equal(control["a"], scores.shuffled(4)["a"]) and not torch.equal(control["a"], scores["a"])
    assert torch.equal(control["a"] + 100, control["b"]) is False  # each layer by a permutation of its own
    assert control.criterion == "by hand, shuffled(seed=3)" and control.samples == scores.samples
    assert (scores.draw, control.draw, control.shuffled(5).draw) == ("unknown", "unknown|3", "unknown|3|5")
    control.save(tmp_path / "control.safetensors")
    assert pxp.Scores.load(tmp_path / "control.safetensors").draw == control.draw
    with pytest.raises(ValueError, match="seed must be a whole number of at least 0, got -1"):
        scores.shuffled(-1)
