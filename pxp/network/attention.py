"""Attention with visible heads.

``nn.MultiheadAttention`` and timm's attentions hide what pruning by explaining needs: the heads' outputs are no
module's output, and torch's fast path calls no projection. In a replica each of them is replaced by an
:class:`Attention` that shares its weights, computes the same values, and shows its parts. The user's model is never
modified.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import type_before_parametrizations


class Rule(Protocol):
    """What an attention asks of the rule of its softmax, see :mod:`pxp.lrp.softmax`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """softmax(QKᵀ/√d) V with the rule's backward pass; (N, heads, tokens, channels) each."""


class Attention(nn.Module):
    """Self-attention with explicit projections; base of the replacements.

    Attributes
    ----------
    num_heads, head_dim : int
    heads : nn.Identity
        Its output (N, tokens, heads · channels) is what the heads give to the output projection.
    rule : Rule or None
        How relevance passes the softmax; None: the ordinary gradient.
    dropout : float
        Of the attention's weights, in training.
    """

    num_heads: int
    head_dim: int
    dropout: float = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Identity()
        self.rule: Rule | None = None

    @property
    def output(self) -> nn.Linear:
        """The output projection."""
        raise NotImplementedError

    def head_weights(self) -> Tensor:
        """The weights of every head, incoming and outgoing, (heads, weights)."""
        raise NotImplementedError

    def split(self, projected: Tensor) -> Tensor:
        """(N, tokens, heads · channels) → (N, heads, tokens, channels)."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Mix the values, (N, heads, tokens, channels) each, to (N, tokens, heads · channels)."""
        if self.rule is None:
            dropout = self.dropout if self.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        else:
            mixed = self.rule.attend(q, k, v, mask, causal)
        return mixed.transpose(1, 2).flatten(2)

    def by_head(self, weight: Tensor) -> Tensor:
        """Rows of a projection's weight or columns of the output projection's, by head: (heads, weights)."""
        return weight.reshape(self.num_heads, -1)


class _Torch(Attention):
    """In place of ``nn.MultiheadAttention``."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    batch_first = False  # tells nn.TransformerEncoderLayer not to take its fast path

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.head_dim = original.num_heads, original.head_dim
        self._tokens_first, self.dropout = not original.batch_first, original.dropout
        if original.in_proj_weight is not None:
            weights = original.in_proj_weight.chunk(3)
        else:
            weights = original.q_proj_weight, original.k_proj_weight, original.v_proj_weight
        biases = (None,) * 3 if original.in_proj_bias is None else original.in_proj_bias.chunk(3)
        for name, weight, bias in zip(("q_proj", "k_proj", "v_proj"), weights, biases, strict=True):
            setattr(self, name, _linear(weight, bias))
        # MultiheadAttention reads its projection's weights but never calls it, so hooks on it must not run
        self.out_proj = _linear(original.out_proj.weight, original.out_proj.bias)

    @property
    def output(self) -> nn.Linear:
        return self.out_proj

    def head_weights(self) -> Tensor:
        incoming = [self.by_head(part.weight) for part in (self.q_proj, self.k_proj, self.v_proj)]
        return torch.cat([*incoming, self.by_head(self.out_proj.weight.t())], dim=1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if self._tokens_first:
            query, key, value = (part.transpose(0, 1) for part in (query, key, value))
        q = self.split(self.q_proj(query))
        k = self.split(self.k_proj(key))
        v = self.split(self.v_proj(value))
        mask = _additive(attn_mask, q)
        if mask is not None and mask.ndim == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))
        padding = _additive(key_padding_mask, q)
        if padding is not None:
            padding = padding[:, None, None, :]
            mask = padding if mask is None else mask + padding
        out = self.out_proj(self.heads(self.attend(q, k, v, mask)))
        weights = None
        if need_weights:
            weights = logits(q.detach(), k.detach(), mask, False).softmax(-1)
            weights = weights.mean(1) if average_attn_weights else weights
        return (out.transpose(0, 1) if self._tokens_first else out), weights


class _Timm(Attention):
    """In place of timm's ``Attention``, ``AttentionRope`` and ``EvaAttention``, with their own submodules."""

    qkv: nn.Linear | None
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    proj: nn.Linear
    proj_drop: nn.Module

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.num_heads, self.head_dim = original.num_heads, original.head_dim
        for name, module in original._modules.items():  # also those that are None
            self.add_module(name, module)
        q_bias = getattr(original, "q_bias", None)
        if q_bias is not None:  # EvaAttention keeps the bias outside of its projection
            bias = torch.cat((q_bias, original.k_bias, original.v_bias))
            self.qkv = _linear(original.qkv.weight, bias)
        if not hasattr(self, "qkv"):  # EvaAttention's own is no module where the projections are separate
            self.qkv = None
        self.dropout = float(getattr(getattr(original, "attn_drop", None), "p", 0.0))
        self._groups = getattr(original, "num_kv_groups", 1)
        self._prefix = getattr(original, "num_prefix_tokens", 0)
        self._half = getattr(original, "rotate_half", False)

    @property
    def output(self) -> nn.Linear:
        return self.proj

    def head_weights(self) -> Tensor:
        if self.qkv is not None:
            incoming = self.qkv.weight.chunk(3)
        else:
            incoming = self.q_proj.weight, self._shared(self.k_proj.weight), self._shared(self.v_proj.weight)
        return torch.cat([*map(self.by_head, incoming), self.by_head(self.output.weight.t())], dim=1)

    def _shared(self, weight: Tensor) -> Tensor:
        """Keys and values that a group of heads shares count for each of them."""
        return weight.unflatten(0, (-1, self.head_dim)).repeat_interleave(self._groups, 0).flatten(0, 1)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        gate = getattr(self, "gate", None)
        if gate is not None:
            gate = gate(x).sigmoid()
            gate = gate if self.rule is None else gate.detach()  # as passes.Constant
        if self.qkv is not None:
            q, k, v = map(self.split, self.qkv(x).chunk(3, dim=-1))
        else:
            q, k, v = (self.split(part(x)) for part in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._rotate(q, rope).type_as(v), self._rotate(k, rope).type_as(v)
        if self._groups > 1:
            k, v = k.repeat_interleave(self._groups, dim=1), v.repeat_interleave(self._groups, dim=1)
        mixed = self.attend(q, k, v, attn_mask, is_causal)
        norm = getattr(self, "norm", None)
        mixed = mixed if norm is None else norm(mixed)
        mixed = self.heads(mixed if gate is None else mixed * gate)
        return self.proj_drop(self.proj(mixed))

    def _rotate(self, tokens: Tensor, rope: Tensor) -> Tensor:
        from timm.layers import apply_rot_embed_cat

        prefix, rest = tokens[:, :, : self._prefix], tokens[:, :, self._prefix :]
        return torch.cat([prefix, apply_rot_embed_cat(rest, rope, half=self._half)], dim=2)


_TIMM = {
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.models.eva.EvaAttention",
    "timm.models.vision_transformer.Attention",  # before timm 1.0.16
}
SUPPORTED = "torch.nn.MultiheadAttention and timm's Attention, AttentionRope and EvaAttention"


def _is_supported(module: nn.Module) -> bool:
    kind = type_before_parametrizations(module)
    if kind is nn.MultiheadAttention:
        return module.bias_k is None and not module.add_zero_attn
    return f"{kind.__module__}.{kind.__qualname__}" in _TIMM


def is_head_layer(module: nn.Module) -> bool:
    """Whether the module is an attention whose heads can be scored and pruned."""
    return isinstance(module, Attention) or _is_supported(module)


def unsupported_attention(model: nn.Module, seen: Iterable[str] = ()) -> dict[str, str]:
    """Name → class, and what it has, of the attention modules that :mod:`pxp` knows no rules for.

    ``seen`` are those that a trace has seen to compute an attention, whatever they are called.
    """
    seen = set(seen)
    return {
        name: _describe(module)
        for name, module in model.named_modules()
        if not is_head_layer(module)
        and not _only_gates(module)
        and (
            name in seen
            or (
                ("Attention" in type(module).__name__ or "Attn" in type(module).__name__)
                and isinstance(getattr(module, "num_heads", None), int)
            )
        )
    }


def _describe(module: nn.Module) -> str:
    name = type(module).__name__
    if type(module) is nn.MultiheadAttention:
        options = {"add_bias_kv": module.bias_k is not None, "add_zero_attn": module.add_zero_attn}
        return f"{name} with {' and '.join(option for option, given in options.items() if given)}"
    for base in type(module).__mro__[1:]:
        if base is nn.MultiheadAttention or f"{base.__module__}.{base.__qualname__}" in _TIMM:
            return f"{name}, a subclass of {base.__module__}.{base.__qualname__}"
    return f"{type(module).__module__}.{name}" if any(other.endswith(f".{name}") for other in _TIMM) else name


def _only_gates(module: nn.Module) -> bool:
    """timm's GlobalContext where it is a factor only: such gates are constants, no relevance passes its softmax."""
    return type(module).__name__ == "GlobalContext" and getattr(module, "mlp_add", None) is None


def make_explicit(twin: nn.Module) -> nn.Module:
    """Replace every supported attention of a replica; all others stay as they are."""
    explicit: dict[int, Attention] = {}  # a shared module stays shared
    for parent in list(twin.modules()):
        for child, module in list(parent._modules.items()):
            if module is not None and _is_supported(module):
                parent._modules[child] = _explicit(module, explicit)
    return _explicit(twin, explicit) if _is_supported(twin) else twin


def _explicit(module: nn.Module, known: dict[int, Attention]) -> Attention:
    if id(module) not in known:
        made = _Torch(module) if isinstance(module, nn.MultiheadAttention) else _Timm(module)
        copy_hooks(module, made)
        known[id(module)] = made.eval()
    return known[id(module)]


def copy_hooks(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the hooks around the forward pass that ``source`` has."""
    for hooks in (name for name in vars(source) if name.startswith("_forward")):
        getattr(target, hooks).update(getattr(source, hooks))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """torch's MultiheadAttention masks where a bool mask is True."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)


def logits(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    x = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
    if causal:
        x = x.masked_fill(torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1), -torch.inf)
    if mask is not None:
        x = x.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else x + mask
    return x


def silence_heads(module: nn.Module, kept: Tensor) -> list:
    """Let the pruned heads of an attention give exactly nothing to its output projection; returns what to remove.

    ``nn.MultiheadAttention`` does not call its projection, and its fast path reads only the weights. So it gets, for
    each pass, a projection whose columns of the pruned heads are zero.
    """
    if not isinstance(module, nn.MultiheadAttention | _Torch):
        projection = module.proj if not isinstance(module, Attention) else module.output
        assert isinstance(projection, nn.Linear)
        width = projection.in_features // len(kept)

        def zero(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            off = ~kept.to(inputs[0].device).repeat_interleave(width)
            return inputs[0].masked_fill(off, 0), *inputs[1:]

        return [projection.register_forward_pre_hook(zero)]

    replaced: list[nn.Module] = []

    def narrow(attention: nn.Module, *_) -> None:
        projection = attention.out_proj
        replaced.append(projection)  # type: ignore[arg-type]
        narrowed = copy.copy(projection)
        narrowed.__class__ = type_before_parametrizations(projection)  # type: ignore[arg-type]
        narrowed.__dict__.pop("weight", None)  # a hook may have set it
        narrowed._parameters = {**projection._parameters, "weight": without_heads(projection.weight, kept)}  # type: ignore
        attention._modules["out_proj"] = narrowed  # type: ignore[assignment]

    def widen(attention: nn.Module, *_) -> None:
        attention._modules["out_proj"] = replaced[-1]
        replaced.pop()

    return [
        module.register_forward_pre_hook(narrow),
        module.register_forward_hook(widen, prepend=True, always_call=True),
        _Restored(module, replaced),
    ]


class _Restored:
    """Removing it gives back the projection that a pass still holds: torch calls no hook after an interrupt."""

    def __init__(self, attention: nn.Module, replaced: list[nn.Module]) -> None:
        self.attention, self.replaced = attention, replaced

    def remove(self) -> None:
        if self.replaced:
            self.attention._modules["out_proj"] = self.replaced[0]
            self.replaced.clear()


def without_heads(weight: Tensor, kept: Tensor) -> Tensor:
    """An output projection's weight with the columns of the pruned heads zeroed."""
    width = weight.shape[1] // len(kept)
    return weight.masked_fill(~kept.to(weight.device).repeat_interleave(width), 0)
