"""Activations and gradients of component layers, read with plain hooks."""

from __future__ import annotations

import copy

import torch
from conftest import relative
from torch import Tensor, nn

import pxp


def close(a: pxp.Scores, b: pxp.Scores, bound: float = 1e-10) -> bool:
    return max(max(relative(a[k], b[k]), relative(a.signed[k], b.signed[k])) for k in b) < bound


def flows(model: nn.Module, x: Tensor, labels: Tensor, sites: dict[str, str], value) -> tuple[dict, dict]:
    """Plain autograd: outputs of the sites, and the gradient of ``value(logits, labels)`` there."""
    outputs: dict[str, Tensor] = {}

    def keep(name):
        # a copy, for an in-place ReLU may follow
        return lambda module, inputs, output: outputs.setdefault(name, output).clone()

    model = copy.deepcopy(model)
    handles = [model.get_submodule(site).register_forward_hook(keep(name)) for name, site in sites.items()]
    total = value(model(x), labels)
    for handle in handles:
        handle.remove()
    return outputs, dict(zip(outputs, torch.autograd.grad(total, list(outputs.values())), strict=True))


def sites(units: pxp.Components) -> dict[str, str]:
    return {name: layer.site[0] for name, layer in units.items()}


def target_sum(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels[:, None]).sum()
