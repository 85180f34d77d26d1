"""Relevance through attentions of windows, of cosines and with relative position bias, against them written out."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative
from oracle import scaled, straight
from torch import Tensor, nn
from torch.nn import functional as F
from vits import POSITIONED, positioned

import pxp

Mixed = dict[str, list[Tensor]]


def norm_by_hand(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, nn.Identity):
        return x
    std = (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt().detach()
    return (x - x.mean(-1, keepdim=True)) / std * norm.weight + norm.bias


def mlp_by_hand(first: nn.Linear, second: nn.Linear, x: Tensor) -> Tensor:
    return second(straight(F.gelu, first(x)))


def places(rows: int, columns: int) -> list[tuple[int, int]]:
    return [(r, c) for r in range(rows) for c in range(columns)]


def position_of(attention: nn.Module, rows: int, columns: int) -> Tensor:
    """(heads, tokens, tokens), pair by pair."""
    if hasattr(attention, "cpb_mlp"):
        bias = torch.empty(attention.num_heads, rows * columns, rows * columns, dtype=torch.float64)
        for i, (r, c) in enumerate(places(rows, columns)):
            for j, (s, d) in enumerate(places(rows, columns)):
                steps = torch.tensor([(r - s) / (rows - 1), (c - d) / (columns - 1)], dtype=torch.float32) * 8
                steps = steps.sign() * (steps.abs() + 1).log2() / 3
                bias[:, i, j] = 16 * attention.cpb_mlp(steps.double()).sigmoid()
        return bias.detach()
    bias = torch.empty(attention.num_heads, rows * columns, rows * columns, dtype=torch.float64)
    for i, (r, c) in enumerate(places(rows, columns)):
        for j, (s, d) in enumerate(places(rows, columns)):
            entry = (r - s + rows - 1) * (2 * columns - 1) + c - d + columns - 1
            bias[:, i, j] = attention.relative_position_bias_table[entry].detach()
    return bias


def biases_of(attention: nn.Module) -> list[Tensor]:
    """Of queries, keys and values."""
    if hasattr(attention, "q_bias"):
        return [attention.q_bias, attention.k_bias, attention.v_bias]
    q, k, v = attention.qkv.bias.chunk(3)
    return [q, 0 * k if hasattr(attention, "logit_scale") else k, v]  # torchvision's Swin v2 has no keys' bias


def mix(attention: nn.Module, x: Tensor, added: Tensor, cp: bool) -> Tensor:
    """(N, tokens, channels) and what is added to the logits → the heads' outputs, side by side."""
    q, k, v = (
        (torch.einsum("ntc,dc->ntd", x, weight) + bias).unflatten(-1, (attention.num_heads, -1))
        for weight, bias in zip(attention.qkv.weight.chunk(3), biases_of(attention), strict=True)
    )
    q, k, v = (q.detach(), k.detach(), v) if cp else (scaled(q, 0.25), scaled(k, 0.25), scaled(v, 0.5))
    if hasattr(attention, "logit_scale"):  # cosines: lengths are constants
        q, k = (part / part.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12).detach() for part in (q, k))
        factor = attention.logit_scale.clamp(max=math.log(100)).exp()
    else:
        factor = q.shape[-1] ** -0.5
    logits = torch.einsum("nqhc,nkhc->nhqk", q, k) * factor + added
    return torch.einsum("nhqk,nkhc->nqhc", logits.softmax(-1), v).flatten(2)


def attend_by_hand(attention: nn.Module, x: Tensor, size: int, shift: int, masked: bool, cp: bool) -> tuple:
    """Image (N, height, width, channels) → the heads of every window (N, tokens, channels), and the output.

    Every window is gathered by the places of its tokens; ``masked`` says whether tokens that a shift brought together
    from opposite edges see each other.
    """
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
    full = x.shape[1:3]
    bias = position_of(attention, size, size)
    mixed, out = [], torch.zeros_like(x)
    for top in range(0, full[0], size):
        for left in range(0, full[1], size):
            rows = [(top + r + shift) % full[0] for r, _ in places(size, size)]
            columns = [(left + c + shift) % full[1] for _, c in places(size, size)]
            turned = torch.tensor(
                [[top + r + shift >= full[0], left + c + shift >= full[1]] for r, c in places(size, size)]
            )
            apart = (turned[:, None] != turned[None]).any(-1)
            mixed.append(mix(attention, x[:, rows, columns], bias - 100.0 * (apart & masked), cp))
            out = out.index_put(
                (torch.arange(len(x))[:, None], torch.tensor(rows), torch.tensor(columns)), attention.proj(mixed[-1])
            )
    return mixed, out[:, :height, :width]


def swin_by_hand(name: str, model: nn.Module, x: Tensor, cp: bool) -> tuple[Tensor, Mixed]:
    """torchvision's and timm's; v2 normalises behind the attention and the MLP."""
    found: Mixed = {}
    second, ours = "v2" in name, name.startswith("torchvision")
    if ours:
        x = norm_by_hand(model.features[0][2], model.features[0][0](x).permute(0, 2, 3, 1))
        parts = [(f"features.{i}", part) for i, part in enumerate(model.features) if i]
    else:
        x = norm_by_hand(model.patch_embed.norm, model.patch_embed.proj(x).permute(0, 2, 3, 1))
        parts = []
        for i, stage in enumerate(model.layers):
            parts += [] if isinstance(stage.downsample, nn.Identity) else [("", stage.downsample)]
            parts.append((f"layers.{i}.blocks", stage.blocks))
    for place, part in parts:
        if not isinstance(part, nn.Sequential | nn.ModuleList):  # merges four neighbours
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            x = torch.cat([x[:, r::2, c::2] for c in (0, 1) for r in (0, 1)], -1)
            x = norm_by_hand(part.norm, part.reduction(x)) if second else part.reduction(norm_by_hand(part.norm, x))
            continue
        for number, block in enumerate(part):
            attention = block.attn
            shift = attention.shift_size[0] if ours else block.shift_size[0]
            size = attention.window_size[0]
            shift = 0 if size >= max(x.shape[1:3]) else shift
            y = x if second else norm_by_hand(block.norm1, x)
            heads, y = attend_by_hand(attention, y, size, shift, True, cp)
            found[f"{place}.{number}.attn"] = heads
            x = x + (norm_by_hand(block.norm1, y) if second else y)
            first, last = (block.mlp[0], block.mlp[3]) if ours else (block.mlp.fc1, block.mlp.fc2)
            if second:
                x = x + norm_by_hand(block.norm2, mlp_by_hand(first, last, x))
            else:
                x = x + mlp_by_hand(first, last, norm_by_hand(block.norm2, x))
    x = norm_by_hand(model.norm, x).mean((1, 2))
    return (model.head if ours else model.head.fc)(x), found


def beit_by_hand(model: nn.Module, x: Tensor, cp: bool) -> tuple[Tensor, Mixed]:
    found: Mixed = {}
    x = model.patch_embed.proj(x).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1)
    x = x if model.pos_embed is None else x + model.pos_embed
    for number, block in enumerate(model.blocks):
        attention = block.attn
        holder = attention if model.rel_pos_bias is None else model.rel_pos_bias
        table = holder.relative_position_bias_table.detach()
        rows, columns = holder.window_size
        bias = torch.empty(attention.num_heads, 1 + rows * columns, 1 + rows * columns, dtype=torch.float64)
        bias[:, 0], bias[:, :, 0], bias[:, 0, 0] = table[-3][:, None], table[-2][:, None], table[-1]
        for i, (r, c) in enumerate(places(rows, columns)):
            for j, (s, d) in enumerate(places(rows, columns)):
                bias[:, i + 1, j + 1] = table[(r - s + rows - 1) * (2 * columns - 1) + c - d + columns - 1]
        heads = mix(attention, norm_by_hand(block.norm1, x), bias, cp)
        found[f"blocks.{number}.attn"] = [heads]
        first, second = (1.0 if gamma is None else gamma for gamma in (block.gamma_1, block.gamma_2))
        x = x + first * attention.proj(heads)
        x = x + second * mlp_by_hand(block.mlp.fc1, block.mlp.fc2, norm_by_hand(block.norm2, x))
    return model.head(norm_by_hand(model.fc_norm, norm_by_hand(model.norm, x)[:, 1:].mean(1))), found


def by_hand(name: str, model: nn.Module, x: Tensor, cp: bool) -> tuple[Tensor, Mixed]:
    return beit_by_hand(model, x, cp) if name.startswith("BEiT") else swin_by_hand(name, model, x, cp)


@pytest.mark.parametrize("rule", ["attnlrp", "cp"])
@pytest.mark.parametrize("name", POSITIONED)
def test_heatmaps_and_heads_are_those_written_out(name, rule, untouched):
    model, images, targets = positioned(name)
    untouched(model)
    images.requires_grad_()
    logits, mixed = by_hand(name, model, images, rule == "cp")
    assert relative(logits.detach(), model(images).detach()) < 1e-12
    for each in mixed.values():
        for window in each:
            window.retain_grad()
    logits.gather(1, targets[:, None]).sum().backward()
    criterion = pxp.LRP(pxp.Epsilon(1e-14), softmax=rule)
    found = pxp.heatmap(model, images.detach(), targets, criterion)
    assert relative(found, images.detach() * images.grad) < 1e-9
    model.zero_grad()
    units = pxp.find_components(model, "head", example=images.detach())
    assert list(units) == list(mixed)
    scores = pxp.attribute(model, (images.detach(), targets), units, criterion)
    for layer, windows in mixed.items():
        relevance = torch.cat([window.detach() * window.grad for window in windows], 1).unflatten(-1, (3, -1)).sum(-1)
        assert relative(scores[layer], relevance.abs().sum(1).mean(0)) < 1e-9
        assert relative(scores.signed[layer], relevance.sum(1).mean(0)) < 1e-9


@pytest.mark.parametrize("name", POSITIONED)
def test_conservation_under_cp_without_biases(name):
    """Also with relative position bias: it changes the weights, which are constants."""
    model, images, targets = positioned(name, biases=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    logits = model(images).gather(1, targets[:, None])[:, 0]
    kept = pxp.heatmap(model, images, targets, pxp.LRP(pxp.Epsilon(1e-14), softmax="cp")).sum((1, 2, 3))
    assert relative(kept, logits) < 1e-8
    lost = pxp.heatmap(model, images, targets, pxp.LRP(pxp.Epsilon(1e-14))).sum((1, 2, 3))
    assert relative(lost, logits) > 1e-3


def test_plain_gradients_see_the_lengths_of_cosine_attention():
    """Only a rule holds them constant; Taylor's gradient is the model's own."""
    model, images, targets = positioned("timm's Swin v2")
    units = pxp.find_components(model, ("head", "neuron"), example=images)
    name = "layers.0.blocks.0.mlp.fc1"  # its attention is below, the others' are above
    seen = {}
    model.get_submodule(name).register_forward_hook(lambda _, inputs, out: seen.setdefault("out", out).retain_grad())
    model(images).gather(1, targets[:, None]).sum().backward()
    expected = (seen["out"] * seen["out"].grad).detach().flatten(1, -2)
    model.zero_grad()
    model.get_submodule(name)._forward_hooks.clear()
    scores = pxp.attribute(model, (images, targets), units, pxp.Taylor(start="logit"))
    assert relative(scores.signed[name], expected.sum(1).mean(0)) < 1e-10
