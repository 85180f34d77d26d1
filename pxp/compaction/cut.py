"""Layers of which only some outputs, inputs or heads are kept."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..network.attention import Attention
from ..network.layers import CONVOLUTIONS


def is_ordinary(module: nn.Module) -> bool:
    """Whether a convolution or linear layer computes as torch's own do."""
    for kind in (*CONVOLUTIONS, nn.Linear):
        if isinstance(module, kind):
            own = [getattr(type(module), name, None) for name in ("forward", "_conv_forward")]
            return own == [getattr(kind, name, None) for name in ("forward", "_conv_forward")]
    return False


@torch.no_grad()
def is_layer(module: Any) -> bool:
    """Whether a module is a convolution or a linear layer that can be cut.

    A subclass may compute by itself. If that is only how it pads, as in timm's ``Conv2dSame``, a part of its weight
    computes the part of its outputs; if it standardises or masks its weight, it does not. A try tells.
    """
    if is_ordinary(module):
        return True
    if not isinstance(module, (*CONVOLUTIONS, nn.Linear)) or not isinstance(module._parameters.get("weight"), Tensor):
        return False
    weight, bias, groups = module.weight, module.bias, getattr(module, "groups", 1)
    sides = [
        (size - 1) * step + 3 for size, step in zip(weight.shape[2:], getattr(module, "dilation", ()), strict=True)
    ]
    x = torch.linspace(-1, 1, weight.shape[1] * groups * math.prod(sides)).view(1, -1, *sides).to(weight)
    half = max(1, groups // 2)
    inputs = weight.shape[1] * half if groups > 1 else max(1, x.shape[1] // 2)
    outputs = len(weight) // groups * half if groups > 1 else max(1, len(weight) // 2)
    part = weight[:outputs] if groups > 1 else weight[:outputs, :inputs]
    less = cut_layer(module, part, None if bias is None else bias[:outputs], half)
    alone = x.index_fill(1, torch.arange(inputs, x.shape[1], device=x.device), 0)
    try:
        return torch.allclose(less(x[:, :inputs]), module(alone)[:, :outputs], rtol=1e-4, atol=1e-4)
    except Exception:
        return False


def entries(bias: Tensor | None, index: Tensor) -> Tensor | None:
    return None if bias is None else bias[index]


def cut_layer(module: Any, weight: Tensor, bias: Tensor | None, groups: int = 1) -> nn.Module:
    """The same kind of layer with other weights."""
    made = copy.copy(module)
    made._parameters = {"weight": nn.Parameter(weight.detach()), "bias": None}
    if bias is not None:
        made._parameters["bias"] = nn.Parameter(bias.detach())
    if isinstance(module, nn.Linear):
        made.out_features, made.in_features = weight.shape
    else:
        made.out_channels, made.in_channels, made.groups = weight.shape[0], weight.shape[1] * groups, groups
    return made


def fewer_heads(attention: Attention, kept: Tensor) -> Attention:
    """An attention with only some of its heads."""
    made = copy.copy(attention)
    made._modules = dict(attention._modules)
    rows = kept.to(attention.output.weight.device).repeat_interleave(attention.head_dim)
    for name, part in attention._modules.items():
        if name in ("q_proj", "k_proj", "v_proj", "gate") and isinstance(part, nn.Linear):
            made._modules[name] = cut_layer(part, part.weight[rows], entries(part.bias, rows))
        elif name == "qkv" and isinstance(part, nn.Linear):
            three = rows.repeat(3)
            made._modules[name] = cut_layer(part, part.weight[three], entries(part.bias, three))
        elif part is attention.output:
            made._modules[name] = cut_layer(part, part.weight[:, rows], part.bias)
    made.num_heads = int(kept.sum())
    return made


def check_heads(name: str, attention: nn.Module, readers: Iterable[fx.Node]) -> None:
    """Whether single heads can be taken out; ``readers`` take its parts, the output and the weights, if it has any."""
    reason = ""
    if getattr(attention, "_groups", 1) > 1:
        reason = "its heads share keys and values"
    elif not isinstance(getattr(attention, "norm", None), nn.Identity | None):
        reason = "it normalises over all of its heads"
    elif any(reader.target is not operator.getitem or reader.args[1] != 0 for reader in readers):
        reason = "its attention weights, which are those of all heads, are read too"
    if reason:
        raise ValueError(f"single heads of {name!r} cannot be taken out: {reason}")
