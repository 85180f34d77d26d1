"""BatchNorm merged into the layer before it, so that a rule sees the affine map that the network computes."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from .attention import copy_hooks
from .trace import Trace


def fold_batch_norm(twin: nn.Module, structure: Trace) -> None:
    """Merge each BatchNorm of a replica into the one layer before it: W' = W·γ/σ, b' = (b − μ)·γ/σ + β.

    Explanation rules then see the affine map that the network really computes. A BatchNorm is left as it is when it
    does not directly follow exactly one convolution or linear layer, as the only one that takes its output.

    Raises
    ------
    ValueError
        A BatchNorm without running statistics has no fixed affine map to merge.
    """
    modules = dict(twin.named_modules())
    owners: dict[str, set[str]] = {}
    for layer, norms in structure.norms.items():
        for norm in norms:
            owners.setdefault(norm, set()).add(layer)
    for layer, norms in structure.norms.items():
        name = norms[0]
        if not name or len(norms) > 1 or len(owners[name]) > 1:
            continue
        linear, norm = modules[layer], modules[name]
        if norm.running_mean is None:
            raise ValueError(f"BatchNorm {name!r} has no running statistics, so its output depends on the batch")
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        bias = -norm.running_mean * scale if linear.bias is None else (linear.bias - norm.running_mean) * scale
        if norm.bias is not None:
            bias = bias + norm.bias
        weight = linear.weight * scale.reshape(-1, *[1] * (linear.weight.ndim - 1))
        linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
        # timm's BatchNormAct2d also holds the dropout and activation that follow
        parts = {part: getattr(norm, part, None) for part in ("drop", "act")}
        rest = OrderedDict((part, found) for part, found in parts.items() if isinstance(found, nn.Module))
        parent, _, child = name.rpartition(".")
        stand_in = nn.Sequential(rest) if rest else nn.Identity()
        copy_hooks(norm, stand_in)  # e.g. a mask that the user has put on the model
        setattr(modules[parent], child, stand_in)
