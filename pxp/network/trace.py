"""What one forward pass shows of a model: what runs in which order, and what takes whose output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .attention import Attention
from .layers import (
    ACTIVATIONS,
    ATTENTIONS,
    BATCH_NORMS,
    CONVOLUTIONS,
    NORMALISATIONS,
    PRODUCTS,
    is_activation,
    is_normalisation,
)
from .replica import replica

T = TypeVar("T")


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
    heads : dict
        Attention module → its number of heads, in order of execution.
    positions : dict
        Layer → number of places (pixels, tokens) at which it computes each of its outputs for one image.
    overwritten : tuple of str
        Layers whose output is then changed in place (by a residual sum).
    functions : dict
        Module → what its forward pass computes by itself though it would need a rule: ``"attention"``, and the names
        in ``torch.nn.functional`` of activations and normalisations.
    """

    order: tuple[str, ...]
    norms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    activations: dict[str, str] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    overwritten: tuple[str, ...] = ()
    functions: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def attentions(self) -> tuple[str, ...]:
        """Modules that compute an attention which is not one of ``heads``."""
        return tuple(name for name, called in self.functions.items() if "attention" in called)

    def site(self, layer: str) -> tuple[str, ...]:
        """Modules whose output is the layer's output: its BatchNorm where it has one, else the layer itself.

        A filter of which only the convolution is silenced still emits ``β − γμ/σ`` through its BatchNorm.
        """
        return tuple(dict.fromkeys(norm or layer for norm in self.norms[layer]))


# A tensor as it is now; changed in place (by a residual sum) it is another one, though its id stays.
_Key = tuple[int, int]


def _key(tensor: Tensor) -> _Key:
    return id(tensor), 0 if tensor.is_inference() else tensor._version


@dataclass
class _Call:
    """One execution of a convolution or linear layer."""

    layer: str
    output: _Key
    tensor: Tensor
    norm: str = ""
    norm_output: _Key | None = None
    activation: str | None = None


class _Uses(TorchFunctionMode):
    """Counts how many operations take each tensor, and notes what is computed outside of the modules that have rules.

    An activation module is one operation, whatever it computes. An attention is known by a softmax that is multiplied
    by another signal as a matrix. One that only weighs elements (the gates of a CNN) or ends the network is none.
    """

    def __init__(self, modules: Mapping[str, nn.Module], images: Tensor) -> None:
        super().__init__()
        self.modules = modules
        self.inside = [""]  # the modules that are running, the innermost last; a hook may run behind the model itself
        self.counts: Counter[_Key] = Counter()
        self.functions: dict[str, dict[str, None]] = {}
        self.alive: list[object] = []  # an id is unique only as long as its tensor lives
        self.signals = {id(images)}  # what depends on the images, also when it is changed in place
        self.weights: set[int] = set()  # those that depend on them only through a softmax

    def enter(self, name: str, inputs: tuple) -> None:
        self.inside.append(name)
        if is_activation(self.modules[name]):
            self.counts.update(_key(a) for a in inputs if isinstance(a, Tensor))

    def leave(self) -> None:
        self.inside.pop()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        inputs = [*args, *(kwargs or {}).values()]
        inputs += [part for a in inputs if isinstance(a, tuple | list) for part in a]  # torch.cat takes a list
        given = {_key(a): a for a in inputs if isinstance(a, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.alive.append((given, result))
        module = self.modules[self.inside[-1]]
        # neither questions about a tensor (its shape) nor dropout in evaluation mode, which returns it as it is
        passed_on = isinstance(result, Tensor) and _key(result) in given
        if isinstance(result, Tensor | tuple | list) and not passed_on and not is_activation(module):
            self.counts.update(given.keys())
        signals = {id(a) for a in given.values()} & self.signals
        if signals:
            made = args[:1] if result is None else result  # x[0] = y has none
            self._follow(getattr(func, "__name__", ""), module, signals, made)
        return result

    def _follow(self, function: str, module: nn.Module, signals: set[int], result: object) -> None:
        made = {id(a) for a in (result if isinstance(result, tuple | list) else [result]) if isinstance(a, Tensor)}
        weights, others = signals & self.weights, signals - self.weights
        self.signals |= made
        if function == "softmax" or not others:
            self.weights |= made
        else:
            self.weights -= made
        called = None
        if function in ATTENTIONS or (function in PRODUCTS and weights and others):
            called = None if isinstance(module, Attention) else "attention"
        elif function in ACTIVATIONS:
            called = None if is_activation(module) else function
        elif function in NORMALISATIONS:
            called = None if is_normalisation(module) else function
        if called is not None:
            self.functions.setdefault(self.inside[-1], {})[called] = None


def trace(model: nn.Module, images: Tensor) -> Trace:
    """Run one batch through a replica of ``model`` and note what runs in which order and what feeds what."""
    twin = replica(model)
    modules = dict(twin.named_modules())
    producer: dict[_Key, _Call] = {}
    calls: list[_Call] = []
    heads: dict[str, int] = {}

    def note(name: str, module: nn.Module):
        def hook(_: nn.Module, inputs: tuple, output: Tensor) -> None:
            if not inputs:
                raise TypeError(f"layer {name!r} is called by keyword; rules see positional inputs: write layer(x)")
            if not isinstance(output, Tensor):
                return
            source = producer.get(_key(inputs[0]))
            if isinstance(module, BATCH_NORMS):
                if source is None or source.norm:
                    return
                source.norm, source.norm_output, source.tensor = name, _key(output), output
                producer[_key(output)] = source
            elif is_activation(module):
                if source is not None and source.activation is None:
                    source.activation = name
            else:
                calls.append(_Call(name, _key(output), output))
                producer[_key(output)] = calls[-1]

        return hook

    with torch.inference_mode(False):
        images = images.clone() if images.is_inference() else images
    uses = _Uses(modules, images)
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda _, inputs, name=name: uses.enter(name, inputs))
        if isinstance(module, (*CONVOLUTIONS, *BATCH_NORMS, nn.Linear)) or is_activation(module):
            module.register_forward_hook(note(name, module))
        elif isinstance(module, Attention):
            module.heads.register_forward_hook(
                lambda *_, name=name, number=module.num_heads: heads.update({name: number})
            )
        module.register_forward_hook(lambda *_: uses.leave())
    with torch.inference_mode(False), torch.no_grad(), uses:
        twin(images)

    norms: dict[str, list[str]] = {}
    positions: dict[str, int] = {}
    overwritten: dict[str, None] = {}
    followers: dict[str, set[str | None]] = {}
    for call in calls:
        # what is used elsewhere too is neither the BatchNorm's alone nor the activation's alone
        if call.norm and uses.counts[call.output] != 1:
            call.norm, call.norm_output, call.activation = "", None, None
        if uses.counts[call.norm_output or call.output] != 1:
            call.activation = None
        norms.setdefault(call.layer, []).append(call.norm)
        components = call.tensor.shape[-1 if isinstance(modules[call.layer], nn.Linear) else 1]
        places = call.tensor.numel() // (components * len(images))  # windows of a sample are samples to a layer
        positions[call.layer] = positions.get(call.layer, 0) + places
        if _key(call.tensor) != (call.norm_output or call.output):
            overwritten[call.layer] = None
        followers.setdefault(call.layer, set()).add(call.activation)
    activations = {layer: found.pop() for layer, found in followers.items() if len(found) == 1}
    return Trace(
        tuple(norms),
        {layer: tuple(found) for layer, found in norms.items()},
        {layer: found for layer, found in activations.items() if found is not None},
        heads,
        positions,
        tuple(overwritten),
        {name: tuple(called) for name, called in uses.functions.items()},
    )


def trace_model(model: nn.Module, example: Tensor | None = None) -> Trace:
    """Trace ``model`` on ``example``, or on zeros of the first usual shape that it accepts."""
    return _first_that_works(model, example, lambda images: trace(model, images))


def example_input(model: nn.Module, example: Tensor | None = None) -> Tensor:
    """One input of a shape that ``model`` accepts: zeros, or the first of ``example``."""

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        replica(model)(images)
        return images

    return _first_that_works(model, example, run)


def _first_that_works(model: nn.Module, example: Tensor | None, use: Callable[[Tensor], T]) -> T:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    replica(model)  # what cannot be copied is an error of its own
    if example is not None:
        try:
            return use(example[:1].to(reference))
        except (RuntimeError, ValueError, AssertionError) as problem:
            shape = tuple(example.shape)
            raise ValueError(f"the model does not accept images of shape {shape}: {problem}") from problem
    candidates = _input_shapes(model)
    error: Exception | None = None
    for shape in candidates:
        try:
            return use(torch.zeros(1, *shape, device=reference.device, dtype=reference.dtype))
        except (RuntimeError, ValueError, AssertionError) as problem:
            error = problem
    raise ValueError(
        f"could not guess an input of {type(model).__name__} (tried {', '.join(map(str, candidates)) or 'nothing'}); "
        "pass example=<one batch of inputs>"
    ) from error


def _input_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    config = getattr(model, "default_cfg", None) or {}  # timm
    shapes: list[tuple[int, ...]] = []
    # torchvision's and timm's vision transformers take no other size
    side = getattr(model, "image_size", None) or getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(side, int | tuple):
        height, width = side if isinstance(side, tuple) else (side, side)
        shapes += [(channels, height, width) for channels in (3, 1)]
    if isinstance(config.get("input_size"), tuple | list):
        shapes.append(tuple(config["input_size"]))
    first = next((m for m in model.modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))), None)
    if isinstance(first, nn.Linear):
        shapes.append((first.in_features,))
        # an image that is flattened first
        for channels in (1, 3):
            side = round((first.in_features / channels) ** 0.5)
            if channels * side**2 == first.in_features:
                shapes.append((channels, side, side))
    elif first is not None:
        dims = len(first.kernel_size)
        shapes += [(first.in_channels, *[side] * dims) for side in ((224, 64, 32, 28) if dims < 3 else (32, 64))]
    return shapes
