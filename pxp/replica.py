"""A private copy of a model's structure that shares its weights: what attribution works on instead of the model.

Everything an explanation needs (evaluation mode, BatchNorm folded into its convolution, no in-place activation, hooks)
is done to the replica. The user's model is never modified, so there is nothing to restore and nothing that an exception
could leave behind.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, FrozenBatchNorm2d)


def is_activation(module: nn.Module) -> bool:
    """Whether ``module`` is an elementwise non-linearity of torch or timm."""
    source = type(module).__module__
    if isinstance(module, nn.MultiheadAttention | nn.Softmax | nn.LogSoftmax):
        return False
    return source == "torch.nn.modules.activation" or source.startswith("timm.layers.activations")


@dataclass(frozen=True)
class Trace:
    """What one forward pass shows of a model's structure; names are those of ``model.named_modules()``.

    Attributes
    ----------
    order : tuple of str
        Convolutions and linear layers in the order of their first execution, each once.
    norms : dict
        Layer → BatchNorms that directly take its output (one for every time the layer runs, "" where none does).
    activations : dict
        Layer → activation module that directly takes its output (after BatchNorm), where there is one.
    """

    order: tuple[str, ...]
    norms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    activations: dict[str, str] = field(default_factory=dict)

    def site(self, layer: str) -> tuple[str, ...]:
        """Modules whose output is the layer's output: its BatchNorm where it has one, else the layer itself.

        A filter of which only the convolution is silenced still emits ``β − γμ/σ`` through its BatchNorm.
        """
        return tuple(dict.fromkeys(norm or layer for norm in self.norms[layer]))


def replica(model: nn.Module) -> nn.Module:
    """Copy the module tree in evaluation mode; parameters and buffers share memory with the model's.

    The copy's parameters need no gradient, its activations are not in-place, and the user's hooks come along.
    """
    memo: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): b.detach() for b in model.buffers()}
    twin = copy.deepcopy(model, memo).eval()
    for module in twin.modules():
        if is_activation(module) and getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return twin


def trace(model: nn.Module, images: Tensor) -> Trace:
    """Run one batch through a replica of ``model`` and note what runs in which order and what feeds what."""
    twin = replica(model)
    # a tensor that was changed in place since (a residual sum) is no longer its producer's output
    producer: dict[tuple[int, int], str] = {}
    alive: list[Tensor] = []  # keeps ids unique
    norms: dict[str, list[str]] = {}
    activations: dict[str, str] = {}
    layer_of_norm: dict[str, str] = {}

    def note(name: str, module: nn.Module):
        def hook(_: nn.Module, inputs: tuple, output: Tensor) -> None:
            if not inputs or not isinstance(output, Tensor):
                return
            source = producer.get((id(inputs[0]), inputs[0]._version))
            if isinstance(module, BATCH_NORMS):
                if source in norms:
                    norms[source][-1] = name
                    layer_of_norm[name] = source
            elif is_activation(module):
                if source is not None:
                    activations.setdefault(layer_of_norm.get(source, source), name)
                return
            else:
                norms.setdefault(name, []).append("")
            producer[id(output), output._version] = name
            alive.append(output)

        return hook

    for name, module in twin.named_modules():
        if isinstance(module, (*CONVOLUTIONS, *BATCH_NORMS, nn.Linear)) or is_activation(module):
            module.register_forward_hook(note(name, module))
    with torch.no_grad():
        twin(images)
    return Trace(tuple(norms), {layer: tuple(found) for layer, found in norms.items()}, activations)


def fold_batch_norm(twin: nn.Module, structure: Trace) -> None:
    """Merge each BatchNorm of a replica into the one layer before it: W' = W·γ/σ, b' = (b − μ)·γ/σ + β.

    Explanation rules then see the affine map that the network really computes. A BatchNorm is left as it is when it
    does not directly follow exactly one convolution or linear layer.

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
        rest = [getattr(norm, part) for part in ("drop", "act") if isinstance(getattr(norm, part, None), nn.Module)]
        parent, _, child = name.rpartition(".")
        stand_in = nn.Sequential(*rest) if rest else nn.Identity()
        stand_in._forward_hooks.update(norm._forward_hooks)  # e.g. a mask that the user has put on the model
        setattr(modules[parent], child, stand_in)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put ``model`` in evaluation mode; afterwards every module has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
