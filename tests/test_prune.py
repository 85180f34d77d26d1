"""Selecting components and silencing them."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from conftest import network, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import pxp
from pxp.network.components import Components, Layer
from pxp.network.trace import Trace


def made(values: dict[str, list[float]], signed: dict[str, list[float]] | None = None) -> pxp.Scores:
    """Scores of layers that need no model."""
    layers = [Layer(name, len(v), (name,)) for name, v in values.items()]
    units = Components("filter", layers, Trace(tuple(values), {name: ("",) for name in values}, {}))
    tensors = {name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()}
    negative = {name: torch.tensor(v, dtype=torch.float64) for name, v in (signed or values).items()}
    return pxp.Scores(units, tensors, negative, criterion="by hand", samples=3)


def pruned(mask: pxp.Mask) -> set[tuple[str, int]]:
    return {(name, i) for name, kept in mask.items() for i, keep in enumerate(kept.tolist()) if not keep}


@pytest.fixture
def scores():
    return made({"a": [0.5, 3.0, 0.1], "b": [2.0, 0.2]}, {"a": [-0.5, 3.0, 0.05], "b": [-2.0, 0.2]})


# --- select ------------------------------------------------------------------------------------------------------


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


# --- masked ------------------------------------------------------------------------------------------------------


def zeroed(model: nn.Module, mask: pxp.Mask) -> nn.Module:
    """The network in which every pruned filter's output after BatchNorm is zero, by its parameters."""
    twin = copy.deepcopy(model)
    for layer, kept in mask.items():
        for name in mask.units[layer].site:
            site = twin.get_submodule(name)
            if hasattr(site, "running_mean"):
                site.running_mean[~kept] = 0
            for part in (site.weight, site.bias):
                if part is not None:
                    part.data[~kept] = 0
    return twin


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet", "bottleneck", "grouped", "conv1d"])
def test_masked_is_the_physically_zeroed_network(name, rate, untouched):
    model, x, _labels, units = network(name)
    mask = pxp.attribute(model, None, units, pxp.Random(2)).select(rate)
    untouched(model)
    with pxp.masked(model, mask) as same_model:
        assert same_model is model
        found = model(x).detach()
    assert relative(found, zeroed(model, mask)(x).detach()) < 1e-12
    assert relative(model(x).detach(), found) > 1e-6


@pytest.mark.parametrize("name", ["vgg", "resnet", "grouped"])
def test_a_pruned_filter_is_exactly_zero_behind_batch_norm(name):
    model, x, _labels, units = network(name)
    mask = pxp.attribute(model, None, units, pxp.Random(2)).select(0.4)
    seen = {}
    with pxp.masked(model, mask):
        handles = [
            model.get_submodule(units[layer].site[0]).register_forward_hook(
                lambda m, i, o, layer=layer: seen.__setitem__(layer, o.clone())
            )
            for layer in units
        ]
        model(x)
    for handle in handles:
        handle.remove()
    for layer, kept in mask.items():
        assert bool((seen[layer][:, ~kept] == 0).all())
        assert bool((seen[layer][:, kept] != 0).flatten(2).any(2).all())


@pytest.mark.parametrize("name", ["resnet", "grouped", "conv1d", "mlp"])
def test_every_single_mask_changes_the_logits(name):
    model, x, labels, units = network(name, samples=4)
    plain = model(x).detach()
    scores = pxp.attribute(model, (x, labels), units, pxp.Taylor())
    tried = 0
    for layer, entry in units.items():
        for index in range(0, entry.size, max(1, entry.size // 4)):
            kept = {n: torch.ones(u.size, dtype=torch.bool) for n, u in units.items()}
            kept[layer][index] = False
            if float(scores[layer][index]) == 0:
                continue  # a filter that a ReLU silences for these images
            with pxp.masked(model, pxp.Mask(units, kept)), torch.no_grad():
                assert relative(model(x), plain) > 1e-9, (layer, index)
            tried += 1
    assert tried > 2 * len(units)


def test_masks_nest_and_restore(untouched):
    model, x, _labels, units = network("vgg")
    untouched(model)
    one, two = (pxp.attribute(model, None, units, pxp.Random(seed)).select(0.3) for seed in (0, 1))
    both = pxp.Mask(units, {name: one[name] & two[name] for name in units})
    plain = model(x).detach()
    with pxp.masked(model, both):
        expected = model(x).detach()
    with pxp.masked(model, one):
        alone = model(x).detach()
        with pxp.masked(model, two):
            assert torch.equal(model(x), expected)
            with pxp.masked(model, two):
                assert torch.equal(model(x), expected)
        assert torch.equal(model(x), alone)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_exception_unmasks(error, untouched):
    model, _x, _labels, units = network("vgg")
    model.features[0].register_forward_hook(lambda *_: None)
    untouched(model)
    mask = pxp.attribute(model, None, units, pxp.Random()).select(0.5)
    with pytest.raises(error), pxp.masked(model, mask):
        raise error


def test_masks_work_in_training_mode_and_with_gradients():
    model, x, _labels, units = network("vgg")
    mask = pxp.attribute(model, None, units, pxp.Random()).select(0.5)
    model.train()
    with pxp.masked(model, mask):
        model(x).sum().backward()
    for layer, kept in mask.items():
        gradient = model.get_submodule(layer).weight.grad.flatten(1).abs().sum(1)
        assert bool((gradient[~kept] == 0).all()) and bool((gradient[kept] > 0).any())


def test_the_mask_of_a_nan_is_zero():
    model, x, _labels, units = network("vgg")
    with torch.no_grad():
        model.features[0].weight[3] = torch.nan
    kept = {name: torch.ones(layer.size, dtype=torch.bool) for name, layer in units.items()}
    kept["features.0"][3] = False
    with pxp.masked(model, pxp.Mask(units, kept)):
        assert bool(model(x).isfinite().all())


# --- files and printing ------------------------------------------------------------------------------------------


def test_scores_and_masks_survive_a_file(tmp_path):
    model, x, labels, units = network("resnet")
    scores = pxp.attribute(model, (x, labels), units, pxp.LRP("zplus"))
    scores.save(tmp_path / "scores.safetensors")
    again = pxp.Scores.load(tmp_path / "scores.safetensors")
    assert list(again) == list(scores) and again.criterion == scores.criterion and again.samples == scores.samples
    assert all(torch.equal(again[n], scores[n]) and torch.equal(again.signed[n], scores.signed[n]) for n in scores)
    assert dict(again.units) == dict(units) and again.units.trace == units.trace and repr(again) == repr(scores)
    mask = scores.select(0.3)
    mask.save(tmp_path / "mask.safetensors")
    loaded = pxp.Mask.load(tmp_path / "mask.safetensors")
    assert pruned(loaded) == pruned(mask) == pruned(again.select(0.3)) and repr(loaded) == repr(mask)
    with pxp.masked(model, mask):
        expected = model(x)
    with pxp.masked(model, loaded):
        assert torch.equal(model(x), expected)
    assert torch.equal(
        torch.cat(list(pxp.attribute(model, (x, labels), loaded.units, pxp.LRP("zplus")).values())),
        torch.cat(list(scores.values())),
    )


def _rewrite(path, change):
    """The same file with a changed header or other tensors; still a well-formed safetensors file."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["pxp"])
    tensors = load_file(path)
    change(header, tensors)
    save_file(tensors, path, metadata={"pxp": json.dumps(header)})


TAMPERED = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "header overwritten": lambda path: path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no tensors at all"),
    "other library's": lambda path: save_file({"a": torch.zeros(2)}, path),
    "no JSON": lambda path: save_file({"a": torch.zeros(2)}, path, metadata={"pxp": "{"}),
    "a layer missing": lambda path: _rewrite(path, lambda h, t: t.pop("magnitude/a")),
    "a group missing": lambda path: _rewrite(path, lambda h, t: [t.pop(k) for k in list(t) if "signed" in k]),
    "another size": lambda path: _rewrite(path, lambda h, t: t.update({"signed/b": torch.zeros(7)})),
    "no trace": lambda path: _rewrite(path, lambda h, t: h.pop("trace")),
    "layer entry": lambda path: _rewrite(path, lambda h, t: h["layers"][0].pop("size")),
    "NaN": lambda path: _rewrite(path, lambda h, t: t["magnitude/a"].fill_(torch.nan)),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_tampered_scores_are_refused(how, scores, tmp_path):
    path = tmp_path / "scores.safetensors"
    scores.save(path)
    TAMPERED[how](path)
    with pytest.raises(ValueError, match=r"scores\.safetensors|[Ss]cores|layer"):
        pxp.Scores.load(path)


def test_files_of_another_kind_are_refused(scores, tmp_path):
    scores.save(tmp_path / "s")
    scores.select(0.2).save(tmp_path / "m")
    with pytest.raises(ValueError, match=r"holds scores, not (a )?mask"):
        pxp.Mask.load(tmp_path / "s")
    with pytest.raises(ValueError, match=r"holds (a )?mask, not scores"):
        pxp.Scores.load(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere"):
        pxp.Scores.load(tmp_path / "nowhere")


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
