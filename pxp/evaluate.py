"""What pruning costs: accuracy, and how it falls when more and more is pruned."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .bars import bar
from .batches import BATCH_SIZE, Data, batches, distinct, fingerprints, refuse_shared
from .budget import latencies
from .curve import Curve
from .masks import Mask
from .models import trained_on
from .rates import RATES, as_rates
from .repair import as_repair
from .scores import Scores, several_scores
from .sweep import Sweep, hits


def accuracy(
    model: nn.Module,
    data: Data,
    *,
    classes: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
) -> float:
    """Top-1 accuracy in evaluation mode; afterwards every module has the mode it had.

    Parameters
    ----------
    model : nn.Module
        Output (batch, classes).
    data : (images, labels), DataLoader or Dataset
    classes : sequence of int, optional
        Restrict the task: only samples of these classes, and the logits sliced to them (a zeroed logit would still
        be a rival of negative ones).
    batch_size : int, default 64

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    ValueError
        No sample (of these classes); a class that the model does not have; an output that is not (batch, classes);
        images or labels that :func:`pxp.attribute` would refuse.
    TypeError
        Data of another type; samples that are no pairs (image, label).
    """
    return float(hits(model, data, classes=classes, batch_size=batch_size).double().mean())


def accuracies(
    model: nn.Module,
    masks: Iterable[Mask],
    data: Data,
    *,
    classes: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> list[float]:
    """Top-1 accuracy under each of several masks; what their networks have in common is computed once.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    masks : iterable of Mask
        Of components of this model.
    data, classes, batch_size
        As for :func:`accuracy`.
    progress : bool, default True
        Show a bar when it takes longer than five seconds.

    Returns
    -------
    list of float
        In the order of ``masks``, each as :func:`accuracy` inside :func:`pxp.masked`.

    Raises
    ------
    ValueError
        As :func:`accuracy` and :func:`pxp.masked`; masks of another model's components.
    TypeError
        Something that is no list of masks.
    """
    several = list(masks) if isinstance(masks, Iterable) else [masks]
    for mask in several:
        if not isinstance(mask, Mask):  # one mask alone is a mapping, and lists its layers
            raise TypeError(f"masks must be a list of pxp.Mask, got {type(masks).__name__} of {type(mask).__name__}")
        mask.units.check(model)
    sweep = Sweep(model, data, classes=classes, batch_size=batch_size)
    with bar(show=progress, desc="prune", unit="image", unit_scale=True) as ahead:
        return sweep.accuracies(several, ahead.update)


def pruning_curve(
    model: nn.Module,
    scores: Scores | Sequence[Scores],
    data: Data,
    *,
    rates: Iterable[float] = RATES,
    classes: Sequence[int] | None = None,
    by: str = "magnitude",
    order: str = "least",
    scope: str = "global",
    min_keep: int = 0,
    cost: str | Mapping[str, float] | None = None,
    repair: tuple[str, Data | Tensor] | None = None,
    allow_shared: bool = False,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> Curve:
    """Prune more and more, each time the whole network, and measure the accuracy, without retraining.

    Parameters
    ----------
    model : nn.Module
    scores : Scores or sequence of Scores
        Several (one per draw of references or seed, see :func:`pxp.attribute_draws`) give the curve its interval.
    data : (images, labels), DataLoader or Dataset
        Images that neither training, nor tuning, nor attribution has seen. The curve keeps which of them were right,
        for its intervals; not if a loader shuffles them, which is logged.
    rates : iterable of float
        In [0, 1], growing; a list, array, Tensor or generator. Default the paper's 20: 0, 0.05, …, 0.95.
    classes : sequence of int, optional
        See :func:`accuracy`.
    by, order, scope, min_keep, cost
        See :meth:`pxp.Scores.select`; ``cost="latency"`` is measured by :func:`pxp.latencies`.
    repair : (method, images), optional
        Measure the networks that :func:`pxp.repair` makes of each mask with these images, which must not be those to
        report on: ``("statistics", images)``. Takes the time of a repair for every mask.
    allow_shared : bool, default False
        Report on images that were used before. Otherwise they are refused, if they are more than 1 % of the smaller of
        two sets: the references of a Scores; what its criterion was tuned on, if it is :func:`pxp.winner`'s; and what a
        shipped network was trained on, of which the 1,000 images of ``data.reference`` are known, and all 59,000 once
        they were loaded with ``full=True``. Images are recognised by their values: cropped, normalised or otherwise
        changed they are others. What other networks were trained on, or a network by :func:`pxp.finetune`, is not
        known, nor what a criterion of one's own was chosen on.
    batch_size : int, default 64
    progress : bool, default True
        Show a bar when it takes longer than five seconds.

    Returns
    -------
    Curve

    Raises
    ------
    ValueError
        No scores or no rates; rates that do not grow; images that were used before; and as :meth:`Scores.select` and
        :func:`accuracy`.
    """
    several = several_scores(scores, "a pruning curve")
    rates = as_rates(rates)
    mended = as_repair(repair)
    if not rates:
        raise ValueError("a pruning curve needs at least one rate")
    settings = {"by": by, "order": order, "scope": scope, "min_keep": min_keep, "cost": cost}
    price = latencies(model, several[0].units) if cost == "latency" else cost
    masks = [[one.select(rate, **{**settings, "cost": price}) for rate in rates] for one in several]  # type: ignore
    if not allow_shared:
        _refuse_seen(model, several, data, classes, batch_size, mended)
    if mended is not None:
        settings["repair"] = f"{mended[0]}, {len(mended[1])} images"
    # runs share the unpruned network, and more
    sweep = Sweep(model, data, classes=classes, batch_size=batch_size, mended=mended)
    with bar(show=progress, desc="prune", unit="image", unit_scale=True) as ahead:
        right = torch.stack([sweep.hits(row, ahead.update) for row in masks]).numpy()
    about: dict = {"criterion": several[0].criterion, "settings": settings, "draws": tuple(one.draw for one in several)}
    return sweep.curve(rates, right, **about)


def _refuse_seen(
    model: nn.Module,
    several: Sequence[Scores],
    data: Data,
    classes: Sequence[int] | None,
    batch_size: int,
    mended: tuple[str, Tensor] | None,
) -> None:
    """Raise a ValueError if the images to report on were used before, see ``allow_shared`` of :func:`pruning_curve`."""
    used: list[tuple[Collection[str], str]] = [(scores.references, "as references") for scores in several]
    used += [(scores.tuned_on, "for tuning") for scores in several]
    used += [(trained_on(model), "to train this network")]
    used += [] if mended is None else [(fingerprints(mended[1]), "for the repair")]
    if not any(seen for seen, _ in used):
        return
    marks: set[str] = set()
    for images, labels in batches(data, batch_size):
        members = slice(None) if classes is None else torch.isin(labels, torch.as_tensor(distinct(classes)).to(labels))
        marks.update(fingerprints(images[members]))
    for seen, purpose in used:
        refuse_shared(marks, seen, purpose)
