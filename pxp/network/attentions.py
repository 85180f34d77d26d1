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
        (module, input, size) → windows (N · windows, tokens, channels), their mask or None, and the way back. The
        windows of one sample follow each other.
    context : callable or None
        (module, input, size) → what keys and values are computed from, where they are not those of all tokens.
    asks : callable or None
        (module, input) → what queries are computed from, likewise.
    pool : callable or None
        (module, queries) → fewer queries.
    size : str or None
        Which of ``takes`` is the height and width of the image that the tokens are.
    kv : str or None
        One projection for keys and values, beside ``q``.
    order : str
        What the outputs of ``qkv`` are to the softmax.
    by_head : bool or str
        The outputs of ``qkv`` and ``kv`` follow each other head by head, or the name of the attribute that tells.
    key_dim : str or None
        How many channels the queries and keys of a head have; None: as many as its values.
    image : bool or str
        Input, projections and output are images, (N, channels, height, width), or the attribute that tells.
    channels : bool
        Channels attend to channels, by all tokens.
    pre : str or None
        Norm of the input.
    q_norm, k_norm : str or None
        Norms of each head's queries and keys.
    norm, gate, act : str or None
        Norm over all heads, gate and activation in front of the projection.
    whole : str or None
        What is called of which ``proj`` is the linear part.
    drop : str or None
        Dropout behind the projection: a module, or its probability.
    attn_drop : str
        Dropout of the weights, likewise.
    pair : bool
        ``forward`` returns (output, weights); the weights are then None.
    calls : bool
        ``forward`` calls its projections as modules; False: it reads their weights.
    per_head : tuple of (str, int), or callable
        Other parameters (or linear layers, by their weight) with one entry for each head: name and dimension; or what
        tells them of a module.
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
    windows: Callable[[Any, Tensor, Any], tuple[Tensor, Tensor | None, Restore]] | None = None
    context: Callable[[Any, Tensor, Any], Tensor] | None = None
    asks: Callable[[Any, Tensor], Tensor] | None = None
    pool: Callable[[Any, Tensor], Tensor] | None = None
    size: str | None = None
    kv: str | None = None
    order: str = "qkv"
    by_head: bool | str = False
    key_dim: str | None = None
    image: bool | str = False
    channels: bool = False
    pre: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    norm: str | None = None
    gate: str | None = None
    act: str | None = None
    whole: str | None = None
    drop: str | None = "proj_drop"
    attn_drop: str = "attn_drop"
    pair: bool = False
    calls: bool = True
    per_head: tuple[tuple[str, int], ...] | Callable[[Any], tuple[tuple[str, int], ...]] = ()
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


def _tiles(image: Tensor, rows: int, columns: int) -> tuple[Callable[[Tensor], Tensor], Restore]:
    """Into windows of that many rows and columns, and back."""
    down, right = image.shape[1] // rows, image.shape[2] // columns

    def part(image: Tensor) -> Tensor:
        windows = image.unflatten(2, (right, columns)).unflatten(1, (down, rows)).transpose(2, 3)
        return windows.flatten(3, 4).flatten(0, 2)

    def restore(windows: Tensor) -> Tensor:
        tiles = windows.unflatten(0, (-1, down, right)).unflatten(3, (rows, columns))
        return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    return part, restore


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """Windows cover (N, height, width, channels)."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % columns, 0, -x.shape[1] % rows))


def _groups(attention: Any, x: Tensor, size: Any) -> tuple[Tensor, None, Restore]:
    """The windows of Twins."""
    height, width = size
    image = _padded(x.unflatten(1, (height, width)), attention.ws, attention.ws)
    part, restore = _tiles(image, attention.ws, attention.ws)
    return part(image), None, lambda made: restore(made)[:, :height, :width].flatten(1, 2)


def _reduced(attention: Any, x: Tensor, size: Any) -> Tensor:
    """Fewer tokens, of which PVT and Twins compute keys and values."""
    pool, reduce, act = (getattr(attention, name, None) for name in ("pool", "sr", "act"))
    if reduce is None:
        return x
    image = x.transpose(1, 2).unflatten(2, tuple(size))
    image = reduce(image if pool is None else pool(image))
    x = attention.norm(image.flatten(2).transpose(1, 2))
    return x if act is None else act(x)


def _shifted_windows(attention: Any, x: Tensor, size: None) -> tuple[Tensor, Tensor | None, Restore]:
    """torchvision's (N, height, width, channels) in windows, padded and shifted as its function does."""
    _, height, width, _ = x.shape
    rows, columns = attention.window_size
    x = _padded(x, rows, columns)
    full = x.shape[1:3]
    # a window as large as the image needs no shift
    down, right = (
        0 if window >= side else shift
        for window, side, shift in zip(attention.window_size, full, attention.shift_size, strict=True)
    )
    part, together = _tiles(x, rows, columns)

    def restore(windows: Tensor) -> Tensor:
        return together(windows).roll((down, right), (1, 2))[:, :height, :width]

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


def _units(attention: Any, x: Tensor, size: None) -> tuple[Tensor, None, Restore]:
    """The mask units of Hiera, whose tokens lie one unit apart from another."""
    number = x.shape[1] // (attention.q_stride * attention.window_size) if attention.use_mask_unit_attn else 1
    units = x.unflatten(1, (-1, number)).transpose(1, 2).flatten(0, 1)
    return units, None, lambda made: made.unflatten(0, (-1, number)).transpose(1, 2).flatten(1, 2)


def _strongest(attention: Any, q: Tensor) -> Tensor:
    """Hiera's queries are the largest of several, channel by channel."""
    return q.unflatten(2, (attention.q_stride, -1)).amax(2) if attention.q_stride > 1 else q


def _flat(attention: Any, x: Tensor, size: None) -> tuple[Tensor, None, Restore]:
    """Tokens that lie as in an image, (N, …, channels)."""
    shape = x.shape[1:-1]
    return x.flatten(1, -2), None, lambda made: made.unflatten(1, shape)


def _distances(attention: Any) -> Tensor:
    """The attention biases of LeViT and what came from it."""
    return attention.attention_biases[:, attention.attention_bias_idxs][None]


def _relative(attention: Any) -> Tensor | None:
    """What timm's modules of relative positions give, MLPs as in :func:`_continuous_position`."""
    own = attention.rel_pos
    if own is None:
        return None
    if not hasattr(own, "mlp"):
        table = own.relative_position_bias_table
        return own.get_bias() if table.ndim == 3 else _by_place(table, own)
    first, last = own.mlp.fc1, own.mlp.fc2
    hidden = F.relu(F.linear(own.rel_coords_log, first.weight, first.bias))
    bias = _by_place(F.linear(hidden, last.weight, last.bias).flatten(0, -2), own)
    bias = bias if own.bias_gain is None else own.bias_gain * bias.sigmoid()
    return F.pad(bias, (own.prefix_tokens, 0, own.prefix_tokens, 0))


def _relative_parts(attention: Any) -> tuple[tuple[str, int], ...]:
    own = attention.rel_pos
    if own is None:
        return ()
    if hasattr(own, "mlp"):
        return (("rel_pos.mlp.fc2", 0),)
    return (("rel_pos.relative_position_bias_table", 0 if own.relative_position_bias_table.ndim == 3 else 1),)


def _grid(attention: Any, x: Tensor, size: None) -> tuple[Tensor, None, Restore]:
    """torchvision's MaxViT gives (N, windows, tokens, channels)."""
    windows = x.shape[1]
    return x.flatten(0, 1), None, lambda made: made.unflatten(0, (-1, windows))


_VIT = Form(takes=("attn_mask", "is_causal"), q_norm="q_norm", k_norm="k_norm", norm="norm", gate="gate")
_ROPE = replace(_VIT, takes=("rope", "attn_mask", "is_causal"))
_TABLE: dict[str, Any] = {"position": _position, "per_head": (("relative_position_bias_table", 1),)}
_SWIN = Form(takes=("mask",), **_TABLE)
_TORCHVISION = Form(
    windows=_shifted_windows, calls=False, drop="dropout", attn_drop="attention_dropout", **_TABLE
)  # fmt: skip
_COSINE: dict[str, Any] = {
    "position": _continuous_position, "logit_scale": "logit_scale", "per_head": (("logit_scale", 0), ("cpb_mlp.2", 0)),
}  # fmt: skip
_HUGGING_FACE = Form(
    qkv=None, proj="o_proj", heads="num_attention_heads", takes=("attention_mask",), scale="scaling", drop=None,
    attn_drop="attention_dropout", pair=True,
)  # fmt: skip

_REDUCED = Form(qkv=None, q="q", kv="kv", context=_reduced)
_BIASES: dict[str, Any] = {
    "by_head": True, "key_dim": "key_dim", "scale": "scale", "drop": None, "position": _distances,
    "per_head": (("attention_biases", 0),),
}  # fmt: skip
_LEVIT = Form(proj="proj.ln.linear", act="proj.act", whole="proj.ln", image="use_conv", **_BIASES)
_COAT = Form(by_head="head_first", position=_relative, per_head=_relative_parts)

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
        drop=None, **_TABLE,
    ),
    "timm.models.davit.WindowAttention": Form(drop=None),
    "timm.models.davit.ChannelAttention": Form(order="vqk", channels=True, scale="scale", drop=None),
    # with its dynamic scale alone; another one would be found to differ
    "timm.models.davit.ChannelAttentionV2": Form(heads="groups", channels=True, drop=None),
    "timm.models.twins.LocallyGroupedAttn": Form(windows=_groups, takes=("size",), size="size"),
    "timm.models.twins.GlobalSubSampleAttn": replace(_REDUCED, takes=("size",), size="size"),
    "timm.models.pvt_v2.Attention": replace(_REDUCED, takes=("feat_size",), size="feat_size"),
    "timm.models.tiny_vit.Attention": Form(pre="norm", **_BIASES),
    "timm.models.efficientformer.Attention": Form(**_BIASES),
    "timm.models.levit.Attention": _LEVIT,
    "timm.models.levit.AttentionDownsample": replace(_LEVIT, qkv=None, q="q", kv="kv"),
    "timm.models.visformer.Attention": Form(image=True),
    "timm.models.maxxvit.Attention2d": replace(_COAT, image=True),
    "timm.models.maxxvit.AttentionCl": replace(_COAT, windows=_flat),
    "timm.models.crossvit.CrossAttention": Form(
        qkv=None, q="wq", k="wk", v="wv", asks=lambda m, x: x[:, :1], scale="scale"
    ),
    "timm.models.hiera.MaskUnitAttention": Form(heads="heads", windows=_units, pool=_strongest, drop=None),
    "timm.layers.attention2d.MultiQueryAttention2d": Form(
        qkv=None, q="query", k="key", v="value", proj="output.proj", whole="output", key_dim="key_dim", image=True,
        takes=("attn_mask",), drop=None,
    ),
    "timm.layers.attention2d.Attention2d": Form(by_head="head_first", image=True, takes=("attn_mask",)),
    "transformers.models.vit.modeling_vit.ViTAttention": _HUGGING_FACE,
    "transformers.models.deit.modeling_deit.DeiTAttention": _HUGGING_FACE,
    "transformers.models.dinov2.modeling_dinov2.Dinov2Attention": _HUGGING_FACE,
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersAttention": (
        _HUGGING_FACE
    ),
}  # fmt: skip

SUPPORTED = (
    "torch.nn.MultiheadAttention, the attentions of torchvision's Swin and MaxViT, of timm's ViT, EVA, BEiT, Swin, "
    "MetaFormer, DaViT, Twins, PVT v2, TinyViT, LeViT, EfficientFormer, Visformer, CoAtNet, MaxViT, CrossViT, Hiera and "
    "MobileNetV4, of Hugging Face's ViT, DeiT and DINOv2, and those given to pxp.register_attention"
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
