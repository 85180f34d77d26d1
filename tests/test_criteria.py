"""The criteria by hand."""

from __future__ import annotations

import pytest
import torch
from by_hand import close, flows, sites, target_sum
from conftest import network, relative
from oracle import Oracle
from torch.nn import functional as F
from vits import images_of, two_blocks

import pxp


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
        curve = pxp.pruning_curve(model, together, (images, targets), rates=(0, 0.5), cost="flops", progress=False)
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
