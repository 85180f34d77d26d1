"""Layers of which only some outputs, inputs or heads are kept."""

from __future__ import annotations

import copy
import math
import operator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..network.attention import Attention
from ..network.gated import incoming, last_layer
from ..network.layers import LAYERS, LINEAR, Identity, is_elementwise
from ..network.projections import layer_of, norms_of, part_of, rows, rows_of_each, sources


def is_ordinary(module: nn.Module) -> bool:
    """Whether a convolution or linear layer computes as torch's own do."""
    for kind in LAYERS:
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
    if not isinstance(module, LAYERS) or not isinstance(module._parameters.get("weight"), Tensor):
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
    if isinstance(module, LINEAR):
        made.out_features, made.in_features = weight.shape
    else:
        made.out_channels, made.in_channels, made.groups = weight.shape[0], weight.shape[1] * groups, groups
    return made


def with_part(module: nn.Module, name: str, part: nn.Module | Tensor) -> Any:
    """The same module with another part or parameter; ``name`` may have dots."""
    first, _, rest = name.partition(".")
    made = copy.copy(module)
    made._modules, made._parameters = dict(module._modules), dict(module._parameters)
    if isinstance(part, Tensor) and not rest:
        made._parameters[first] = nn.Parameter(part.detach())
    elif not rest:
        made._modules[first] = part  # type: ignore[assignment]
    else:
        made._modules[first] = with_part(module.get_submodule(first), rest, part)
    return made


def fewer_heads(attention: Attention, kept: Tensor) -> Attention:
    """An attention with only some of its heads."""
    form, made = attention.form, attention
    kept = kept.to(attention.projection.weight.device)
    read = kept.repeat_interleave(attention.head_dim)
    for name, letters in sources(attention):
        index = rows_of_each(attention, name, letters).to(kept.device)[kept].unique()  # in their order
        made = _fewer_outputs(made, attention, name, index)
    if form.gate is not None and part_of(attention, form.gate) is not None:
        made = _fewer_outputs(made, attention, form.gate, read.nonzero().flatten())
    projection = cut_layer(attention.projection, attention.projection.weight[:, read], attention.projection.bias)
    made = with_part(made, form.proj, projection)
    for name, dim in form.per_head(attention) if callable(form.per_head) else form.per_head:
        part = attrgetter(name)(attention)
        if isinstance(part, LINEAR):
            made = with_part(made, name, cut_layer(part, part.weight[kept], entries(part.bias, kept)))
        elif part is not None:
            made = with_part(made, name, part.index_select(dim, kept.nonzero().flatten()))
    made.num_heads = int(kept.sum())
    return made


def _fewer_outputs(made: Any, attention: Attention, name: str, index: Tensor) -> Any:
    """With some outputs of a projection, and of the norms behind its layer."""
    own = layer_of(attention, name)
    layer = part_of(attention, own)
    made = with_part(made, own, cut_layer(layer, layer.weight[index], entries(layer.bias, index)))
    for own in norms_of(attention, name):
        norm = copy.copy(part_of(attention, own))
        norm.num_features = len(index)
        norm._parameters = {n: p if p is None else nn.Parameter(p[index]) for n, p in norm._parameters.items()}
        norm._buffers = {n: b if b is None or not b.ndim else b[index] for n, b in norm._buffers.items()}
        made = with_part(made, own, norm)
    return made


def fewer_units(mlp: nn.Module, kept: Tensor, outputs: Tensor) -> nn.Module:
    """A gated MLP with only some of its hidden units and of its outputs."""
    last, made = last_layer(mlp), mlp
    names = {part: name for name, part in mlp.named_children()}
    for part in incoming(mlp):
        index = kept.repeat(part.out_features // len(kept))
        made = with_part(made, names[part], cut_layer(part, part.weight[index], entries(part.bias, index)))
    return with_part(made, names[last], cut_layer(last, last.weight[outputs][:, kept], entries(last.bias, outputs)))


def check_units(name: str, mlp: nn.Module) -> None:
    """Whether single hidden units of a gated MLP can be taken out."""
    known = {*incoming(mlp), last_layer(mlp)}
    for own, part in mlp.named_children():
        if part not in known and not isinstance(part, Identity) and not is_elementwise(part):
            raise ValueError(
                f"single units of {name!r} cannot be taken out: {own!r} ({type(part).__name__}) takes all of them"
            )


def check_heads(name: str, attention: Attention, node: fx.Node) -> None:
    """Whether single heads can be taken out of an attention that is called at ``node``."""
    form, heads = attention.form, attention.num_heads
    given = {**dict(zip(form.takes, node.args[1:], strict=False)), **node.kwargs}
    reason = ""
    if 1 < len(rows(attention, *sources(attention)[-1])) < heads:
        reason = "its heads share keys and values"
    elif not isinstance(part_of(attention, form.norm), Identity | None):
        reason = "it normalises over all of its heads"
    elif "shape" not in node.meta and any(r.target is not operator.getitem or r.args[1] != 0 for r in node.users):
        reason = "its attention weights, which are those of all heads, are read too"
    elif heads > 1 and any(_counts(given.get(mask), heads) for mask in ("attn_mask", "shared_rel_pos_bias")):
        reason = "it takes a mask or a bias with a part for each head"
    if reason:
        raise ValueError(f"single heads of {name!r} cannot be taken out: {reason}")


def _counts(mask: Any, heads: int) -> bool:
    """Whether a mask (..., queries, keys) has one part for each head."""
    shape: tuple = mask.meta.get("shape", ()) if isinstance(mask, fx.Node) else ()
    return len(shape) > 2 and shape[-3] in ((heads, 0), (0, heads))
