"""Finished searches: the winner, its curve on images that the search has not seen, and files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..attribute import attribute
from ..batches import BATCH_SIZE, Data, fingerprints, refuse_shared, whole
from ..criteria import Criterion
from ..curve import Curve
from ..data import shipped_file
from ..evaluate import pruning_curve
from ..files import FORMAT, Newer, check_format
from ..network.components import Components
from .space import as_criterion, renewed
from .storage import check_choices

if TYPE_CHECKING:
    import optuna


def winner(study: optuna.Study, *, space: Callable | None = None, trial: int | None = None) -> tuple[Criterion, dict]:
    """The best criterion of a study, and the options of :meth:`pxp.Scores.select` that belong to it.

    ``study.best_params`` names both together, and lacks what :func:`pxp.tune` was given for all trials.

    Parameters
    ----------
    study : optuna.Study
        From :func:`pxp.tune`.
    space : callable, optional
        The space that the study was made with, if it was a function.
    trial : int, optional
        Another trial than the best one; a study with several objectives needs it.

    Returns
    -------
    (criterion, dict)
        The criterion knows the images that it was tuned on, so that :func:`pxp.pruning_curve` does not report on them.

    Raises
    ------
    ValueError
        A study with several objectives and no ``trial``; no such trial; no trial that came to an end.
    """
    import optuna

    if trial is None and len(study.directions) > 1:
        numbers = ", ".join(str(t.number) for t in study.best_trials)
        raise ValueError(f"with several objectives there is no single winner; give trial=, one of {numbers}")
    by_number = {t.number: t for t in study.get_trials(deepcopy=False)}
    if trial is not None and trial not in by_number:
        raise ValueError(f"the study has no trial {trial}")
    params = study.best_params if trial is None else by_number[trial].params
    if space is None and params.get("absolute") == "never":
        params = renewed(params)
    criterion, options = as_criterion(params if space is None else space(optuna.trial.FixedTrial(params)))
    criterion = copy.copy(criterion)  # a space may give the same object again
    object.__setattr__(criterion, "tuned_on", frozenset(study.user_attrs.get("pxp", {}).get("images", ())))
    return criterion, {**study.user_attrs.get("pxp", {}).get("selection", {}), **options}


def tuned_curve(
    study: optuna.Study,
    model: nn.Module,
    refs: Data | Sequence[tuple[Tensor, Tensor]],
    units: Components,
    data: Data,
    *,
    space: Callable | None = None,
    trial: int | None = None,
    repair: tuple[str, Data | Tensor] | None = None,
    allow_shared: bool = False,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> Curve:
    """The winner's pruning curve on images that tuning has not seen.

    Parameters
    ----------
    study, space, trial
        As for :func:`pxp.winner`.
    model, units
        As for :func:`pxp.attribute`.
    refs : (images, labels) or a list of them
        Several give the curve its interval.
    data : (images, labels), Dataset or DataLoader
        The images to report on.
    repair, allow_shared
        As for :func:`pxp.pruning_curve`.

    Returns
    -------
    Curve
        At the study's rates and classes.

    Raises
    ------
    ValueError
        ``data`` shares images with tuning, references or training, see :func:`pxp.pruning_curve`; as
        :func:`pxp.winner`.
    """
    about = study.user_attrs.get("pxp")
    if about is None:
        raise ValueError("this is no study made by pxp.tune")
    images = whole(data)
    if not allow_shared:  # said before the work; of the rest the curve takes care
        refuse_shared(fingerprints(images[0]), about["images"], "for tuning")
    criterion, options = winner(study, space=space, trial=trial)
    several: list[Any] = refs if isinstance(refs, list) else [refs]
    scores = [attribute(model, each, units, criterion, progress=progress) for each in several]
    return pruning_curve(
        model, scores, images, rates=about["rates"], classes=about["classes"], allow_shared=allow_shared,
        repair=repair, batch_size=batch_size, progress=progress, **options,
    )  # fmt: skip


def _reports(curve: Sequence[float], about: dict) -> dict[int, float]:
    """What a trial with this curve reported while it grew: step → area so far."""
    if about.get("objective") != ["a_pr"]:
        return {}
    return {step: sum(curve[: step + 1]) / len(about["rates"]) for step in range(len(curve))}


def save_study(study: optuna.Study, path: str | Path) -> None:
    """Write a study as JSON: small, readable, and without what depends on the machine: times, workers, storage.

    Parameters
    ----------
    study : optuna.Study
    path : path

    Raises
    ------
    ValueError
        Choices that JSON does not hold, such as rule objects.
    """
    from optuna.distributions import distribution_to_json

    distributions: dict[str, Any] = {}
    trials = []
    for trial in study.get_trials(deepcopy=False):
        if not trial.state.is_finished():
            continue
        check_choices(trial.distributions, "a file")
        distributions |= {name: json.loads(distribution_to_json(d)) for name, d in trial.distributions.items()}
        attrs = {name: value for name, value in trial.user_attrs.items() if name not in ("seconds", "worker")}
        trials.append({"state": trial.state.name, "params": trial.params, "values": trial.values, "attrs": attrs})
    content = {
        "format": FORMAT,
        "name": study.study_name,
        "directions": [direction.name.lower() for direction in study.directions],
        "attrs": study.user_attrs,
        "distributions": distributions,
    }
    rows = ",\n".join(json.dumps(trial) for trial in trials)
    Path(path).write_text(json.dumps(content)[:-1] + f', "trials": [\n{rows}\n]}}\n')


def load_study(path: str | Path) -> optuna.Study:
    """Read what :func:`pxp.save_study` wrote, as a study in memory.

    Parameters
    ----------
    path : path or str
        A file, or the name of a study that ships with the package (``"vgg-grid"``, …).

    Returns
    -------
    optuna.Study

    Raises
    ------
    FileNotFoundError
        Neither a file nor a shipped study; the message names those.
    ValueError
        Not a file of this kind, damaged, or written by a newer pxp.
    """
    import optuna
    from optuna.distributions import json_to_distribution

    file = shipped_file(path, "studies")
    try:
        content = json.loads(file.read_text())
        if check_format(content.get("format"), file) < 2:
            content = _renewed(content)
        known = {name: json_to_distribution(json.dumps(each)) for name, each in content["distributions"].items()}
        trials = [
            optuna.trial.create_trial(
                state=optuna.trial.TrialState[trial["state"]],
                params=trial["params"],
                distributions={name: known[name] for name in trial["params"]},
                values=trial["values"],
                intermediate_values=_reports(trial["attrs"].get("curve", []), content["attrs"].get("pxp", {})),
                user_attrs=trial["attrs"],
            )
            for trial in content["trials"]
        ]
        directions, name, attrs = content["directions"], content["name"], content["attrs"]
    except Newer:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no study written by pxp, or it is damaged: {error}") from error
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(study_name=name, directions=directions)
    finally:
        optuna.logging.set_verbosity(level)
    for key, value in attrs.items():
        study.set_user_attr(key, value)
    study.add_trials(trials)
    return study


def _renewed(content: dict) -> dict:
    """A study of format 1 in today's words, see :func:`pxp.search.space.renewed`."""
    choices = content["distributions"].get("absolute", {}).get("attributes", {}).get("choices", ())
    if "never" not in choices:
        return content
    from optuna.distributions import CategoricalDistribution, distribution_to_json

    sample, selection = "sample" in choices, content["attrs"].get("pxp", {}).get("selection", {})
    new = [renewed({"absolute": value, "start": "loss"}, sample) for value in choices]
    known = {name: each for name, each in content["distributions"].items() if name != "absolute"}
    for name in ("by", "absolute", "order"):
        values = dict.fromkeys(setting[name] for setting in new if name in setting)
        if values:
            known[name] = json.loads(distribution_to_json(CategoricalDistribution([*values])))
    trials = []
    for trial in content["trials"]:
        params = renewed(trial["params"], sample)
        try:
            criterion, options = as_criterion(params)
        except (TypeError, ValueError):  # the parameters of a function, which means by them what it likes
            return content
        attrs = {**trial["attrs"], "setting": repr((criterion, sorted({**selection, **options}.items())))}
        trials.append({**trial, "params": params, "attrs": attrs})
    return {**content, "distributions": known, "trials": trials}
