"""Where studies live, and what they can hold."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna


def open_storage(storage: str | Path | optuna.storages.BaseStorage | None) -> optuna.storages.BaseStorage | None:
    """Open a journal file or a database; in a database workers have a heartbeat and lost trials are tried again."""
    import optuna

    if isinstance(storage, Path):
        storage = str(storage)
    if not isinstance(storage, str):
        return storage
    if storage.endswith(".journal"):
        from optuna.storages.journal import JournalFileBackend

        return optuna.storages.JournalStorage(JournalFileBackend(storage))
    from sqlalchemy.exc import DatabaseError

    if "://" not in storage:
        raise ValueError(
            f"storage must be a database URL such as 'sqlite:///study.db' or a *.journal file, got {storage!r}"
        )
    with quiet():
        again = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=3)
        for attempt in range(5):
            try:
                return optuna.storages.RDBStorage(storage, heartbeat_interval=30, heartbeat_stale_trial_callback=again)
            except DatabaseError:  # another worker that starts at the same time is making the tables
                if attempt == 4:
                    raise
                time.sleep(0.5 + random.random())
    raise AssertionError("unreachable")


def check_choices(distributions: Mapping[str, Any], where: str) -> None:
    """Raise ValueError if a parameter has choices that only this process knows."""
    for name, distribution in distributions.items():
        for value in getattr(distribution, "choices", ()):
            if not isinstance(value, str | int | float | None):
                raise ValueError(
                    f"{where} holds texts, numbers and None, not {value!r} of {name!r}; let the choices be names of "
                    'rules and their parameters, as {"low": ["gamma"], "low_gamma": [0.1, 0.25]}, or let a function '
                    "make rules of them"
                )


def offered_by(space: Callable[[optuna.Trial], Any]) -> dict[str, Any]:
    """What a function asks a trial for: parameter → distribution."""
    import optuna

    with quiet():
        trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    space(trial)
    return trial.distributions


def check_same(study: optuna.Study, offered: Mapping[str, Any]) -> None:
    """Raise ValueError if a study has searched a parameter among other choices than those that are offered now."""
    from optuna.distributions import check_distribution_compatibility

    for trial in study.get_trials(deepcopy=False):
        for name, before in trial.distributions.items():
            try:
                check_distribution_compatibility(before, offered.get(name, before))
            except ValueError as error:
                raise ValueError(
                    f"study {study.study_name!r} has searched {name!r} in {before}, not in {offered[name]}; a study "
                    "keeps its choices, so use another study_name"
                ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna's messages about every trial, and about parts that it calls experimental, are not the user's concern."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
