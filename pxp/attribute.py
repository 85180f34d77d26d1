"""Attribution: the relevance of every component, or of every input pixel, in one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from zennit.core import Composite

from .criteria import Activation, IntegratedGradients, Magnitude, Random, Taylor
from .data import Data, batches
from .lrp.composites import LRP, LayerComposite
from .network.components import Components, Layer
from .network.fold import fold_batch_norm
from .network.replica import replica
from .network.trace import Trace, trace_model
from .scores import Scores

Criterion: TypeAlias = LRP | Composite | Taylor | IntegratedGradients | Activation | Magnitude | Random
EPSILON = LRP("epsilon")


def attribute(
    model: nn.Module,
    refs: Data,
    units: Components,
    criterion: Criterion,
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> Scores:
    """Score every component by how much it matters for the reference samples' own classes.

    A component's relevance for one sample is summed over its own elements (space). ``scores.signed`` is the mean over
    samples of that sum; ``scores`` itself the mean of its absolute value, taken per sample (and per token where the
    component has tokens, unless the criterion says otherwise), as in Hatefi et al. 2024. A head's own elements are its
    channels at the input of the output projection, where AttnLRP's relevance is twice that at the softmax summed over
    keys.

    Parameters
    ----------
    model : nn.Module
        Any classifier with output (batch, classes), in any mode, on any device. It is left bit for bit as it is.
    refs : (images, labels), DataLoader or Dataset
        Reference samples: floating-point images (N, ...) and integer labels (N,). Moved to the model's device and
        dtype. Not read by :class:`pxp.Magnitude` and :class:`pxp.Random`.
    units : Components
        From :func:`pxp.find_components`.
    criterion : LRP, Taylor, IntegratedGradients, Activation, Magnitude, Random or zennit Composite
        A zennit composite must give a rule to every module that changes relevance (activations: ``Pass``), as zennit's
        own composites do. BatchNorm is merged before it is registered, so its canonizers find nothing left to merge.
    batch_size : int, default 32
        Samples per pass; a DataLoader keeps its own.
    progress : bool, default True
        Show a bar when it takes longer than five seconds.

    Returns
    -------
    Scores
        On the CPU, float64, one 1-D tensor per layer.

    Raises
    ------
    ValueError
        Empty references; wrong shape or dtype; NaN or infinite images; labels outside the model's classes or of another
        length; components of another model; scores that are NaN or infinite (the layers are named).
    TypeError
        ``criterion`` is none of the above, ``units`` no Components.
    """
    if not isinstance(units, Components):
        raise TypeError(f"units must come from pxp.find_components, got {type(units).__name__}")
    if not isinstance(criterion, Criterion):
        raise TypeError(
            "criterion must be a pxp.LRP, Taylor, IntegratedGradients, Activation, Magnitude or Random object or a "
            f"zennit composite, got {criterion!r}"
        )
    units.check(model)
    if isinstance(criterion, Random):
        generator = torch.Generator().manual_seed(criterion.seed)
        drawn = {
            name: torch.rand(layer.size, generator=generator, dtype=torch.float64) for name, layer in units.items()
        }
        return Scores(units, drawn, drawn, criterion=repr(criterion), samples=0)

    with torch.inference_mode(False), torch.enable_grad():
        twin, hooks = _prepare(model, units.trace, criterion)
        if isinstance(criterion, Magnitude):
            modules = dict(twin.named_modules())
            weights = {
                name: modules[name].head_weights() if layer.kind == "head" else modules[name].weight.flatten(1)
                for name, layer in units.items()
            }
            norms = {name: weight.norm(dim=1).double().cpu() for name, weight in weights.items()}
            return Scores(units, norms, norms, criterion=repr(criterion), samples=0)
        signed = {name: torch.zeros(layer.size, dtype=torch.float64) for name, layer in units.items()}
        magnitude = {name: torch.zeros_like(total) for name, total in signed.items()}
        samples = 0
        with hooks as probe_rules:
            for images, labels in tqdm(
                batches(refs, batch_size), desc="attribute", unit="batch", delay=5, leave=False, disable=not progress
            ):
                images, labels = _check(model, images, labels)
                values = _component_values(twin, images, labels, units, criterion, probe_rules)
                for name, value in values.items():
                    value = value.double().cpu()  # (samples, tokens, components)
                    signed[name] += value.sum((0, 1))
                    absolute = getattr(criterion, "absolute", "token")
                    if absolute == "sample":
                        value = value.sum(1, keepdim=True)
                    magnitude[name] += (value if absolute == "never" else value.abs()).sum((0, 1))
                samples += len(labels)
    if samples == 0:
        raise ValueError("the reference set is empty: no sample to explain")
    return Scores(
        units,
        {name: total / samples for name, total in magnitude.items()},
        {name: total / samples for name, total in signed.items()},
        criterion=_describe(criterion),
        samples=samples,
    )


def heatmap(
    model: nn.Module,
    images: Tensor,
    targets: Tensor | int,
    criterion: Criterion = EPSILON,
    *,
    batch_size: int = 32,
) -> Tensor:
    """Relevance of every input value for the target class.

    Parameters
    ----------
    model : nn.Module
        Left bit for bit as it is.
    images : Tensor
        Floating point, (N, ...).
    targets : Tensor or int
        The class to explain, per image (N,) or one for all. Neither the label nor the prediction is implied.
    criterion : LRP, Taylor, IntegratedGradients or zennit Composite
        Default LRP-ε. Integrated gradients start from a black image.
    batch_size : int, default 32

    Returns
    -------
    Tensor
        Same shape, dtype and device as ``images``; summed over an image, about the target's logit.

    Raises
    ------
    ValueError
        As :func:`pxp.attribute`.
    TypeError
        A criterion that explains no input.
    """
    if not isinstance(criterion, LRP | Composite | Taylor | IntegratedGradients):
        raise TypeError(
            f"{criterion!r} does not explain inputs; use LRP, Taylor, IntegratedGradients or a zennit composite"
        )
    targets = torch.full((len(images),), targets) if isinstance(targets, int) else targets
    parts = []
    with torch.inference_mode(False), torch.enable_grad():
        checked, labels = _check(model, images, targets)
        structure = trace_model(model, checked)
        twin, hooks = _prepare(model, structure, criterion)
        with hooks as rules, _probe(twin, structure, None, None):
            for x, y in zip(checked.split(batch_size), labels.split(batch_size), strict=True):
                # a rule for the first layer may give relevance to black pixels, and x ⊙ g must be able to say so
                tiny = torch.finfo(x.dtype).tiny ** (1 if x.dtype == torch.float16 else 0.25)
                x = torch.where(x == 0, tiny, x)
                relevance = torch.zeros_like(x)
                steps = _path(criterion)
                for step in range(1, steps + 1):
                    point = (x * (step / steps)).requires_grad_()
                    start = _start(twin, point, y, criterion, rules)
                    (gradient,) = torch.autograd.grad(start, point)
                    factor = x if isinstance(criterion, IntegratedGradients) else point.detach()
                    relevance += gradient if _carries_relevance(criterion) else factor * gradient
                parts.append(relevance / steps)
    return torch.cat(parts).to(images)


def _describe(criterion: Criterion) -> str:
    return type(criterion).__name__ if isinstance(criterion, Composite) else repr(criterion)


def _carries_relevance(criterion: Criterion) -> bool:
    """zennit's rules let relevance flow back, ours the g of R = x ⊙ g."""
    return isinstance(criterion, Composite) and not isinstance(criterion, LayerComposite)


def _path(criterion: Criterion) -> int:
    return criterion.path_steps if isinstance(criterion, LRP) else getattr(criterion, "steps", 1)


def _prepare(model: nn.Module, structure: Trace, criterion: Criterion):
    """A replica that is ready for the criterion, and the context in which its rules are in place."""
    twin = replica(model)
    if not isinstance(criterion, Magnitude) or criterion.folded:
        fold_batch_norm(twin, structure)
    composite = criterion.composite(model, structure) if isinstance(criterion, LRP) else criterion
    return twin, composite.context(twin) if isinstance(composite, Composite) else nullcontext()


def _check(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Validate one batch and move it to the model's device and dtype."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a floating-point tensor, got {kind}")
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.ndim != 1:
        raise ValueError(
            f"labels must be a 1-D tensor of class indices, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if images.ndim < 2 or len(images) == 0:
        raise ValueError(f"images must be a non-empty batch (samples, ...), got shape {tuple(images.shape)}")
    if len(images) != len(labels):
        raise ValueError(f"got {len(images)} images but {len(labels)} labels")
    if not bool(images.isfinite().all()):
        raise ValueError("images contain NaN or infinite values")
    if int(labels.min()) < 0:
        raise ValueError(f"labels must be class indices from 0, got {int(labels.min())}")
    parameter = next((p for p in model.parameters() if p.is_floating_point()), images)
    images = images.detach().to(parameter)
    labels = labels.to(parameter.device).long()
    # tensors made in inference mode cannot be part of a graph
    return tuple(part.clone() if part.is_inference() else part for part in (images, labels))  # type: ignore[return-value]


def _start(twin: nn.Module, images: Tensor, labels: Tensor, criterion: Criterion, rules) -> Tensor:
    """Run the network and return the scalar whose backward pass is the explanation of the whole batch."""
    try:
        logits = twin(images)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"the model does not accept images of shape {tuple(images.shape)} and dtype {images.dtype}: {error}"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model's output must be logits of shape (batch, classes), got {shape}")
    if int(labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"labels reach {int(labels.max())}, but the model has {logits.shape[1]} classes "
            f"(0 to {logits.shape[1] - 1})"
        )
    target = logits.gather(1, labels[:, None]).squeeze(1)
    if _carries_relevance(criterion):
        return (target * target.detach()).sum()  # each sample starts with its logit as relevance
    match getattr(criterion, "start", "logit"):
        case "one":
            return (target / target.detach()).sum()
        case "margin":
            others = logits.scatter(1, labels[:, None], -torch.inf)
            return (target - others.amax(1)).sum()
        case "loss":
            return F.cross_entropy(logits, labels, reduction="sum")
        case _:
            return target.sum()


def _backward(start: Tensor) -> None:
    if start.requires_grad:  # else no scored layer has any influence on it
        start.backward()


def _component_values(
    twin: nn.Module, images: Tensor, labels: Tensor, units: Components, criterion: Criterion, rules
) -> dict[str, Tensor]:
    """Per-sample values of all components: layer → (samples, tokens, components)."""
    if isinstance(criterion, Activation):
        return _activations(twin, images, units)
    values: dict[str, Tensor] = {}

    def note(name: str, output: Tensor, flow: Tensor) -> None:
        value = _per_component(units[name], flow, None if _carries_relevance(criterion) else output)
        values[name] = values[name] + value if name in values else value

    if isinstance(criterion, IntegratedGradients):
        return _integrated(twin, images, labels, units, criterion, rules)
    steps = _path(criterion)
    with _probe(twin, units.trace, units, note):
        for step in range(1, steps + 1):
            point = images if steps == 1 else images * (step / steps)
            _backward(_start(twin, point, labels, criterion, rules))
    # a layer of which nothing depends on its output (inside a constant gate) was never read
    for name in units.keys() - values.keys():
        values[name] = torch.zeros(len(labels), 1, units[name].size)
    return {name: value / steps for name, value in values.items()}


def _integrated(
    twin: nn.Module, images: Tensor, labels: Tensor, units: Components, criterion: IntegratedGradients, rules
) -> dict[str, Tensor]:
    """Path-averaged gradient at every element, times the element's change of activation, summed per component."""
    flows: dict[tuple[str, int], Tensor] = {}
    ends: dict[tuple[str, int], Tensor] = {}
    calls: dict[str, int] = {}

    # a shared layer runs several times: its calls are told apart by their order in the backward pass
    def note(name: str, output: Tensor, flow: Tensor) -> None:
        key = (name, calls.get(name, 0))
        calls[name] = key[1] + 1
        flows[key] = flows[key] + flow if key in flows else flow.clone()
        ends[key] = output

    with _probe(twin, units.trace, units, note, exact=True):
        for step in range(1, criterion.steps + 1):
            calls.clear()
            _backward(_start(twin, images * (step / criterion.steps), labels, criterion, rules))
    starts: dict[str, list[Tensor]] = {}
    if not criterion.influence:
        with (
            torch.no_grad(),
            _listen(twin, units, lambda name, output: starts.setdefault(name, []).append(output.clone())),
        ):
            twin(torch.zeros_like(images[:1]))
    values: dict[str, Tensor] = {}
    for (name, call), flow in flows.items():
        # backward visits the calls of a shared layer in reverse order
        change = 1.0 if criterion.influence else ends[name, call] - starts[name][-1 - call]
        value = _per_component(units[name], flow * change / criterion.steps)
        values[name] = values[name] + value if name in values else value
    return values


def _activations(twin: nn.Module, images: Tensor, units: Components) -> dict[str, Tensor]:
    modules = dict(twin.named_modules())
    values: dict[str, Tensor] = {}

    def note(name: str, output: Tensor) -> None:
        follower = units[name].activation
        output = output if follower is None else modules[follower].forward(output)
        value = _per_component(units[name], output.abs() if units[name].kind == "head" else output)
        elements = output.numel() / (value.shape[0] * value.shape[2])
        values[name] = values.get(name, 0) + value / elements

    with torch.no_grad(), _listen(twin, units, note):
        twin(images)
    return values


def _per_component(layer: Layer, elements: Tensor, factor: Tensor | None = None) -> Tensor:
    """Sum (N, C, *space) over space, a head over its channels, or view (N, *tokens, C): (N, tokens, components)."""
    if layer.kind != "filter":
        elements = elements if factor is None else elements * factor
        elements = elements.reshape(len(elements), -1, elements.shape[-1])
        return elements.unflatten(-1, (layer.size, -1)).sum(-1) if layer.kind == "head" else elements
    if factor is None:
        return elements.flatten(2).sum(2).unsqueeze(1)
    # a product of matrices, so that the product of the elements is never stored
    return torch.matmul(elements.flatten(2).unsqueeze(2), factor.flatten(2).unsqueeze(3))[..., 0, 0].unsqueeze(1)


@contextmanager
def _listen(twin: nn.Module, units: Components, note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``note(layer, output)`` whenever a component layer's output appears."""
    modules = dict(twin.named_modules())
    handles = [
        modules[site].register_forward_hook(lambda module, inputs, output, name=name: note(name, output))
        for name, layer in units.items()
        for site in layer.site
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


@contextmanager
def _probe(
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
        if not exact and type(modules[activation]) is nn.ReLU and not _hooked(modules[activation])
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

    layers: Mapping[str, Layer] = units or {}
    sites = {name: (structure.site(name), False) for name in structure.order if name not in layers}
    sites |= {name: (layer.site, True) for name, layer in layers.items()}
    handles = [
        modules[site].register_forward_hook(hook(name, read)) for name, (where, read) in sites.items() for site in where
    ]
    handles += [modules[activation].register_forward_hook(rectify) for activation in set(rectified.values())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
