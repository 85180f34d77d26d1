"""What is known of the classes of attention: where their parts are, and what they compute besides softmax(QKᵀ/√d) V.

One :class:`Form` per class; ``pxp.network.attention`` does the rest. A class of one's own is added with
:func:`register_attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from . import places
from .layers import MULTIHEAD, qualified


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
    extend : callable or None
        (module, queries, keys, size) → both, with more channels, whose product over their √d are the logits.
    size : str or None
        Which of ``takes`` is the height and width of the image that the tokens are; None: the input has that shape.
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
    windows: Callable[[Any, Tensor, Any], tuple[Tensor, Tensor | None, places.Restore]] | None = None
    context: Callable[[Any, Tensor, Any], Tensor] | None = None
    asks: Callable[[Any, Tensor], Tensor] | None = None
    pool: Callable[[Any, Tensor], Tensor] | None = None
    extend: Callable[[Any, Tensor, Tensor, Any], tuple[Tensor, Tensor]] | None = None
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


_VIT = Form(takes=("attn_mask", "is_causal"), q_norm="q_norm", k_norm="k_norm", norm="norm", gate="gate")
_ROPE = replace(_VIT, takes=("rope", "attn_mask", "is_causal"))
_TABLE: dict[str, Any] = {"position": places.table_of_distances, "per_head": (("relative_position_bias_table", 1),)}
_SWIN = Form(takes=("mask",), **_TABLE)
_TORCHVISION = Form(
    windows=places.shifted_windows, calls=False, drop="dropout", attn_drop="attention_dropout", **_TABLE
)  # fmt: skip
_COSINE: dict[str, Any] = {
    "position": places.continuous_distances, "logit_scale": "logit_scale",
    "per_head": (("logit_scale", 0), ("cpb_mlp.2", 0)),
}  # fmt: skip
_HUGGING_FACE = Form(
    qkv=None, proj="o_proj", heads="num_attention_heads", takes=("attention_mask",), scale="scaling", drop=None,
    attn_drop="attention_dropout", pair=True,
)  # fmt: skip

_REDUCED = Form(qkv=None, q="q", kv="kv", context=places.reduced)
_BIASES: dict[str, Any] = {
    "by_head": True, "key_dim": "key_dim", "scale": "scale", "drop": None, "position": places.biases,
    "per_head": (("attention_biases", 0),),
}  # fmt: skip
_LEVIT = Form(proj="proj.ln.linear", act="proj.act", whole="proj.ln", image="use_conv", **_BIASES)
_COAT = Form(by_head="head_first", position=places.relative, per_head=places.relative_parts)

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
        qkv="to_qkv", proj="merge", heads="n_heads", scale="scale_factor", windows=places.grid,
        drop=None, **_TABLE,
    ),
    "timm.models.davit.WindowAttention": Form(drop=None),
    "timm.models.davit.ChannelAttention": Form(order="vqk", channels=True, scale="scale", drop=None),
    # with its dynamic scale alone; another one would be found to differ
    "timm.models.davit.ChannelAttentionV2": Form(heads="groups", channels=True, drop=None),
    "timm.models.twins.LocallyGroupedAttn": Form(windows=places.groups, takes=("size",), size="size"),
    "timm.models.twins.GlobalSubSampleAttn": replace(_REDUCED, takes=("size",), size="size"),
    "timm.models.pvt_v2.Attention": replace(_REDUCED, takes=("feat_size",), size="feat_size"),
    "timm.models.tiny_vit.Attention": Form(pre="norm", **_BIASES),
    "timm.models.efficientformer.Attention": Form(**_BIASES),
    "timm.models.levit.Attention": _LEVIT,
    "timm.models.levit.AttentionDownsample": replace(_LEVIT, qkv=None, q="q", kv="kv"),
    "timm.models.visformer.Attention": Form(image=True),
    "timm.models.maxxvit.Attention2d": replace(_COAT, image=True),
    "timm.models.maxxvit.AttentionCl": replace(_COAT, windows=places.flat),
    "timm.models.crossvit.CrossAttention": Form(
        qkv=None, q="wq", k="wk", v="wv", asks=lambda m, x: x[:, :1], scale="scale"
    ),
    "timm.models.hiera.MaskUnitAttention": Form(
        heads="heads", windows=places.mask_units, pool=places.strongest, drop=None
    ),
    "timm.models.vision_transformer_sam.Attention": Form(
        q_norm="q_norm", k_norm="k_norm", windows=places.flat, extend=places.decomposed
    ),
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
    "MetaFormer, DaViT, Twins, PVT v2, TinyViT, LeViT, EfficientFormer, Visformer, CoAtNet, MaxViT, CrossViT, Hiera, "
    "SAM and MobileNetV4, of Hugging Face's ViT, DeiT and DINOv2, and those given to pxp.register_attention"
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
        Neither ``qkv`` nor all of ``q``, ``k`` and ``v``, or both; a class that ``pxp`` knows.

    Examples
    --------
    >>> pxp.register_attention(MyAttention, qkv="to_qkv", proj="to_out.0", heads="heads")  # doctest: +SKIP
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"an attention to register is a class of modules, got {cls!r}")
    separate = [name for name in (q, k, v) if name is not None]
    if len(separate) != (3 if qkv is None else 0):
        raise ValueError("name either qkv, one projection for all, or q, k and v")
    if cls is MULTIHEAD or qualified(cls) in _KNOWN:
        raise ValueError(f"{qualified(cls)} is supported as it is")
    q, k, v = q or "", k or "", v or ""
    _KNOWN[cls] = Form(proj, qkv, q, k, v, heads=heads, scale=scale, drop=drop, pair=pair, own=True)
