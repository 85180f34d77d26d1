"""Relevance of a vision transformer by the classical form R_i = Σ_j …, without autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import VisionTransformer

CONV = {"epsilon": 0.0, "gamma": 0.25}


EPS = 1e-6


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


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """The same values; the gradient times ``factor``."""
    return tensor * factor + tensor.detach() * (1 - factor)


def straight(activation, x: Tensor) -> Tensor:
    """LXT's identity rule: a constant factor in front of the input."""
    return x * (activation(x) / x).detach()
