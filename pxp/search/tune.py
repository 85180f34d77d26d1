"""Tuning: the composite is a hyperparameter, and the area under the pruning curve its objective (Hatefi et al. 2024).

A trial is one setting: attribute the reference samples, rank, prune at growing rates, measure on tuning images. Optuna
proposes the settings; samplers, pruners, storages and studies are its own.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from zennit.core import Composite

from ..attribute import attribute
from ..bars import bar
from ..batches import BATCH_SIZE, Data, fingerprints, refuse_shared, shared, whole
from ..budget import Budget, latencies
from ..criteria import Criterion
from ..files import FORMAT, check_format
from ..identity import identity
from ..lrp.composites import LRP
from ..masks import Mask
from ..network.components import Components
from ..rates import RATES, as_rates
from ..repair import as_repair
from ..scores import Scores
from ..sweep import Sweep
from .space import SearchSpace, as_criterion, search_space
from .storage import check_choices, check_same, offered_by, open_storage, quiet

if TYPE_CHECKING:
    import optuna


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a trial is worth: ``"a_pr"``, or a quantity and a level, such as ``"accuracy@0.5"``."""

    quantity: str
    level: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Objective:
        quantity, _, level = text.partition("@")
        try:
            found = cls(quantity, float(level) if level else 0.0)
        except ValueError:
            found = cls("", -1)
        levelled = quantity in ("accuracy", "flops", "parameters", "latency")
        if not (quantity == "a_pr" and not level) and not (levelled and level and 0 <= found.level <= 1):
            raise ValueError(
                f"unknown objective {text!r}; allowed: 'a_pr'; 'accuracy@RATE', the accuracy at one pruning rate; "
                "'flops@SHARE', 'parameters@SHARE' and 'latency@SHARE', what the highest rate saves that keeps this "
                "share of accuracy"
            )
        return found

    def rates(self, rates: Sequence[float]) -> tuple[float, ...]:
        """The pruning rates that have to be measured."""
        return (self.level,) if self.quantity == "accuracy" else tuple(rates)

    def value(
        self,
        curve: Mapping[float, float],
        masks: Mapping[float, Mask],
        rates: Sequence[float],
        latency_left: Callable[[Mask], float],
    ) -> float:
        if self.quantity == "a_pr":
            return sum(curve[rate] for rate in rates) / len(rates)
        if self.quantity == "accuracy":
            return curve[self.level]
        kept = [rate for rate in rates if curve[rate] >= self.level * curve[min(rates)]]
        mask = masks[max(kept)]
        if self.quantity == "latency":
            return 1 - latency_left(mask)
        prices = {name: getattr(layer, self.quantity) for name, layer in mask.units.items()}
        saved = sum(prices[name] * int((~keep).sum()) for name, keep in mask.items())
        return saved / sum(price * mask.units[name].size for name, price in prices.items())


class _NoRanking(Exception):
    """The scores of a trial rank nothing; the reason is the trial's user attribute."""


class _Trials:
    """The function that Optuna optimises: one call is one trial."""

    def __init__(
        self,
        model: nn.Module,
        refs: tuple[Tensor, Tensor],
        units: Components,
        data: tuple[Tensor, Tensor],
        space: Callable[[optuna.Trial], Any],
        objectives: Sequence[Objective],
        rates: Sequence[float],
        fixed: Mapping[str, Any],
        classes: Sequence[int] | None,
        batch_size: int,
        mended: tuple[str, Tensor] | None,
    ) -> None:
        self.model, self.refs, self.units, self.space = model, refs, units, space
        self.objectives, self.rates, self.fixed = list(objectives), tuple(rates), dict(fixed)
        self.sweep = Sweep(model, data, classes=classes, batch_size=batch_size, mended=mended)
        self.batch = data[0][:batch_size]
        self.measured = sorted({rate for objective in objectives for rate in objective.rates(rates)})
        self._scores: dict[str, Scores] = {}
        self._budget: Budget | None = None
        self._latencies: dict[str, float] | None = None

    def __call__(self, trial: optuna.Trial) -> float | tuple[float, ...]:
        import optuna

        criterion, options = as_criterion(self.space(trial))
        options = {**self.fixed, **options}
        setting = repr((criterion, sorted(options.items())))
        trial.set_user_attr("setting", setting)
        trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
        mark = identity((criterion, sorted(options.items())))
        trial.set_user_attr("identity", mark)
        earlier = None if mark is None else self._earlier(trial, mark)
        if earlier is not None:
            return self._repeat(trial, earlier)
        started = time.perf_counter()
        try:
            scores = self.scores(criterion)
            ranked = scores.signed if options.get("by") == "signed" else scores
            if torch.cat(list(ranked.values())).unique().numel() == 1:
                raise ValueError("all scores are equal, so they rank nothing")
        except ValueError as problem:
            trial.set_user_attr("reason", str(problem))
            raise _NoRanking(str(problem)) from problem
        if options.get("cost") == "latency":
            options = {**options, "cost": self.latencies()}
        masks = {rate: scores.select(rate, **options) for rate in self.measured}
        attributed = time.perf_counter()
        curve: dict[float, float] = {}
        try:
            grows = [objective.quantity for objective in self.objectives] == ["a_pr"]
            # all rates together are cheaper than one after the other, which only a pruner needs
            together = not grows or isinstance(trial.study.pruner, optuna.pruners.NopPruner)
            for rates in [self.measured] if together else [[rate] for rate in self.measured]:
                for rate, found in zip(rates, self.sweep.accuracies([masks[rate] for rate in rates]), strict=True):
                    curve[rate] = found
                    if grows:
                        # an area that only grows: pruners compare the best value so far, and a mean begins at its best
                        trial.report(sum(curve.values()) / len(self.measured), len(curve) - 1)
                if grows and trial.should_prune():
                    raise optuna.TrialPruned()
        finally:
            seconds = {"attribution": attributed - started, "sweep": time.perf_counter() - attributed}
            trial.set_user_attr("seconds", {part: round(value, 3) for part, value in seconds.items()})
            trial.set_user_attr("curve", list(curve.values()))
        values = tuple(objective.value(curve, masks, self.rates, self.latency_left) for objective in self.objectives)
        return values[0] if len(values) == 1 else values

    def _earlier(self, trial: optuna.Trial, mark: str) -> optuna.trial.FrozenTrial | None:
        """An earlier trial of the same setting that came to an end."""
        from optuna.trial import TrialState

        ended = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        for other in trial.study.get_trials(deepcopy=False, states=ended):
            known = other.state != TrialState.FAIL or "reason" in other.user_attrs
            if known and other.number != trial.number and other.user_attrs.get("identity") == mark:
                return other
        return None

    @staticmethod
    def _repeat(trial: optuna.Trial, earlier: optuna.trial.FrozenTrial) -> float | tuple[float, ...]:
        import optuna
        from optuna.trial import TrialState

        trial.set_user_attr("same_as", earlier.number)
        for name in ("curve", "reason"):
            if name in earlier.user_attrs:
                trial.set_user_attr(name, earlier.user_attrs[name])
        if earlier.state == TrialState.FAIL:
            raise _NoRanking(earlier.user_attrs["reason"])
        for step, value in earlier.intermediate_values.items():
            trial.report(value, step)
        if earlier.state == TrialState.PRUNED:
            raise optuna.TrialPruned()
        return earlier.values[0] if len(earlier.values) == 1 else tuple(earlier.values)

    def scores(self, criterion: Criterion | Composite) -> Scores:
        """Attribute once per criterion; magnitudes and signed scores come from the same pass."""
        key = identity(criterion)
        found = None if key is None else self._scores.get(key)
        if found is None:
            found = attribute(self.model, self.refs, self.units, criterion, progress=False)
            if key is not None:
                self._scores[key] = found
        return found

    def latencies(self) -> dict[str, float]:
        """Measured once: trials with the same setting must choose the same masks."""
        if self._latencies is None:
            self._latencies = latencies(self.model, self.units, self.batch)
        return self._latencies

    def latency_left(self, mask: Mask) -> float:
        """Seconds of the smaller network relative to the model's, on one batch."""
        if self._budget is None:
            self._budget = Budget(self.model, "latency", 1.0, self.batch)
        return self._budget.left(mask)


def tune(
    model: nn.Module,
    refs: Data,
    units: Components,
    tune_data: Data,
    n_trials: int | None = None,
    *,
    space: str | Mapping[str, Any] | Callable[[optuna.Trial], Any] = "paper",
    objective: str | Sequence[str] = "a_pr",
    rates: Iterable[float] = RATES,
    classes: Sequence[int] | None = None,
    min_keep: int = 0,
    scope: str = "global",
    repair: tuple[str, Data | Tensor] | None = None,
    sampler: str | optuna.samplers.BaseSampler | None = None,
    pruner: optuna.pruners.BasePruner | None = None,
    storage: str | Path | optuna.storages.BaseStorage | None = None,
    study_name: str | None = None,
    seed: int | None = 0,
    n_jobs: int = 1,
    timeout: float | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> optuna.Study:
    """Search the criterion whose ranking prunes best; :func:`pxp.winner` gives it and how it selects.

    A setting that was tried before, by any worker, is not evaluated again: its trial gets the known values (user
    attribute ``same_as``). Nor is an attribution or a mask. A setting that gives no ranking (NaN, infinite or all equal
    scores) fails alone, with the reason in its user attributes.

    Parameters
    ----------
    model, refs, units
        As for :func:`pxp.attribute`.
    tune_data : (images, labels), Dataset or DataLoader
        The images that the objective is measured on. Never report on them: :func:`pxp.tuned_curve` refuses to.
    n_trials : int, optional
        Trials of the whole study, over all workers and earlier calls. Default: all of a grid; no limit but ``timeout``,
        where there is one; else 100.
    space : {"paper", "extended"}, mapping, SearchSpace or callable
        See :func:`pxp.search_space`; a mapping as for :class:`pxp.search.space.SearchSpace`; or a function that takes
        an ``optuna.Trial`` and returns such a setting, any criterion, or (criterion, options of ``select``).
    objective : str or sequence of str
        ``"a_pr"``; ``"accuracy@0.5"``, the accuracy at one rate; ``"flops@0.95"``, ``"parameters@0.95"``, the share
        of the components' cost that the highest rate saves which keeps 95 % of the accuracy. Several are maximised
        together and give a Pareto front, ``study.best_trials``. ``"latency@0.95"`` measures the compacted network on
        one batch of tuning images, so it varies a little from run to run.
    rates : iterable of float
        Pruning rates of a trial's curve, as for :func:`pxp.pruning_curve`; default the paper's 20.
    classes, batch_size
        As for :func:`pxp.pruning_curve`.
    min_keep, scope
        As for :meth:`pxp.Scores.select`, in every trial whose setting does not say otherwise.
    repair : (method, images), optional
        As for :func:`pxp.pruning_curve`: the objective is that of the repaired networks. ``"statistics"`` takes a pass
        over the images for every mask, ``"least_squares"`` some twenty times as long.
    sampler : {"tpe", "gp", "random", "grid"} or Optuna sampler, optional
        ``"tpe"`` (the default); ``"gp"``, a Gaussian process as in the paper; ``"grid"``, every setting of a finite
        space once.
    pruner : Optuna pruner, optional
        Stops hopeless trials by the area under the curve so far; default none. Single objective ``"a_pr"`` only.
    storage : str, path or Optuna storage, optional
        Default in memory. A path that ends in ``.journal``, for several processes on one machine; or any database URL
        of Optuna's: ``sqlite:///study.db``, ``postgresql+psycopg://…`` for many machines. In a database a worker's
        heartbeat shows that it lives, and the trial of a killed one is tried again.
    study_name : str, optional
        With ``storage``: the study to join or to go on with; a study keeps its choices.
    seed : int or None, default 0
        With one worker the study is repeatable to the last bit. Workers that start together need different ones, or
        None.
    n_jobs : int, default 1
        Threads. Processes are faster: start several with the same storage.
    timeout : float, optional
        Seconds.
    progress : bool, default True
        Show a bar when it takes longer than five seconds.

    Returns
    -------
    optuna.Study
        Every trial has the user attributes ``curve``, ``setting``, ``seconds`` and ``worker``.

    Raises
    ------
    ValueError
        As :func:`pxp.attribute`; unknown space, sampler or objective; a wrong name or value in the space; references
        and tuning images that share more than 1 % of the smaller set; a stored study of another network, or of other
        images, references, components, objective, rates or choices; choices that a storage cannot hold, such as rule
        objects.
    """
    import optuna
    from optuna.trial import TrialState

    objectives = [Objective.parse(text) for text in ([objective] if isinstance(objective, str) else objective)]
    rates = as_rates(rates)
    if not objectives or not rates:
        raise ValueError("tuning needs at least one objective and one rate")
    if isinstance(space, str):
        space = search_space(model, space)
    elif isinstance(space, Mapping) and not isinstance(space, SearchSpace):
        space = SearchSpace(space)
    images = whole(tune_data)
    references = whole(refs)
    marks = fingerprints(images[0])
    seen = shared(fingerprints(references[0]), marks)
    if seen:
        raise ValueError(f"{seen} reference images are also tuning images; draw the two from different splits")
    mended = as_repair(repair)
    if mended is not None:
        refuse_shared(marks, fingerprints(mended[1]), "for the repair")
    about = {
        "format": FORMAT,
        "objective": [objective] if isinstance(objective, str) else list(objective),
        "rates": list(rates),
        "classes": None if classes is None else list(classes),
        "units": units.describe(),
        "components": identity(list(units.values())),
        "network": identity([*model.parameters(), *model.buffers()]),
        "references": identity(sorted(zip(fingerprints(references[0]), references[1].tolist(), strict=True))),
        "selection": {"min_keep": min_keep, "scope": scope},
        "images": sorted(marks),
        "repair": None if mended is None else [mended[0], identity(sorted(fingerprints(mended[1])))],
    }
    fixed = {"min_keep": min_keep, "scope": scope}
    run = _Trials(model, references, units, images, space, objectives, rates, fixed, classes, batch_size, mended)
    # what is wrong with the arguments is an error here, not in every trial
    highest = int(references[1].argmax())
    attribute(model, tuple(part[highest : highest + 1] for part in references), units, LRP(), progress=False)  # type: ignore[arg-type]
    everything = {name: torch.ones(layer.size, dtype=torch.bool) for name, layer in units.items()}
    run.sweep.accuracies([Mask(units, everything)])

    offered = space if isinstance(space, SearchSpace) else {} if storage is None else offered_by(space)
    if not isinstance(storage, optuna.storages.InMemoryStorage | None):
        check_choices(offered, "a stored study")
    with quiet():
        study = optuna.create_study(
            storage=open_storage(storage),
            study_name=study_name,
            load_if_exists=study_name is not None,
            pruner=pruner or optuna.pruners.NopPruner(),
            directions=["maximize"] * len(objectives),
        )
        known = study.user_attrs.get("pxp")
        check_format((known or about).get("format"), f"study {study.study_name!r}")
        if known is None:
            study.set_user_attr("pxp", about)
        elif differ := [name for name in about if name in (*known, "repair") and known.get(name) != about[name]]:
            raise ValueError(
                f"study {study.study_name!r} exists with other {', '.join(differ)}; use another study_name"
            )
        trials = study.get_trials(deepcopy=False)
        check_same(study, offered)
        study.sampler = _sampler(sampler, space, seed, len(trials))
        if n_trials is None and timeout is None and not isinstance(study.sampler, optuna.samplers.GridSampler):
            n_trials = 100

        def ended() -> int:
            trials = study.get_trials(deepcopy=False)
            done = (TrialState.COMPLETE, TrialState.PRUNED)
            return sum(t.state in done or (t.state == TrialState.FAIL and "reason" in t.user_attrs) for t in trials)

        ahead = bar(show=progress, total=n_trials, initial=ended(), desc="tune")

        def after(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            ahead.update()
            if n_trials is not None and ended() >= n_trials:
                study.stop()

        with ahead:
            left = None if n_trials is None else max(0, n_trials - ended())
            done = isinstance(study.sampler, optuna.samplers.GridSampler) and study.sampler.is_exhausted(study)
            if left != 0 and not done:
                study.optimize(
                    run, n_trials=left, timeout=timeout, n_jobs=n_jobs, catch=(_NoRanking,), callbacks=[after]
                )
    return study


def _sampler(
    sampler: str | optuna.samplers.BaseSampler | None, space: Any, seed: int | None, begun: int
) -> optuna.samplers.BaseSampler:
    from optuna import samplers

    if isinstance(sampler, samplers.BaseSampler):
        return sampler
    if sampler not in (None, "tpe", "gp", "random", "grid"):
        raise ValueError(f"unknown sampler {sampler!r}; allowed: 'tpe', 'gp', 'random', 'grid', or one of Optuna's")
    if sampler == "grid":
        grid = space.grid() if isinstance(space, SearchSpace) else None
        if grid is None:
            raise ValueError("a grid needs a space of finitely many values that depend on no other: 'paper' or a dict")
        return samplers.GridSampler(grid, seed=0)  # all workers must number the settings alike
    # a worker that joins must not propose again what the first ones did
    seed = None if seed is None else seed + begun
    if sampler == "gp":
        return samplers.GPSampler(seed=seed, deterministic_objective=True, warn_independent_sampling=False)
    if sampler == "random":
        return samplers.RandomSampler(seed=seed)
    return samplers.TPESampler(seed=seed)
