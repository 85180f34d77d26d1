"""LRP rules for linear and convolutional layers, in the form relevance = x ⊙ g.

Write the relevance of a layer's input as R(x) = x ⊙ g, where g is what flows backwards. For LRP-0, g is the ordinary
gradient (Montavon et al. 2019, section 10.3). Every other rule only rescales what flows through one layer, so each
rule here is a forward hook that leaves the layer's output values as they are and changes their backward pass. One
backward pass of autograd then computes all relevances at once.

With input a, weight w, bias b, output z_j = Σ_i a_i w_ij + b_j, upper relevance R_j = z_j g_j, and
x⁺ = max(x, 0), x⁻ = min(x, 0), every rule has the shape

    R_i = Σ_j c_ij · R_j / stabilised(d_j)

with contributions c_ij and a denominator d_j that the rule's docstring states. They are zennit's definitions
(Anders et al. 2021), which the tests compare with.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from zennit.core import Hook

from ..identity import ByValue
from ..network.layers import LINEAR
from .carry import Anew, Carry, Once, Redistribute, as_called, lean, over, scaled, stabilize, with_parameters


def _positive_part(tensor: Tensor) -> Tensor:
    return tensor.clamp(min=0)


def _negative_part(tensor: Tensor) -> Tensor:
    return tensor.clamp(max=0)


def _not_negative(x: Tensor) -> bool:
    return bool(x.detach().min() >= 0)


def as_number(name: str, value: Any) -> float:
    """A parameter as a float, which is compared and printed by value, whatever number was given.

    Raises
    ------
    ValueError
        Negative or not finite.
    """
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    return abs(float(value))  # −0 is 0


def as_zero_params(given: str | list[str] | None) -> str | None:
    """``"bias"`` or None, however it was written.

    Raises
    ------
    ValueError
        Anything else.
    """
    names = {given} if isinstance(given, str) else set(given or ())
    if names - {"bias"}:
        raise ValueError(f"zero_params may only name 'bias', got {given!r}")
    return "bias" if names else None


class Rule(ByValue, Hook):
    """Base of all rules: a zennit hook, so that a zennit composite can place it; compared and printed by its values.

    Parameters
    ----------
    zero_params : str or list of str, optional
        ``"bias"`` leaves the bias out of the denominator, so that it absorbs no relevance (zennit's option of the same
        name). Default: the bias takes its share.
    epsilon : float, default 1e-6
        Stabiliser of the denominator.

    Raises
    ------
    ValueError
        ``epsilon`` that is negative or not finite; ``zero_params`` that is not ``"bias"``.
    """

    def __init__(self, *, zero_params: str | list[str] | None = None, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.zero_params = as_zero_params(zero_params)
        self.epsilon = as_number("epsilon", epsilon)
        # set by a composite that knows that a ReLU follows: outputs below 0 then carry no relevance
        self.rectified = False

    def copy(self) -> Rule:
        return copy.copy(self)

    def register(self, module: nn.Module):
        if not isinstance(getattr(module, "weight", None), Tensor):
            raise TypeError(f"{type(self).__name__} is a rule for linear and convolutional layers, not {module}")
        return module.register_forward_hook(self._hook, prepend=True)  # what a user's hook changes is not the layer's

    def _hook(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        # where no gradient flows below, the rule would have no effect
        return self.apply(as_called(module, inputs[0], output), inputs[0], output) if inputs[0].requires_grad else None

    def apply(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor | None:
        """Return a tensor with the values of ``output`` whose backward pass is the rule's."""
        raise TypeError(f"{type(self).__name__} defines no rule")

    def _bias(self, module: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor | None:
        """The part of the bias that the denominator keeps."""
        bias = module.bias
        return None if bias is None or self.zero_params else part(bias)  # type: ignore[arg-type]


def _channels(module: nn.Module, bias: Tensor) -> Tensor:
    return bias if isinstance(module, LINEAR) else bias.reshape(-1, *[1] * (module.weight.ndim - 2))  # type: ignore[operator]


class Epsilon(Rule):
    """LRP-ε: R_i = Σ_j a_i w_ij R_j / (z_j + ε sign z_j)  (Bach et al. 2015, eq. 58).

    With ε = 0 (LRP-0) a ReLU network's relevance is exactly gradient × input.

    Parameters
    ----------
    epsilon : float, default 1e-6
        Larger values absorb the relevance of weakly activated outputs.
    zero_params : str or list of str, optional
        ``"bias"``: the denominator is z_j − b_j.

    Raises
    ------
    ValueError
        See :class:`Rule`.
    """

    def __init__(self, epsilon: float = 1e-6, *, zero_params: str | list[str] | None = None) -> None:
        super().__init__(zero_params=zero_params, epsilon=epsilon)

    def apply(self, module: nn.Module, x: Tensor, output: Tensor) -> None:
        held = Once(output.detach())
        bias = _channels(module, module.bias) if self.zero_params and module.bias is not None else None  # type: ignore[arg-type]

        def scale(grad: Tensor) -> Tensor:
            (z,) = held.take()
            if bias is not None:
                return grad * z / stabilize(z - bias, self.epsilon)
            ratio = z.abs()  # z / (z + ε sign z) without a sign
            return ratio.div_(ratio + self.epsilon).mul_(grad) if self.epsilon else grad

        output.register_hook(scale)


class _Signed(Rule):
    """Rules that treat positive and negative contributions a_i w_ij differently.

    For inputs ≥ 0 the positive contributions are Σ a w⁺, one pass; for others Σ a⁺ w⁺ + Σ a⁻ w⁻.
    """

    def _hook(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        x = inputs[0]
        # over tokens what the rule keeps is more than all that the network itself keeps, and is soon made again
        if x.requires_grad and isinstance(module, LINEAR) and x.ndim > 2:
            layer = with_parameters(module, module.weight, module.bias)
            return Anew.apply((output.detach(),), lambda x: self.apply(module, x, layer(x)), x)
        return super()._hook(module, inputs, output)

    @staticmethod
    def contributions(module: nn.Module, x: Tensor, positive: bool, bias: Tensor | None = None) -> Tensor:
        """Sum of the positive (or negative) contributions to each output, plus ``bias``, with a graph to ``x``."""
        same, other = (_positive_part, _negative_part) if positive else (_negative_part, _positive_part)
        if _not_negative(x):
            return lean(module, same, x, bias)
        return lean(module, same, x.clamp(min=0), bias) + lean(module, other, x.clamp(max=0))


class Gamma(_Signed):
    """LRP-γ, generalised to inputs and outputs of any sign (Montavon et al. 2019; Andéol et al. 2021).

    Positive outputs: contributions a⁺(w + γw⁺) + a⁻(w + γw⁻), denominator their sum + b + γb⁺.
    Negative outputs: contributions a⁺(w + γw⁻) + a⁻(w + γw⁺), denominator their sum + b + γb⁻.
    γ = 0 is LRP-0, γ → ∞ is z⁺ for positive outputs.

    Parameters
    ----------
    gamma : float, optional
        Default None: 0.25 for convolutions and 0.05 for linear layers, as in the paper's search space.
    zero_params, epsilon
        See :class:`Rule`.

    Raises
    ------
    ValueError
        ``gamma`` or ``epsilon`` that is negative or not finite.
    """

    def __init__(
        self, gamma: float | None = None, *, zero_params: str | list[str] | None = None, epsilon: float = 1e-6
    ) -> None:
        super().__init__(zero_params=zero_params, epsilon=epsilon)
        self.gamma = None if gamma is None else as_number("gamma", gamma)

    def _gamma(self, module: nn.Module) -> float:
        if self.gamma is not None:
            return self.gamma
        return 0.05 if isinstance(module, LINEAR) else 0.25

    def apply(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        gamma, z = self._gamma(module), output.detach()
        if self.rectified and _not_negative(x):
            # only positive outputs matter: one pass with w + γw⁺ carries everything
            kept = self._bias(module, lambda b: b + gamma * b.clamp(min=0))
            upper = lean(module, lambda weight: weight.clamp(min=0).mul_(gamma).add_(weight), x, kept)
            # without the bias the denominator may be negative
            lower = stabilize(upper.detach(), self.epsilon) if self.zero_params else upper.detach().abs() + self.epsilon
            share = z.clamp(min=0).div_(lower)
            return Carry.apply((z,), (share,), scaled, upper)
        if self.zero_params and module.bias is not None:
            return self._apply_without_bias(module, x, output)
        # (aw)⁺ = (aw + |aw|)/2 and (aw)⁻ = (aw − |aw|)/2, so with m = Σ|aw| + |b| the numerators are those of
        # (1 + γ/2)z ± (γ/2)m, + where z > 0. The denominator's size is then (1 + γ/2)|z| + (γ/2)m.
        half = gamma / 2
        m = lean(
            module,
            lambda weight: weight.abs().mul_(half),
            x if _not_negative(x) else x.abs(),
            self._bias(module, lambda b: half * b.abs()),
        )
        share = over(z, m.detach().add_(z.abs(), alpha=1 + half).add_(self.epsilon))

        def weigh(grad: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
            return share.abs().mul_(1 + half).mul_(grad), share.mul_(grad)

        return Carry.apply((z,), (share,), weigh, output, m)

    def _apply_without_bias(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        # the denominator may then have another sign than z
        gamma, z = self._gamma(module), output.detach()
        q = self.contributions(module, x, positive=True)
        z0 = z - _channels(module, module.bias)  # type: ignore[arg-type]
        up = z > 0
        share = z / stabilize(torch.add(z0, torch.where(up, q.detach(), z0 - q.detach()), alpha=gamma), self.epsilon)
        shares = torch.where(up, share, share * (1 + gamma)), share * torch.where(up, gamma, -gamma)
        return Carry.apply((z,), shares, scaled, output, q)


class ZPlus(_Signed):
    """z⁺: contributions (a w)⁺ = a⁺w⁺ + a⁻w⁻, denominator their sum + b⁺  (Montavon et al. 2017; zennit's ZPlus).

    Parameters
    ----------
    zero_params, epsilon
        See :class:`Rule`.
    """

    def apply(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        q = self.contributions(module, x, True, self._bias(module, _positive_part))
        z = output.detach()
        # never negative, so the stabiliser is simply added
        return Carry.apply((z,), (over(z, q.detach().add_(self.epsilon)),), scaled, q)


class AlphaBeta(_Signed):
    """LRP-αβ: α times the positive share minus β times the negative share  (Bach et al. 2015, eq. 60).

    R_i = Σ_j [α (a w)⁺ / (Σ (a w)⁺ + b⁺) − β (a w)⁻ / (Σ (a w)⁻ + b⁻)] R_j.  α = 1, β = 0 is z⁺.

    Parameters
    ----------
    alpha, beta : float, default 2 and 1
        Both ≥ 0 and α − β = 1, so that relevance is conserved.
    zero_params, epsilon
        See :class:`Rule`.

    Raises
    ------
    ValueError
        Negative ``alpha`` or ``beta``, or α − β ≠ 1.
    """

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 1.0,
        *,
        zero_params: str | list[str] | None = None,
        epsilon: float = 1e-6,
    ) -> None:
        super().__init__(zero_params=zero_params, epsilon=epsilon)
        if not (0 <= alpha < math.inf and beta >= 0 and abs(alpha - beta - 1) < 1e-9):
            raise ValueError(f"alpha and beta must be ≥ 0 with alpha − beta = 1, got alpha={alpha}, beta={beta}")
        self.alpha, self.beta = as_number("alpha", alpha), as_number("beta", beta)

    def apply(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        z = output.detach()
        carriers, shares = [], []
        for factor, positive in ((self.alpha, True), (-self.beta, False)):
            kept = self._bias(module, _positive_part if positive else _negative_part)
            part = self.contributions(module, x, positive, kept)
            carriers.append(part)
            shares.append(factor * z / stabilize(part.detach(), self.epsilon))
        return Carry.apply((z,), tuple(shares), scaled, *carriers)


class InputRule(Rule):
    """Rules for the layer that sees the image; :func:`pxp.heatmap` gives them an image without exact zeros."""

    def terms(self, module: nn.Module, x: Tensor) -> list[tuple[float, Tensor, Tensor, Tensor | None]]:
        """(sign, input, weight, bias) of the passes whose signed sum is the denominator."""
        raise TypeError(f"{type(self).__name__} defines no rule")

    def apply(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        return Redistribute.apply(x, (output.detach(),), lambda x: self.terms(module, x), module, self.epsilon)

    def _kept(self, module: nn.Module) -> Tensor | None:
        return None if self.zero_params else module.bias  # type: ignore[return-value]


class WSquare(InputRule):
    """w²: R_i = Σ_j w_ij² / (Σ_i w_ij² + b_j²) R_j  (Montavon et al. 2017). For the first layer only.

    The relevance of inputs that are exactly 0 is lost elsewhere, since g = R / x has no value there.

    Parameters
    ----------
    zero_params, epsilon
        See :class:`Rule`.
    """

    def terms(self, module: nn.Module, x: Tensor) -> list[tuple[float, Tensor, Tensor, Tensor | None]]:
        bias = self._kept(module)
        return [(1.0, torch.ones_like(x), module.weight**2, None if bias is None else bias**2)]  # type: ignore[operator]


class Flat(InputRule):
    """Flat: every input of an output gets the same share (Lapuschkin et al. 2019). For the first layer only.

    Parameters
    ----------
    zero_params, epsilon
        See :class:`Rule`; the bias never takes a share.
    """

    def terms(self, module: nn.Module, x: Tensor) -> list[tuple[float, Tensor, Tensor, Tensor | None]]:
        return [(1.0, torch.ones_like(x), torch.ones_like(module.weight), None)]  # type: ignore[arg-type]


Bound = float | Tensor | Sequence[Any]


def _nested(values: Any) -> Any:
    """Numbers in nested tuples, which can be hashed."""
    return tuple(map(_nested, values)) if isinstance(values, list) else values


class ZBox(InputRule):
    """z^B, for inputs in a box: contributions a w − l w⁺ − h w⁻  (Montavon et al. 2017). For the first layer only.

    Parameters
    ----------
    low, high : float, Tensor or nested sequence of float
        Smallest and largest possible input value; broadcast against the input (e.g. (1, 3, 1, 1) per channel). Kept as
        numbers, in nested tuples.
    zero_params, epsilon
        See :class:`Rule`.

    Raises
    ------
    ValueError
        If ``low`` exceeds ``high`` anywhere, or a bound is not finite.
    """

    def __init__(
        self,
        low: Bound = 0.0,
        high: Bound = 1.0,
        *,
        zero_params: str | list[str] | None = None,
        epsilon: float = 1e-6,
    ) -> None:
        super().__init__(zero_params=zero_params, epsilon=epsilon)
        lower, upper = (torch.as_tensor(bound, dtype=torch.float64) for bound in (low, high))
        if not bool(((lower <= upper) & lower.isfinite() & upper.isfinite()).all()):
            raise ValueError(f"low and high must be finite, and low not exceed high, got low={low}, high={high}")
        self.low, self.high = _nested(lower.tolist()), _nested(upper.tolist())

    def terms(self, module: nn.Module, x: Tensor) -> list[tuple[float, Tensor, Tensor, Tensor | None]]:
        weight, bias = module.weight, self._kept(module)
        low, high = (x.new_tensor(bound).expand_as(x).clone() for bound in (self.low, self.high))
        above, below = (None, None) if bias is None else (bias.clamp(min=0), bias.clamp(max=0))
        return [
            (1.0, x.clone(), weight, bias),  # type: ignore[list-item]
            (-1.0, low, weight.clamp(min=0), above),  # type: ignore[operator]
            (-1.0, high, weight.clamp(max=0), below),  # type: ignore[operator]
        ]


RULES: dict[str, Callable[..., Rule]] = {
    "epsilon": Epsilon,
    "gamma": Gamma,
    "zplus": ZPlus,
    "alpha2beta1": AlphaBeta,
    "flat": Flat,
    "wsquare": WSquare,
}


# the parameter of each rule that has one, as in ``pxp.LRP(low="gamma", low_gamma=0.1)``
PARAMETERS: dict[str, str] = {"epsilon": "epsilon", "gamma": "gamma", "alpha2beta1": "alpha"}


def make_rule(rule: str | Rule, zero_params: str | list[str] | None = None, **parameter: float) -> Rule:
    """Turn a rule's name into the rule, with its default parameter or another; a rule is returned as it is.

    Raises
    ------
    ValueError
        Unknown name; a parameter that this rule does not have; parameters together with a rule object, which has its
        own.
    TypeError
        Neither a name nor a rule.
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"unknown rule {rule!r}; allowed: {', '.join(map(repr, RULES))}, or a rule object")
        allowed = PARAMETERS.get(rule)
        if set(parameter) - {allowed}:
            has = f"{allowed!r} and 'zero_params'" if allowed else "'zero_params' only"
            raise ValueError(
                f"the rule {rule!r} has no parameter {next(iter(set(parameter) - {allowed}))!r}; it has {has}"
            )
        if rule == "alpha2beta1" and parameter:
            return AlphaBeta(parameter["alpha"], parameter["alpha"] - 1, zero_params=zero_params)
        return RULES[rule](zero_params=zero_params, **parameter)
    if not isinstance(rule, Rule):
        raise TypeError(f"a rule is a name or a pxp rule such as pxp.Gamma(0.25), got {rule!r}")
    if zero_params or parameter:
        name = type(rule).__name__
        given = ", ".join(
            f"{key}={value!r}" for key, value in {"zero_params": zero_params, **parameter}.items() if value
        )
        raise ValueError(f"give {given} to the rule itself: {name}(..., {given})")
    return rule
