"""What passes relevance on: activations, normalisations, products and gates, as modules and as functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from zennit.core import Hook

from ..network.layers import Kind, kind_of
from .carry import Anew, Carry, scaled


class Identity(Hook):
    """Elementwise activations pass relevance on unchanged: f(x) = x · (f(x) / x) with the fraction held constant.

    ReLU and LeakyReLU need no hook, their gradient is f(x) / x already.
    """

    def register(self, module: nn.Module):
        return module.register_forward_hook(self._hook, prepend=True)  # a user's hook may change the output

    def _hook(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        x = inputs[0]
        if not x.requires_grad:
            return None

        def make(x: Tensor) -> Tensor:
            known = x.detach()
            return x * torch.where(known == 0, 0, module.forward(known) / known)

        return Anew.apply((output.detach(),), make, x)


class Normalisation(Hook):
    """Normalisations of a sample by its own values: the standard deviation is a constant (Ali et al. 2022).

    What remains is linear: y = (x − mean) · w/std + b, and without the mean where it is not subtracted.
    """

    def register(self, module: nn.Module):
        return module.register_forward_hook(self._hook, prepend=True)

    @staticmethod
    def _hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        x, kind = inputs[0], kind_of(module)
        if not x.requires_grad or kind is None or kind.passes != "normalisation":
            return None  # merged into the layer before it
        if getattr(module, "running_mean", None) is not None:
            return None  # by running statistics, which are constants
        weight: Tensor | None = getattr(module, "weight", None)
        groups = 0
        dims: tuple[int, ...] = (1,)
        if kind.over == "last":
            shape = _asked(module, kind, "normalized_shape")
            dims = tuple(range(-1 if isinstance(shape, int) else -len(shape), 0))
        elif kind.over == "groups":
            groups = _asked(module, kind, "num_groups")
        elif kind.over == "places":
            groups = x.shape[1]
        if weight is not None and kind.over != "last":
            weight = _by_channel(weight, x)
        return normalised(x, output, weight, dims, groups, kind.centred, getattr(module, "eps", None))


def _asked(module: nn.Module, kind: Kind, name: str) -> Any:
    """An attribute that a normalisation of this kind must have."""
    if not hasattr(module, name):
        raise ValueError(f"{type(module).__name__} was told to be a {kind.name}, which needs the attribute {name!r}")
    return getattr(module, name)


def _by_channel(weight: Tensor, x: Tensor) -> Tensor:
    return weight.reshape(-1, *[1] * (x.ndim - 2))


def normalised(
    x: Tensor,
    output: Tensor,
    weight: Tensor | None,
    dims: tuple[int, ...],
    groups: int,
    centred: bool,
    epsilon: float | None,
) -> Tensor:
    """A normalisation's output with the backward pass of a division by a constant.

    Over ``dims``, or over each of ``groups`` of channels with all their places.
    """
    value = x.detach()
    if groups:
        value, dims = value.reshape(len(x), groups, -1), (2,)
    square = value.var(dims, correction=0, keepdim=True) if centred else value.square().mean(dims, keepdim=True)
    shape = value.shape  # all that the backward pass keeps of the input
    scale = (square + (torch.finfo(x.dtype).eps if epsilon is None else epsilon)).rsqrt()

    def weigh(grad: Tensor, scale: Tensor) -> tuple[Tensor]:
        flow = grad if weight is None else grad * weight
        flow = flow.reshape(shape) * scale
        flow = flow.sub_(flow.mean(dims, keepdim=True)) if centred else flow
        return (flow.reshape(grad.shape),)

    return Carry.apply((output.detach(),), (scale,), weigh, x)


# --- what a model computes by functions, not by modules ---------------------------------------------------------------


def _identity(function: Callable, args: tuple, options: dict, kind: Kind) -> Tensor:
    x = args[0]
    # never in place: the value before is needed
    options = {**options, "inplace": False} if "inplace" in options else options
    value = function(x.detach(), *(False if a is True else a for a in args[1:]), **options)
    if not x.requires_grad:
        return value
    known = x.detach()
    return Carry.apply((value,), (torch.where(known == 0, 0, value / known),), scaled, x)


def _normalisation(function: Callable, args: tuple, options: dict, kind: Kind) -> Tensor:
    output = function(*args, **options)
    x = args[0]
    if not x.requires_grad:
        return output
    names = {
        "last": ("input", "normalized_shape", "weight", "bias", "eps") if kind.centred
        else ("input", "normalized_shape", "weight", "eps"),
        "groups": ("input", "num_groups", "weight", "bias", "eps"),
        "places": ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
        "given": ("input", "p", "dim", "eps"),
    }[kind.over]  # fmt: skip
    given = {**dict(zip(names, args, strict=False)), **options}
    if kind.over == "given":
        norm = x.detach().norm(given.get("p", 2.0), given.get("dim", 1), keepdim=True)
        scale = 1 / norm.clamp(min=given.get("eps", 1e-12))
        return Carry.apply((output.detach(),), (scale,), lambda grad, scale: (grad * scale,), x)
    if kind.over == "places" and not given.get("use_input_stats", True):
        return output
    dims = tuple(range(-len(given["normalized_shape"]), 0)) if kind.over == "last" else ()
    groups = given.get("num_groups", 0) if kind.over != "places" else x.shape[1]
    weight = given.get("weight")
    if weight is not None and kind.over != "last":
        weight = _by_channel(weight, x)
    return normalised(x, output, weight, dims, groups, kind.centred, given.get("eps", 1e-5 if kind.centred else None))


def _half(function: Callable, args: tuple, options: dict, kind: Kind) -> Tensor:
    """A product of two signals gives half of its relevance to each (Achtibat et al. 2024, eq. 11)."""
    result = function(*args, **options)
    if result.requires_grad:
        result.register_hook(lambda grad: grad / 2)
    return result


def _glu(function: Callable, args: tuple, options: dict, kind: Kind) -> Tensor:
    """The second half of a gated linear unit is a gate, a constant factor."""
    signal, gate = args[0].chunk(2, args[1] if len(args) > 1 else options.get("dim", -1))
    return signal * torch.sigmoid(gate).detach()


FUNCTIONS = {"identity": _identity, "normalisation": _normalisation, "half": _half, "glu": _glu}
