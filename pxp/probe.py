"""What a criterion may ask of a model: samples, activations, gradients and weights, all from a private replica."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zennit.core import Composite

from .bars import bar
from .baseline import Baseline, on_the_way
from .batches import BATCH_SIZE, Data, batches, check_classes, checked, fingerprints
from .network.bake import need_weight
from .network.check import check_replica, forgotten, once
from .network.components import Components, Layer
from .network.fold import fold_batch_norm
from .network.gated import incoming, unit_weights
from .network.layers import RELU
from .network.outputs import logits_of
from .network.replica import check_values, eager, hooked, out_of_memory, replica
from .network.signals import Pass, Signals
from .network.trace import Trace, trace

SEEN = ("order", "norms", "functions")  # of a structure, what must not change


class NoComponents(TypeError):
    """A criterion that ranks components was asked to explain an input."""


class Probe:
    """A model that is ready for one criterion; the user's model is never touched.

    Attributes
    ----------
    model : nn.Module
        The user's model.
    structure : Trace
        What runs in which order.
    twin : nn.Module
        A replica in evaluation mode whose BatchNorms are merged; its layers have the names of the model's.
    samples : int
        How many reference samples were read so far.
    references : set of str
        Their fingerprints.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Trace,
        units: Components | None,
        refs: Data,
        batch_size: int = BATCH_SIZE,
        progress: bool = False,
    ) -> None:
        check_values(model)
        self.model, self.structure = model, structure
        self.samples = 0
        self.references: set[str] = set()
        self._units, self._refs, self._batch_size, self._progress = units, refs, batch_size, progress
        self._functions: Mapping[str, Pass] | None = None

    @property
    def units(self) -> Components:
        """The components to score."""
        if self._units is None:
            raise NoComponents("it asks for components, and an input has none")
        return self._units

    @cached_property
    def twin(self) -> nn.Module:
        twin = replica(self.model)
        fold_batch_norm(twin, self.structure)
        return twin

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Reference samples, checked, on the model's device and in its dtype: (images, labels) at a time."""
        parts = batches(self._refs, self._batch_size)
        for images, labels in bar(parts, show=self._progress, desc="attribute", unit="batch"):
            self.references.update(fingerprints(images))
            images, labels = placed(self.model, images, labels)
            if self.samples == 0 and once(self.model, "replica"):
                with forgotten(self.model):
                    self._check_batch(images, labels)  # what the model does not accept is an error of its own
                    check_replica(self.model, self.twin, self.structure, images[:2])
            yield images, labels
            self.samples += len(labels)

    @contextmanager
    def rules(self, composite: Composite) -> Iterator[None]:
        """A context in which a composite's rules are in place on ``twin``, and for the functions that it calls."""
        self._functions = getattr(composite, "functions", None)
        try:
            with composite.context(self.twin):
                yield
        finally:
            self._functions = None

    def weights(self, *, folded: bool = True) -> dict[str, Tensor]:
        """Layer → (components, weights) that compute each component; of a head also those that read it.

        With ``folded`` BatchNorm is merged into them.
        """
        units = self.units
        modules = dict((self.twin if folded else replica(self.model)).named_modules())
        for name, layer in units.items():
            for part in [] if layer.kind == "head" else incoming(modules[name]) or [modules[name]]:
                need_weight(name, part)
        return {
            name: modules[name].head_weights() if layer.kind == "head" else unit_weights(modules[name])
            for name, layer in units.items()
        }

    def forward(self, images: Tensor, note: Callable[[str, Tensor], None]) -> None:
        """Run the network and call ``note(layer, output)`` whenever a component layer's output appears."""
        modules = dict(self.twin.named_modules())
        told = self._by_sample(note, len(images))
        handles = [
            modules[site].register_forward_hook(lambda module, inputs, output, name=name: told(name, output))
            for name, layer in self.units.items()
            for site in layer.site
        ]
        try:
            with torch.no_grad(), eager():
                self.twin(images.clone())
        finally:
            for handle in handles:
                handle.remove()

    def backward(
        self,
        images: Tensor,
        labels: Tensor,
        note: Callable[[str, Tensor, Tensor], None],
        *,
        start: str = "logit",
        exact: bool = False,
        carried: bool = False,
    ) -> None:
        """Run the network forwards and backwards, and call ``note(layer, output, flow)`` on the way back.

        Parameters
        ----------
        images, labels : Tensor
            From :meth:`batches`.
        note : callable
            ``flow`` is the gradient that arrives at the layer's ``output``, under the rules that are in place; a layer
            that runs several times is told once for each time, the last one first.
        start : {"logit", "one", "margin", "loss"}
            What is differentiated, see :class:`pxp.LRP`; the sum over the batch.
        exact : bool
            False: where a ReLU follows, ``output`` may be the ReLU's. Nothing flows where the two differ.
        carried : bool
            The rules let relevance itself flow back, as zennit's do: every sample starts with its logit.
        """
        with reading(self.twin, self.structure, self._units, self._by_sample(note, len(images)), exact=exact):
            begin = self._start(images, labels, start, carried)
            if begin.requires_grad:  # else no scored layer has any influence on it
                with unbroken(self.model):
                    begin.backward()

    def _by_sample(self, note: Callable[..., None], samples: int) -> Callable[..., None]:
        """The same with tensors whose first dimension is that of the samples.

        Of windows, (samples · windows, tokens, channels) becomes (samples, tokens, channels).
        """

        def told(name: str, *tensors: Tensor) -> None:
            dimension = self.structure.samples.get(name, 0)
            if dimension is None or tensors[0].shape[dimension] % samples:
                raise ValueError(
                    f"it is not clear which values of {name!r} belong to which sample; let the samples be the first "
                    "dimension of what it gives, with tokens or windows behind them; where a layer runs once for each "
                    "sample, batch_size=1 helps"
                )
            tensors = tuple(tensor.movedim(dimension, 0) for tensor in tensors)
            if self.units[name].kind != "filter":
                tensors = tuple(tensor.reshape(samples, -1, tensor.shape[-1]) for tensor in tensors)
            elif len(tensors[0]) != samples:
                tensors = tuple(tensor.unflatten(0, (samples, -1)).movedim(1, 2) for tensor in tensors)
            note(name, *tensors)

        return told

    def relevance(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        start: str = "logit",
        steps: int = 1,
        baseline: Baseline = 0.0,
        carried: bool = False,
    ) -> dict[str, Tensor]:
        """Activation × gradient of every component: layer → (samples, tokens, components).

        Parameters
        ----------
        images, labels : Tensor
            From :meth:`batches`.
        start, carried
            As for :meth:`backward`.
        steps : int, default 1
            Average over this many images on the straight way from black to the image.
        baseline : float or tuple of float, default 0.0
            The value of black, for all channels or for each.
        """
        found: dict[str, Tensor] = {}

        def note(name: str, output: Tensor, flow: Tensor) -> None:
            value = self.per_component(name, flow, None if carried else output)
            found[name] = found[name] + value if name in found else value

        for step in range(1, steps + 1):
            point = images if steps == 1 else on_the_way(images, baseline, step / steps)
            self.backward(point, labels, note, start=start, carried=carried)
        return self.completed({name: value / steps for name, value in found.items()}, labels)

    def per_component(self, name: str, elements: Tensor, factor: Tensor | None = None) -> Tensor:
        """Sum the elements of a layer's output, times ``factor``, over each component: (samples, tokens, components).

        ``(N, C, *space)`` is summed over space, ``(N, *tokens, channels)`` of heads over each head's channels.
        """
        layer = self.units[name]
        if layer.kind != "filter":
            elements = elements if factor is None else elements * factor
            elements = elements.reshape(len(elements), -1, elements.shape[-1])
            return elements.unflatten(-1, (layer.size, -1)).sum(-1) if layer.kind == "head" else elements
        if factor is None:
            return elements.flatten(2).sum(2).unsqueeze(1)
        # a product of matrices, so that the product of the elements is never stored
        return torch.matmul(elements.flatten(2).unsqueeze(2), factor.flatten(2).unsqueeze(3))[..., 0, 0].unsqueeze(1)

    def completed(self, found: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """With zeros for every layer of which nothing depends on its output, as inside a constant gate."""
        missing = [layer for name, layer in self.units.items() if name not in found]
        return found | {e.name: torch.zeros(len(labels), 1, e.size, device=labels.device) for e in missing}

    def logits(self, images: Tensor, labels: Tensor) -> Tensor:
        """Run the network: (samples, classes), which have these labels; what enters a softmax at its end."""
        logits, signals = self._run(images, self.structure.followed)
        if signals is not None and self._functions is not None:
            self._check_faults(signals, logits, "these images")
        check_classes(labels, logits)
        return logits

    def _run(self, images: Tensor, followed: bool) -> tuple[Tensor, Signals | None]:
        """What the network says, before a softmax at its end, and what was seen of its functions."""
        images = images.clone()  # which a network may change
        signals = Signals(self.twin, images, self._functions) if followed else None
        try:
            with eager(), nullcontext() if signals is None else signals.watching():
                output = logits_of(self.twin(images))
        except (RuntimeError, AssertionError) as error:
            if out_of_memory(error):
                raise torch.cuda.OutOfMemoryError(
                    f"there is no memory for {len(images)} images at a time; give a smaller batch_size ({error})"
                ) from error
            raise ValueError(
                f"the model does not accept images of shape {tuple(images.shape)} and dtype {images.dtype}: {error}"
            ) from error
        return (output if signals is None else signals.logits(output)), signals

    @torch.no_grad()
    def _check_batch(self, images: Tensor, labels: Tensor) -> None:
        """The structure was seen with one image, and before; a forward pass may do something else with several."""
        self.logits(images[:1], labels[:1])
        now = trace(self.model, images[:1])
        if any(getattr(now, part) != getattr(self.structure, part) for part in SEEN):
            raise ValueError(
                f"{type(self.model).__name__} is not what it was when its components were found: other layers or "
                "functions run, or a hook has come; find its components again"
            )
        logits, signals = self._run(images, True)
        assert signals is not None
        if signals.changed and not self.structure.followed:
            raise self._branches(f"{len(images)} images", "")
        if not self.structure.functions:
            self._check_faults(signals, logits, f"{len(images)} images")

    def _check_faults(self, signals: Signals, logits: Tensor, what: str) -> None:
        reached = signals.of(logits)
        for name, fault in [] if reached is None else sorted(reached.faults):
            raise self._branches(what, f": {name!r} then computes {fault}, for which there is no LRP rule")

    def _branches(self, what: str, how: str) -> ValueError:
        return ValueError(
            f"the forward pass of {type(self.model).__name__} does something else with {what} than with the image on "
            f"which it was looked at{how}; let it do the same with every batch"
        )

    def _start(self, images: Tensor, labels: Tensor, start: str, carried: bool) -> Tensor:
        """Run the network and return the scalar whose backward pass is the explanation of the whole batch."""
        logits = self.logits(images, labels)
        target = logits.gather(1, labels[:, None]).squeeze(1)
        if carried:
            return (target * target.detach()).sum()
        match start:
            case "one":
                return (target / target.detach()).sum()
            case "margin":
                others = logits.scatter(1, labels[:, None], -torch.inf)
                return (target - others.amax(1)).sum()
            case "loss":
                return -F.cross_entropy(logits, labels, reduction="sum")  # positive is useful, as for the others
            case _:
                return target.sum()


@contextmanager
def unbroken(model: nn.Module) -> Iterator[None]:
    """Say what to do where a forward pass overwrites what the backward pass needs."""
    try:
        yield
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise ValueError(
            f"the forward pass of {type(model).__name__} changes in place what its gradient needs, so nothing can flow "
            f"back through it; write x = x + y for x += y, and torch.relu(x) for x.relu_() ({error})"
        ) from error


def placed(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A batch on the model's device, the images in its dtype."""
    check_values(model)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), images)
    images, labels = images.detach().to(parameter), labels.to(parameter.device)
    # tensors made in inference mode cannot be part of a graph
    return tuple(part.clone() if part.is_inference() else part for part in (images, labels))  # type: ignore[return-value]


def explained(model: nn.Module, images: Tensor, targets: Tensor | int) -> tuple[Tensor, Tensor]:
    """Images with the class to explain of each, or one for all; checked, and placed as the model needs them."""
    given = torch.as_tensor(targets)
    return placed(model, *checked(images, given.expand(len(images)) if given.ndim == 0 else given))


@contextmanager
def reading(
    twin: nn.Module,
    structure: Trace,
    units: Components | None,
    note: Callable[[str, Tensor, Tensor], None] | None,
    *,
    exact: bool = False,
) -> Iterator[None]:
    """Call ``note(layer, output, flow)`` in the backward pass; shield all layers' outputs from in-place operations.

    ``flow`` is what arrives at the output before the layer's own rule rescales it. The graph starts at the first
    component layers: nothing below them is differentiated. Where a ReLU follows, ``output`` is the ReLU's unless
    ``exact``: nothing flows where the two differ, and the next layer holds it in memory anyway.
    """
    modules = dict(twin.named_modules())
    rectified = {
        name: activation
        for name, activation in structure.activations.items()
        if not exact and type(modules[activation]) is RELU and not hooked(modules[activation])
    }
    waiting: dict[int, list[Tensor]] = {}

    def hook(name: str, read: bool):
        shield = name in structure.overwritten

        def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not read:
                return output.clone() if shield and output.requires_grad else None
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            seen = output.clone() if shield else output.view_as(output)
            value: list[Tensor] = []  # given up when read, so that memory falls during the backward pass
            if name in rectified:
                waiting[id(seen)] = value
            else:
                value.append(output.detach())
            seen.register_hook(lambda flow: note(name, value.pop(), flow))  # type: ignore[misc]
            return seen

        return forward

    def rectify(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        value = waiting.pop(id(inputs[0]), None)
        if value is not None:
            value.append(output.detach())

    def with_gradient(name: str, read: bool):
        def check(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not torch.is_grad_enabled() and (read or inputs[0].requires_grad):
                raise ValueError(
                    f"{name!r} runs without gradients, so nothing can flow back through it: checkpoint it with "
                    "use_reentrant=False, or let the forward pass do without torch.no_grad"
                )

        return check

    layers: Mapping[str, Layer] = units or {}
    sites = {name: (structure.site(name), False) for name in structure.order if name not in layers}
    sites |= {name: (layer.site, True) for name, layer in layers.items()}
    handles = [
        modules[site].register_forward_hook(hook(name, read)) for name, (where, read) in sites.items() for site in where
    ]
    handles += [
        modules[name].register_forward_pre_hook(with_gradient(name, read))
        for name, (_, read) in sites.items()
        if name in structure.order
    ]
    handles += [modules[activation].register_forward_hook(rectify) for activation in set(rectified.values())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
