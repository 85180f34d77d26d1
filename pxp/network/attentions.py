"""What is known of the classes of attention: where their parts are, and what they compute besides softmax(QKᵀ/√d) V.

One :class:`Form` per class; :mod:`pxp.network.attention` does the rest. A class of one's own is added with
:func:`register_attention`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import type_before_parametrizations

from .layers import qualified

Restore = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """Where a class of self-attentions keeps what. Names are of attributes, dots included; None: there is none.

    Attributes
    ----------
    proj : str
        The output projection; a head's score is read at its input.
    qkv : str or None
        One projection for queries, keys and values, in this order, each with all heads. Where the class has none or an
        instance has None there, ``q``, ``k`` and ``v`` are read.
    q, k, v : str
        Separate projections.
    heads : str
        The number of heads.
    takes : tuple of str
        What ``forward`` takes behind the tokens, in its order: ``"rope"``, ``"is_causal"``, ``"mask"`` (one for each
        window, (windows, tokens, tokens)), or the name of any other mask: a sum to the logits, or bool with True for
        what is attended to.
    scale : str or None
        What the logits are multiplied with; None: 1/√d.
    logit_scale : str or None
        Given for cosine attention: the logarithm of what the cosines of queries and keys are multiplied with.
    position : callable or None
        Module → relative position bias (1, heads, tokens, tokens), or None where an instance has none.
    fused_bias : callable or None
        The bias of ``qkv`` where it is not the layer's own.
    windows : callable or None
        (module, input) → windows (N · windows, tokens, channels), their mask or None, and the way back. The windows of
        one sample follow each other.
    span : callable or None
        Module → how many tokens each one attends to; None: all of its sample.
    q_norm, k_norm : str or None
        Norms of each head's queries and keys.
    norm, gate : str or None
        Norm over all heads and gate, both in front of the projection.
    drop : str or None
        Dropout behind the projection: a module, or its probability.
    attn_drop : str
        Dropout of the weights, likewise.
    groups : str or None
        How many heads share their keys and values.
    pair : bool
        ``forward`` returns (output, weights); the weights are then None.
    calls : bool
        ``forward`` calls its projections as modules; False: it reads their weights.
    per_head : tuple of (str, int)
        Other parameters (or linear layers, by their weight) with one entry for each head: name and dimension.
    own : bool
        Registered by the user, so it is compared with what the class computes.
    """

    proj: str = "proj"
    qkv: str | None = "qkv"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    heads: str = "num_heads"
    takes: tuple[str, ...] = ()
    scale: str | None = None
    logit_scale: str | None = None
    position: Callable[[Any], Tensor | None] | None = None
    fused_bias: Callable[[Any], Tensor | None] | None = None
    windows: Callable[[Any, Tensor], tuple[Tensor, Tensor | None, Restore]] | None = None
    span: Callable[[Any], int] | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    norm: str | None = None
    gate: str | None = None
    drop: str | None = "proj_drop"
    attn_drop: str = "attn_drop"
    groups: str | None = None
    pair: bool = False
    calls: bool = True
    per_head: tuple[tuple[str, int], ...] = ()
    own: bool = False


OUTSIDE = ("q_bias", "k_bias", "v_bias")


def _bias_outside(attention: Any) -> Tensor | None:
    """The bias that some of timm's attentions keep outside of their projection."""
    if attention.q_bias is None:
        return attention.qkv.bias
    return torch.cat([getattr(attention, name) for name in OUTSIDE])


def _bias_without_keys(attention: Any) -> Tensor | None:
    """torchvision's cosine attention ignores the keys' part of the bias."""
    if attention.qkv.bias is None:
        return None
    q, k, v = attention.qkv.bias.chunk(3)
    return torch.cat([q, torch.zeros_like(k), v])


def _by_place(table: Tensor, attention: Any) -> Tensor:
    """A table (distances, heads) as (1, heads, tokens, tokens)."""
    index = attention.relative_position_index
    tokens = math.isqrt(index.numel())
    return table[index.flatten()].unflatten(0, (tokens, tokens)).permute(2, 0, 1)[None]


def _position(attention: Any) -> Tensor | None:
    """The relative position bias of Swin, MaxViT and BEiT."""
    table = attention.relative_position_bias_table
    return None if table is None else _by_place(table, attention)


def _continuous_position(attention: Any) -> Tensor:
    """Swin v2's relative position bias, from a small MLP of the coordinates.

    Its layers see no signal but constants, so they are not called: they would count as layers of the network.
    """
    first, _, second = attention.cpb_mlp
    hidden = F.relu(F.linear(attention.relative_coords_table, first.weight, first.bias))
    return 16 * _by_place(F.linear(hidden, second.weight).flatten(0, -2), attention).sigmoid()


def _shifted_windows(attention: Any, x: Tensor) -> tuple[Tensor, Tensor | None, Restore]:
    """torchvision's (N, height, width, channels) in windows, padded and shifted as its function does."""
    _, height, width, _ = x.shape
    rows, columns = attention.window_size
    x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
    full = x.shape[1:3]
    # a window as large as the image needs no shift
    down, right = (
        0 if window >= side else shift
        for window, side, shift in zip(attention.window_size, full, attention.shift_size, strict=True)
    )

    def part(image: Tensor) -> Tensor:
        windows = image.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3)
        return windows.flatten(3, 4).flatten(0, 2)

    def restore(windows: Tensor) -> Tensor:
        image = windows.unflatten(0, (-1, full[0] // rows, full[1] // columns)).unflatten(3, (rows, columns))
        image = image.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return image.roll((down, right), (1, 2))[:, :height, :width]

    if not down and not right:
        return part(x), None, restore
    # what a shift brings together from opposite edges does not see each other
    regions = torch.zeros(1, *full, 1, device=x.device)
    steps = [
        (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        for window, shift in ((rows, down), (columns, right))
    ]
    for number, (vertical, horizontal) in enumerate(itertools.product(*steps)):
        regions[:, vertical, horizontal] = number
    region = part(regions)[..., 0]
    apart = region[:, None, :] != region[:, :, None]
    return part(x.roll((-down, -right), (1, 2))), -100 * apart.to(x.dtype), restore


def _grid(attention: Any, x: Tensor) -> tuple[Tensor, None, Restore]:
    """torchvision's MaxViT gives (N, windows, tokens, channels)."""
    windows = x.shape[1]
    return x.flatten(0, 1), None, lambda made: made.unflatten(0, (-1, windows))


def _window(attention: Any) -> int:
    return math.prod(attention.window_size)


_VIT = Form(takes=("attn_mask", "is_causal"), q_norm="q_norm", k_norm="k_norm", norm="norm", gate="gate")
_ROPE = replace(_VIT, takes=("rope", "attn_mask", "is_causal"), groups="num_kv_groups")
_TABLE: dict[str, Any] = {"position": _position, "per_head": (("relative_position_bias_table", 1),)}
_SWIN = Form(takes=("mask",), span=_window, **_TABLE)
_TORCHVISION = Form(
    windows=_shifted_windows, span=_window, calls=False, drop="dropout", attn_drop="attention_dropout", **_TABLE
)  # fmt: skip
_COSINE: dict[str, Any] = {
    "position": _continuous_position, "logit_scale": "logit_scale", "per_head": (("logit_scale", 0), ("cpb_mlp.2", 0)),
}  # fmt: skip
_HUGGING_FACE = Form(
    qkv=None, proj="o_proj", heads="num_attention_heads", takes=("attention_mask",), scale="scaling", drop=None,
    attn_drop="attention_dropout", pair=True,
)  # fmt: skip

_KNOWN: dict[type | str, Form] = {
    "timm.layers.attention.Attention": _VIT,
    "timm.models.vision_transformer.Attention": _VIT,  # before timm 1.0.16
    "timm.layers.attention.AttentionRope": _ROPE,
    "timm.models.eva.EvaAttention": replace(_ROPE, fused_bias=_bias_outside),
    "timm.models.beit.Attention": Form(
        takes=("shared_rel_pos_bias",), fused_bias=_bias_outside, **_TABLE
    ),
    "timm.models.metaformer.Attention": Form(),
    "timm.models.swin_transformer.WindowAttention": _SWIN,
    "timm.models.swin_transformer_v2.WindowAttention": replace(_SWIN, fused_bias=_bias_outside, **_COSINE),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": _TORCHVISION,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": replace(
        _TORCHVISION, fused_bias=_bias_without_keys, **_COSINE
    ),
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": Form(
        qkv="to_qkv", proj="merge", heads="n_heads", scale="scale_factor", windows=_grid,
        span=lambda m: m.max_seq_len, drop=None, **_TABLE,
    ),
    "transformers.models.vit.modeling_vit.ViTAttention": _HUGGING_FACE,
    "transformers.models.deit.modeling_deit.DeiTAttention": _HUGGING_FACE,
    "transformers.models.dinov2.modeling_dinov2.Dinov2Attention": _HUGGING_FACE,
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersAttention": (
        _HUGGING_FACE
    ),
}  # fmt: skip

SUPPORTED = (
    "torch.nn.MultiheadAttention, the attentions of torchvision's Swin and MaxViT, of timm's ViT, EVA, BEiT, Swin and "
    "MetaFormer, of Hugging Face's ViT, DeiT and DINOv2, and those given to pxp.register_attention"
)


def form_of(module: nn.Module) -> Form | None:
    """How this very class of attention looks; a subclass may compute something else."""
    cls = type_before_parametrizations(module)
    return _KNOWN.get(cls) or _KNOWN.get(qualified(cls))


def is_known(cls: type, name: str = "") -> bool:
    """Whether a class is in the table; with a name, whether one so called is, of whatever library."""
    if not name:
        return cls in _KNOWN or qualified(cls) in _KNOWN
    return any(isinstance(other, str) and other.endswith(f".{name}") for other in _KNOWN)


def register_attention(
    cls: type[nn.Module],
    *,
    proj: str,
    qkv: str | None = None,
    q: str | None = None,
    k: str | None = None,
    v: str | None = None,
    heads: str = "num_heads",
    scale: str | None = None,
    drop: str | None = None,
    pair: bool = False,
) -> None:
    """Tell where a plain multi-head self-attention of one's own has its parts, so that its heads can be explained.

    ``forward`` must take tokens (N, tokens, channels) alone and compute softmax(QKᵀ · scale) V with a linear output
    projection. Whenever a model with such an attention is explained, the description is compared with what the class
    computes for random tokens, so a wrong one is an error, not a wrong explanation. Only this very class is meant: a
    subclass is registered for itself. To register a class again replaces its description.

    Parameters
    ----------
    cls : type
        The attention's class.
    proj : str
        Name of the output projection, an ``nn.Linear``; dots lead to parts of parts (``"to_out.0"``).
    qkv : str, optional
        Name of the one ``nn.Linear`` whose outputs are all queries, then all keys, then all values.
    q, k, v : str, optional
        Names of separate ones, instead of ``qkv``.
    heads : str, default "num_heads"
        Name of the number of heads.
    scale : str, optional
        Name of the factor of the logits; default 1/√d.
    drop : str, optional
        Name of the dropout behind the projection.
    pair : bool, default False
        ``forward`` returns a pair whose first is the output.

    Raises
    ------
    TypeError
        ``cls`` is no class of modules.
    ValueError
        Neither ``qkv`` nor all of ``q``, ``k`` and ``v``, or both; a class that :mod:`pxp` knows.

    Examples
    --------
    >>> pxp.register_attention(MyAttention, qkv="to_qkv", proj="to_out.0", heads="heads")  # doctest: +SKIP
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"an attention to register is a class of modules, got {cls!r}")
    separate = [name for name in (q, k, v) if name is not None]
    if len(separate) != (3 if qkv is None else 0):
        raise ValueError("name either qkv, one projection for all, or q, k and v")
    if cls is nn.MultiheadAttention or qualified(cls) in _KNOWN:
        raise ValueError(f"{qualified(cls)} is supported as it is")
    q, k, v = q or "", k or "", v or ""
    _KNOWN[cls] = Form(proj, qkv, q, k, v, heads=heads, scale=scale, drop=drop, pair=pair, own=True)
