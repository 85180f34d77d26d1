"""The results that the book reports: ``python recipes/results.py TASK...`` measures them and goes on where it was.

Every criterion is measured on the 2,000 images that no search has seen, over ten draws of reference samples, and
written as a pruning curve that knows its hits to ``pxp/assets/curves/TASK.json`` (:func:`pxp.load_curves`). "X,
shuffled" is the control with as many components of each layer. Run ``searches.py`` first. Until a task is complete,
its curves are kept as ``runs/TASK.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import pxp
from pxp.data import ASSETS

# task → model, kind of component, the search of the paper's space, of the extended space
TASKS = {
    "vgg": ("vgg", "filter", "vgg-grid", "vgg-extended"),
    "resnet": ("resnet", "filter", "resnet-tpe", "resnet-extended"),
    "vit-heads": ("vit", "head", "vit-heads-tpe", None),
    "vit-neurons": ("vit", "neuron", "vit-neurons-tpe", None),
}
SEEDS = range(10)
CONTROLLED = ("LRP-epsilon", "LRP-zplus", "Taylor", "magnitude")
BASELINES = {
    "Taylor": pxp.Taylor(),
    "integrated gradients": pxp.IntegratedGradients(20),
    "internal influence": pxp.IntegratedGradients(20, influence=True),
    "activation": pxp.Activation(),
    "magnitude": pxp.Magnitude(),
    "Fisher": pxp.Fisher(),
    "variance": pxp.Variance(),
    "weighted activation": pxp.WeightedActivation(),
    "geometric median": pxp.GeometricMedian(),
    "ablation": pxp.Ablation(),
}


def curves_of(task: str) -> dict[str, Callable[[], pxp.Curve]]:
    """Criterion → what measures its curve."""
    network, kind, study, extended = TASKS[task]
    data, model = pxp.load_dataset(), pxp.load_model(network)
    units = pxp.find_components(model, kind)
    draws = [pxp.reference_samples(data.reference, per_class=10, seed=seed) for seed in SEEDS]
    images = data.eval

    def fixed(criterion: pxp.Criterion, **options) -> pxp.Curve:
        scores = pxp.attribute_draws(model, draws, units, criterion, progress=False)
        if all(one.draw == "" for one in scores):
            scores = scores[:1]  # no draw changes anything
        return pxp.pruning_curve(model, scores, images, progress=False, **options)

    def shuffled(criterion: pxp.Criterion) -> pxp.Curve:
        scores = pxp.attribute_draws(model, draws, units, criterion, progress=False)
        control = [one.shuffled(seed) for one, seed in zip(scores, SEEDS, strict=True)]
        return pxp.pruning_curve(model, control, images, progress=False)

    def tuned(name: str) -> pxp.Curve:
        return pxp.tuned_curve(pxp.load_study(name), model, draws, units, images, progress=False)

    def transferred(name: str) -> pxp.Curve:
        criterion, options = pxp.winner(pxp.load_study(name))
        return fixed(criterion, **options)

    wanted: dict[str, Callable[[], pxp.Curve]] = {"tuned": partial(tuned, study)}
    if extended:
        wanted["tuned, extended space"] = partial(tuned, extended)
    for rule in ("epsilon", "zplus", "gamma", "alpha2beta1"):
        wanted[f"LRP-{rule}"] = partial(fixed, pxp.LRP(rule))
    if kind != "filter":
        for softmax in ("cp", "zplus"):
            wanted[f"LRP-epsilon, softmax {softmax}"] = partial(fixed, pxp.LRP("epsilon", softmax=softmax))
    for other, (_, _, source, _) in TASKS.items():
        if other != task:
            wanted[f"tuned on {other}"] = partial(transferred, source)
    wanted |= {name: partial(fixed, each) for name, each in BASELINES.items()}
    rules = {f"LRP-{rule}": pxp.LRP(rule) for rule in ("epsilon", "zplus")}
    wanted |= {f"{name}, shuffled": partial(shuffled, (BASELINES | rules)[name]) for name in CONTROLLED}
    return wanted | {"random": partial(fixed, pxp.Random())}


def measure(task: str) -> None:
    path = Path("runs") / f"{task}.json"
    path.parent.mkdir(exist_ok=True)
    curves = pxp.load_curves(path) if path.exists() else {}
    for name, run in curves_of(task).items():
        if name not in curves:
            curves[name] = run()
            pxp.save_curves(curves, path)
        print(f"{task:<12} {name:<28} {curves[name]}", flush=True)
    pxp.save_curves(curves, ASSETS / "curves" / f"{task}.json")


def command(each: Callable[[str], None], description: str | None) -> None:
    """Do something for every task that the command line names."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    torch.set_num_threads(1)
    for task in parser.parse_args().tasks:
        each(task)


if __name__ == "__main__":
    command(measure, __doc__)
