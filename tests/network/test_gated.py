"""Hidden units of gated MLPs are what the last layer reads."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from conftest import MODES, only, relative
from oracle import scaled, straight
from torch import Tensor, nn
from vits import Around, lively

import pxp
from pxp.network.replica import replica
from pxp.sweep import silenced

MAKE = {
    "SwiGLU": lambda: timm.layers.SwiGLU(6, 8),
    "SwiGLU with a norm": lambda: timm.layers.SwiGLU(6, 8, norm_layer=nn.LayerNorm),
    "packed": lambda: timm.layers.SwiGLUPacked(6, 16),
    "gate last": lambda: timm.layers.GluMlp(6, 16, norm_layer=nn.LayerNorm),
}


def hidden_by_hand(mlp: nn.Module, x: Tensor) -> Tensor:
    """What the last layer reads; a sigmoid is a constant, any other product halved, the norm's deviation constant."""
    if isinstance(mlp, timm.layers.SwiGLU):
        gate, value = mlp.fc1_g(x), mlp.fc1_x(x)
    else:
        gate, value = mlp.fc1(x).chunk(2, -1)[:: -1 if mlp.gate_last else 1]
    if isinstance(mlp.act, nn.Sigmoid):
        hidden = mlp.act(gate).detach() * value
    else:
        hidden = scaled(straight(mlp.act, gate) * value, 0.5)
    if isinstance(mlp.norm, nn.LayerNorm):
        std = (hidden.var(-1, correction=0, keepdim=True) + mlp.norm.eps).sqrt().detach()
        hidden = (hidden - hidden.mean(-1, keepdim=True)) / std * mlp.norm.weight + mlp.norm.bias
    return hidden


def without_columns(model: nn.Module, index: int) -> nn.Module:
    other = copy.deepcopy(model)
    other.inner.fc2.weight.data[:, index] = 0
    return other


@pytest.mark.parametrize("name", MAKE)
def test_units_are_scored_and_masked_at_the_last_layers_input(name, untouched):
    torch.manual_seed(0)
    model = untouched(lively(Around(MAKE[name]())))
    x, targets = torch.randn(2, 5, 6, dtype=torch.float64), torch.tensor([0, 3])
    units = pxp.find_components(model, ("neuron", "mlp_output"), example=x)
    assert {layer: each.size for layer, each in units.items()} == {"inner": 8, "inner.fc2": 6}
    point = x.clone().requires_grad_()
    hidden = hidden_by_hand(model.inner, model.inp(point))
    logits = model.out(model.inner.fc2(hidden).mean(1))
    assert relative(logits, model(x)) < 1e-13
    target = logits.gather(1, targets[:, None]).sum()
    of_hidden, of_pixels = torch.autograd.grad(target, (hidden, point))
    criterion = pxp.LRP(pxp.Epsilon(1e-14))
    assert relative(pxp.heatmap(model, x, targets, criterion), (point * of_pixels).detach()) < 1e-9
    scores = pxp.attribute(model, (x, targets), units, criterion)
    assert relative(scores["inner"], (hidden * of_hidden).detach().abs().sum(1).mean(0)) < 1e-9
    neurons = units.of_kind("neuron")
    for index in range(8):
        expected = without_columns(model, index)(x).detach()
        for mode in MODES.values():
            with mode(), pxp.masked(model, only(neurons, "inner", index)):
                assert relative(model(x).detach(), expected) < 1e-13
        with silenced(model, only(neurons, "inner", index)) as twin, torch.no_grad():
            assert relative(twin(x), expected) < 1e-13
        assert relative(expected, model(x).detach()) > 1e-9
    with pxp.masked(model, only(neurons, "inner", 2)):  # what is masked takes no relevance
        found = pxp.attribute(model, (x, targets), neurons, criterion)["inner"]
    assert float(found[2]) == 0 and bool((found[[0, 1, *range(3, 8)]] > 0).all())


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("criterion", [pxp.Taylor(), pxp.Activation(), pxp.Magnitude(), pxp.Random()], ids=repr)
def test_every_criterion_and_curves(name, criterion):
    model = lively(Around(MAKE[name]()))
    x, targets = torch.randn(2, 5, 6, dtype=torch.float64), torch.tensor([0, 3])
    units = pxp.find_components(model, "neuron", example=x)
    scores = pxp.attribute(model, (x, targets), units, criterion)
    assert scores["inner"].shape == (8,) and scores["inner"].unique().numel() == 8
    curve = pxp.pruning_curve(model, scores, (x, targets), rates=(0, 0.5), progress=False, allow_shared=True)
    with pxp.masked(model, scores.select(0.5)):
        assert curve.runs[0][1] == pxp.accuracy(model, (x, targets))


def test_weights_and_costs_by_hand():
    for name in ("SwiGLU", "packed"):
        model = lively(Around(MAKE[name]()))
        x = torch.randn(1, 5, 6, dtype=torch.float64)
        units = pxp.find_components(model, "neuron", example=x)
        mlp, layer = model.inner, units["inner"]
        assert layer.parameters == 2 * (6 + 1) + 6 and layer.flops == 2 * 5 * (2 * 6 + 6)
        parts = (mlp.fc1_g.weight, mlp.fc1_x.weight) if name == "SwiGLU" else mlp.fc1.weight.chunk(2)
        expected = torch.cat(parts, 1).detach().norm(dim=1)
        found = pxp.attribute(model, None, units, pxp.Magnitude())["inner"]
        assert relative(found, expected) < 1e-12


def test_a_copied_replica_shows_its_own_units():
    model = lively(Around(MAKE["SwiGLU"]()))
    twin = copy.deepcopy(replica(model))
    seen = []
    twin.inner.hidden.register_forward_hook(lambda *_: seen.append(1))
    twin(torch.randn(1, 5, 6, dtype=torch.float64))
    assert seen == [1]


def test_a_gated_mlp_of_convolutions_has_no_units_but_a_rule():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), timm.layers.GluMlp(6, 8, use_conv=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 4),
    )  # fmt: skip
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="no components of kind 'neuron'"):
        pxp.find_components(model, "neuron", example=x)
    assert bool((pxp.heatmap(model, x, 1) != 0).any())
