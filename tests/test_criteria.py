"""The criteria by hand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from by_hand import close, flows, sites, target_sum
from conftest import network, relative
from oracle import Oracle
from torch.nn import functional as F
from vits import images_of, two_blocks

import pxp
from pxp.network.fold import fold_batch_norm
from pxp.network.replica import replica


def test_taylor_per_sample_is_the_sensitivity_to_a_head_mask():
    """Michel et al. 2019: the mean of |∂loss/∂m|; m by central differences."""
    model = two_blocks()
    images, targets = images_of(model, 3)
    units = pxp.find_components(model, "head")
    scores = pxp.attribute(model, (images, targets), units, pxp.Taylor(absolute="sample"))
    ones = {name: torch.ones(3, dtype=torch.float64) for name in units}
    step = 1e-5
    for name in units:
        for head in range(3):
            slopes = []
            for image, target in zip(images, targets, strict=True):
                losses = []
                for move in (step, -step):
                    gate = {layer: values.clone() for layer, values in ones.items()}
                    gate[name][head] += move
                    losses.append(F.cross_entropy(Oracle(model, image, gate).logits, target))
                slopes.append(abs(float((losses[0] - losses[1]).detach()) / (2 * step)))
            assert float(scores[name][head]) == pytest.approx(sum(slopes) / 3, rel=1e-6)


def test_every_criterion_scores_heads_and_neurons_in_one_pass(untouched):
    model = untouched(two_blocks())
    images, targets = images_of(model, 4)
    units = pxp.find_components(model, ("neuron", "head"))
    assert units.kind == "neuron+head" and [layer.kind for layer in units.values()] == ["head", "neuron"] * 2
    for criterion in (
        pxp.LRP(), pxp.Taylor(), pxp.Taylor(absolute="sample"), pxp.IntegratedGradients(3), pxp.Activation(),
        pxp.IntegratedGradients(3, influence=True), pxp.Magnitude(), pxp.Random(), pxp.LRP(path_steps=2, start="margin"),
    ):  # fmt: skip
        together = pxp.attribute(model, (images, targets), units, criterion)
        if not isinstance(criterion, pxp.Random):
            for kind in ("head", "neuron"):
                alone = pxp.attribute(model, (images, targets), units.of_kind(kind), criterion)
                assert all(relative(together[name], alone[name]) < 1e-10 for name in alone)
        curve = pxp.pruning_curve(
            model, together, (images, targets), rates=(0, 0.5), cost="flops", progress=False, allow_shared=True
        )
        assert curve.settings["cost"] == "flops"


def test_activation_and_magnitude_of_a_head_by_hand():
    model = two_blocks()
    images, targets = images_of(model, 3)
    units = pxp.find_components(model, "head")
    activation = pxp.attribute(model, (images, targets), units, pxp.Activation())
    magnitude = pxp.attribute(model, None, units, pxp.Magnitude())
    for index, name in enumerate(units):
        mixed = torch.stack([Oracle(model, image).blocks[index]["mixed"] for image in images])
        assert relative(activation[name], mixed.unflatten(-1, (3, 4)).abs().mean((0, 1, 3))) < 1e-12
        attention = model.get_submodule(name)
        rows = attention.in_proj_weight.view(3, 3, -1).permute(1, 0, 2).flatten(1)
        columns = attention.out_proj.weight.T.reshape(3, -1)
        assert relative(magnitude[name], torch.cat([rows, columns], 1).norm(dim=1)) < 1e-12


def test_default_taylor_is_of_the_loss_and_differs_from_lrp():
    model, x, labels, units = network("vgg")
    taylor = pxp.attribute(model, (x, labels), units, pxp.Taylor())
    assert close(taylor, pxp.attribute(model, (x, labels), units, pxp.LRP(pxp.Epsilon(0), start="loss")))
    assert not close(taylor, pxp.attribute(model, (x, labels), units, pxp.LRP(pxp.Epsilon(0))), 1e-2)


@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_integrated_gradients_by_hand(name):
    model, x, labels, units = network(name, samples=4)
    steps = 5
    found = pxp.attribute(model, (x, labels), units, pxp.IntegratedGradients(steps))
    influence = pxp.attribute(model, (x, labels), units, pxp.IntegratedGradients(steps, influence=True))
    runs = [flows(model, x * k / steps, labels, sites(units), target_sum) for k in range(steps + 1)]
    for layer in units:
        gradient = sum(gradients[layer] for _, gradients in runs[1:]) / steps
        change = (runs[-1][0][layer] - runs[0][0][layer]).detach()
        per_sample = (gradient * change).flatten(2).sum(2)
        assert relative(found.signed[layer], per_sample.mean(0)) < 1e-9
        assert relative(found[layer], per_sample.abs().mean(0)) < 1e-9
        per_sample = gradient.flatten(2).sum(2)
        assert relative(influence.signed[layer], per_sample.mean(0)) < 1e-9
        assert relative(influence[layer], per_sample.abs().mean(0)) < 1e-9


def test_integrated_gradients_are_complete_at_the_input():
    model, x, labels, _units = network("vgg")
    heat = pxp.heatmap(model, x, labels, pxp.IntegratedGradients(steps=60))
    logits = (model(x) - model(torch.zeros_like(x))).gather(1, labels[:, None])[:, 0].detach()
    torch.testing.assert_close(heat.flatten(1).sum(1), logits, rtol=0.02, atol=0.02)


BLACK = (-2.1, -2.0, -1.8)


def test_integrated_gradients_add_up_from_any_baseline():
    """Completeness (Sundararajan et al. 2017, proposition 1): f(x) − f(baseline), the closer the more steps."""
    model, x, labels, _units = network("grouped")
    for given in (-1.5, BLACK):
        black = torch.tensor(given, dtype=x.dtype).reshape(1, -1, 1, 1).expand_as(x)
        expected = (model(x) - model(black)).gather(1, labels[:, None])[:, 0].detach()
        sums = [
            pxp.heatmap(model, x, labels, pxp.IntegratedGradients(steps, baseline=given)).flatten(1).sum(1)
            for steps in (10, 400)
        ]
        coarse, fine = (float((total - expected).abs().max() / expected.abs().max()) for total in sums)
        assert fine < coarse / 10 and fine < 4e-3
        grey = (model(x) - model(torch.zeros_like(x))).gather(1, labels[:, None])[:, 0].detach()
        assert relative(sums[1], grey) > 0.1


@pytest.mark.parametrize("given", [-1.5, BLACK])
def test_paths_from_a_baseline_by_hand(given):
    model, x, labels, units = network("grouped", samples=3)
    steps = 4
    black = torch.tensor(given, dtype=x.dtype).reshape(1, -1, 1, 1).expand_as(x)
    points = [black + (x - black) * (k / steps) for k in range(steps + 1)]
    found = pxp.attribute(model, (x, labels), units, pxp.IntegratedGradients(steps, baseline=given))
    influence = pxp.attribute(model, (x, labels), units, pxp.IntegratedGradients(steps, True, baseline=given))
    runs = [flows(model, point, labels, sites(units), target_sum) for point in points]
    for layer in units:
        gradient = sum(gradients[layer] for _, gradients in runs[1:]) / steps
        change = (runs[-1][0][layer] - runs[0][0][layer]).detach()
        assert relative(found.signed[layer], (gradient * change).flatten(2).sum(2).mean(0)) < 1e-9
        assert relative(influence.signed[layer], gradient.flatten(2).sum(2).mean(0)) < 1e-9
    lrp, path = pxp.LRP("gamma", input="flat"), pxp.LRP("gamma", input="flat", path_steps=steps, baseline=given)
    heat = sum(pxp.heatmap(model, point, labels, lrp) for point in points[1:]) / steps
    assert relative(pxp.heatmap(model, x, labels, path), heat) < 1e-9
    parts = [pxp.attribute(model, (point, labels), units, lrp) for point in points[1:]]
    scores = pxp.attribute(model, (x, labels), units, path)
    assert all(relative(scores.signed[n], sum(part.signed[n] for part in parts) / steps) < 1e-9 for n in units)


def test_pixels_that_turn_black_on_the_way_keep_their_relevance():
    """From −1 to 1 half of the way is exactly 0, where x ⊙ g would lose what an input rule gives."""
    model, x, labels, _units = network("vgg", samples=2)
    ones = torch.ones_like(x)
    path = pxp.LRP("zplus", input="flat", path_steps=2, baseline=-1.0)
    expected = (pxp.heatmap(model, ones, labels, pxp.LRP("zplus", input="flat")) + pxp.heatmap(
        model, ones * 1e-30, labels, pxp.LRP("zplus", input="flat"))) / 2  # fmt: skip
    assert relative(pxp.heatmap(model, ones, labels, path), expected) < 1e-9


@pytest.mark.parametrize("criterion", [pxp.IntegratedGradients, lambda n, **given: pxp.LRP(path_steps=n, **given)])
def test_a_baseline_must_fit_the_channels(criterion):
    model, x, labels, units = network("grouped")
    for given in ((0.5,), (0.1, 0.2, 0.3, 0.4)):
        message = rf"baseline has {len(given)} values, .*, but images of shape \(\d+, 3, 18, 18\) have 3 channels"
        with pytest.raises(ValueError, match=message):
            pxp.heatmap(model, x, labels, criterion(2, baseline=given))
        with pytest.raises(ValueError, match=message):
            pxp.attribute(model, (x, labels), units, criterion(2, baseline=given))


def test_baselines_are_compared_and_printed_by_value():
    assert pxp.IntegratedGradients() == pxp.IntegratedGradients(baseline=0)
    assert repr(pxp.IntegratedGradients()) == "IntegratedGradients(steps=20, influence=False, start='logit')"
    numbers = tuple(np.float32(value) for value in (-2.0, -1.5, 0.25))
    for make in (pxp.IntegratedGradients, lambda **given: pxp.LRP(path_steps=3, **given)):
        given, same = make(baseline=numbers), make(baseline=(-2, -1.5, 0.25))
        assert given == same != make(baseline=-2) and hash(given) == hash(same)
        assert repr(given) == repr(same) and "baseline=(-2.0, -1.5, 0.25)" in repr(given)
        assert "baseline" not in repr(make(baseline=0.0))
    assert repr(pxp.LRP(path_steps=3, baseline=-2)) == "LRP('epsilon', path_steps=3, baseline=-2.0)"


def test_activation_by_hand():
    for name in ("vgg", "resnet", "grouped"):
        model, x, labels, units = network(name, samples=4)
        scores = pxp.attribute(model, (x, labels), units, pxp.Activation())
        outputs, _ = flows(model, x, labels, sites(units), target_sum)
        for layer in units:
            output = outputs[layer].detach()
            output = output.relu() if units[layer].activation else output
            assert relative(scores.signed[layer], output.mean((0, 2, 3))) < 1e-12
            assert relative(scores[layer], output.mean((2, 3)).abs().mean(0)) < 1e-12
    assert units["project"].activation is None and float(scores.signed["project"].min()) < 0


def test_magnitude_by_hand():
    model, _, _, units = network("vgg")
    conv, norm = model.features[3], model.features[4]
    raw = pxp.attribute(model, None, units, pxp.Magnitude(folded=False))
    folded = pxp.attribute(model, None, units, pxp.Magnitude())
    lengths = (conv.weight**2).sum((1, 2, 3)).sqrt().detach()
    assert relative(raw["features.3"], lengths) < 1e-12
    gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).abs().detach()
    assert relative(folded["features.3"], lengths * gain) < 1e-12
    assert raw.samples == 0 and torch.equal(raw["features.3"], raw.signed["features.3"])


def test_random_is_uniform_and_seeded():
    model, _, _, units = network("vgg")
    state = torch.get_rng_state()
    one, again, other = (pxp.attribute(model, None, units, pxp.Random(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    values, others = torch.cat(list(one.values())), torch.cat(list(other.values()))
    assert torch.equal(values, torch.cat(list(again.values()))) and not torch.equal(values, others)
    assert 0 <= float(values.min()) and float(values.max()) < 1 and abs(float(values.mean()) - 0.5) < 0.05


PAGE = Path(__file__).resolve().parent.parent / "book" / "own-criterion.md"


def test_the_page_about_ones_own_criterion_runs():
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf8"), re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 3 and list(names["curves"]) == ["L1()", "Sensitivity()", repr(pxp.LRP("epsilon"))]
    model, x, labels, units = network("resnet")
    found = pxp.attribute(model, None, units, names["L1"]())
    twin = replica(model)
    fold_batch_norm(twin, units.trace)
    modules = dict(twin.named_modules())
    assert all(relative(found[name], modules[name].weight.abs().sum((1, 2, 3)).double()) < 1e-12 for name in units)
    assert found.samples == 0 and found.criterion == "L1()"
    _, by_hand = flows(model, x, labels, sites(units), lambda logits, y: F.cross_entropy(logits, y, reduction="sum"))
    found = pxp.attribute(model, (x, labels), units, names["Sensitivity"]())
    for name in units:
        assert relative(found[name], by_hand[name].abs().sum((2, 3)).mean(0)) < 1e-12
    assert found.samples == len(x)
    # what only asks for gradients explains inputs too
    start = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(start), labels, reduction="sum"), start)
    assert relative(pxp.heatmap(model, x, labels, names["Sensitivity"]()), gradient.abs()) < 1e-12


class Gives(pxp.Criterion):
    """Yields what it is told."""

    def __init__(self, make) -> None:
        self.make = make

    def values(self, probe):
        yield self.make({name: torch.ones(2, 1, layer.size) for name, layer in probe.units.items()})

    def __repr__(self) -> str:
        return "Gives()"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda found: dict(list(found.items())[1:]), r"the values of Gives\(\) lack layers: "),
        (lambda found: found | {"elsewhere": torch.ones(2, 1, 3)}, "name other layers: elsewhere"),
        (lambda found: {name: value[..., 1:] for name, value in found.items()}, r"must have shape \(samples, tokens, "),
        (lambda found: {name: value[0, 0] for name, value in found.items()}, r"must have shape \(samples, tokens, "),
        (
            lambda found: {name: value[: 1 + (name == next(iter(found)))] for name, value in found.items()},
            "with as many samples in every layer, got",
        ),
        (lambda found: {name: value * torch.nan for name, value in found.items()}, "are NaN or infinite in layers"),
    ],
)
def test_what_a_criterion_must_give(make, message):
    model, x, labels, units = network("vgg")
    assert float(pxp.attribute(model, None, units, Gives(lambda found: found)).signed[next(iter(units))][0]) == 1
    with pytest.raises(ValueError, match=message):
        pxp.attribute(model, (x, labels), units, Gives(make))
    with pytest.raises(TypeError, match=r"Gives\(\) does not explain inputs"):
        pxp.heatmap(model, x, labels, Gives(lambda found: found))


def test_an_own_type_error_is_not_taken_for_a_missing_component():
    model, x, labels, _units = network("vgg")

    class Broken(pxp.Criterion):
        def values(self, probe):
            raise TypeError("of its own")
            yield

    with pytest.raises(TypeError, match="^of its own$"):
        pxp.heatmap(model, x, labels, Broken())


@pytest.mark.parametrize("absolute", ["token", "sample"])
def test_where_an_own_criterion_takes_absolute_values(absolute):
    model, x, labels, units = network("vgg")
    values = torch.tensor([[1.0, -3.0], [2.0, 2.0]])  # (samples, tokens)
    criterion = Gives(lambda found: {n: values[..., None].expand(2, 2, v.shape[2]) for n, v in found.items()})
    criterion.absolute = absolute
    scores = pxp.attribute(model, (x, labels), units, criterion)
    expected = {"token": 4.0, "sample": 3.0}[absolute]
    assert all(bool((scores[n] == expected).all() and (scores.signed[n] == 1).all()) for n in units)
    assert all(value.dtype == torch.float64 and value.device.type == "cpu" for value in scores.values())
