"""What pruning costs: accuracy, pruning curves, and whether two criteria really differ."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .bars import bar
from .batches import BATCH_SIZE, Data, batches, distinct, fingerprints, refuse_shared
from .budget import latencies
from .data import shipped_file
from .files import FORMAT, Newer, check_format, renewed
from .models import trained_on
from .rates import RATES, as_rates, fraction
from .scores import Scores
from .statistics import Comparison, bootstrap, paired
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


@dataclass(frozen=True, repr=False)
class Curve:
    """Accuracy at growing pruning rates, for one or several sets of reference samples.

    Attributes
    ----------
    rates : tuple of float
        In [0, 1], growing; a list, array, Tensor or generator becomes a tuple of floats.
    runs : tuple of tuple of float
        Accuracy, in [0, 1], per run (row) and rate (column).
    criterion : str
        What ranked the components.
    settings : dict
        How they were selected.
    """

    rates: tuple[float, ...]
    runs: tuple[tuple[float, ...], ...]
    criterion: str = ""
    settings: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", as_rates(self.rates))
        object.__setattr__(self, "runs", tuple(tuple(fraction("accuracy", a) for a in run) for run in self.runs))
        if not self.rates or not self.runs or any(len(run) != len(self.rates) for run in self.runs):
            raise ValueError(f"every run needs one accuracy for each of the {len(self.rates)} rates")

    @property
    def accuracy(self) -> np.ndarray:
        """Mean over runs, (rates,)."""
        return np.mean(self.runs, axis=0)

    @property
    def a_pr_runs(self) -> np.ndarray:
        """A_PR of each run, (runs,)."""
        return np.mean(self.runs, axis=1)

    @property
    def a_pr(self) -> float:
        """A_PR: mean accuracy over the rates (Hatefi et al. 2024, as reported); at most 1."""
        return float(np.mean(self.runs))

    @property
    def area(self) -> float:
        """Area by the trapezoid rule, as in the paper's public code; at most the last rate minus the first."""
        return float(np.trapezoid(self.accuracy, self.rates))

    def top_pr(self, share: float = 0.95) -> float:
        """Highest rate up to which the mean accuracy never falls below ``share`` of that at the first rate.

        Of a curve that starts at rate 0 that is the unpruned network's; of another it is not, and the Top-PR of two
        curves can only be compared if they start alike. ``share`` is a fraction, 0.95 for 95 %.
        """
        share = fraction("share", share)
        good = self.accuracy >= share * self.accuracy[0]
        return self.rates[int(np.argmin(good)) - 1] if not good.all() else self.rates[-1]

    def interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Bootstrap interval of the mean accuracy at each rate, over runs; two arrays (rates,).

        ``level`` is a fraction, 0.95 for 95 %. It tells how much the runs vary, that is the reference samples (or
        seeds), not the images that accuracy is measured on. A single run does not vary: both arrays are its accuracy.
        """
        return bootstrap(np.asarray(self.runs), level)

    def a_pr_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of A_PR over runs; as :meth:`interval`."""
        low, high = bootstrap(self.a_pr_runs[:, None], level)
        return float(low[0]), float(high[0])

    def plot(self, ax=None, **kwargs):
        """Draw accuracy against pruning rate; see :func:`pxp.plots.curves`."""
        from . import plots

        return plots.curves({self.criterion or "curve": self}, ax=ax, **kwargs)

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Curve:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            The file is no such JSON, what it holds is no curve, or a newer pxp wrote it.
        """
        try:
            return cls._made_of(json.loads(Path(path).read_text()), path)
        except Newer:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no curve written by pxp: {error}") from error

    @classmethod
    def _made_of(cls, entries: dict, path: object) -> Curve:
        runs = tuple(tuple(run) for run in entries["runs"])
        criterion, settings = entries["criterion"], dict(entries["settings"])
        if check_format(entries.get("format"), path) < 2:
            criterion, kept, turned = renewed(criterion)
            settings |= {"by": "signed"} if kept else {}
            if turned and settings.get("by") == "signed":  # the lowest were the most useful
                settings["order"] = "least" if settings.get("order") == "most" else "most"
        return cls(tuple(entries["rates"]), runs, criterion, settings)

    def __repr__(self) -> str:
        low, high = self.a_pr_interval()
        spread = f" [{low:.3f}, {high:.3f}]" if len(self.runs) > 1 else ""
        first, best = self.rates[0], self.accuracy[0]
        since = f" from {first:.0%} on" if first else ""  # where nothing is said about the unpruned network
        start = f"relative to {best:.3f} at {first:.0%}" if first else f"unpruned {best:.3f}"
        return (
            f"Curve({self.criterion or 'unnamed'}, {len(self.runs)} run{'s' if len(self.runs) > 1 else ''}: "
            f"A_PR {self.a_pr:.3f}{spread}{since}, Top-PR {self.top_pr():.0%}, {start})"
        )


def save_curves(curves: Mapping[str, Curve], path: str | Path) -> None:
    """Write named curves as one JSON file.

    Parameters
    ----------
    curves : mapping of str to Curve
    path : path
    """
    written = {name: {"format": FORMAT, **asdict(curve)} for name, curve in curves.items()}
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(entries)}" for name, entries in written.items())
    Path(path).write_text(f"{{\n{rows}\n}}\n")


def load_curves(path: str | Path) -> dict[str, Curve]:
    """Read what :func:`save_curves` wrote.

    Parameters
    ----------
    path : path or str
        A file, or the name of curves that ship with the package: the results on the shipped networks, ``"vgg"``,
        ``"resnet"``, ``"vit-heads"``, ``"vit-neurons"``.

    Returns
    -------
    dict of str to Curve
        In the order in which they were written.

    Raises
    ------
    FileNotFoundError
        Neither a file nor shipped curves; the message names those.
    ValueError
        Not a file of this kind, or damaged.
    """
    file = shipped_file(path, "curves")
    try:
        return {name: Curve._made_of(entries, file) for name, entries in json.loads(file.read_text()).items()}
    except Newer:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} holds no curves written by pxp: {error}") from error


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
    allow_shared: bool = False,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> Curve:
    """Prune more and more and measure the accuracy, without retraining.

    Parameters
    ----------
    model : nn.Module
    scores : Scores or sequence of Scores
        Several (one per seed) give the curve its interval.
    data : (images, labels), DataLoader or Dataset
        Images that neither training, nor tuning, nor attribution has seen.
    rates : iterable of float
        In [0, 1], growing; a list, array, Tensor or generator. Default the paper's 20: 0, 0.05, …, 0.95.
    classes : sequence of int, optional
        See :func:`accuracy`.
    by, order, scope, min_keep, cost
        See :meth:`pxp.Scores.select`; ``cost="latency"`` is measured by :func:`pxp.latencies`.
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
    several = [scores] if isinstance(scores, Scores) else list(scores)
    rates = as_rates(rates)
    if not several or not rates:
        raise ValueError("a pruning curve needs at least one Scores and one rate")
    settings = {"by": by, "order": order, "scope": scope, "min_keep": min_keep, "cost": cost}
    price = latencies(model, several[0].units) if cost == "latency" else cost
    masks = [[one.select(rate, **{**settings, "cost": price}) for rate in rates] for one in several]  # type: ignore
    if not allow_shared:
        _refuse_seen(model, several, data, classes, batch_size)
    sweep = Sweep(model, data, classes=classes, batch_size=batch_size)  # runs share the unpruned network, and more
    with bar(show=progress, desc="prune", unit="image", unit_scale=True) as ahead:
        runs = tuple(tuple(sweep.accuracies(row, ahead.update)) for row in masks)
    return Curve(rates, runs, several[0].criterion, settings)


def _refuse_seen(
    model: nn.Module, several: Sequence[Scores], data: Data, classes: Sequence[int] | None, batch_size: int
) -> None:
    """Raise a ValueError if the images to report on were used before, see ``allow_shared`` of :func:`pruning_curve`."""
    used: list[tuple[Collection[str], str]] = [(scores.references, "as references") for scores in several]
    used += [(scores.tuned_on, "for tuning") for scores in several]
    used += [(trained_on(model), "to train this network")]
    if not any(seen for seen, _ in used):
        return
    marks: set[str] = set()
    for images, labels in batches(data, batch_size):
        members = slice(None) if classes is None else torch.isin(labels, torch.as_tensor(distinct(classes)).to(labels))
        marks.update(fingerprints(images[members]))
    for seen, purpose in used:
        refuse_shared(marks, seen, purpose)


def compare(first: Curve, second: Curve) -> Comparison:
    """Test whether two criteria differ in A_PR, run by run.

    Parameters
    ----------
    first, second : Curve
        Run i of both must have used the same reference samples; a curve with one run (a criterion without samples) is
        compared with every run of the other.

    Returns
    -------
    Comparison
        With n runs the p-value cannot be below 2 / 2ⁿ.

    Raises
    ------
    ValueError
        Other rates; other numbers of runs; fewer than two pairs.
    """
    if len(first.rates) != len(second.rates) or not np.allclose(first.rates, second.rates, rtol=0, atol=1e-9):
        raise ValueError("the two curves have different rates")
    a, b = first.a_pr_runs, second.a_pr_runs
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        raise ValueError(f"cannot pair {len(a)} runs with {len(b)}")
    difference = a - b
    if len(difference) < 2:
        raise ValueError("a paired test needs at least two runs")
    return paired(difference)
