"""``python -m pxp tune``: a worker that joins a study, on this machine or on any other that reaches its storage."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .data import load_dataset, reference_samples
from .models import load_model
from .network.attention import is_head_layer
from .network.components import KINDS, find_components
from .search.studies import save_study, winner
from .search.tune import tune


def parser() -> argparse.ArgumentParser:
    """The command line; defaults are those of :func:`pxp.tune`."""
    top = argparse.ArgumentParser(prog="python -m pxp", description="Prune vision networks by explaining them.")
    command = top.add_subparsers(required=True).add_parser(
        "tune",
        help="search the composite that prunes best",
        description="Start it any number of times, on any number of machines, with one storage and study name: all "
        "work on the same study, go on where it was left, and stop when it has its trials.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = command.add_argument
    add("--storage", required=True, help="a *.journal file, sqlite:///study.db, postgresql+psycopg://user@host/name, …")
    add("--study", required=True, help="name of the study")
    add("--model", default="vgg", help="a shipped network, or torchvision/NAME or timm/NAME")
    add("--weights", default=None, help="pretrained weights of a torchvision or timm model, such as DEFAULT")
    add("--kind", choices=KINDS, default=None, help="components to prune; default filter, or head of a transformer")
    add("--data", choices=("fashion-mnist", "imagenette"), default="fashion-mnist")
    add("--root", default=None, help="folder of the data set, where it has one")
    add("--per-class", type=int, default=10, help="reference samples per class")
    add("--tune-per-class", type=int, default=50, help="tuning images per class")
    add("--trials", type=int, default=None, help="of the whole study; default 100, or all of a grid")
    add("--space", choices=("paper", "extended"), default="paper")
    add("--sampler", choices=("tpe", "gp", "random", "grid"), default="tpe")
    add(
        "--objective",
        nargs="+",
        default=["a_pr"],
        help="a_pr, accuracy@RATE, flops@SHARE, parameters@SHARE, latency@SHARE",
    )
    add("--min-keep", type=int, default=0, help="components that every layer keeps")
    add("--prune", action="store_true", help="stop trials whose curve falls below the median of the others")
    add("--seed", type=int, default=None, help="of the sampler; workers that start together need different ones")
    add("--timeout", type=float, default=None, help="seconds")
    add("--save", default=None, help="write the study to this JSON file at the end")
    return top


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    import optuna

    given = parser().parse_args(arguments)
    model = load_model(given.model, **({"weights": given.weights} if given.weights else {}))
    data = load_dataset(given.data, **({"root": given.root} if given.root else {}))
    kind = given.kind or ("head" if any(is_head_layer(module) for module in model.modules()) else "filter")
    study = tune(
        model,
        reference_samples(data.reference, given.per_class),
        find_components(model, kind),
        reference_samples(data.tune, given.tune_per_class),
        given.trials,
        space=given.space,
        objective=given.objective,
        classes=data.labels if given.data == "imagenette" else None,
        min_keep=given.min_keep,
        sampler=given.sampler,
        pruner=optuna.pruners.MedianPruner(n_warmup_steps=4) if given.prune else None,
        storage=given.storage,
        study_name=given.study,
        seed=given.seed,
        timeout=given.timeout,
    )
    if given.save:
        save_study(study, given.save)
    for trial in study.best_trials[:10]:
        criterion, options = winner(study, trial=trial.number)
        values = ", ".join(f"{value:.4f}" for value in trial.values)
        print(f"trial {trial.number} of {len(study.trials)}: {values} by {criterion!r}, {options}")


if __name__ == "__main__":
    main()
