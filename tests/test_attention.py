"""Attention with visible heads, and its rules, against the same written out by hand in the classical form R_i = Σ_j …

Nothing in the oracle uses autograd, and it distributes relevance itself, not gradients.
"""

from __future__ import annotations

import contextlib
import json
import math

import pytest
import timm
import torch
import torchvision
from conftest import randomise, relative, same, snapshot
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torchvision.models.vision_transformer import VisionTransformer

import pxp
from pxp.lrp.softmax import AttentionRule, make_softmax_rule
from pxp.network.attention import Attention
from pxp.network.replica import replica
from pxp.sweep import silenced

CONV = {"epsilon": 0.0, "gamma": 0.25}
EPS = 1e-6


def two_blocks(biases: bool = True, seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(
        image_size=12, patch_size=4, num_layers=2, num_heads=3, hidden_dim=12, mlp_dim=10, num_classes=4
    )
    return lively(model, biases)


def lively(model: nn.Module, biases: bool = True) -> nn.Module:
    """Float64, eval mode, no parameter at its initial constant (torchvision's head is all zero)."""
    randomise(model)
    for name, parameter in model.named_parameters():
        bias = name.rpartition(".")[2].endswith("bias")
        if bias and not biases:
            parameter.data.zero_()
        elif parameter.ndim == 1:
            shift = 0.0 if bias else 1.0
            parameter.data.copy_(shift + 0.3 * torch.randn_like(parameter))
        elif "token" in name or "pos_" in name:
            parameter.data.copy_(torch.zeros_like(parameter) if not biases else 0.3 * torch.randn_like(parameter))
        elif "in_proj" in name or not parameter.any():
            parameter.data.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model


def images_of(model: nn.Module, samples: int = 2) -> tuple[Tensor, Tensor]:
    config = getattr(model, "default_cfg", {})
    side = getattr(model, "image_size", None) or model.patch_embed.img_size[0]
    channels = 3 if config or not hasattr(model, "conv_proj") else model.conv_proj.in_channels
    torch.manual_seed(1)
    return torch.randn(samples, channels, side, side, dtype=torch.float64), torch.arange(samples) % 4


def small_timm(name: str, **options):
    def make() -> nn.Module:
        return timm.create_model(name, num_classes=4, depth=2, img_size=32, **{"patch_size": 16, **options})

    return make


MODELS = {
    "torchvision": lambda: VisionTransformer(32, 16, 2, 3, 24, 20, num_classes=4),
    "vit_tiny": small_timm("vit_tiny_patch16_224", embed_dim=24, num_heads=3, mlp_ratio=1),
    "deit": small_timm("deit_tiny_patch16_224", embed_dim=24, num_heads=3, mlp_ratio=1),
    "deit3 with layer scale": small_timm("deit3_small_patch16_224", embed_dim=24, num_heads=3, mlp_ratio=1),
    "q/k norm and registers": small_timm(
        "vit_tiny_patch16_224", embed_dim=24, num_heads=3, mlp_ratio=1, qk_norm=True, reg_tokens=3, init_values=0.1
    ),
    "average pooling": small_timm(
        "vit_tiny_patch16_224", embed_dim=24, num_heads=3, mlp_ratio=1, class_token=False, global_pool="avg"
    ),
    "dinov2 with registers": small_timm(
        "vit_small_patch14_reg4_dinov2", embed_dim=24, num_heads=3, mlp_ratio=1, patch_size=16
    ),
    "eva02": small_timm("eva02_tiny_patch14_224", embed_dim=24, num_heads=3),
    "eva02 unfused": small_timm("eva02_base_patch14_224", embed_dim=24, num_heads=3),
    "quick GELU and a norm first": small_timm(
        "vit_base_patch16_clip_quickgelu_224", embed_dim=24, num_heads=3, mlp_ratio=1
    ),
    "rope": small_timm("vit_base_patch16_rope_reg1_gap_256", embed_dim=24, num_heads=3),
    "dinov3": small_timm("vit_small_patch16_dinov3", embed_dim=24, num_heads=3),
}
GATED = {"eva02"}  # packed gated MLPs have no hidden unit that is one module's output
LISTED = ("vit_b_16", "vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2")


# --- the oracle ---------------------------------------------------------------------------------------------------


def linear(rule: str, a: Tensor, weight: Tensor, bias: Tensor | None, r: Tensor, gamma: float = 0.05) -> Tensor:
    """Relevance of the inputs (tokens, in) from that of the outputs (tokens, out)."""
    c = torch.einsum("ti,ji->tji", a, weight)
    b = torch.zeros(len(weight), dtype=a.dtype) if bias is None else bias
    z = c.sum(-1) + b

    def over(d: Tensor) -> Tensor:
        return d + EPS * torch.where(d < 0, -1.0, 1.0)

    if rule == "epsilon":
        share = c / over(z)[..., None]
    elif rule == "zplus":
        share = c.clamp(min=0) / over(c.clamp(min=0).sum(-1) + b.clamp(min=0))[..., None]
    elif rule == "alpha2beta1":
        up = c.clamp(min=0) / over(c.clamp(min=0).sum(-1) + b.clamp(min=0))[..., None]
        down = c.clamp(max=0) / over(c.clamp(max=0).sum(-1) + b.clamp(max=0))[..., None]
        share = 2 * up - down
    else:
        up, down = c + gamma * c.clamp(min=0), c + gamma * c.clamp(max=0)
        for_up = up / over(up.sum(-1) + b + gamma * b.clamp(min=0))[..., None]
        for_down = down / over(down.sum(-1) + b + gamma * b.clamp(max=0))[..., None]
        share = torch.where((z > 0)[..., None], for_up, for_down)
    return torch.einsum("tji,tj->ti", share, r)


def layer_norm(norm: nn.LayerNorm, x: Tensor, r: Tensor) -> Tensor:
    """LRP-0 through y = (x − mean) w/std + b, std a constant."""
    n = x.shape[-1]
    std = (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    y = (x - x.mean(-1, keepdim=True)) / std * norm.weight + norm.bias
    centre = torch.eye(n, dtype=x.dtype) - 1 / n
    c = torch.einsum("ti,ji,tj->tji", x, centre, norm.weight / std)
    return torch.einsum("tji,tj->ti", c, r / y)


def softmax(rule: str, x: Tensor, r: Tensor) -> Tensor:
    """Relevance of logits (heads, queries, keys) from that of the attention weights."""
    s = x.softmax(-1)
    if rule == "attnlrp":
        return x * (r - s * r.sum(-1, keepdim=True))
    jacobian = torch.diag_embed(s) - torch.einsum("...j,...i->...ji", s, s)
    c = (jacobian * x[..., None, :]).clamp(min=0)
    d = c.sum(-1)
    if rule == "zplus":
        d = d + (s - torch.einsum("...ji,...i->...j", jacobian, x)).clamp(min=0)
    return torch.einsum("...ji,...j->...i", c / (d + 1e-9)[..., None], r)


class Oracle:
    """torchvision's VisionTransformer for one image, forwards with einsum and backwards with relevance."""

    def __init__(self, model: VisionTransformer, image: Tensor, gate: dict[str, Tensor] | None = None) -> None:
        """``gate``: block → factors (heads,) on the heads' outputs."""
        self.model, self.patch = model, model.patch_size
        rows = F.unfold(image[None], self.patch, stride=self.patch)[0].T
        self.rows = rows
        patches = rows @ model.conv_proj.weight.flatten(1).T + model.conv_proj.bias
        tokens = torch.cat([model.class_token[0], patches])
        self.steps = [tokens, model.encoder.pos_embedding[0]]
        x = tokens + model.encoder.pos_embedding[0]
        self.blocks = []
        for index, block in enumerate(model.encoder.layers):
            seen = {"x": x, "norm": block.ln_1(x)}
            mha, d = block.self_attention, x.shape[1] // block.num_heads
            for part, weight, bias in zip("qkv", mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3), strict=True):
                seen[part] = torch.einsum("ti,ji->tj", seen["norm"], weight) + bias
                seen[f"{part} heads"] = seen[part].reshape(len(x), -1, d)
            seen["logits"] = torch.einsum("qhc,khc->hqk", seen["q heads"], seen["k heads"]) / math.sqrt(d)
            seen["weights"] = seen["logits"].softmax(-1)
            mixed = torch.einsum("hqk,khc->qhc", seen["weights"], seen["v heads"])
            if gate:
                mixed = mixed * gate[f"encoder.layers.encoder_layer_{index}.self_attention"][:, None]
            seen["mixed"] = mixed.flatten(1)
            seen["attention"] = seen["mixed"] @ mha.out_proj.weight.T + mha.out_proj.bias
            seen["y"] = x + seen["attention"]
            seen["norm 2"] = block.ln_2(seen["y"])
            seen["hidden"] = block.mlp[0](seen["norm 2"])
            seen["active"] = F.gelu(seen["hidden"])
            seen["mlp"] = block.mlp[3](seen["active"])
            x = seen["y"] + seen["mlp"]
            self.blocks.append(seen)
        self.out = x
        self.final = model.encoder.ln(x)
        self.logits = self.final[0] @ model.heads.head.weight.T + model.heads.head.bias

    def explain(self, target: int, rule: str, attention: str) -> dict[str, Tensor]:
        """Relevance of everything: heads and neurons per token, and the pixels."""
        found: dict[str, Tensor] = {}
        model = self.model
        start = F.one_hot(torch.tensor(target), len(self.logits)) * self.logits
        r = torch.zeros_like(self.final)
        r[:1] = linear(rule, self.final[:1], model.heads.head.weight, model.heads.head.bias, start[None])
        r = layer_norm(model.encoder.ln, self.out, r)
        for index in reversed(range(len(self.blocks))):
            block, seen = model.encoder.layers[index], self.blocks[index]
            mha, name = block.self_attention, f"encoder.layers.encoder_layer_{index}"
            both = seen["y"] + seen["mlp"]
            hidden = linear(rule, seen["active"], block.mlp[3].weight, block.mlp[3].bias, r * seen["mlp"] / both)
            found[f"{name}.mlp.0"] = hidden  # GELU: identity
            found[f"{name}.mlp.3"] = r * seen["mlp"] / both
            below = linear(rule, seen["norm 2"], block.mlp[0].weight, block.mlp[0].bias, hidden)
            r = r * seen["y"] / both + layer_norm(block.ln_2, seen["y"], below)
            both = seen["y"]
            mixed = linear(rule, seen["mixed"], mha.out_proj.weight, mha.out_proj.bias, r * seen["attention"] / both)
            per_head = mixed.reshape(len(mixed), block.num_heads, -1)
            found[f"{name}.self_attention"] = per_head.sum(-1)
            ratio = per_head / seen["mixed"].reshape(per_head.shape)
            half = 1.0 if attention == "cp" else 0.5
            of_v = half * torch.einsum("khc,hqk,qhc->khc", seen["v heads"], seen["weights"], ratio)
            parts = {"v": of_v}
            if attention != "cp":
                of_weights = 0.5 * torch.einsum("hqk,khc,qhc->hqk", seen["weights"], seen["v heads"], ratio)
                found[f"{name} weights"] = of_weights
                of_logits = softmax(attention, seen["logits"], of_weights) / seen["logits"]
                scale = 0.5 / math.sqrt(per_head.shape[-1])
                q, k = seen["q heads"], seen["k heads"]
                parts["q"] = scale * torch.einsum("qhc,khc,hqk->qhc", q, k, of_logits)
                parts["k"] = scale * torch.einsum("qhc,khc,hqk->khc", q, k, of_logits)
            weights = dict(zip("qkv", mha.in_proj_weight.chunk(3), strict=True))
            biases = dict(zip("qkv", mha.in_proj_bias.chunk(3), strict=True))
            below = sum(
                linear(rule, seen["norm"], weights[part], biases[part], value.flatten(1))
                for part, value in parts.items()
            )
            r = r * seen["x"] / both + layer_norm(block.ln_1, seen["x"], below)
        tokens, position = self.steps
        r = (r * tokens / (tokens + position))[1:]
        weight = model.conv_proj.weight.flatten(1)
        pixels = linear(rule, self.rows, weight, model.conv_proj.bias, r, gamma=0.25)
        side = model.image_size
        found["pixels"] = F.fold(pixels.T[None], side, self.patch, stride=self.patch)[0]
        return found


SOFTMAX = {
    "attnlrp": "attnlrp",
    "cp": "cp",
    "zplus": "zplus",
    "zplus without bias": pxp.SoftmaxZPlus(zero_params="bias"),
}


@pytest.mark.parametrize("attention", SOFTMAX)
@pytest.mark.parametrize("rule", ["epsilon", "gamma", "zplus", "alpha2beta1"])
def test_relevance_is_that_of_the_explicit_rules(rule, attention, untouched):
    model = untouched(two_blocks())
    images, targets = images_of(model, 3)
    criterion = pxp.LRP(rule, softmax=SOFTMAX[attention])
    oracles = [Oracle(model, image) for image in images]
    assert relative(torch.stack([oracle.logits for oracle in oracles]), model(images)) < 1e-12
    found = [o.explain(int(t), rule, attention) for o, t in zip(oracles, targets, strict=True)]
    pixels = pxp.heatmap(model, images, targets, criterion)
    assert relative(pixels, torch.stack([one["pixels"] for one in found])) < 1e-10
    units = pxp.find_components(model, ("head", "neuron", "mlp_output"))
    assert len(units) == 6 and units.total == 2 * (3 + 10 + 12)
    scores = pxp.attribute(model, (images, targets), units, criterion)
    per_sample = pxp.attribute(
        model, (images, targets), units, pxp.LRP(rule, softmax=SOFTMAX[attention], absolute="sample")
    )
    for name in units:
        expected = torch.stack([one[name] for one in found])  # samples, tokens, components
        assert relative(scores.signed[name], expected.sum(1).mean(0)) < 1e-10
        assert relative(scores[name], expected.abs().sum(1).mean(0)) < 1e-10
        assert relative(per_sample[name], expected.sum(1).abs().mean(0)) < 1e-10


@pytest.mark.parametrize(("rule", "attention"), [("epsilon", "attnlrp"), ("gamma", "cp"), ("alpha2beta1", "zplus")])
def test_relevance_of_the_shipped_vit_is_that_of_the_explicit_rules(rule, attention, untouched):
    model = untouched(pxp.load_model("vit").double())
    images, targets = pxp.load_dataset("fashion-mnist").eval[0][:2].double(), torch.tensor([9, 3])
    found = [Oracle(model, i).explain(int(t), rule, attention) for i, t in zip(images, targets, strict=True)]
    criterion = pxp.LRP(rule, softmax=attention)
    pixels = pxp.heatmap(model, images, targets, criterion)
    assert relative(pixels, torch.stack([one["pixels"] for one in found])) < 1e-8
    units = pxp.find_components(model, ("head", "neuron", "mlp_output"))
    assert len(units) == 18
    scores = pxp.attribute(model, (images, targets), units, criterion)
    for name in units:
        expected = torch.stack([one[name] for one in found])
        assert relative(scores[name], expected.abs().sum(1).mean(0)) < 1e-8


def test_a_heads_score_is_twice_its_softmax_relevance_over_keys():
    model = two_blocks()
    images, targets = images_of(model)
    scores = pxp.attribute(model, (images, targets), pxp.find_components(model, "head"), pxp.LRP("gamma"))
    found = [Oracle(model, i).explain(int(t), "gamma", "attnlrp") for i, t in zip(images, targets, strict=True)]
    for index, name in enumerate(scores):
        per_query = torch.stack([one[f"encoder.layers.encoder_layer_{index} weights"].sum(-1) for one in found])
        assert relative(scores[name], 2 * per_query.abs().sum(-1).mean(0)) < 1e-10


def test_conservation_under_cp_without_biases():
    model = two_blocks(biases=False)
    images, targets = images_of(model, 4)
    logits = model(images).gather(1, targets[:, None])[:, 0].detach()
    none = pxp.Epsilon(1e-14)
    kept = pxp.heatmap(model, images, targets, pxp.LRP(none, softmax="cp")).sum((1, 2, 3))
    assert relative(kept, logits) < 1e-8
    lost = pxp.heatmap(model, images, targets, pxp.LRP(none)).sum((1, 2, 3))
    assert relative(lost, logits) > 1e-2  # AttnLRP's expansion has a constant term


# --- the efficient formulation of LXT, written out ------------------------------------------------------------------


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """The same values; the gradient times ``factor``."""
    return tensor * factor + tensor.detach() * (1 - factor)


def plain_norm(norm: nn.LayerNorm | nn.Identity, x: Tensor) -> Tensor:
    if isinstance(norm, nn.Identity):
        return x
    std = (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt().detach()
    return (x - x.mean(-1, keepdim=True)) / std * norm.weight + norm.bias


def straight(activation, x: Tensor) -> Tensor:
    """LXT's identity rule: a constant factor in front of the input."""
    return x * (activation(x) / x).detach()


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
        (lambda: torchvision.models.vit_b_16(num_classes=4), by_lxt_torchvision),
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


# --- the softmax rules alone ------------------------------------------------------------------------------------------


def one_attention(rule: AttentionRule, q: Tensor, k: Tensor, v: Tensor) -> Attention:
    return rule.attend(q, k, v, None, False)


@pytest.mark.parametrize("zero_params", [None, "bias"])
@pytest.mark.parametrize("tokens", [2, 5])
def test_softmax_zplus_is_the_direct_rule(zero_params, tokens):
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(2, 3, tokens, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = one_attention(pxp.SoftmaxZPlus(zero_params=zero_params), q, k, v)
    start = torch.randn_like(out)
    of_q = q * torch.autograd.grad(out, q, start / out)[0]
    with torch.no_grad():
        logits = q @ k.transpose(-2, -1) / 2
        of_weights = logits.softmax(-1) * ((start / out) @ v.transpose(-2, -1)) / 2
        of_logits = softmax("zplus" if zero_params is None else "zplus without bias", logits, of_weights)
        expected = 0.5 * q * ((of_logits / logits) @ k) / 2
    assert relative(of_q.detach(), expected) < 1e-7  # where nothing is positive, rounding is divided by ε = 1e-9


def test_softmax_rules_give_the_softmax_itself_and_survive_masks():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.zeros(4, 4, dtype=torch.float64).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), -torch.inf)
    for name in ("attnlrp", "cp", "zplus"):
        rule = make_softmax_rule(name)
        for given, causal in ((mask, False), (mask == 0, False), (None, True)):
            out = rule.attend(q, k, v, given, causal)
            assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), atol=1e-14)
            assert all(
                bool(g.isfinite().all())
                for g in torch.autograd.grad(out.sum(), (q, k, v), allow_unused=True)
                if g is not None
            )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pxp.LRP(softmax="attn"), ValueError, "unknown softmax rule 'attn'; allowed: 'attnlrp', 'cp', 'zplus'"),
        (lambda: pxp.LRP(softmax=3), TypeError, "a softmax rule is a name or a rule"),
        (lambda: pxp.SoftmaxZPlus(zero_params="weight"), ValueError, "zero_params may only be 'bias'"),
        (lambda: pxp.SoftmaxZPlus(epsilon=-1), ValueError, "epsilon must not be negative, got -1"),
        (
            lambda: pxp.LRP(absolute="head"),
            ValueError,
            "absolute must be one of 'token', 'sample', 'never', got 'head'",
        ),
        (
            lambda: pxp.Taylor(absolute="head"),
            ValueError,
            "absolute must be one of 'token', 'sample', 'never', got 'head'",
        ),
        (lambda: pxp.AttnLRP().register(nn.Linear(2, 2)), TypeError, "a rule for the attention of a replica"),
    ],
)
def test_wrong_rules(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_repr_of_the_rules():
    assert repr(pxp.LRP("gamma", softmax="cp", absolute="sample")) == "LRP('gamma', softmax='cp', absolute='sample')"
    assert [repr(make_softmax_rule(name)) for name in ("attnlrp", "cp", "zplus")] == [
        "AttnLRP()", "CPLRP()", "SoftmaxZPlus()",
    ]  # fmt: skip
    assert repr(pxp.SoftmaxZPlus(zero_params="bias")) == "SoftmaxZPlus(zero_params='bias')"


# --- normalisation and gated MLPs by hand -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm, timm.layers.LayerNorm, timm.layers.RmsNorm])
def test_normalisations_divide_by_a_constant(make):
    torch.manual_seed(0)
    norm = make(6).double()
    norm.weight.data.uniform_(0.5, 1.5)
    model = nn.Sequential(norm, nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double().eval()
    x = torch.randn(4, 6, dtype=torch.float64) + 0.5
    centred = isinstance(norm, nn.LayerNorm)
    value = x - x.mean(1, keepdim=True) * centred
    constant = norm.weight / (value.square().mean(1, keepdim=True) + (norm.eps or 2.3e-16)).sqrt()
    point = x.clone().requires_grad_()
    moved = (point - point.mean(1, keepdim=True) * centred) * constant.detach()
    moved = moved + norm.bias if getattr(norm, "bias", None) is not None else moved
    (gradient,) = torch.autograd.grad(model[1:](moved)[:, 1].sum(), point)
    found = pxp.heatmap(model, x, 1, pxp.LRP(pxp.Epsilon(1e-14)))
    assert relative(found, x * gradient) < 1e-9


@pytest.mark.parametrize("make", [timm.layers.SwiGLU, timm.layers.GluMlp])
def test_gated_products_are_shared_half_and_half(make):
    torch.manual_seed(0)
    gated = make(4, hidden_features=6)
    model = lively(nn.Sequential(nn.Linear(4, 4), gated, nn.Linear(4, 3)))
    x = torch.randn(3, 4, dtype=torch.float64)
    found = pxp.heatmap(model, x, 2, pxp.LRP(pxp.Epsilon(1e-14)))
    point = x.clone().requires_grad_()
    y = model[0](point)
    if make is timm.layers.SwiGLU:
        gate, value = straight(F.silu, gated.fc1_g(y)), gated.fc1_x(y)
    else:
        value, gate = gated.fc1(y).chunk(2, -1)
        gate = straight(torch.sigmoid, gate)
        if not gated.gate_last:
            raise AssertionError("the default of timm has changed")
    (gradient,) = torch.autograd.grad(model[2](gated.fc2(scaled(gate * value, 0.5)))[:, 2].sum(), point)
    assert relative(found, x * gradient) < 1e-9


# --- equal outputs ----------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """One MultiheadAttention between two linear layers."""

    def __init__(self, attention: nn.MultiheadAttention, **options) -> None:
        super().__init__()
        self.inp, self.attention, self.options = nn.Linear(6, 6), attention, options
        self.unpacked, self.first = attention.kdim != 6, attention.batch_first
        self.other = nn.Linear(6, attention.kdim)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.inp(x)
        k = v = self.other(q) if self.unpacked else q
        if not self.first:
            q, k, v = (part.transpose(0, 1) for part in (q, k, v))
        y, _ = self.attention(q, k, v, **self.options)
        return self.out((y if self.first else y.transpose(0, 1)).mean(1))


def mha(**options) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(6, 3, **{"batch_first": True, **options})


UPPER = torch.ones(5, 5, dtype=torch.bool).triu(1)
ATTENTIONS = {
    "packed": lambda: Wrapped(mha()),
    "tokens first": lambda: Wrapped(mha(batch_first=False)),
    "without bias": lambda: Wrapped(mha(bias=False)),
    "unpacked": lambda: Wrapped(mha(kdim=4, vdim=4)),
    "bool mask": lambda: Wrapped(mha(), attn_mask=UPPER),
    "float mask": lambda: Wrapped(mha(), attn_mask=torch.randn(5, 5, dtype=torch.float64), need_weights=False),
    "mask per head": lambda: Wrapped(mha(), attn_mask=UPPER.expand(6, 5, 5)),
    "padding": lambda: Wrapped(mha(), key_padding_mask=torch.tensor([[False] * 4 + [True], [False] * 5])),
    "both": lambda: Wrapped(mha(), attn_mask=UPPER, key_padding_mask=torch.tensor([[False] * 4 + [True], [False] * 5])),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_multihead_attention_has_an_equal(name, untouched):
    torch.manual_seed(0)
    model = untouched(lively(ATTENTIONS[name]()))
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    twin = replica(model)
    assert isinstance(twin.attention, Attention)
    with torch.no_grad():
        assert relative(twin(x), model(x)) < 1e-14
        for average in (True, False):
            options = {**model.options, "need_weights": True, "average_attn_weights": average}
            same_input = [part.transpose(0, 1) if name == "tokens first" else part for part in (x, x, x)]
            if name == "unpacked":
                same_input[1] = same_input[2] = torch.randn(2, 5, 4, dtype=torch.float64)
            expected, weights = model.attention(*same_input, **options)
            found, own = twin.attention(*same_input, **options)
            assert relative(found, expected) < 1e-13 and relative(own, weights) < 1e-13


@pytest.mark.parametrize("name", MODELS)
def test_transformers_have_equal_outputs_and_batches_equal_singles(name, untouched):
    torch.manual_seed(0)
    model = untouched(lively(MODELS[name]()))
    images, targets = images_of(model, 3)
    with torch.no_grad():
        assert relative(replica(model)(images), model(images)) < 1e-13
    units = pxp.find_components(model, "head" if name in GATED else ("head", "neuron"))
    assert units.of_kind("head").total == 6
    criterion = pxp.LRP("gamma", softmax="zplus")
    together = pxp.attribute(model, (images, targets), units, criterion)
    singly = [pxp.attribute(model, (images[i : i + 1], targets[i : i + 1]), units, criterion) for i in range(3)]
    for layer in units:
        assert relative(together[layer], sum(one[layer] for one in singly) / 3) < 1e-10
        assert float(together[layer].min()) > 0


@pytest.mark.parametrize("name", LISTED)
def test_listed_models_at_full_size(name, untouched):
    """Equal outputs, three lines to prune, and the effect of every single head's mask; float32 as users have it."""
    torch.manual_seed(0)
    if name == "vit_b_16":
        model = torchvision.models.vit_b_16(num_classes=4)
    else:
        model = timm.create_model(name, num_classes=4, **({"img_size": 56} if "dinov2" in name else {}))
    model = untouched(lively(model).float())
    images, targets = (part.to(torch.float32) if part.is_floating_point() else part for part in images_of(model, 1))
    with torch.no_grad():
        before = model(images)
        assert relative(replica(model)(images), before) < 1e-4
        units = pxp.find_components(model, "head")
        mask = pxp.attribute(model, (images, targets), units, pxp.LRP("epsilon")).select(0.2)
        with pxp.masked(model, mask):
            pruned = model(images)
        assert mask.kept == units.total - round(0.2 * units.total) and relative(pruned, before) > 1e-4
        with silenced(model, mask) as twin:
            assert relative(twin(images), pruned) < 1e-3
        assert torch.equal(model(images), before)
    for mode in MODES:
        for layer, each in units.items():
            # what differs between the modes is the way through a layer, not through its heads
            for index in range(each.size if mode == "inference" or name.startswith("vit_tiny") else 1):
                with MODES[mode](), pxp.masked(model, only(units, layer, index)):
                    assert not torch.equal(model(images), before), (layer, index)


# --- masks ------------------------------------------------------------------------------------------------------------

MODES = {"grad": contextlib.nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}


def only(units: pxp.Components, name: str, index: int) -> pxp.Mask:
    kept = {layer: torch.ones(each.size, dtype=torch.bool) for layer, each in units.items()}
    kept[name][index] = False
    return pxp.Mask(units, kept)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*MODELS, "shipped"])
def test_every_single_mask_changes_the_logits(name, mode):
    torch.manual_seed(0)
    model = pxp.load_model("vit").double() if name == "shipped" else lively(MODELS[name]())
    if name == "shipped":
        images = pxp.load_dataset("fashion-mnist").eval[0][:1].double()
    else:
        images, _ = images_of(model, 1)
    units = pxp.find_components(model, "head" if name in GATED else ("head", "neuron"))
    with MODES[mode]():
        before = model(images)
        for layer, each in units.items():
            for index in range(each.size):
                with pxp.masked(model, only(units, layer, index)):
                    assert not torch.equal(model(images), before), (layer, index)
        assert torch.equal(model(images), before)


@pytest.mark.parametrize("mode", MODES)
def test_a_masked_head_is_one_that_mixes_nothing(mode):
    model = two_blocks()
    images, _ = images_of(model, 1)
    units = pxp.find_components(model, "head")
    kept = {"encoder.layers.encoder_layer_0.self_attention": [True, False, True],
            "encoder.layers.encoder_layer_1.self_attention": [False, False, True]}  # fmt: skip
    mask = pxp.Mask(units, {name: torch.tensor(value) for name, value in kept.items()})
    expected = Oracle(model, images[0], {name: torch.tensor(value).double() for name, value in kept.items()}).logits
    with MODES[mode](), pxp.masked(model, mask):
        assert relative(model(images)[0].detach(), expected.detach()) < 1e-12


def test_masked_heads_of_timm_are_zeroed_columns():
    torch.manual_seed(0)
    model = lively(MODELS["deit3 with layer scale"]())
    images, _ = images_of(model, 2)
    units = pxp.find_components(model, "head")
    mask = only(units, "blocks.1.attn", 2)
    with torch.no_grad():
        with pxp.masked(model, mask):
            found = model(images)
        model.blocks[1].attn.proj.weight[:, 16:24] = 0
        assert relative(found, model(images)) < 1e-13


def test_head_masks_nest_and_survive_errors(untouched):
    model = untouched(two_blocks())
    images, _ = images_of(model)
    units = pxp.find_components(model, "head")
    first, second = (only(units, name, 1) for name in units)
    both = pxp.Mask(units, {name: first[name] & second[name] for name in units})
    with torch.no_grad():
        with pxp.masked(model, both):
            expected = model(images)
        with pxp.masked(model, first), pxp.masked(model, second):
            assert torch.equal(model(images), expected)
        before = model(images)
        with pytest.raises(RuntimeError), pxp.masked(model, first):
            model.encoder(torch.zeros(1, 10, 7, dtype=torch.float64))
        with pytest.raises(AssertionError), pxp.masked(model, first):
            model(torch.zeros(1, 3, 5, 5, dtype=torch.float64))
        assert torch.equal(model(images), before)


def test_an_interrupt_leaves_no_head_pruned(untouched):
    """torch calls a forward hook after an Exception only."""

    class Interrupt(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func.__name__ == "multi_head_attention_forward":
                raise KeyboardInterrupt
            return func(*args, **(kwargs or {}))

    model = untouched(two_blocks())
    images, _ = images_of(model)
    units = pxp.find_components(model, "head")
    name = next(iter(units))
    before = model(images)
    with pytest.raises(KeyboardInterrupt), pxp.masked(model, only(units, name, 1)):
        with pytest.raises(KeyboardInterrupt), pxp.masked(model, only(units, name, 2)), Interrupt():
            model(images)
        raise KeyboardInterrupt
    assert torch.equal(model(images), before)


class Encoder(nn.Module):
    """torch's own encoder, which takes a fast path where it can."""

    def __init__(self, activation="relu", **options) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, activation=activation, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(x).mean(1))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_mask_reaches_torchs_fast_encoder(activation, untouched):
    torch.manual_seed(0)
    model = untouched(lively(Encoder(activation)))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    units = pxp.find_components(model, ("head", "neuron"), example=x)
    assert units.of_kind("head").total == 6 and units.of_kind("neuron").total == 32
    units = units.of_kind("head") if activation == "relu" else units  # some of ReLU's neurons are dead
    for mode in MODES.values():
        with mode():
            before = model(x)
            for layer, each in units.items():
                for index in range(each.size):
                    with pxp.masked(model, only(units, layer, index)):
                        found = model(x)
                    with silenced(model, only(units, layer, index)) as twin, torch.no_grad():
                        assert relative(found.detach(), twin(x)) < 1e-12
                    assert relative(found.detach(), before.detach()) > 1e-6


# --- criteria ---------------------------------------------------------------------------------------------------------


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


def test_costs_by_hand():
    units = pxp.find_components(two_blocks(), ("head", "neuron", "mlp_output"))
    head, neuron, output = list(units.values())[:3]
    # 4 channels: rows of q, k, v with biases, columns of the output projection; 10 tokens
    assert head.parameters == 3 * (4 * 12 + 4) + 4 * 12
    assert head.flops == 2 * 10 * 4 * (4 * 12) + 2 * 2 * 10 * 10 * 4
    assert neuron.parameters == 12 + 1 + 12 and neuron.flops == 2 * 10 * 24
    assert output.parameters == 10 + 1 and output.flops == 2 * 10 * 10


def test_files_keep_heads(tmp_path):
    model = two_blocks()
    units = pxp.find_components(model, ("head", "neuron"))
    scores = pxp.attribute(model, images_of(model), units, pxp.LRP())
    scores.save(tmp_path / "scores.safetensors")
    loaded = pxp.Scores.load(tmp_path / "scores.safetensors")
    assert loaded.units.kind == "head+neuron" and dict(loaded.units) == dict(units)
    assert loaded.units.trace == units.trace
    mask = loaded.select(0.5, cost="parameters")
    mask.save(tmp_path / "mask.safetensors")
    again = pxp.Mask.load(tmp_path / "mask.safetensors")
    with pxp.masked(model, again), torch.no_grad():
        found = model(images_of(model)[0])
    with pxp.masked(model, mask), torch.no_grad():
        assert torch.equal(found, model(images_of(model)[0]))


# --- structure --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["swin_t"])
def test_unsupported_attention_is_named(name, untouched):
    torch.manual_seed(0)
    model = untouched(torchvision.models.get_model(name, weights=None, num_classes=4).eval())
    with pytest.raises(ValueError, match=r"heads of .*0\.attn' \(ShiftedWindowAttention\w*\) cannot be told apart"):
        pxp.find_components(model, "head")
    units = pxp.find_components(model, "neuron")
    images, targets = torch.rand(1, 3, 64, 64), torch.tensor([0])
    with pytest.raises(ValueError, match="there is no LRP rule for 'features.1.0.attn'"):
        pxp.attribute(model, (images, targets), units, pxp.LRP())
    assert pxp.attribute(model, (images, targets), units, pxp.Taylor()).samples == 1


class Sharing(nn.Module):
    """An attention with another name, whose weights pass a dropout, a mixture of the heads and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.mix, self.drop = nn.Linear(6, 18), nn.Linear(2, 2), nn.Dropout(0.5)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        weights = self.mix((q @ k.mT).softmax(-1).movedim(1, -1)).movedim(-1, 1)
        weights = (1 - self.gate.sigmoid()) * weights + self.gate.sigmoid() * weights.mean(1, keepdim=True)
        return (self.drop(weights) @ v).transpose(1, 2).flatten(2)


class Fused(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class Own(nn.MultiheadAttention):
    pass


class Around(nn.Module):
    """Something between two linear layers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inp, self.inner, self.out = nn.Linear(6, 6), inner, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(self.inp(x)).mean(1))


UNSUPPORTED = {
    "ConViT": (
        lambda: timm.create_model("convit_tiny", num_classes=4, depth=2, local_up_to_layer=1, img_size=32),
        r"'blocks.0.attn' \(GPSA\)",
    ),
    "Hiera": (
        lambda: timm.create_model("hiera_tiny_224", num_classes=4, embed_dim=8, stages=(1, 1, 1, 1)),
        r"'blocks.0.attn' \(MaskUnitAttention\)",
    ),
    "parallel scaling": (
        small_timm("vit_base_patch16_xp_224", embed_dim=24, num_heads=3), r"'blocks.0' \(ParallelScalingBlock\)"
    ),
    "of one's own": (lambda: Around(Sharing()), r"'inner' \(Sharing\)"),
    "fused": (lambda: Around(Fused()), r"'inner' \(Fused\)"),
    "another library's of the same name": (
        lambda: timm.create_model("beit_base_patch16_224", num_classes=4, depth=1, img_size=32, embed_dim=24, num_heads=3),
        r"'blocks.0.attn' \(timm.models.beit.Attention\)",
    ),
    "bias_kv": (lambda: Wrapped(mha(add_bias_kv=True)), r"'attention' \(MultiheadAttention with add_bias_kv\)"),
    "zero_attn": (lambda: Wrapped(mha(add_zero_attn=True)), r"'attention' \(MultiheadAttention with add_zero_attn\)"),
    "subclass": (
        lambda: Wrapped(Own(6, 3, batch_first=True)), r"'attention' \(Own, a subclass of torch.*MultiheadAttention\)"
    ),
    "global context": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), timm.layers.GlobalContext(8, fuse_add=True, fuse_scale=False),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        ),
        r"'1' \(GlobalContext\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_attention_by_any_other_name_is_seen(case, untouched):
    make, message = UNSUPPORTED[case]
    model = untouched(make().eval())
    side = getattr(getattr(model, "patch_embed", None), "img_size", (224, 224) if case == "Hiera" else (32, 32))
    tokens = isinstance(model, Around | Wrapped)
    x = torch.randn(1, 5, 6) if tokens else torch.randn(1, 3, *side)
    with pytest.raises(ValueError, match=f"the heads of {message} cannot be told apart; supported are torch.nn.Mul"):
        pxp.find_components(model, "head", example=x)
    with pytest.raises(ValueError, match=f"there is no LRP rule for {message}; supported are torch.nn.Mul"):
        pxp.heatmap(model, x, 1)


class Selects(nn.Module):
    """A softmax that reads a table, one over branches, one of parameters: none is an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.one, self.other, self.choose = (nn.Linear(6, 6) for _ in range(4))
        self.mixture, self.out = nn.Parameter(torch.randn(5, 5)), nn.Linear(6, 4)
        self.table = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixture.softmax(-1) @ self.inp(x)
        weights = self.choose(x.mean(1, keepdim=True)).unflatten(-1, (2, 3)).softmax(2).repeat(1, 1, 1, 2)
        branches = torch.stack([self.one(x), self.other(x)], 2)
        return self.out((branches * weights).sum(2).mean(1)).softmax(-1) @ self.table


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: timm.create_model("skresnet18", num_classes=4), (3, 32, 32)),
        (lambda: timm.create_model("resnest14d", num_classes=4), (3, 32, 32)),
        (Selects, (5, 6)),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 8, 3), timm.layers.GlobalContext(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
            ),
            (3, 9, 9),
        ),
    ],
    ids=["selective kernels", "split attention", "selects", "a gate"],
)
def test_a_softmax_that_multiplies_no_matrix_or_is_a_gates_is_no_attention(make, shape):
    model = make().eval()
    assert bool((pxp.heatmap(model, torch.randn(1, *shape), 1) != 0).any())


class Functional(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Layered(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


@pytest.mark.parametrize(
    ("function", "name", "instead"),
    [
        (F.gelu, "gelu", "GELU"),
        (F.silu, "silu", "SiLU"),
        (F.hardswish, "hardswish", "Hardswish"),
        (F.elu, "elu", "ELU"),
        (lambda x: F.layer_norm(x, (6,)), "layer_norm", "LayerNorm"),
        (lambda x: F.rms_norm(x, (6,)), "rms_norm", "RMSNorm"),
    ],
)
def test_functions_that_no_rule_reaches_are_errors(function, name, instead, untouched, tmp_path):
    model = untouched(lively(Around(Functional(function))))
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    message = rf"'inner' \(Functional\) calls {name} as a function, .* call a module: torch\.nn\.{instead}$"
    with pytest.raises(ValueError, match=message):
        pxp.heatmap(model, x, 1)
    # files know it too
    behind = nn.Sequential(nn.Conv1d(5, 5, 1).double(), model)
    pxp.attribute(behind, None, pxp.find_components(behind, example=x), pxp.Random()).save(tmp_path / "scores")
    assert pxp.Scores.load(tmp_path / "scores").units.trace.functions == {"1.inner": (name,)}


def test_files_from_before_functions_were_noted_can_be_read(tmp_path):
    model = two_blocks()
    pxp.attribute(model, None, pxp.find_components(model, "head"), pxp.Random()).save(tmp_path / "scores")
    with safe_open(tmp_path / "scores", framework="pt") as file:
        header = json.loads(file.metadata()["pxp"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    del header["trace"]["functions"]
    save_file(tensors, tmp_path / "scores", metadata={"pxp": json.dumps(header)})
    assert pxp.Scores.load(tmp_path / "scores").units.trace == pxp.find_components(model, "head").trace


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
    with pytest.raises(ValueError, match=r"'encoder\.layers\.0\.activation' \(Functional\) calls gelu as a function"):
        pxp.heatmap(with_module, x, 1)


def test_an_activation_is_one_use_of_its_input_whatever_it_computes():
    """Quick GELU is x · sigmoid(1.702 x)."""
    units = pxp.find_components(MODELS["quick GELU and a norm first"](), "neuron")
    assert {name: layer.activation for name, layer in units.items()} == {
        f"blocks.{i}.mlp.fc1": f"blocks.{i}.mlp.act" for i in range(2)
    }

    class Reads(nn.Module):
        """Something else reads the hidden units, so they are not the activation's alone."""

        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(6, 6), timm.layers.QuickGELU(), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc1(x)
            return self.fc2(self.act(x) + x)

    with pytest.raises(ValueError, match="no components of kind 'neuron'"):
        pxp.find_components(Reads(), "neuron")


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
    pxp.pruning_curve(model, scores, (images, targets), rates=(0, 0.5), progress=False)
    pxp.heatmap(model, images, targets, pxp.LRP(softmax="cp"))
    with pytest.raises(ValueError, match="NaN"):
        pxp.attribute(model, (images * torch.nan, targets), units, pxp.LRP())
    assert same(state, snapshot(model))
    assert [dict(vars(each)) for each in classes] == before
    assert functions == (F.scaled_dot_product_attention, F.softmax, F.multi_head_attention_forward, torch.softmax)
    assert flags == (torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled(), torch.get_default_dtype())
