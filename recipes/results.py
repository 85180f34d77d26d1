"""The results that the book reports: ``python recipes/results.py TASK...`` measures them and goes on where it was.

Every criterion is measured on 1,000 images that no search has seen, over five draws of reference samples, and written
as a pruning curve to ``pxp/assets/curves/TASK.json`` (:func:`pxp.load_curves`). Run ``searches.py`` first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

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
SEEDS = range(5)
BASELINES = {
    "Taylor": pxp.Taylor(),
    "integrated gradients": pxp.IntegratedGradients(20),
    "internal influence": pxp.IntegratedGradients(20, influence=True),
    "activation": pxp.Activation(),
    "magnitude": pxp.Magnitude(),
}


def curves_of(task: str) -> dict[str, Callable[[], pxp.Curve]]:
    """Criterion → what measures its curve."""
    network, kind, study, extended = TASKS[task]
    data, model = pxp.load_dataset(), pxp.load_model(network)
    units = pxp.find_components(model, kind)
    draws = [pxp.reference_samples(data.reference, per_class=10, seed=seed) for seed in SEEDS]
    images = pxp.reference_samples(data.eval, per_class=100)

    def fixed(criterion: pxp.LRP, **options) -> pxp.Curve:
        scores = [pxp.attribute(model, refs, units, criterion, progress=False) for refs in draws]
        return pxp.pruning_curve(model, scores, images, progress=False, **options)

    def chance() -> pxp.Curve:
        scores = [pxp.attribute(model, draws[0], units, pxp.Random(seed), progress=False) for seed in SEEDS]
        return pxp.pruning_curve(model, scores, images, progress=False)

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
    return {**wanted, **{name: partial(fixed, each) for name, each in BASELINES.items()}, "random": chance}


def measure(task: str) -> None:
    path = ASSETS / "curves" / f"{task}.json"
    path.parent.mkdir(exist_ok=True)
    curves = pxp.load_curves(path) if path.exists() else {}
    for name, run in curves_of(task).items():
        if name not in curves:
            curves[name] = run()
            pxp.save_curves(curves, path)
        print(f"{task:<12} {name:<28} {curves[name]}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    torch.set_num_threads(1)
    for each in parser.parse_args().tasks:
        measure(each)
