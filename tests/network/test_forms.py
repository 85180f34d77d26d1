"""Attentions with fewer keys or queries, of images, of channels, and with biases by distance; references by hand."""

from __future__ import annotations

import pytest
import torch
from conftest import MODES, only, relative
from oracle import scaled, straight
from test_attentions import without_columns
from timm.layers import RelPosBias, RelPosMlp
from timm.layers.attention2d import Attention2d as PlainAttention2d
from timm.layers.attention2d import MultiQueryAttention2d
from timm.layers.pos_embed_rel import RelPosBiasTf
from timm.models import (
    crossvit,
    davit,
    efficientformer,
    hiera,
    levit,
    maxxvit,
    pvt_v2,
    tiny_vit,
    twins,
    visformer,
    vision_transformer_sam,
)
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
    "SAM": lambda: Within(
        vision_transformer_sam.Attention(6, HEADS, qk_norm=True, use_rel_pos=True, input_size=SIZE), "last"
    ),
    "SAM, of another size": lambda: Within(
        vision_transformer_sam.Attention(6, HEADS, use_rel_pos=True, input_size=(3, 5)), "last"
    ),
    "SAM, without positions": lambda: Within(vision_transformer_sam.Attention(6, HEADS), "last"),
    "one key for all heads": lambda: Within(MultiQueryAttention2d(6, 8, HEADS, 4, 5, use_bias=True), "image", width=8),
    "one key, fewer": lambda: Within(MultiQueryAttention2d(6, 6, HEADS, 4, 5, query_strides=2, kv_stride=2), "image"),
    "MobileNetV4": lambda: Within(PlainAttention2d(6, num_heads=HEADS, head_first=True), "image"),
}


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = lively(MADE[name]())
    # small enough for a softmax that is neither 0 nor 1
    return model, 0.3 * torch.randn(2, HIGH * WIDE, 6, dtype=torch.float64), torch.tensor([0, 2])


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    std = (x.var(-1, correction=0, keepdim=True) + layer.eps).sqrt().detach()
    return (x - x.mean(-1, keepdim=True)) / std * layer.weight + layer.bias


def affine(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer or 1×1 convolution of tokens, with the BatchNorm behind it."""
    if hasattr(layer, "bn"):
        factor = layer.bn.weight / (layer.bn.running_var + layer.bn.eps).sqrt()
        return (affine(layer.linear, x) - layer.bn.running_mean) * factor + layer.bn.bias
    made = torch.einsum("ntc,dc->ntd", x, layer.weight.flatten(1))
    return made if layer.bias is None else made + layer.bias


def factors(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """AttnLRP's, of (N, tokens, heads, channels)."""
    return [scaled(q, 0.25), scaled(k, 0.25), scaled(v, 0.5)]


def mix(q: Tensor, k: Tensor, v: Tensor, added: Tensor | float = 0.0, scale: float | None = None) -> Tensor:
    q, k, v = factors(q, k, v)
    logits = torch.einsum("nqhc,nkhc->nhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale) + added
    return torch.einsum("nhqk,nkhc->nqhc", logits.softmax(-1), v).flatten(2)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1))


def pixels() -> list[tuple[int, int]]:
    return [(r, c) for r in range(HIGH) for c in range(WIDE)]


def by_distance(a: nn.Module, step: int = 1) -> Tensor:
    """(heads, queries, keys) of biases that are numbered in the order in which their distances occur."""
    seen = {}
    asked = [(r, c) for r, c in pixels() if r % step == 0 and c % step == 0]
    for r, c in pixels():
        for s, d in pixels():
            seen.setdefault((abs(r - s), abs(c - d)), len(seen))
    number = seen if isinstance(a, tiny_vit.Attention) else {(r, c): r * WIDE + c for r, c in seen}
    columns = [[number[abs(r - s), abs(c - d)] for s, d in pixels()] for r, c in asked]
    return torch.stack([torch.stack([a.attention_biases[:, i] for i in row], -1) for row in columns], 1)


def split_by_head(a: nn.Module, made: Tensor) -> tuple[Tensor, ...]:
    """Head after head, its queries, keys and values."""
    wide = heads(made)
    return wide[..., : a.key_dim], wide[..., a.key_dim : 2 * a.key_dim], wide[..., 2 * a.key_dim :]


def fewer_keys(a: nn.Module, x: Tensor) -> Tensor:
    y = torch.stack(
        [
            torch.einsum("nijc,dcij->nd", x.unflatten(1, SIZE)[:, r : r + 2, c : c + 2], a.sr.weight)
            for r in range(0, HIGH, 2)
            for c in range(0, WIDE, 2)
        ],
        1,
    )
    k, v = affine(a.kv, norm(a.norm, y + a.sr.bias)).chunk(2, -1)
    return affine(a.proj, mix(heads(affine(a.q, x)), heads(k), heads(v)))


def pooled_keys(a: nn.Module, x: Tensor) -> Tensor:
    y = x.unflatten(1, SIZE)
    y = torch.stack([y[:, r : r + 2, c : c + 3].mean((1, 2)) for r in (0, 2) for c in (0, 3)], 1)
    k, v = affine(a.kv, straight(F.gelu, norm(a.norm, affine(a.sr, y)))).chunk(2, -1)
    return affine(a.proj, mix(heads(affine(a.q, x)), heads(k), heads(v)))


def windows(a: nn.Module, x: Tensor) -> Tensor:
    """Rows 0 to 3; columns 0 to 3, then 4 and 5 with zeros behind."""
    image, out = F.pad(x.unflatten(1, SIZE), (0, 0, 0, 2)), []
    for start in (0, 4):
        q, k, v = (heads(part) for part in affine(a.qkv, image[:, :, start : start + 4].flatten(1, 2)).chunk(3, -1))
        out.append(affine(a.proj, mix(q, k, v)).unflatten(1, (4, 4)))
    return torch.cat(out, 2)[:, :, :WIDE].flatten(1, 2)


def channels(a: nn.Module, x: Tensor) -> Tensor:
    """Channel i's weights are the softmax of its keys' products with the values; queries are what is mixed."""
    q, k, v = (heads(part) for part in affine(a.qkv, x).chunk(3, -1))
    if hasattr(a, "dynamic_scale"):
        k, v, q, scale = q, k, v, x.shape[1] ** -0.5
    else:
        scale = q.shape[-1] ** -0.5
    k, v, q = factors(k, v, q)
    weights = (torch.einsum("nthi,nthj->nhij", k, v) * scale).softmax(-1)
    return affine(a.proj, torch.einsum("nhij,nthj->nthi", weights, q).flatten(2))


def with_biases(a: nn.Module, x: Tensor) -> Tensor:
    y = norm(a.norm, x) if isinstance(a, tiny_vit.Attention) else x
    mixed = mix(*split_by_head(a, affine(a.qkv, y)), by_distance(a))
    if isinstance(a, levit.Attention):
        return affine(a.proj.ln, straight(F.hardswish, mixed))
    return affine(a.proj, mixed)


def fewer_queries(a: nn.Module, x: Tensor) -> Tensor:
    q = heads(affine(a.q.ln, x.unflatten(1, SIZE)[:, ::2, ::2].flatten(1, 2)))
    kv = heads(affine(a.kv, x))
    mixed = mix(q, kv[..., : a.key_dim], kv[..., a.key_dim :], by_distance(a, 2))
    return affine(a.proj.ln, straight(F.hardswish, mixed))


def first_asks(a: nn.Module, x: Tensor) -> Tensor:
    return affine(a.proj, mix(heads(affine(a.wq, x[:, :1])), heads(affine(a.wk, x)), heads(affine(a.wv, x))))


def largest_queries(a: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (heads(part) for part in affine(a.qkv, x).chunk(3, -1))
    q = q.unflatten(1, (4, 6))
    which = q.argmax(1, keepdim=True)
    return affine(a.proj, mix(q.gather(1, which)[:, 0], k, v))


def one_key(a: nn.Module, x: Tensor) -> Tensor:
    k, v = (affine(part.proj, x)[:, :, None].expand(-1, -1, HEADS, -1) for part in (a.key, a.value))
    return affine(a.output.proj, mix(heads(affine(a.query.proj, x)), k, v))


def of_an_image(a: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (heads(part) for part in affine(a.qkv, x).chunk(3, -1))
    return affine(a.proj, mix(q, k, v))


def head_by_head(a: nn.Module, x: Tensor) -> Tensor:
    """With a bias from a small network of logarithmic distances, or from a table of them."""
    added = torch.zeros(HEADS, HIGH * WIDE, HIGH * WIDE, dtype=torch.float64)
    for i, (r, c) in enumerate(pixels()):
        for j, (s, d) in enumerate(pixels()):
            if hasattr(a.rel_pos, "mlp"):
                added[:, i, j] = a.rel_pos.mlp(a.rel_pos.rel_coords_log[r - s + HIGH - 1, c - d + WIDE - 1])
            else:
                entry = (r - s + HIGH - 1) * (2 * WIDE - 1) + c - d + WIDE - 1
                added[:, i, j] = a.rel_pos.relative_position_bias_table[entry]
    q, k, v = heads(affine(a.qkv, x)).chunk(3, -1)
    return affine(a.proj, mix(q, k, v, added.detach()))


def decomposed(a: nn.Module, x: Tensor) -> Tensor:
    """A query's product with a vector of the distance: a layer, all of whose relevance is the query's."""
    q, k, v = (heads(part) for part in affine(a.qkv, x).chunk(3, -1))
    q, k = norm(a.q_norm, q), norm(a.k_norm, k)
    asked = scaled(q, 0.5)
    added = torch.stack(
        [
            torch.stack(
                [asked[:, i] @ (a.rel_pos_h[r - s + HIGH - 1] + a.rel_pos_w[c - d + WIDE - 1]) for s, d in pixels()],
                -1,
            )
            for i, (r, c) in enumerate(pixels())
        ],
        -2,
    )
    return affine(a.proj, mix(q, k, v, added))


BY_HAND = {
    "DaViT, channels": channels, "DaViT v2, channels": channels, "Twins, windows": windows, "Twins": fewer_keys,
    "PVT v2": fewer_keys, "PVT v2, pooled": pooled_keys, "TinyViT": with_biases, "EfficientFormer": with_biases,
    "LeViT": with_biases, "LeViT, images": with_biases, "LeViT, fewer queries": fewer_queries,
    "Visformer": of_an_image, "CoAtNet": head_by_head, "MaxViT": head_by_head, "CrossViT": first_asks,
    "Hiera, fewer queries": largest_queries, "SAM": decomposed, "one key for all heads": one_key,
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_relevance_is_that_of_the_attention_written_out(name):
    model, x, targets = made(name)
    point = x.clone().requires_grad_()
    logits = model.out(BY_HAND[name](model.inner, model.inp(point)).mean(1))
    assert relative(logits.detach(), model(x).detach()) < 1e-12
    (gradient,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), point)
    found = pxp.heatmap(model, x, targets, pxp.LRP(pxp.Epsilon(1e-14)))
    assert relative(found, (point * gradient).detach()) < 1e-8


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
    pxp.pruning_curve(model, scores, (x, targets), rates=(0, 0.5), progress=False, allow_shared=True)
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


def test_another_scale_is_refused():
    torch.manual_seed(0)
    model = lively(Within(davit.ChannelAttentionV2(6, HEADS, dynamic_scale=False)))
    x = 0.3 * torch.randn(2, HIGH * WIDE, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"copy of it computes something else, first at 'inner.proj'"):
        pxp.heatmap(model, x, torch.tensor([0, 1]), pxp.LRP())


def test_costs_of_fewer_keys_and_of_one_key_by_hand():
    model, x, _ = made("PVT v2")
    head = next(iter(pxp.find_components(model, "head", example=x).values()))
    queries, keys, width, channels = HIGH * WIDE, HIGH * WIDE // 4, 6, 2
    assert head.parameters == 4 * channels * width + 3 * channels
    products = 2 * 2 * queries * keys * channels
    assert head.flops == 2 * 2 * channels * width * (queries + keys) + products
    model, x, _ = made("one key for all heads")
    head = next(iter(pxp.find_components(model, "head", example=x).values()))
    assert head.parameters == 4 * 6 + 4 + 5 * 8  # the key and the values stay
    assert head.flops == 2 * queries * (4 * 6 + 5 * 8) + 2 * queries * queries * (4 + 5)


def test_filters_of_projections_are_no_components():
    model, x, _ = made("Visformer")
    with pytest.raises(ValueError, match="no components of kind 'filter'"):
        pxp.find_components(model, "filter", example=x)
