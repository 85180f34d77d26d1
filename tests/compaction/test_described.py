"""Compaction of what is described by its class: attentions with relative positions, and gated MLPs."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import drawn, relative
from torch import Tensor, nn
from torchvision.models.maxvit import MaxVit
from vits import GATED, MODELS, POSITIONED, Around, images_of, lively, positioned

import pxp

SHARED = "BEiT, one bias for all"
ALL = ("head", "neuron", "mlp_output")
GATED_MLPS = {
    "SwiGLU": lambda: timm.layers.SwiGLU(6, 8),
    "SwiGLU without biases": lambda: timm.layers.SwiGLU(6, 8, bias=False),
    "packed": lambda: timm.layers.SwiGLUPacked(6, 16),
    "gate last": lambda: timm.layers.GluMlp(6, 16),
}
NORMED = {
    "SwiGLU": lambda: timm.layers.SwiGLU(6, 8, norm_layer=nn.LayerNorm),
    "packed": lambda: timm.layers.GluMlp(6, 16, norm_layer=nn.LayerNorm),
}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def check(model: nn.Module, x: Tensor, mask: pxp.Mask) -> nn.Module:
    with pxp.masked(model, mask), torch.no_grad():
        expected = model(x)
    small = pxp.compact(model, mask, example=x)
    assert relative(small(x).detach(), expected) < 1e-12
    assert parameters(small) < parameters(model)
    return small


@pytest.mark.parametrize("kinds", ["head", ALL], ids=str)
@pytest.mark.parametrize("name", [name for name in POSITIONED if name != SHARED])
def test_heads_take_their_relative_positions_with_them(name, kinds, untouched):
    model, x, labels = positioned(name)
    units = pxp.find_components(untouched(model), kinds, example=x)
    for seed in (0, 1):
        mask = drawn(units, 0.5, seed)
        small = check(model, x, mask)
        heads = pxp.find_components(small, "head", example=x)
        assert heads.total == sum(int(kept.sum()) for layer, kept in mask.items() if units[layer].kind == "head")
    scores = pxp.attribute(small, (x, labels), heads, pxp.LRP(pxp.Epsilon(1e-12)))
    with pxp.masked(model, mask):
        expected = pxp.attribute(model, (x, labels), units.only(*heads), pxp.LRP(pxp.Epsilon(1e-12)))
    for layer in heads:
        assert relative(scores[layer], expected[layer][mask[layer]]) < 1e-9


def test_heads_of_maxvit(untouched):
    torch.manual_seed(0)
    model = untouched(lively(MaxVit((32, 32), 8, 2, [8, 16], [1, 1], 4, 0.1, num_classes=4)))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    check(model, x, drawn(pxp.find_components(model, ("head", "neuron"), example=x), 0.5))


def test_a_layer_without_heads_is_the_bias_of_its_projection():
    model, x, _ = positioned("timm's Swin v2")
    units = pxp.find_components(model, "head", example=x)
    first = next(iter(units))
    kept = {name: torch.full((layer.size,), name != first) for name, layer in units.items()}
    small = check(model, x, pxp.Mask(units, kept))
    assert list(pxp.find_components(small, "head", example=x)) == list(units)[1:]


def test_a_bias_for_all_attentions_is_refused():
    model, x, _ = positioned(SHARED)
    units = pxp.find_components(model, "head", example=x)
    with pytest.raises(ValueError, match=r"'blocks.0.attn' cannot be taken out: it takes a mask or a bias with a part"):
        pxp.compact(model, drawn(units, 0.5, 0), example=x)
    check(model, x, drawn(pxp.find_components(model, "neuron", example=x), 0.5, 0))


@pytest.mark.parametrize("kinds", ["neuron", ("neuron", "mlp_output")], ids=str)
@pytest.mark.parametrize("name", GATED_MLPS)
def test_units_of_gated_mlps_are_gone_from_every_layer(name, kinds, untouched):
    torch.manual_seed(0)
    model, x = untouched(lively(Around(GATED_MLPS[name]()))), torch.randn(2, 5, 6, dtype=torch.float64)
    units = pxp.find_components(model, kinds, example=x)
    for seed in (0, 1, 2):
        mask = drawn(units, 0.5, seed)
        small, number = check(model, x, mask), int(mask["inner"].sum())
        incoming = 2 * number if hasattr(small.inner, "fc1") else number
        assert {part.out_features for own, part in small.inner.named_children() if own.startswith("fc1")} == {incoming}
        assert small.inner.fc2.in_features == number
        found = pxp.find_components(small, "neuron", example=x)  # it is a gated MLP still
        assert {layer: each.size for layer, each in found.items()} == {"inner": number}
        again = check(small, x, drawn(found, 0.5, seed)) if number > 2 else small
        assert not any("hidden" in own for own, _ in again.named_modules())
    nothing = pxp.Mask(units, {layer: torch.zeros(each.size, dtype=torch.bool) for layer, each in units.items()})
    check(model, x, nothing)


@pytest.mark.parametrize("name", NORMED)
def test_units_behind_a_norm_are_refused(name):
    model, x = lively(Around(NORMED[name]())), torch.randn(2, 5, 6, dtype=torch.float64)
    units = pxp.find_components(model, ("neuron", "mlp_output"), example=x)
    with pytest.raises(ValueError, match=r"units of 'inner' cannot be taken out: 'norm' \(LayerNorm\) takes all of"):
        pxp.compact(model, drawn(units, 0.5, 0), example=x)
    check(model, x, drawn(units.of_kind("mlp_output"), 0.5, 0))


@pytest.mark.parametrize("name", GATED - {"eva02 unfused"})
def test_transformers_with_gated_mlps(name, untouched, tmp_path):
    model = untouched(lively(MODELS[name]()))
    x, _ = images_of(model, 2)
    for kinds in ("neuron", ALL):
        small = check(model, x, drawn(pxp.find_components(model, kinds, example=x), 0.5, 0))
        pxp.save_compact(small, tmp_path / "small.safetensors")
        loaded = pxp.load_compact(tmp_path / "small.safetensors", model)
        assert torch.equal(loaded(x), small(x))
