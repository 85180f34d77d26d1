"""BatchNorm merged into the layer before it, so that a rule sees the affine map that the network computes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .bake import need_weight
from .layers import BATCH_NORMS, Identity, Sequential, for_weight
from .trace import Trace


def fold_batch_norm(twin: nn.Module, structure: Trace) -> None:
    """Merge each BatchNorm of a replica into the layers before it: W' = W·γ/σ, b' = (b − μ)·γ/σ + β.

    Explanation rules then see the affine map that the network really computes. A BatchNorm is left as it is when it
    does not directly follow convolutions or linear layers, as the only one that takes their output, or takes something
    else too. One that is merged stays the same object, so that whatever refers to it finds what is left of
    it: nothing, or the activation that a BatchNorm with a forward pass of its own also computes.

    Raises
    ------
    ValueError
        A BatchNorm without running statistics has no fixed affine map to merge; a forward pass of its own that is no
        BatchNorm followed by something; a layer before it whose weight cannot be read.
    """
    modules = dict(twin.named_modules())
    for name, layers in structure.owners.items():
        if not structure.merges(name):
            continue
        norm = modules[name]
        if norm.running_mean is None:
            raise ValueError(f"BatchNorm {name!r} has no running statistics, so its output depends on the batch")
        for layer in layers:
            need_weight(layer, modules[layer])
            if "weight" not in modules[layer]._parameters:
                raise ValueError(
                    f"{layer!r} is given its weight from outside while the network runs, so the BatchNorm {name!r} "
                    "behind it cannot be merged into it; make the weight a parameter"
                )
        scale, shift = _affine(norm)
        _reduce(name, norm, scale, shift, modules[layers[0]].weight.ndim)
        for linear in (modules[layer] for layer in layers):
            bias = shift if linear.bias is None else linear.bias * scale + shift
            linear.weight = nn.Parameter((linear.weight * for_weight(linear, scale)).detach(), requires_grad=False)
            linear.bias = nn.Parameter(bias.detach(), requires_grad=False)


class _Asked:
    """What is left of a BatchNorm that is merged; a forward pass may still ask for its statistics, gain or bias."""

    def __getattr__(self, name: str) -> Any:
        merged = vars(self).get("_merged", {})
        return merged[name] if name in merged else super().__getattr__(name)  # type: ignore[misc]


class Merged(_Asked, Identity):
    """Nothing."""


class MergedAndMore(_Asked, Sequential):
    """The dropout and the activation."""


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel in evaluation mode."""
    weight, bias = (getattr(norm, part, None) for part in ("weight", "bias"))
    scale = torch.rsqrt(norm.running_var + getattr(norm, "eps", 1e-5))
    if weight is not None:
        scale = scale * weight
    shift = -norm.running_mean * scale
    return scale, shift if bias is None else shift + bias


@torch.no_grad()
def _reduce(name: str, norm: Any, scale: Tensor, shift: Tensor, dims: int) -> None:
    """Take its affine map from a BatchNorm and leave what else it computes."""
    # timm's BatchNormAct2d also holds the dropout and activation that follow
    parts = {part: getattr(norm, part, None) for part in ("drop", "act")}
    rest = {part: found for part, found in parts.items() if isinstance(found, nn.Module)}
    if type(norm) not in BATCH_NORMS and not scale.is_meta:  # what those compute needs no test
        alone = _without_hooks(norm)
        left = Sequential(*(part for child, part in alone._modules.items() if child in rest))
        if not _becomes(alone, left, scale, shift, dims):
            neutral = _without_hooks(norm)
            _neutralise(neutral)
            if not _becomes(alone, neutral, scale, shift, dims):
                raise ValueError(
                    f"{name!r} ({type(norm).__name__}) has a forward of its own that is no BatchNorm with running "
                    "statistics in evaluation mode, alone or followed by an activation; put a torch BatchNorm and what "
                    "else it does, as modules, in its place"
                )
            _neutralise(norm)
            return
    norm._merged = {**norm._parameters, **norm._buffers}
    norm.__class__ = MergedAndMore if rest else Merged
    norm._parameters, norm._buffers, norm._modules = {}, {}, rest
    vars(norm).pop("forward", None)


def _without_hooks(norm: nn.Module) -> Any:
    """A copy whose hooks, which are for the user's inputs, do not run."""
    alone = copy.deepcopy(norm)
    for module in alone.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return alone


def _becomes(norm: Any, left: nn.Module, scale: Tensor, shift: Tensor, dims: int) -> bool:
    """Whether ``norm`` computes the affine map and then ``left``."""
    ones = [1] * (dims - 2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, len(scale), *[3] * (dims - 2), generator=generator).to(scale)
    close = 1e-2 if scale.dtype in (torch.float16, torch.bfloat16) else 1e-4
    try:
        found, expected = norm(x.clone()), left(x * scale.view(-1, *ones) + shift.view(-1, *ones))
    except Exception:  # it is the user's code
        return False
    same = isinstance(found, Tensor) and found.shape == expected.shape
    return same and torch.allclose(found, expected, rtol=close, atol=close)


def _neutralise(norm: Any) -> None:
    """Give a BatchNorm the mean 0 and the standard deviation 1, and neither gain nor bias."""
    norm._parameters, norm._buffers = dict(norm._parameters), dict(norm._buffers)
    values = {"running_mean": 0.0, "running_var": 1 - getattr(norm, "eps", 1e-5), "weight": 1.0, "bias": 0.0}
    for part, value in values.items():
        tensor = getattr(norm, part, None)
        if tensor is not None:
            made = torch.full_like(tensor, value)
            setattr(norm, part, nn.Parameter(made, requires_grad=False) if part in norm._parameters else made)
