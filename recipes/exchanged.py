"""Where by one criterion, which by another: ``python recipes/exchanged.py TASK...``.

Writes ``pxp/assets/curves/exchanged-TASK.json``.

Each criterion decides how many components every layer loses, and each criterion which ones
(:meth:`pxp.Scores.arranged_by`), at one rate, over ten draws of references, on 1,000 unseen images. A curve's name is
``"WHERE | WHICH"``. The lottery of a layer's components is another one than that of the layers.
"""

from __future__ import annotations

from results import SEEDS, TASKS, command

import pxp
from pxp.data import ASSETS

# where criteria are far apart
RATES = {"vgg": 0.2, "resnet": 0.2, "vit-heads": 0.75, "vit-neurons": 0.9}
CRITERIA = {
    "LRP-epsilon": pxp.LRP("epsilon"),
    "LRP-zplus": pxp.LRP("zplus"),
    "Taylor": pxp.Taylor(),
    "magnitude": pxp.Magnitude(),
}


def measure(task: str) -> None:
    network, kind, _, _ = TASKS[task]
    data, model = pxp.load_dataset(), pxp.load_model(network)
    units = pxp.find_components(model, kind)
    draws = [pxp.reference_samples(data.reference, per_class=10, seed=seed) for seed in SEEDS]
    images = pxp.reference_samples(data.eval, per_class=100)
    scores = {n: pxp.attribute_draws(model, draws, units, c, progress=False) for n, c in CRITERIA.items()}
    scores["random"], lottery = (
        [pxp.attribute(model, draws[0], units, pxp.Random(start + seed)) for seed in SEEDS] for start in (0, 100)
    )
    curves = {}
    for where in scores:
        for which in scores:
            others = lottery if where == which == "random" else scores[which]
            both = [one.arranged_by(other) for one, other in zip(scores[where], others, strict=True)]
            both = both[:1] if where == which == "magnitude" else both  # no draw changes anything
            name = f"{where} | {which}"
            curves[name] = pxp.pruning_curve(model, both, images, rates=[RATES[task]], progress=False)
            print(f"{task:<12} {name:<28} {curves[name].accuracy[0]:.3f}", flush=True)
    pxp.save_curves(curves, ASSETS / "curves" / f"exchanged-{task}.json")


if __name__ == "__main__":
    command(measure, __doc__)
