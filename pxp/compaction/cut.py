"""Layers of which only some outputs, inputs or heads are kept."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn

from ..network.attention import Attention


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
