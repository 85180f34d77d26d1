"""The LRP rules of the softmax of attention.

In the form R = x ⊙ g they only rescale gradients (Achtibat et al. 2024, section 3.3). With A = softmax(QKᵀ/√d), O = AV:
a product of two factors gives half of its relevance to each, so g is halved for V and halved twice for Q and K.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from zennit.core import Hook

from ..identity import ByValue
from ..network.attention import Attention, logits
from .carry import Anew
from .rules import as_number, as_zero_params


def _scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    if tensor.requires_grad:
        tensor.register_hook(lambda gradient: gradient * factor)
    return tensor


class AttentionRule(ByValue, Hook, ABC):
    """Base of the rules of the softmax; placed on an :class:`Attention` by a composite, compared by its values."""

    def register(self, module: nn.Module):
        if not isinstance(module, Attention):
            raise TypeError(
                f"{self!r} is a rule for the attention of a replica, not for {type(module).__name__}; explain the "
                "model with pxp.attribute or pxp.heatmap"
            )
        module.rule = self
        return _Placed(module)

    def copy(self) -> AttentionRule:
        return self

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """softmax(QKᵀ/√d) V with the rule's backward pass; (N, heads, tokens, channels) each."""


class _Placed:
    def __init__(self, module: Attention) -> None:
        self.module = module

    def remove(self) -> None:
        self.module.rule = None


class AttnLRP(AttentionRule):
    """Softmax by its first-order Taylor expansion: R_i = x_i (R_i − s_i Σ_j R_j)  (Achtibat et al. 2024, eq. 12–14).

    In the form R = x ⊙ g that is the ordinary gradient of the softmax. The expansion's constant term absorbs
    relevance, so conservation does not hold here.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        q, k, v = _scale_gradient(q, 0.25), _scale_gradient(k, 0.25), _scale_gradient(v, 0.5)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class CPLRP(AttentionRule):
    """Conservative propagation: attention weights are constants, all relevance goes through the values.

    Source: Ali et al. 2022.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        with torch.no_grad():
            weights = logits(q, k, mask, causal).softmax(-1)
        return weights @ v


class SoftmaxZPlus(AttentionRule):
    """z⁺ on the linearised softmax (Hatefi et al. 2024, the third choice of the search space).

    Linearised at x, s_j = Σ_i J_ji x_i + b_j with J_ji = s_j (δ_ij − s_i) and b_j = s_j (1 − x_j + Σ_i s_i x_i). Only
    positive contributions count: R_i = Σ_j (J_ji x_i)⁺ / (Σ_i (J_ji x_i)⁺ + b_j⁺) R_j.

    Parameters
    ----------
    zero_params : "bias", optional
        Leave b_j⁺ out of the denominator, so that it absorbs no relevance.
    epsilon : float, default 1e-9
        Stabiliser of the denominator; small, since a softmax output often is.

    Raises
    ------
    ValueError
        ``epsilon`` that is negative or not finite; ``zero_params`` that is not ``"bias"``.
    """

    def __init__(self, *, zero_params: str | None = None, epsilon: float = 1e-9) -> None:
        super().__init__()
        self.zero_params, self.epsilon = as_zero_params(zero_params), as_number("epsilon", epsilon)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        q, k, v = _scale_gradient(q, 0.25), _scale_gradient(k, 0.25), _scale_gradient(v, 0.5)
        with torch.no_grad():
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        # the matrices of all heads are too large to be kept
        return Anew.apply((mixed,), lambda q, k, v: _ZPlusSoftmax.apply(logits(q, k, mask, causal), self) @ v, q, k, v)


class _ZPlusSoftmax(Function):
    @staticmethod
    def forward(ctx, x: Tensor, rule: SoftmaxZPlus) -> Tensor:
        s = x.softmax(-1)
        ctx.save_for_backward(x, s)
        ctx.rule = rule
        return s

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, s = ctx.saved_tensors
        x = x.masked_fill(s == 0, 0)  # masked logits are −∞
        sx = s * x
        down, mean = sx.clamp(max=0).neg_(), sx.sum(-1, keepdim=True)
        del sx  # the matrices are large, so few are held at a time
        # Σ_i (J_ji x_i)⁺ / s_j: the diagonal is positive where x_j is, all else where x_i is negative
        size = x.clamp(min=0)
        size.addcmul_(size, s, value=-1).add_(down.sum(-1, keepdim=True)).sub_(down)
        del down
        if ctx.rule.zero_params is None:
            size += torch.sub(1 + mean, x).clamp_(min=0)
        share = (s * s).mul_(grad).div_(size.mul_(s).add_(ctx.rule.epsilon))
        del size
        flow = torch.where(x > 0, share, share.sum(-1, keepdim=True) - share).mul_(s)
        return share.mul_(x > 0).sub_(flow).mul_(x != 0), None


SOFTMAX_RULES: dict[str, Callable[..., AttentionRule]] = {"attnlrp": AttnLRP, "cp": CPLRP, "zplus": SoftmaxZPlus}


def make_softmax_rule(rule: str | AttentionRule, zero_params: str | None = None) -> AttentionRule:
    """Turn a softmax rule's name into the rule; a rule is returned as it is.

    Raises
    ------
    ValueError
        Unknown name.
    TypeError
        Neither a name nor a rule.
    """
    if isinstance(rule, str):
        if rule not in SOFTMAX_RULES:
            raise ValueError(
                f"unknown softmax rule {rule!r}; allowed: {', '.join(map(repr, SOFTMAX_RULES))}, or a rule object"
            )
        return SoftmaxZPlus(zero_params=zero_params) if rule == "zplus" else SOFTMAX_RULES[rule]()
    if not isinstance(rule, AttentionRule):
        raise TypeError(f"a softmax rule is a name or a rule such as pxp.SoftmaxZPlus(), got {rule!r}")
    return rule
