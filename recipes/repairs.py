"""What repair without labels is worth: ``python recipes/repairs.py TASK...`` measures it and goes on where it was.

Curves at five rates on the 2,000 unseen images, of networks that 500 images of the reference split have repaired, by
criterion, method and scope; their names are ``"criterion, method, scope"``. Ten draws of LRP, its control and random;
three of the other criteria where least squares mends them, which takes seconds for each network. Means are mended for
the former only. Then, at two rates, with 20 and 100 images: ``"criterion, method, scope, 20 images"``. Until a task is
complete they are kept as ``runs/repair-TASK.json``; then as ``pxp/assets/curves/repair-TASK.json``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from results import SEEDS, TASKS, command

import pxp
from pxp.data import ASSETS

RATES, FEW_RATES = (0.2, 0.4, 0.6, 0.8, 0.9), (0.4, 0.8)
LEADING = ("LRP", "LRP, shuffled", "random")
OTHERS_DRAWS = 3  # of least squares
# the rule that is best on the network
BEST = {"vgg": "epsilon", "resnet": "zplus", "vit-heads": "epsilon", "vit-neurons": "epsilon"}
RIVALS = {
    "Taylor": pxp.Taylor(),
    "activation": pxp.Activation(),
    "magnitude": pxp.Magnitude(),
    "Fisher": pxp.Fisher(),
    "random": pxp.Random(),
}


def wanted(task: str) -> Iterator[tuple[str, str | None, str, int]]:
    """Criterion, method, scope and number of images, the most telling first."""
    methods: list[str | None] = [None, "least_squares"]
    if TASKS[task][0] != "vit":  # which has no BatchNorm
        methods.append("statistics")
    for method in methods:
        for scope in ("global", "layer"):
            for name in (*LEADING, *(rival for rival in RIVALS if rival not in LEADING)):
                yield name, method, scope, 500
    for number, method in itertools.product((500, 20, 100), (*methods[1:], "mean")):
        if number != 500 or method == "mean":
            for name, scope in itertools.product(LEADING, ("global", "layer")):
                yield name, method, scope, number


def measure(task: str) -> None:
    network, kind, _, _ = TASKS[task]
    data, model = pxp.load_dataset(), pxp.load_model(network)
    units = pxp.find_components(model, kind)
    draws = [pxp.reference_samples(data.reference, per_class=10, seed=seed) for seed in SEEDS]
    criteria = {"LRP": pxp.LRP(BEST[task]), **RIVALS}
    scores = {n: pxp.attribute_draws(model, draws, units, c, progress=False) for n, c in criteria.items()}
    scores["magnitude"] = scores["magnitude"][:1]  # no draw changes anything
    scores["LRP, shuffled"] = [one.shuffled(seed) for one, seed in zip(scores["LRP"], SEEDS, strict=True)]
    path = Path("runs") / f"repair-{task}.json"
    path.parent.mkdir(exist_ok=True)
    curves = pxp.load_curves(path) if path.exists() else {}
    for name, method, scope, number in wanted(task):
        key = f"{name}, {method or 'none'}, {scope}" + (f", {number} images" if number != 500 else "")
        few = OTHERS_DRAWS if method == "least_squares" and name not in LEADING else len(SEEDS)
        if key not in curves or len(curves[key].draws) < min(few, len(scores[name])):
            images = pxp.reference_samples(data.reference, per_class=number // 10, seed=100)[0]
            curves[key] = pxp.pruning_curve(
                model, scores[name][:few], data.eval, rates=RATES if number == 500 else FEW_RATES, scope=scope,
                repair=None if method is None else (method, images), progress=False,
            )  # fmt: skip
            pxp.save_curves(curves, path)
        print(f"{task:<12} {key:<48}", " ".join(f"{value:.3f}" for value in curves[key].accuracy), flush=True)

    pxp.save_curves(curves, ASSETS / "curves" / f"repair-{task}.json")


if __name__ == "__main__":
    command(measure, __doc__)
