"""How pruned heads and pruned units of gated MLPs are silenced; weights stay as they are."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from .attention import Attention, Described
from .attentions import form_of
from .gated import is_gated, last_layer
from .layers import LINEAR
from .projections import inputs_of, part_of


def reader_of(module: nn.Module | None) -> Any:
    """The layer of a replica's attention or gated MLP that reads its heads or hidden units; None of other modules."""
    return module.projection if isinstance(module, Attention) else last_layer(module) if is_gated(module) else None


def silence_units(mlp: nn.Module, kept: Tensor) -> list:
    """Let the pruned hidden units of a gated MLP give exactly nothing to its last layer; returns what to remove."""
    last = last_layer(mlp)
    assert last is not None

    def zero(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return inputs[0].masked_fill(~kept.to(inputs[0].device), 0), *inputs[1:]

    return [last.register_forward_pre_hook(zero)]


def silence_heads(module: nn.Module, kept: Tensor) -> list:
    """Let the pruned heads of an attention give exactly nothing to its output projection; returns what to remove.

    Some attentions do not call their projection, ``nn.MultiheadAttention``'s fast path reads only its weights. So these
    get, for each pass, a projection whose columns of the pruned heads are zero; so does what was registered, which may
    do either.
    """
    form = module.form if isinstance(module, Described) else form_of(module)
    name = "out_proj" if form is None else form.proj
    if form is not None and form.calls and not form.own:
        projection = part_of(module, name)
        width = inputs_of(projection) // len(kept)

        def zero(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            off = ~kept.to(inputs[0].device).repeat_interleave(width)
            off = off if isinstance(projection, LINEAR) else off.view(-1, 1, 1)  # of an image
            return inputs[0].masked_fill(off, 0), *inputs[1:]

        return [projection.register_forward_pre_hook(zero)]

    replaced: list[nn.Module] = []

    def narrow(attention: nn.Module, *_) -> None:
        projection = part_of(attention, name)
        replaced.append(projection)
        narrowed = copy.copy(projection)
        narrowed.__class__ = type_before_parametrizations(projection)
        narrowed.__dict__.pop("weight", None)  # a hook may have set it
        narrowed._parameters = {**projection._parameters, "weight": without_heads(projection.weight, kept)}
        _put(attention, name, narrowed)

    def widen(attention: nn.Module, *_) -> None:
        _put(attention, name, replaced[-1])
        replaced.pop()

    return [
        module.register_forward_pre_hook(narrow),
        module.register_forward_hook(widen, prepend=True, always_call=True),
        _Restored(module, name, replaced),
    ]


def _put(module: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    (part_of(module, parent) if parent else module)._modules[child] = part


class _Restored:
    """Removing it gives back the projection that a pass still holds: torch calls no hook after an interrupt."""

    def __init__(self, attention: nn.Module, name: str, replaced: list[nn.Module]) -> None:
        self.attention, self.name, self.replaced = attention, name, replaced

    def remove(self) -> None:
        if self.replaced:
            _put(self.attention, self.name, self.replaced[0])
            self.replaced.clear()


def without_heads(weight: Tensor, kept: Tensor) -> Tensor:
    """The weight of a layer that reads heads or hidden units, with the columns of the pruned ones zeroed."""
    width = weight.shape[1] // len(kept)
    off = ~kept.to(weight.device).repeat_interleave(width)
    return weight.masked_fill(off.view(-1, *[1] * (weight.ndim - 2)), 0)
