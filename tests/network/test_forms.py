"""Attentions with fewer keys or queries, of images, of channels, and with biases by distance; references by hand."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from conftest import MODES, drawn, only, relative
from oracle import scaled, straight
from test_attentions import without_columns
from timm.layers import RelPosBias, RelPosMlp
from timm.layers.attention2d import Attention2d as PlainAttention2d
from timm.layers.attention2d import MultiQueryAttention2d
from timm.layers.pos_embed_rel import RelPosBiasTf
from timm.models import crossvit, davit, efficientformer, hiera, levit, maxxvit, pvt_v2, tiny_vit, twins, visformer
from torch import Tensor, nn
from torch.nn import functional as F
from vits import lively

import pxp
from pxp.network.attention import Described
from pxp.network.replica import replica

HEADS, HIGH, WIDE = 3, 4, 6  # of images of 4 by 6 pixels, with 6 channels


class Within(nn.Module):
    """An attention between two linear layers, its tokens in the form that it takes."""

    def __init__(self, inner: nn.Module, form: str = "tokens", *options, width: int = 6) -> None:
        super().__init__()
        self.inp, self.inner, self.out = nn.Linear(6, 6), inner, nn.Linear(width, 4)
        self.form, self.options = form, options

    def forward(self, x: Tensor) -> Tensor:
        y = self.inp(x)
        if self.form == "image":
            made = self.inner(y.transpose(1, 2).unflatten(2, (HIGH, WIDE)), *self.options).flatten(2).transpose(1, 2)
        elif self.form == "last":
            made = self.inner(y.unflatten(1, (HIGH, WIDE)), *self.options).flatten(1, 2)
        else:
            made = self.inner(y, *self.options)
        return self.out(made.mean(1))


SIZE = (HIGH, WIDE)


def relpos(cls: type, **options):
    return lambda num_heads, **_: cls(window_size=SIZE, num_heads=num_heads, **options)


def linear_pvt() -> nn.Module:
    attention = pvt_v2.Attention(6, HEADS, linear_attn=True)
    attention.pool = nn.AdaptiveAvgPool2d(2)
    return attention


MADE = {
    "DaViT": lambda: Within(davit.WindowAttention(6, (2, 2), HEADS)),
    "DaViT, channels": lambda: Within(davit.ChannelAttention(6, HEADS, qkv_bias=True)),
    "DaViT v2, channels": lambda: Within(davit.ChannelAttentionV2(6, HEADS)),
    "Twins, windows": lambda: Within(twins.LocallyGroupedAttn(6, HEADS, ws=4), "tokens", SIZE),
    "Twins": lambda: Within(twins.GlobalSubSampleAttn(6, HEADS, sr_ratio=2), "tokens", SIZE),
    "Twins, all tokens": lambda: Within(twins.GlobalSubSampleAttn(6, HEADS), "tokens", SIZE),
    "PVT v2": lambda: Within(pvt_v2.Attention(6, HEADS, sr_ratio=2), "tokens", SIZE),
    "PVT v2, pooled": lambda: Within(linear_pvt(), "tokens", SIZE),
    "TinyViT": lambda: Within(tiny_vit.Attention(6, 4, HEADS, attn_ratio=2, resolution=SIZE)),
    "EfficientFormer": lambda: Within(efficientformer.Attention(6, 4, HEADS, attn_ratio=1.5, resolution=SIZE)),
    "LeViT": lambda: Within(levit.Attention(6, 4, HEADS, attn_ratio=2, resolution=SIZE, act_layer=nn.Hardswish)),
    "LeViT, images": lambda: Within(
        levit.Attention(6, 4, HEADS, attn_ratio=2, resolution=SIZE, use_conv=True, act_layer=nn.Hardswish), "image"
    ),
    "LeViT, fewer queries": lambda: Within(
        levit.AttentionDownsample(6, 8, 4, HEADS, resolution=SIZE, act_layer=nn.Hardswish), width=8
    ),
    "Visformer": lambda: Within(visformer.Attention(6, HEADS, head_dim_ratio=1.5), "image"),
    "CoAtNet": lambda: Within(maxxvit.Attention2d(6, 12, 4, rel_pos_cls=relpos(RelPosBias)), "image", width=12),
    "CoAtNet, part by part": lambda: Within(maxxvit.Attention2d(6, dim_head=2, head_first=False), "image"),
    "MaxViT": lambda: Within(maxxvit.AttentionCl(6, dim_head=2, rel_pos_cls=relpos(RelPosMlp, hidden_dim=5)), "last"),
    "MaxViT, a sigmoid": lambda: Within(
        maxxvit.AttentionCl(6, dim_head=2, head_first=False, rel_pos_cls=relpos(RelPosMlp, mode="swin")), "last"
    ),
    "MaxViT of TensorFlow": lambda: Within(
        maxxvit.AttentionCl(6, dim_head=2, head_first=False, rel_pos_cls=relpos(RelPosBiasTf)), "last"
    ),
    "CrossViT": lambda: Within(crossvit.CrossAttention(6, HEADS, qkv_bias=True)),
    "Hiera": lambda: Within(hiera.MaskUnitAttention(6, 12, HEADS), width=12),
    "Hiera, units": lambda: Within(hiera.MaskUnitAttention(6, 12, HEADS, 2, 3, True), width=12),
    "Hiera, fewer queries": lambda: Within(hiera.MaskUnitAttention(6, 12, HEADS, 4), width=12),
    "one key for all heads": lambda: Within(MultiQueryAttention2d(6, 8, HEADS, 4, 5, use_bias=True), "image", width=8),
    "one key, fewer": lambda: Within(MultiQueryAttention2d(6, 6, HEADS, 4, 5, query_strides=2, kv_stride=2), "image"),
    "MobileNetV4": lambda: Within(PlainAttention2d(6, num_heads=HEADS, head_first=True), "image"),
}


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = lively(MADE[name]())
    return model, torch.randn(2, HIGH * WIDE, 6, dtype=torch.float64), torch.tensor([0, 2])


@pytest.mark.parametrize("name", MADE)
def test_heads_are_masked_and_taken_out(name, untouched):
    model, x, targets = made(name)
    untouched(model)
    units = pxp.find_components(model, "head", example=x)
    assert isinstance(replica(model).inner, Described) and units.total == HEADS
    before = model(x).detach()
    for fused in (True, False):
        if hasattr(model.inner, "fused_attn"):
            model.inner.fused_attn = fused
        assert relative(model(x).detach(), before) < 1e-12
        assert relative(replica(model)(x).detach(), before) < 1e-13
        for index in range(HEADS):
            expected = without_columns(model, "inner", index)(x).detach()
            assert relative(expected, before) > 1e-6
            for mode in MODES.values():
                with mode(), pxp.masked(model, only(units, "inner", index)):
                    assert relative(model(x).detach(), expected) < 1e-12
                    assert mode is MODES["inference"] or relative(replica(model)(x).detach(), expected) < 1e-12
    if hasattr(model.inner, "fused_attn"):
        model.inner.fused_attn = True
    scores = pxp.attribute(model, (x, targets), units, pxp.LRP("gamma"))
    singly = [pxp.attribute(model, (x[i : i + 1], targets[i : i + 1]), units, pxp.LRP("gamma")) for i in range(2)]
    assert relative(scores["inner"], sum(one["inner"] for one in singly) / 2) < 1e-10
    pxp.pruning_curve(model, scores, (x, targets), rates=(0, 0.5), progress=False)
    for count in (1, 2, 3):
        mask = scores.select(count=count)
        with pxp.masked(model, mask):
            expected = model(x).detach()
        small = pxp.compact(model, mask, example=x)
        assert relative(small(x).detach(), expected) < 1e-12
        if count < 3:
            left = pxp.find_components(small, "head", example=x)
            assert left.total == HEADS - count
            found = pxp.attribute(small, (x, targets), left, pxp.LRP(pxp.Epsilon(1e-12)))
            with pxp.masked(model, mask):
                own = pxp.attribute(model, (x, targets), units, pxp.LRP(pxp.Epsilon(1e-12)))
            assert relative(next(iter(found.values())), own["inner"][mask["inner"]]) < 1e-9
