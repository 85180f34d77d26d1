"""Which rule each layer gets, and which networks are refused."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from conftest import relative, same, snapshot
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import VisionTransformer
from vits import Around, Encoder, Wrapped, images_of, lively, mha, small_timm, two_blocks

import pxp


def test_depth_groups_of_vit_b_16_are_the_papers():
    model = torchvision.models.vit_b_16()
    units = pxp.find_components(model, ("head", "neuron", "mlp_output"))
    assert units.of_kind("head").total == 144
    assert units.of_kind("neuron").total + units.of_kind("mlp_output").total == 46_080
    groups = pxp.depth_groups(model, units.trace)
    blocks = {"low": range(3), "middle": range(3, 9), "high": range(9, 12)}
    for group, indices in blocks.items():
        for index in indices:
            inside = [g for name, g in groups.items() if name.startswith(f"encoder.layers.encoder_layer_{index}.")]
            assert inside == [group] * 6
    assert groups["conv_proj"] == "low" and groups["heads.head"] == "fc" and len(groups) == 12 * 6 + 2


def test_the_composite_shows_every_rule():
    text = repr(pxp.LRP("epsilon", low="zplus", softmax="cp").composite(two_blocks()))
    assert "encoder.layers.encoder_layer_0.self_attention.q_proj" in text and "ZPlus" in text


class Functional(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Layered(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def test_files_know_what_has_no_rule(tmp_path):
    model = lively(Around(Functional(torch.exp)))
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    behind = nn.Sequential(nn.Conv1d(5, 5, 1).double(), model)
    pxp.attribute(behind, None, pxp.find_components(behind, example=x), pxp.Random()).save(tmp_path / "scores")
    trace = pxp.Scores.load(tmp_path / "scores").units.trace
    assert trace.functions == {"1.inner": ("exp",)} and not trace.followed
    gated = nn.Sequential(nn.Conv1d(5, 5, 1), Functional(lambda x: x * torch.sigmoid(x))).double()
    units = pxp.find_components(gated, example=x)
    pxp.attribute(gated, None, units, pxp.Random()).save(tmp_path / "scores")
    assert pxp.Scores.load(tmp_path / "scores").units.trace == units.trace and units.trace.followed


@pytest.mark.parametrize(
    "make",
    [
        lambda: Functional(F.relu), lambda: Functional(torch.tanh), lambda: Layered(6), lambda: nn.GELU(),
        lambda: timm.layers.GELU(), lambda: timm.layers.LayerNorm(6), lambda: timm.layers.RmsNorm(6),
        lambda: timm.layers.GluMlp(6, 8), lambda: timm.layers.SwiGLU(6, 8), lambda: nn.SiLU(), lambda: nn.RMSNorm(6),
    ],
)  # fmt: skip
def test_modules_with_a_rule_and_functional_relu_are_accepted(make):
    model = lively(Around(make()))
    assert bool(pxp.heatmap(model, torch.randn(2, 5, 6, dtype=torch.float64), 1).isfinite().all())


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_encoder_with_gelu_by_name_is_that_with_the_module(norm_first, untouched):
    torch.manual_seed(0)
    named, with_module = Encoder("gelu", norm_first=norm_first), Encoder(nn.GELU(), norm_first=norm_first)
    named = untouched(lively(named))
    with_module.double().eval().load_state_dict(named.state_dict())
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    found = pxp.heatmap(named, x, 1)
    assert torch.equal(found, pxp.heatmap(with_module, x, 1))
    for layer in with_module.encoder.layers:
        layer.activation = Functional(F.gelu)
    assert relative(pxp.heatmap(with_module, x, 1), found) < 1e-12


def test_depth_groups_of_parallel_and_of_unusual_blocks():
    model = small_timm("vit_small_patch16_18x2_224", embed_dim=24, num_heads=3, mlp_ratio=1)()
    groups = pxp.depth_groups(model, pxp.find_components(model, "head").trace)
    for layer, group in groups.items():
        expected = {"blocks.0": "low", "blocks.1": "high", "patch_embed": "low", "head": "fc"}
        assert group == next(found for start, found in expected.items() if layer.startswith(start)), layer

    class Pairs(nn.Module):
        """Blocks that are lists of an attention and its MLP."""

        def __init__(self) -> None:
            super().__init__()
            self.inp, self.layers, self.out = nn.Linear(6, 6), nn.ModuleList(), nn.Linear(6, 4)
            for _ in range(3):
                mlp = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
                self.layers.append(nn.ModuleList([mha(), mlp]))

        def forward(self, x: Tensor) -> Tensor:
            x = self.inp(x)
            for attention, mlp in self.layers:
                x = x + attention(x, x, x)[0]
                x = x + mlp(x)
            return self.out(x.mean(1))

    x = torch.randn(1, 5, 6)
    model = Pairs()
    groups = pxp.depth_groups(model, pxp.find_components(model, "head", example=x).trace)
    assert [groups[f"layers.{i}.1.0"] for i in range(3)] == ["low", "middle", "high"]
    assert groups["inp"] == "low" and groups["layers.1.0.q_proj"] == "middle" and groups["out"] == "fc"
    # an attention without a block around it
    model = Wrapped(mha())
    groups = pxp.depth_groups(model, pxp.find_components(model, "head", example=x).trace)
    assert groups["inp"] == "low" and groups["attention.q_proj"] == "low" and groups["out"] == "fc"


def test_models_without_heads_and_without_a_kind():
    with pytest.raises(ValueError, match="no components of kind 'head'"):
        pxp.find_components(pxp.load_model("vgg"), "head")
    with pytest.raises(ValueError, match="kind must be one or several different kinds"):
        pxp.find_components(two_blocks(), ("head", "head"))
    with pytest.raises(ValueError, match="unknown kind 'heads'"):
        pxp.find_components(two_blocks(), "heads")


def test_nothing_global_is_changed():
    model = two_blocks()
    model.train()
    images, targets = images_of(model)
    classes = (nn.MultiheadAttention, nn.LayerNorm, nn.GELU, VisionTransformer, timm.layers.Attention, nn.Linear)
    before = [dict(vars(each)) for each in classes]
    functions = (F.scaled_dot_product_attention, F.softmax, F.multi_head_attention_forward, torch.softmax)
    flags = (torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled(), torch.get_default_dtype())
    state = snapshot(model)
    units = pxp.find_components(model, ("head", "neuron"))
    scores = pxp.attribute(model, (images, targets), units, pxp.LRP("gamma", softmax="zplus"))
    pxp.pruning_curve(model, scores, (images, targets), rates=(0, 0.5), progress=False, allow_shared=True)
    pxp.heatmap(model, images, targets, pxp.LRP(softmax="cp"))
    with pytest.raises(ValueError, match="NaN"):
        pxp.attribute(model, (images * torch.nan, targets), units, pxp.LRP())
    assert same(state, snapshot(model))
    assert [dict(vars(each)) for each in classes] == before
    assert functions == (F.scaled_dot_product_attention, F.softmax, F.multi_head_attention_forward, torch.softmax)
    assert flags == (torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled(), torch.get_default_dtype())
