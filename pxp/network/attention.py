"""Attention with visible heads.

Attentions hide what pruning by explaining needs: the heads' outputs are no module's output, and torch's fast path calls
no projection. In a replica each of them is replaced by an :class:`Attention` that shares its weights, computes the same
values, and shows its parts; ``pxp.network.attentions`` tells what each class looks like. The user's model is never
modified.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import type_before_parametrizations

from .attentions import OUTSIDE, Form, form_of, is_known
from .attentions import SUPPORTED as SUPPORTED
from .layers import LINEAR, MULTIHEAD, Identity, Linear, qualified
from .projections import inputs_of, layer_of, option, part_of, projected, rows_of_each, sources


class Rule(Protocol):
    """What an attention asks of the rule of its softmax, see :mod:`pxp.lrp.softmax`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """softmax(QKᵀ/√d) V with the rule's backward pass; (N, heads, tokens, channels) each."""


class Attention(nn.Module):
    """Self-attention with explicit projections; base of the replacements.

    Attributes
    ----------
    form : Form
        Where it has its parts.
    num_heads, head_dim : int
    heads : Identity
        Its output (N, tokens, heads · channels) is what the heads give to the output projection.
    rule : Rule or None
        How relevance passes the softmax; None: the ordinary gradient.
    dropout : float
        Of the attention's weights, in training.
    """

    form: Form
    num_heads: int
    head_dim: int
    dropout: float = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.heads = Identity()
        self.rule: Rule | None = None

    @property
    def projection(self) -> Any:
        """The output projection, a linear layer or a convolution."""
        return part_of(self, self.form.proj)

    def head_weights(self) -> Tensor:
        """The weights of every head, incoming and outgoing, (heads, weights); shared ones count for each."""
        incoming = [
            part_of(self, layer_of(self, name)).weight.flatten(1)[rows_of_each(self, name, letters)].flatten(1)
            for name, letters in sources(self)
        ]
        return torch.cat([*incoming, self.projection.weight.transpose(0, 1).reshape(self.num_heads, -1)], dim=1)

    @property
    def is_image(self) -> bool:
        """Whether it gives (N, channels, height, width)."""
        return bool(option(self, self.form.image))

    def nothing(self) -> Tensor:
        """What it gives without any head, for each channel."""
        width = inputs_of(self.projection)
        zeros = self.projection.weight.new_zeros((1, width, 1, 1) if self.is_image else (1, 1, width))
        made = part_of(self, self.form.whole or self.form.proj)(zeros)
        return made[0, :, 0, 0] if self.is_image else made[0, 0]

    def split(self, projected: Tensor) -> Tensor:
        """(N, tokens, heads · channels) → (N, heads, tokens, channels)."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Mix the values, (N, heads, tokens, channels) each."""
        if self.rule is not None:
            return self.rule.attend(q, k, v, mask, causal)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)

    def join(self, mixed: Tensor) -> Tensor:
        """(N, heads, tokens, channels) → (N, tokens, heads · channels)."""
        return mixed.transpose(1, 2).flatten(2)


class _Torch(Attention):
    """In place of ``nn.MultiheadAttention``."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    out_proj: Linear
    form = Form("out_proj", qkv=None, drop=None)
    batch_first: bool

    def __init__(self, original: Any) -> None:
        super().__init__()
        # what a forward pass may ask of it
        self.__dict__.update({name: value for name, value in vars(original).items() if isinstance(value, int | float)})
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
    def in_proj_weight(self) -> Tensor | None:
        parts = (self.q_proj, self.k_proj, self.v_proj)
        return torch.cat([part.weight for part in parts]) if self._qkv_same_embed_dim else None

    @property
    def in_proj_bias(self) -> Tensor | None:
        biases = [part.bias for part in (self.q_proj, self.k_proj, self.v_proj) if part.bias is not None]
        return torch.cat([*biases]) if biases else None

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
        if not self.batch_first:
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
        out = self.out_proj(self.heads(self.join(self.attend(q, k, v, mask))))
        weights = None
        if need_weights:
            weights = logits(q.detach(), k.detach(), mask, False).softmax(-1)
            weights = weights.mean(1) if average_attn_weights else weights
        return (out if self.batch_first else out.transpose(0, 1)), weights


class Described(Attention):
    """In place of an attention that a :class:`Form` describes: its own attributes and parts, under their own names."""

    def __init__(self, original: nn.Module, form: Form) -> None:
        super().__init__()
        # not what would hide a method or the parts of this class, such as the number of heads under the name "heads"
        own = {name: value for name, value in vars(original).items() if not hasattr(self, name) or name[0] == "_"}
        self.__dict__.update(own)
        self._modules = {**original._modules, "heads": Identity()}
        self.form = form
        self.num_heads = heads_of(original)
        self.head_dim = inputs_of(self.projection) // self.num_heads
        self.dropout = _probability(original, form.attn_drop)
        self._dropped = 0.0 if form.drop is None else _probability(original, form.drop)
        if form.fused_bias is not None and self._part("qkv") is not None:
            self._modules["qkv"] = _linear(self._part("qkv").weight, form.fused_bias(self))
            for name in OUTSIDE:
                self._parameters.pop(name, None)
                self._buffers.pop(name, None)
        if not form.calls:  # hooks on what is never called must not run
            for name in ("qkv", "proj"):
                self._modules[name] = _linear(self._part(name).weight, self._part(name).bias)

    def _part(self, name: str | None) -> Any:
        return part_of(self, name)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
        form = self.form
        given = {**dict(zip(form.takes[: len(args)], args[: len(form.takes)], strict=True)), **options}
        unknown = [name for name, value in options.items() if name not in form.takes and value is not None]
        if unknown or len(args) > len(form.takes):
            what = ", ".join(map(repr, unknown)) or f"{len(args) + 1} arguments"
            raise ValueError(f"an attention with {what} is not supported")
        gate = self._part(form.gate)
        if gate is not None:
            gate = gate(x).sigmoid()
            gate = gate if self.rule is None else gate.detach()  # as passes.Constant
        size = given.pop(form.size or "", x.shape[1:-1])
        norm = self._part(form.pre)
        x = x if norm is None else norm(x)
        x, window_mask, restore = (x, None, None) if form.windows is None else form.windows(self, x, size)
        q, k, v, shape = projected(self, x, given.pop("rope", None), size)
        causal = given.pop("is_causal", False)
        masks = [
            _of_windows(window_mask, x.shape[0]),
            _of_windows(given.pop("mask", None), x.shape[0]),
            *given.values(),
        ]
        masks += [] if form.position is None else [form.position(self)]
        mixed = self.attend(q, k, v, _together(masks, q), causal)
        mixed = self.join(mixed.mT if form.channels else mixed)
        norm, act = self._part(form.norm), self._part(form.act)
        mixed = mixed if norm is None else norm(mixed)
        mixed = mixed if gate is None else mixed * gate
        mixed = self.heads(mixed if act is None else act(mixed))
        if self.is_image:
            mixed = mixed.transpose(1, 2).unflatten(2, shape)
        out = self._part(form.whole or form.proj)(mixed)
        drop = self._part(form.drop)
        out = F.dropout(out, self._dropped, self.training) if drop is None else drop(out)
        out = out if restore is None else restore(out)
        return (out, None) if form.pair else out


def _is_supported(module: nn.Module) -> bool:
    kind = type_before_parametrizations(module)
    if kind is MULTIHEAD:
        return module.bias_k is None and not module.add_zero_attn
    return form_of(module) is not None


def heads_of(module: nn.Module) -> int:
    """The number of heads of a supported attention."""
    form = None if isinstance(module, Attention) else form_of(module)
    return getattr(module, "num_heads" if form is None else form.heads)


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
    if type(module) is MULTIHEAD:
        options = {"add_bias_kv": module.bias_k is not None, "add_zero_attn": module.add_zero_attn}
        return f"{name} with {' and '.join(option for option, given in options.items() if given)}"
    for base in type(module).__mro__[1:]:
        if base is MULTIHEAD or is_known(base):
            return f"{name}, a subclass of {qualified(base)}"
    return f"{type(module).__module__}.{name}" if is_known(type(module), name) else name


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
        made: Attention
        if isinstance(module, MULTIHEAD):
            made = _Torch(module)
            copy_hooks(module, made)
        else:
            form = form_of(module)
            assert form is not None
            if form.own:
                _check_parts(module, form)
            made = Described(module, form).eval()
            if form.own:
                _check_values(module, made)
        known[id(module)] = made.eval()
    return known[id(module)]


def _check_parts(module: nn.Module, form: Form) -> None:
    """Whether what was registered of a class is there."""
    separate = (form.q, form.k, form.v)
    wrong = [
        name
        for name in (form.proj, *(separate if form.qkv is None else (form.qkv,)))
        if not isinstance(part_of(module, name), LINEAR)
    ]
    if wrong:
        raise ValueError(f"{type(module).__name__} was registered with {wrong[0]!r}, which is no linear layer of it")
    heads = getattr(module, form.heads, None)
    if not isinstance(heads, int):
        raise ValueError(f"{type(module).__name__} was registered with heads={form.heads!r}, which is no number of it")
    if "heads" in module._modules:
        raise ValueError(f"{type(module).__name__} has a part named 'heads', which explaining it needs for itself")


def _check_values(module: nn.Module, made: Described) -> None:
    """Whether a registered class computes what its description says, for random tokens."""
    projection = part_of(module, made.form.qkv or made.form.q)
    tokens = torch.randn(2, 5, projection.in_features, generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(projection.weight)
    try:
        with torch.no_grad():
            expected, found = module.forward(tokens), made.forward(tokens)
        expected, found = (both[0] if made.form.pair else both for both in (expected, found))
        same = torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{type(module).__name__} does not fit what was registered of it; given two images of five tokens, and "
            f"nothing else, it says: {error}"
        ) from error
    if not same:
        raise ValueError(
            f"{type(module).__name__} does not compute what was registered of it: softmax(QKᵀ · scale) V of "
            "all tokens, with queries, keys and values one after the other; a scale that is not 1/√d is named: scale="
        )


def copy_hooks(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the hooks around the forward pass that ``source`` has."""
    for hooks in (name for name in vars(source) if name.startswith("_forward")):
        getattr(target, hooks).update(getattr(source, hooks))


def _linear(weight: Tensor, bias: Tensor | None) -> Linear:
    layer = Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """torch's MultiheadAttention masks where a bool mask is True."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)


def _of_windows(mask: Tensor | None, number: int) -> Tensor | None:
    """(windows, tokens, tokens) of one sample → (N · windows, 1, tokens, tokens)."""
    return None if mask is None else mask.repeat(number // len(mask), 1, 1)[:, None]


def _together(masks: list[Tensor | None], like: Tensor) -> Tensor | None:
    """The sum of masks; those of bool are True for what is attended to."""
    given = [mask for mask in masks if mask is not None]
    if len(given) < 2:
        return given[0] if given else None
    total: Any = 0
    for mask in given:
        total = total + _additive(~mask if mask.dtype == torch.bool else mask, like)
    return total


def _probability(module: nn.Module, name: str) -> float:
    """Of a dropout, which may be a module or a number."""
    dropout = getattr(module, name, 0.0)
    return float(getattr(dropout, "p", 0.0) if isinstance(dropout, nn.Module) else dropout)


def logits(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    x = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
    if causal:
        x = x.masked_fill(torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1), -torch.inf)
    if mask is not None:
        x = x.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else x + mask
    return x
