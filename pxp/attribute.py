"""Attribution: the relevance of every component, or of every input pixel, in one backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from zennit.core import Composite

from .batches import BATCH_SIZE, Data
from .criteria import Criterion, Random, check_absolute
from .input_probe import InputProbe
from .lrp.composites import LRP, LayerComposite
from .network.components import Components, check_components
from .network.trace import trace_model
from .probe import NoComponents, Probe, explained
from .scores import Scores

EPSILON = LRP("epsilon")


def attribute(
    model: nn.Module,
    refs: Data,
    units: Components,
    criterion: Criterion | Composite,
    *,
    batch_size: int = BATCH_SIZE,
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
    criterion : Criterion or zennit Composite
        :class:`pxp.LRP`, :class:`pxp.Taylor`, …, or your own, see :class:`pxp.Criterion`. A zennit composite must give
        a rule to every module that changes relevance (activations: ``Pass``), as zennit's own composites do. BatchNorm
        is merged before it is registered, so its canonizers find nothing left to merge.
    batch_size : int, default 64
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
        length; components of another model; scores that are NaN or infinite (the layers are named); a criterion that
        leaves out a layer or gives values of another shape; a layer whose values do not lie sample by sample.
    TypeError
        ``criterion`` is none of the above, ``units`` no Components.
    """
    check_components(units)
    asked = as_criterion(criterion)
    units.check(model)
    signed: dict[str, Tensor] = {}
    magnitude: dict[str, Tensor] = {}
    samples = 0
    with torch.inference_mode(False), torch.enable_grad():
        probe = Probe(model, units.trace, units, refs, batch_size, progress)
        made = asked.values(probe)
        if not isinstance(made, Iterator):
            raise TypeError(
                f"values of {criterion!r} must yield a dict of every layer's values, batch by batch, and returns "
                f"{type(made).__name__}"
            )
        for found in made:
            _check_values(found, units, criterion)
            for name, value in found.items():
                value = value.detach()
                wide = torch.float32 if value.device.type == "mps" else torch.float64  # which that device lacks
                signed[name] = signed.get(name, 0) + value.sum((0, 1), dtype=wide)
                if asked.absolute == "sample":
                    value = value.sum(1, keepdim=True)
                magnitude[name] = magnitude.get(name, 0) + value.abs().sum((0, 1), dtype=wide)
            samples += len(value)
    if samples == 0:
        raise ValueError("the reference set is empty: no sample to explain")
    return Scores(
        units,
        _means(magnitude, units, samples),
        _means(signed, units, samples),
        criterion=type(criterion).__name__ if isinstance(criterion, Composite) else repr(criterion),
        samples=probe.samples,
        has_sign=asked.has_sign,
        references=probe.references,
        tuned_on=getattr(criterion, "tuned_on", ()),
    )


def attribute_draws(
    model: nn.Module,
    draws: Iterable[Data],
    units: Components,
    criterion: Criterion | Composite,
    *,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> list[Scores]:
    """Score with several draws of reference samples: one ranking for each, as :func:`pxp.pruning_curve` takes them.

    How much a result depends on the draw is seen in no other way; ten draws are few.

    Parameters
    ----------
    model, units, criterion, batch_size, progress
        As for :func:`attribute`.
    draws : iterable of (images, labels), DataLoader or Dataset
        Each what :func:`attribute` takes, such as ``[pxp.reference_samples(data.train, seed=s) for s in range(10)]``.

    Returns
    -------
    list of Scores
        In the order of the draws. Alike, but for :class:`pxp.Random`, whose draws have its seed and the following ones.

    Raises
    ------
    ValueError
        No draw; as :func:`attribute`, with the number of the draw.
    TypeError
        ``draws`` is a single (images, labels).
    """
    if isinstance(draws, tuple | list) and len(draws) == 2 and isinstance(draws[0], Tensor):
        raise TypeError("draws must be several sets of (images, labels), got one; put it into a list")
    found = []
    for number, refs in enumerate(draws):
        one = replace(criterion, seed=criterion.seed + number) if isinstance(criterion, Random) else criterion
        try:
            found.append(attribute(model, refs, units, one, batch_size=batch_size, progress=progress))
        except ValueError as error:
            raise ValueError(f"draw {number}: {error}") from error
    if not found:
        raise ValueError("there is no draw of reference samples")
    return found


def heatmap(
    model: nn.Module,
    images: Tensor,
    targets: Tensor | int,
    criterion: Criterion | Composite = EPSILON,
    *,
    batch_size: int = BATCH_SIZE,
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
    criterion : Criterion or zennit Composite
        Default LRP-ε. Integrated gradients start from a black image, which is 0 unless their ``baseline`` is another.
    batch_size : int, default 64

    Returns
    -------
    Tensor
        Same shape, dtype and device as ``images``; summed over an image, about the target's logit.

    Raises
    ------
    ValueError
        As :func:`pxp.attribute`; relevance that is NaN or infinite; a rule for the input behind something that mixes
        pixels, see :class:`pxp.LRP`.
    TypeError
        A criterion that explains no input.
    """
    asked = as_criterion(criterion)
    with torch.inference_mode(False), torch.enable_grad():
        both = explained(model, images, targets)
        probe = InputProbe(model, trace_model(model, both[0]), both, batch_size)
        try:
            parts = [_finite(found["input"], criterion) for found in asked.values(probe)]
        except NoComponents as error:
            raise TypeError(
                f"{criterion!r} does not explain inputs; use LRP, Taylor, IntegratedGradients or a zennit composite "
                f"({error})"
            ) from error
    return torch.cat(parts).to(images)


@dataclass(frozen=True)
class _OfZennit(Criterion):
    """A zennit composite. Its rules let relevance itself flow back, unlike pxp's, in which g of R = x ⊙ g flows."""

    composite: Composite

    def values(self, probe: Probe) -> Iterator[dict[str, Tensor]]:
        with probe.rules(self.composite):
            for images, labels in probe.batches():
                carried = not isinstance(self.composite, LayerComposite)
                yield probe.relevance(images, labels, carried=carried)


def as_criterion(criterion: Criterion | Composite) -> Criterion:
    if isinstance(criterion, Composite):
        return _OfZennit(criterion)
    if not isinstance(criterion, Criterion):
        raise TypeError(
            "criterion must be a pxp.LRP, Taylor, IntegratedGradients, Activation, Magnitude or Random object, another "
            f"pxp.Criterion or a zennit composite, got {criterion!r}"
        )
    check_absolute(criterion.absolute)
    return criterion


def _finite(relevance: Tensor, criterion: Criterion | Composite) -> Tensor:
    if not bool(relevance.isfinite().all()):
        raise ValueError(
            f"the heatmap by {criterion!r} is NaN or infinite; the numbers overflowed: use float32 or float64, or "
            "another rule"
        )
    return relevance


def _check_values(found: dict[str, Tensor], units: Components, criterion: Criterion | Composite) -> None:
    """What a criterion gives for a batch must be of every layer and of one number of samples."""
    missing = [name for name in units if name not in found]
    if missing or len(found) > len(units):
        odd = missing or [name for name in found if name not in units]
        raise ValueError(f"the values of {criterion!r} {'lack' if missing else 'name other'} layers: {', '.join(odd)}")
    samples = len(found[next(iter(units))])
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the values of {criterion!r} for layer {name!r} must be a Tensor, got {type(value).__name__}"
            )
        if value.ndim != 3 or len(value) != samples or value.shape[2] != units[name].size:
            raise ValueError(
                f"the values of {criterion!r} for layer {name!r} must have shape (samples, tokens, {units[name].size}) "
                f"with as many samples in every layer, got {tuple(value.shape)}"
            )


def _means(totals: dict[str, Tensor], units: Components, samples: int) -> dict[str, Tensor]:
    """Means over samples, brought to the CPU in one piece; the layers may be on several devices."""
    sizes = [layer.size for layer in units.values()]
    device = totals[next(iter(units))].device
    means = torch.cat([totals[name].to(device) for name in units]).cpu().double() / samples
    return dict(zip(units, means.split(sizes), strict=True))
