"""What one forward pass shows of a model: what runs in which order, and what takes whose output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from threading import get_ident
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .attention import Attention
from .layers import LAYERS, LINEAR, TRANSPOSED, is_activation, is_batch_norm
from .outputs import tensors
from .readings import read_values
from .replica import eager, out_of_memory, replica
from .signals import UNSEEN, Signal, Signals, by_keyword

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
        Layer → number of places (pixels, tokens) at which it computes each of its outputs for one image; of a
        transposed convolution, at which it reads each of its inputs.
    overwritten : tuple of str
        Layers whose output is then changed in place (by a residual sum).
    functions : dict
        Module → what its forward pass computes on the way to the output though there is no rule for it:
        ``"attention"``, or the name of a function.
    gates : tuple of str
        Layers that only weigh others: the output depends on them through gates alone, or they see nothing of the image.
    followed : bool
        Functions have to be followed in every pass that explains: there are products of signals, activations or
        normalisations that no module computes, the network ends in a softmax, or it reads a value on which it may
        branch.
    elsewhere : tuple of str
        BatchNorms that take something else too than the output of one layer.
    samples : dict
        Layer → the dimension of its output in which the samples lie, where it is not the first: 1 behind a network that
        puts tokens first. None where the values of one sample do not lie side by side.
    products : dict
        Attention module → multiplications with which one head weighs keys and mixes values, for one image.
    """

    order: tuple[str, ...]
    norms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    activations: dict[str, str] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    overwritten: tuple[str, ...] = ()
    functions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    gates: tuple[str, ...] = ()
    followed: bool = False
    elsewhere: tuple[str, ...] = ()
    samples: dict[str, int | None] = field(default_factory=dict)
    products: dict[str, int] = field(default_factory=dict)

    @property
    def attentions(self) -> tuple[str, ...]:
        """Modules that compute an attention which is not one of ``heads``."""
        return tuple(name for name, called in self.functions.items() if "attention" in called)

    @cached_property
    def owners(self) -> dict[str, tuple[str, ...]]:
        """BatchNorm → the layers whose output it takes."""
        found: dict[str, dict[str, None]] = {}
        for layer, norms in self.norms.items():
            for norm in filter(None, norms):
                found.setdefault(norm, {})[layer] = None
        return {norm: tuple(layers) for norm, layers in found.items()}

    def merges(self, norm: str) -> bool:
        """Whether all that a BatchNorm takes is the output of layers that give theirs to nothing else, ever."""
        return norm not in self.elsewhere and all(set(self.norms[layer]) == {norm} for layer in self.owners[norm])

    def shared(self, layer: str) -> tuple[str, ...]:
        """BatchNorms of the layer that are those of other layers, too."""
        return tuple(dict.fromkeys(norm for norm in self.norms[layer] if norm and len(self.owners[norm]) > 1))

    def unclear(self, layer: str) -> str | None:
        """A BatchNorm because of which no module has the layer's output, neither more nor less, as its own."""
        norms = set(self.norms[layer]) - {""}
        own = "" not in self.norms[layer] and not self.shared(layer) and norms.isdisjoint(self.elsewhere)
        return None if own else next((norm for norm in sorted(norms) if not self.merges(norm)), None)

    def site(self, layer: str) -> tuple[str, ...]:
        """Modules whose output is the layer's output: its BatchNorm where it has one, else the layer itself.

        A filter of which only the convolution is silenced still emits ``β − γμ/σ`` through its BatchNorm. A BatchNorm
        of several layers is no place of any of them; once it is merged, each layer is its own.
        """
        return (layer,) if self.shared(layer) else tuple(dict.fromkeys(norm or layer for norm in self.norms[layer]))


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
    read: Tensor
    constant: bool
    norm: str = ""
    norm_output: _Key | None = None
    activation: str | None = None


def _is_one(module: nn.Module) -> bool:
    return is_activation(module) or is_batch_norm(module)


def _fits(layer: nn.Module, output: Tensor) -> bool:
    """Whether dimension 1, of which a BatchNorm takes its channels, is that of the layer's outputs."""
    return not isinstance(layer, LINEAR) or output.ndim == 2


class _Uses(Signals):
    """Counts how many operations take each tensor. An activation or a BatchNorm is one, whatever it computes."""

    strict = True

    def __init__(self, twin: nn.Module, images: Tensor) -> None:
        super().__init__(twin, images)
        self.counts: Counter[_Key] = Counter()
        self.alive: list[object] = []  # an id is unique only as long as its tensor lives

    def enter(self, name: str, inputs: tuple) -> None:
        super().enter(name, inputs)
        if _is_one(self.modules[name]):
            self.counts.update(_key(a) for a in inputs if isinstance(a, Tensor))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = {_key(a): a for a in tensors([*args, *(kwargs or {}).values()])}
        result = super().__torch_function__(func, types, args, kwargs)
        self.alive.append((given, result))
        # neither questions about a tensor (its shape) nor dropout in evaluation mode, which returns it as it is
        passed_on = isinstance(result, Tensor) and _key(result) in given
        module = self.modules[self.inside[-1]]
        asked = isinstance(result, torch.Size) or not isinstance(result, Tensor | tuple | list)
        if not asked and not passed_on and not _is_one(module):
            self.counts.update(given.keys())
        return result


def trace(model: nn.Module, images: Tensor) -> Trace:
    """Run one batch through a replica of ``model`` and note what runs in which order and what feeds what."""
    twin = replica(model)
    modules = dict(twin.named_modules())
    producer: dict[_Key, _Call] = {}
    calls: list[_Call] = []
    heads: dict[str, int] = {}
    runs: Counter[str] = Counter()  # of BatchNorms
    products: Counter[str] = Counter()

    def note(name: str, module: nn.Module):
        def hook(_: nn.Module, inputs: tuple, output: Tensor) -> None:
            if not inputs:
                raise by_keyword(name)
            if not isinstance(output, Tensor):
                return
            source = producer.get(_key(inputs[0]))
            if is_batch_norm(module):
                runs[name] += 1
                if source is None or source.norm or not _fits(modules[source.layer], output):
                    return
                source.norm, source.norm_output, source.tensor = name, _key(output), output
                producer[_key(output)] = source
            elif is_activation(module):
                if source is not None and source.activation is None:
                    source.activation = name
            else:
                calls.append(_Call(name, _key(output), output, inputs[0], uses.of(inputs[0]) is None))
                producer[_key(output)] = calls[-1]

        return hook

    def counted(name: str, attend: Callable[..., Tensor]) -> Any:
        def counting(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
            pairs = q[..., 0].numel() // q.shape[1] * k.shape[-2] // len(images)
            products[name] += pairs * (q.shape[-1] + v.shape[-1])
            return attend(q, k, v, *rest)

        return counting

    with torch.inference_mode(False), torch.enable_grad():
        images = images.clone().requires_grad_().clone()  # which a network may overwrite
    uses = _Uses(twin, images)
    for name, module in modules.items():
        if isinstance(module, LAYERS) or is_batch_norm(module) or is_activation(module):
            module.register_forward_hook(note(name, module))
        elif isinstance(module, Attention):
            module.heads.register_forward_hook(
                lambda *_, name=name, number=module.num_heads: heads.update({name: number})
            )
            vars(module)["attend"] = counted(name, module.attend)
    with torch.inference_mode(False), torch.enable_grad(), eager(), _at_rest(model), uses.watching():
        output = twin(images)
    answer = next(tensors(getattr(output, "logits", output)), None)
    unseen = Signal(faults=frozenset({("", UNSEEN)}))
    reached = uses.of(answer if answer is None else uses.logits(answer)) or unseen
    faults: dict[str, dict[str, None]] = {}
    for name, what in sorted(reached.faults | (read_values(model, images) if uses.asked else frozenset())):
        faults.setdefault(name, {})[what] = None

    its_own = [name for name, module in modules.items() if isinstance(module, LAYERS)]
    if its_own and not calls and not heads:
        raise ValueError(
            f"none of the layers of {type(model).__name__} runs in a copy of it, so its forward pass runs those of "
            "another object, or none; define forward in the class, with layers of self"
        )
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
        layer = modules[call.layer]
        placed = call.read if isinstance(layer, TRANSPOSED) else call.tensor
        components = placed.shape[-1 if isinstance(layer, LINEAR) else 1]
        places = placed.numel() // (components * len(images))  # windows of a sample are samples to a layer
        positions[call.layer] = positions.get(call.layer, 0) + places
        if _key(call.tensor) != (call.norm_output or call.output):
            overwritten[call.layer] = None
        followers.setdefault(call.layer, set()).add(call.activation)
    # (samples, tokens, channels) is clear; (tokens, samples, channels), (samples · windows, tokens, channels) are not
    unclear = [
        call.layer
        for call in calls
        if call.constant
        or len(call.tensor) != len(images)
        or (isinstance(modules[call.layer], LINEAR) and len(images) in call.tensor.shape[1:-1])
    ]
    gates = tuple(layer for layer in norms if not reached.layers & uses.layers.get(layer, 0))
    merged = Counter(call.norm for call in calls)
    activations = {layer: found.pop() for layer, found in followers.items() if len(found) == 1}
    return Trace(
        tuple(norms),
        {layer: tuple(found) for layer, found in norms.items()},
        {layer: found for layer, found in activations.items() if found is not None},
        heads,
        positions,
        tuple(overwritten),
        {name: tuple(found) for name, found in faults.items()},
        () if any(what == UNSEEN for _, what in reached.faults) else gates,
        uses.changed or uses.asked or (answer is not None and uses.logits(answer) is not answer),
        tuple(norm for norm, number in runs.items() if number > merged[norm]),
        _dimensions_of_samples(model, images[:1].detach(), unclear) if unclear else {},
        dict(products),
    )


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Raise ValueError if a module of the model itself runs, as a lambda that a copy has kept may let it."""
    thread = get_ident()  # in others it may well run

    def ran(name: str) -> None:
        if get_ident() == thread:
            raise ValueError(
                f"{name!r} of the model itself runs inside a copy of {type(model).__name__}: a lambda or closure holds "
                "it, which no copy can follow; call it as self's in a forward pass"
            )

    handles = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: ran(name), prepend=True)
        for name, module in model.named_modules()
        if module._parameters or module._buffers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dimensions_of_samples(model: nn.Module, image: Tensor, layers: Sequence[str]) -> dict[str, int | None]:
    """Layer → the dimension that grows with the number of samples, where it is not the first.

    None where there is no such, or the values of the first sample do not come before those of the second.
    """
    twin = replica(model)
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    for name in found:
        twin.get_submodule(name).register_forward_hook(lambda _, inputs, output, name=name: found[name].append(output))
    generator = torch.Generator().manual_seed(0)
    two = torch.rand(2, *image.shape[1:], generator=generator).to(image)
    with torch.inference_mode(False), torch.no_grad(), eager():
        twin(two[:1].clone())
        runs = {name: len(outputs) for name, outputs in found.items()}
        twin(two.clone())
    dimensions: dict[str, int | None] = {}
    for name, outputs in found.items():
        ways = {_grows(one, both) for one, both in zip(outputs[: runs[name]], outputs[runs[name] :], strict=False)}
        dimensions[name] = ways.pop() if len(ways) == 1 and len(outputs) == 2 * runs[name] else None
    return {name: dimension for name, dimension in dimensions.items() if dimension != 0}


def _grows(one: Tensor, both: Tensor) -> int | None:
    """The dimension in which ``both`` has ``one`` and as much again; None if there is no such."""
    for dimension, size in enumerate(one.shape):
        if both.shape == (*one.shape[:dimension], 2 * size, *one.shape[dimension + 1 :]):
            close = torch.allclose(both.narrow(dimension, 0, size), one, rtol=1e-2, atol=1e-2 * float(one.abs().max()))
            return dimension if close else None
    return None


def trace_model(model: nn.Module, example: Tensor | None = None) -> Trace:
    """Trace ``model`` on ``example``, or on zeros of the first usual shape that it accepts."""
    return _first_that_works(model, example, lambda images: trace(model, images))


def example_input(model: nn.Module, example: Tensor | None = None) -> Tensor:
    """One input of a shape that ``model`` accepts: zeros, or the first of ``example``."""

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        with eager():
            replica(model)(images.clone())
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
            if out_of_memory(problem):
                raise
            shape = tuple(example.shape)
            raise ValueError(f"the model does not accept images of shape {shape}: {problem}") from problem
    candidates = _input_shapes(model)
    error: Exception | None = None
    for shape in candidates:
        try:
            return use(torch.zeros(1, *shape, device=reference.device, dtype=reference.dtype))
        except (RuntimeError, ValueError, AssertionError) as problem:
            if out_of_memory(problem):
                raise
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
    first = next((m for m in model.modules() if isinstance(m, LAYERS)), None)
    if isinstance(first, LINEAR):
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
