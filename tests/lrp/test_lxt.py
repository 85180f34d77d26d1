"""Heatmaps of transformers, against the efficient formulation of LXT written out."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import relative
from oracle import scaled, straight
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import VisionTransformer
from vits import MODELS, images_of, lively

import pxp


def plain_norm(norm: nn.LayerNorm | nn.Identity, x: Tensor) -> Tensor:
    if isinstance(norm, nn.Identity):
        return x
    std = (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt().detach()
    return (x - x.mean(-1, keepdim=True)) / std * norm.weight + norm.bias


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor, cp: bool) -> Tensor:
    q, k, v = (q.detach(), k.detach(), v) if cp else (scaled(q, 0.25), scaled(k, 0.25), scaled(v, 0.5))
    return torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, -1) @ v


def by_lxt_torchvision(model: VisionTransformer, x: Tensor, cp: bool) -> Tensor:
    x = model._process_input(x)
    x = torch.cat([model.class_token.expand(len(x), -1, -1), x], 1) + model.encoder.pos_embedding
    for block in model.encoder.layers:
        y, mha = plain_norm(block.ln_1, x), block.self_attention
        heads = (len(x), x.shape[1], block.num_heads, -1)
        q, k, v = (
            F.linear(y, weight, bias).view(heads).transpose(1, 2)
            for weight, bias in zip(mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3), strict=True)
        )
        mixed = attention_by_hand(q, k, v, cp).transpose(1, 2).flatten(2)
        x = x + F.linear(mixed, mha.out_proj.weight, mha.out_proj.bias)
        x = x + block.mlp[3](straight(F.gelu, block.mlp[0](plain_norm(block.ln_2, x))))
    return model.heads(plain_norm(model.encoder.ln, x)[:, 0])


def rotated(x: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    """Each pair of channels turned by its place's angle; without the ``prefix`` tokens, which have no place."""
    sin, cos = rope.chunk(2, -1)
    still, x = x[:, :, :prefix], x[:, :, prefix:]
    if half:
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return torch.cat([still, x * cos + turned * sin], 2)


def attention_of_timm(attention: nn.Module, x: Tensor, rope: Tensor | None, cp: bool) -> Tensor:
    if attention.qkv is None:
        parts = [getattr(attention, f"{part}_proj")(x) for part in "qkv"]
    else:
        biases = [getattr(attention, f"{part}_bias", None) for part in "qkv"]
        parts = attention.qkv(x).chunk(3, -1)
        parts = [part if bias is None else part + bias for part, bias in zip(parts, biases, strict=True)]
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in parts)
    q, k = plain_norm(attention.q_norm, q), plain_norm(attention.k_norm, k)
    if rope is not None:
        q, k = (rotated(part, rope, attention.num_prefix_tokens, attention.rotate_half) for part in (q, k))
    mixed = plain_norm(attention.norm, attention_by_hand(q, k, v, cp).transpose(1, 2).flatten(2))
    if getattr(attention, "gate", None) is not None:
        mixed = mixed * attention.gate(x).sigmoid().detach()
    return attention.proj(mixed)


def mlp_of_timm(mlp: nn.Module, x: Tensor) -> Tensor:
    if isinstance(mlp, timm.layers.SwiGLU):
        x = scaled(straight(mlp.act, mlp.fc1_g(x)) * mlp.fc1_x(x), 0.5)
    elif isinstance(mlp, timm.layers.GluMlp):
        gate, value = mlp.fc1(x).chunk(2, -1)
        x = scaled(straight(mlp.act, gate) * value, 0.5)
    else:
        x = straight(mlp.act, mlp.fc1(x))
    return mlp.fc2(plain_norm(mlp.norm, x))


def by_lxt_timm(model: nn.Module, x: Tensor, cp: bool) -> Tensor:
    """timm's VisionTransformer, and its Eva, which has rotary embeddings."""
    tokens = model._pos_embed(model.patch_embed(x))
    x, rope = tokens if isinstance(tokens, tuple) else (tokens, None)
    x = plain_norm(model.norm_pre, x)
    for block in model.blocks:
        scales = (getattr(block, "gamma_1", None), getattr(block, "gamma_2", None))
        first, second = (1.0 if scale is None else scale for scale in scales)
        ls1, ls2 = (getattr(block, name, nn.Identity()) for name in ("ls1", "ls2"))
        x = x + ls1(first * attention_of_timm(block.attn, plain_norm(block.norm1, x), rope, cp))
        x = x + ls2(second * mlp_of_timm(block.mlp, plain_norm(block.norm2, x)))
    x = plain_norm(model.norm, x)
    x = x[:, model.num_prefix_tokens :].mean(1) if model.global_pool == "avg" else x[:, 0]
    return model.head(plain_norm(model.fc_norm, x))


@pytest.mark.parametrize("softmax_rule", ["attnlrp", "cp"])
@pytest.mark.parametrize(
    ("make", "run"),
    [
        (
            lambda: VisionTransformer(224, 16, 3, 12, 768, 3072, num_classes=4),
            by_lxt_torchvision,
        ),  # a quarter of ViT-B/16
        (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=4), by_lxt_timm),
        (lambda: timm.create_model("deit3_small_patch16_224", num_classes=4, depth=3), by_lxt_timm),
    ],
    ids=["vit_b_16", "vit_tiny", "deit3"],
)
def test_heatmaps_equal_lxts_efficient_formulation(make, run, softmax_rule):
    model = lively(make())
    if softmax_rule == "attnlrp" and isinstance(model, VisionTransformer):
        model.double()
    images, targets = images_of(model, 1)
    images.requires_grad_()
    logits = run(model, images, softmax_rule == "cp")
    assert relative(logits.detach(), model(images).detach()) < 1e-10
    (gradient,) = torch.autograd.grad(logits[0, targets[0]], images)
    found = pxp.heatmap(model, images.detach(), targets, pxp.LRP(pxp.Epsilon(1e-14), softmax=softmax_rule))
    assert relative(found, images.detach() * gradient) < 1e-7


@pytest.mark.parametrize("softmax_rule", ["attnlrp", "cp"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "torchvision"])
def test_heatmaps_of_every_kind_of_timm_model_equal_lxts_formulation(name, softmax_rule):
    model = lively(MODELS[name]())
    images, targets = images_of(model)
    images.requires_grad_()
    logits = by_lxt_timm(model, images, softmax_rule == "cp")
    assert relative(logits.detach(), model(images).detach()) < 1e-12
    (gradient,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), images)
    found = pxp.heatmap(model, images.detach(), targets, pxp.LRP(pxp.Epsilon(1e-14), softmax=softmax_rule))
    assert relative(found, images.detach() * gradient) < 1e-9


@pytest.mark.parametrize("softmax_rule", ["attnlrp", "cp"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_gate_behind_the_heads_is_constant(softmax_rule, fused):
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.out = nn.Linear(6, 12), nn.Linear(12, 4)
            self.attn = timm.models.eva.EvaAttention(
                12, 3, qkv_fused=fused, num_prefix_tokens=0, norm_layer=nn.LayerNorm, qk_norm=True, gated=True
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attn(self.inp(x)).mean(1))

    model = lively(Gated())
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    logits = model.out(attention_of_timm(model.attn, model.inp(x), None, softmax_rule == "cp").mean(1))
    assert relative(logits.detach(), model(x).detach()) < 1e-12
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), x)
    found = pxp.heatmap(model, x.detach(), 1, pxp.LRP(pxp.Epsilon(1e-14), softmax=softmax_rule))
    assert relative(found, x.detach() * gradient) < 1e-9
