"""Queries, keys and values of a described attention: where they come from, and which outputs are whose head's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .layers import LAYERS, is_batch_norm


def part_of(module: nn.Module, name: str | None) -> Any:
    """A part by its name, which may have dots; None where there is none."""
    part: nn.Module | None = None if name is None else module
    for step in [] if name is None else name.split("."):
        part = None if part is None else part._modules.get(step)
    return part


def option(attention: Any, given: Any) -> Any:
    """What a form says of an attention: itself, or by the name of its attribute."""
    return getattr(attention, given) if isinstance(given, str) else given


def sources(attention: Any) -> list[tuple[str, str]]:
    """The projections' names, each with the letters of what it computes, in the order of its outputs."""
    form = attention.form
    if part_of(attention, form.qkv) is not None:
        return [(form.qkv, form.order)]
    if part_of(attention, form.kv) is not None:
        return [(form.q, "q"), (form.kv, "kv")]
    return [(form.q, "q"), (form.k, "k"), (form.v, "v")]


def layer_of(attention: nn.Module, name: str) -> str:
    """A projection is a convolution or linear layer, or ends in one, with nothing but norms behind it."""
    inner = [own for own, m in part_of(attention, name).named_modules() if isinstance(m, LAYERS)]
    return ".".join(filter(None, (name, inner[-1])))


def norms_of(attention: nn.Module, name: str) -> list[str]:
    """The BatchNorms behind a projection's layer."""
    inner = [f"{name}.{own}" if own else name for own, _ in part_of(attention, name).named_modules()]
    behind = inner[inner.index(layer_of(attention, name)) + 1 :]
    return [own for own in behind if is_batch_norm(part_of(attention, own))]


def inputs_of(projection: nn.Module) -> int:
    """How many channels an output projection reads."""
    return int(getattr(projection, "in_features", 0) or getattr(projection, "in_channels", 0))


def parts(attention: Any, projected: Tensor, letters: str) -> list[Tensor]:
    """A projection's outputs (N, tokens, channels) by what they are, (N, heads, tokens, channels of a head)."""
    form = attention.form
    keys = attention.head_dim if form.key_dim is None else getattr(attention, form.key_dim)
    widths = [attention.head_dim if letter == "v" else keys for letter in letters]
    if option(attention, form.by_head):
        found = projected.unflatten(-1, (-1, sum(widths))).split(widths, -1)
    else:
        heads = projected.shape[-1] // sum(widths)
        pieces = projected.split([heads * width for width in widths], -1)
        found = tuple(piece.unflatten(-1, (heads, -1)) for piece in pieces)
    return [part.transpose(1, 2) for part in found]


def rows(attention: Any, name: str, letters: str) -> Tensor:
    """Which outputs of a projection are each head's, (heads, outputs); of keys that all heads share, one for all."""
    outputs = len(part_of(attention, layer_of(attention, name)).weight)
    return torch.cat(parts(attention, torch.arange(outputs)[None, None], letters), -1)[0, :, 0]


def rows_of_each(attention: Any, name: str, letters: str) -> Tensor:
    """As :func:`rows`, with shared ones for each head that reads them."""
    found = rows(attention, name, letters)
    return found.repeat_interleave(attention.num_heads // len(found), 0)


def projected(attention: Any, x: Tensor, rope: Tensor | None, size: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Queries, keys and values, (N, heads, tokens, channels), with logits that are their products over √d.

    The last one is the shape of an image of queries, where tokens are pixels.
    """
    form, shape = attention.form, None
    asking = x if form.asks is None else form.asks(attention, x)
    x = x if form.context is None else form.context(attention, x, size)
    found: dict[str, Tensor] = {}
    for name, letters in sources(attention):
        made = part_of(attention, name)(asking if letters == "q" else x)
        if option(attention, form.image):
            shape = made.shape[2:] if "q" in letters else shape
            made = made.flatten(2).transpose(1, 2)
        found.update(zip(letters, parts(attention, made, letters), strict=True))
    q, k, v = found["q"], found["k"], found["v"]
    q_norm, k_norm = part_of(attention, form.q_norm), part_of(attention, form.k_norm)
    q, k = q if q_norm is None else q_norm(q), k if k_norm is None else k_norm(k)
    q = q if form.pool is None else form.pool(attention, q)
    if rope is not None:
        q, k = _rotate(attention, q, rope).type_as(v), _rotate(attention, k, rope).type_as(v)
    shared = q.shape[1] // k.shape[1]
    if shared > 1:
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    if form.channels:
        q, k, v = q.mT, k.mT, v.mT
    root = math.sqrt(q.shape[-1])
    if form.logit_scale is not None:
        scale = getattr(attention, form.logit_scale).clamp(max=math.log(100)).exp()
        q, k = _direction(attention, q) * (scale * root), _direction(attention, k)
    elif form.scale is not None:
        q = q * (getattr(attention, form.scale) * root)
    if form.extend is not None:
        q, k = form.extend(attention, q, k, size)
    return q, k, v, shape


def _direction(attention: Any, tokens: Tensor) -> Tensor:
    """Vectors of length 1; under a rule the division is by a constant, as in a normalisation."""
    length = tokens.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return tokens / (length if attention.rule is None else length.detach())


def _rotate(attention: Any, tokens: Tensor, rope: Tensor) -> Tensor:
    from timm.layers import apply_rot_embed_cat

    count = getattr(attention, "num_prefix_tokens", 0)
    prefix, rest = tokens[:, :, :count], tokens[:, :, count:]
    rotated = apply_rot_embed_cat(rest, rope, half=getattr(attention, "rotate_half", False))
    return torch.cat([prefix, rotated], dim=2)
