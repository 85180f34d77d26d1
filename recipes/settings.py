"""What else the composites of ``vgg-grid`` are worth: ``python recipes/settings.py``.

Writes ``pxp/assets/studies/vgg-settings.npz``. Its rows are the 64 trials with absolute scores whose low group has the
middle group's rule (the low group's rule changes few scores), in the study's order:

``trial``           int64 (64,): number of the trial
``tune``, ``eval``  uint8 (64, 500): at how many of the 20 pruning rates an image is classified correctly; the images
                    are the study's tuning images, and 50 per class that it has not seen
``flipping``        float32 (64,): how faithful the composite's heatmaps are (symmetric relevance gain, see below)

Faithfulness in input space is pixel flipping: the lit pixels of 100 unseen images are made black in 20 steps, once the
most relevant first and once the least relevant first; the gain is the difference of the two mean probabilities of the
label (Blücher et al. 2024, "Decoupling pixel flipping and occlusion strategy for consistent XAI benchmarks"). Black is
what relevance = input × gradient compares with; a pixel that is black already is neither flipped nor counted.
"""

from __future__ import annotations

import numpy as np
import torch
from tqdm import tqdm

import pxp
from pxp.data import ASSETS
from pxp.evaluate import RATES
from pxp.sweep import hits, silenced

STEPS = 20


def relevance_gain(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, heat: torch.Tensor) -> float:
    """Mean label probability while the least relevant pixels go, minus that while the most relevant ones go."""
    lit = images > 0
    number = lit.flatten(1).sum(1)[:, None, None, None]
    means = []
    with torch.inference_mode():
        for sign in (1, -1):
            ranks = heat.mul(sign).masked_fill(~lit, torch.inf).flatten(1).argsort(1).argsort(1).view_as(images)
            probabilities = [
                model(images * (ranks >= number * step / STEPS)).softmax(1).gather(1, labels[:, None]).mean()
                for step in range(1, STEPS)
            ]
            means.append(float(torch.stack(probabilities).mean()))
    return means[0] - means[1]


def main() -> None:
    data, model = pxp.load_dataset(), pxp.load_model("vgg")
    units = pxp.find_components(model)
    refs = pxp.reference_samples(data.reference, per_class=10)
    seen, unseen = pxp.reference_samples(data.tune, per_class=50), pxp.reference_samples(data.eval, per_class=50)
    images = (torch.cat([seen[0], unseen[0]]), torch.cat([seen[1], unseen[1]]))
    few, targets = pxp.reference_samples(data.eval, per_class=10)
    trials = [
        trial
        for trial in pxp.load_study("vgg-grid").trials
        if trial.params["by"] == "magnitude" and trial.params["low"] == trial.params["middle"]
    ]
    known: dict[bytes, torch.Tensor] = {}
    counts, flipping = [], []
    for trial in tqdm(trials):
        criterion = pxp.LRP(**trial.params)
        scores = pxp.attribute(model, refs, units, criterion, progress=False)
        count = torch.zeros(len(images[1]), dtype=torch.uint8)
        for rate in RATES:
            mask = scores.select(rate)
            key = torch.cat(list(mask.values())).numpy().tobytes()
            if key not in known:
                with silenced(model, mask) as pruned:
                    known[key] = hits(pruned, images, batch_size=100)
            count += known[key]
        value = float(count[: len(seen[1])].double().mean()) / len(RATES)
        assert trial.value is not None and abs(value - trial.value) < 2e-3, (trial.number, value, trial.value)
        counts.append(count)
        heat = pxp.heatmap(model, few, targets, criterion).detach()
        flipping.append(relevance_gain(model, few, targets, heat))
    table = torch.stack(counts).numpy()
    np.savez_compressed(
        ASSETS / "studies" / "vgg-settings.npz",
        trial=np.array([trial.number for trial in trials]),
        tune=table[:, : len(seen[1])],
        eval=table[:, len(seen[1]) :],
        flipping=np.array(flipping, dtype=np.float32),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
