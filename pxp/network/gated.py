"""Gated MLPs: their hidden units are products, fc2(act(g(x)) · f(x)), so no layer's output is one.

Such a unit is a channel of what the last linear layer reads (behind a norm, where there is one). In a replica the
module ``hidden`` of the MLP passes it on, and so shows it; on the user's model the last layer's input is silenced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .layers import GATED, LINEAR, Identity, Linear, by_output, qualified


class Hidden(Identity):
    """What a gated MLP gives to its last layer."""


class _Through:
    """The input of the last layer goes through ``hidden``; an object, so that a copied network has its own."""

    def __init__(self, hidden: nn.Module) -> None:
        self.hidden = hidden

    def __call__(self, last: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.hidden(inputs[0]), *inputs[1:]


def last_layer(module: nn.Module | None) -> Any:
    """The last layer of a gated MLP, linear or a convolution; None of any other module."""
    name = None if module is None else GATED.get(qualified(type(module)))
    return None if name is None else getattr(module, name)


def is_gated(module: nn.Module | None) -> bool:
    """Whether the module is a gated MLP whose hidden units can be scored and pruned."""
    return isinstance(last_layer(module), LINEAR)


def show_hidden(twin: nn.Module) -> None:
    """Give every gated MLP of a replica its module ``hidden``."""
    for module in list(twin.modules()):
        last = last_layer(module)
        if last is not None and "hidden" not in module._modules:
            module.add_module("hidden", hidden := Hidden().eval())
            last.register_forward_pre_hook(_Through(hidden))


def hide_hidden(twin: nn.Module) -> nn.Module:
    """Undo :func:`show_hidden`: the network is then written as it was."""
    for module in twin.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _Through):
                del module._forward_pre_hooks[key]
        if last_layer(module) is not None:
            module._modules.pop("hidden", None)
    return twin


def incoming(module: nn.Module) -> list[Linear]:
    """The linear layers that compute a gated MLP's hidden units, with a row or several for each; else none."""
    last = last_layer(module)
    parts = [] if last is None else list(module.children())
    return [part for part in parts if isinstance(part, LINEAR) and part is not last]


def unit_weights(module: Any) -> Tensor:
    """The weights that compute each unit of a layer, (units, weights)."""
    last = last_layer(module)
    if last is None:
        return by_output(module)
    rows = [part.weight.unflatten(0, (-1, last.in_features)) for part in incoming(module)]
    return torch.cat([row.transpose(0, 1).flatten(1) for row in rows], dim=1)
