"""The best of a grid on other images: ``python recipes/leaders.py`` measures the twenty best of ``vgg-grid``.

What comes first of 512 on the tuning images need not on others. Each of the twenty is measured as ``results.py``
measures its criteria, over ten draws of references on the 2,000 images that no search has seen. Until all are, the
curves are kept as ``runs/vgg-leaders.json``; then as ``pxp/assets/curves/vgg-leaders.json``. Their names are those of
the four rules, from low to fully connected, and of what ranks.
"""

from __future__ import annotations

from pathlib import Path

import torch
from results import SEEDS, TASKS

import pxp
from pxp.data import ASSETS

LEADERS = 20


def name(params: dict) -> str:
    """Such as ``"zplus, epsilon, epsilon, epsilon, magnitude"``."""
    return ", ".join(params[part] for part in ("low", "middle", "high", "fc", "by"))


def main() -> None:
    torch.set_num_threads(1)
    network, kind, grid, _ = TASKS["vgg"]
    study, data, model = pxp.load_study(grid), pxp.load_dataset(), pxp.load_model(network)
    units = pxp.find_components(model, kind)
    draws = [pxp.reference_samples(data.reference, per_class=10, seed=seed) for seed in SEEDS]
    path = Path("runs") / "vgg-leaders.json"
    path.parent.mkdir(exist_ok=True)
    curves = pxp.load_curves(path) if path.exists() else {}
    for trial in sorted(study.trials, key=lambda trial: -trial.value)[:LEADERS]:
        key = name(trial.params)
        if key not in curves:
            curves[key] = pxp.tuned_curve(study, model, draws, units, data.eval, trial=trial.number, progress=False)
            pxp.save_curves(curves, path)
        print(f"{trial.value:.4f} tuned, {key:<50} {curves[key].a_pr:.4f}", flush=True)
    pxp.save_curves(curves, ASSETS / "curves" / "vgg-leaders.json")


if __name__ == "__main__":
    main()
