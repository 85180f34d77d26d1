"""Repair against training: ``python recipes/finetuned.py TASK...`` writes ``pxp/assets/evidence/finetuned-TASK.json``.

What LRP has pruned, within each layer, of three draws: as cut, repaired by least squares without labels, trained for
some epochs on the same 500 images with their labels (:func:`pxp.finetune`), and both, one after the other. Accuracy on
the 2,000 unseen images, with its 95 % interval over draws and images, and seconds of the processor, one thread.
"""

from __future__ import annotations

import json
import time

import numpy as np
from repairs import BEST, FEW_RATES
from results import SEEDS, TASKS, command
from torch import nn

import pxp
from pxp.data import ASSETS, Split
from pxp.evaluate import hits
from pxp.statistics import estimate

EPOCHS, DRAWS = (1, 5, 20), 3


def ways(model: nn.Module, mask: pxp.Mask, data: Split) -> dict[str, tuple[nn.Module, float]]:
    """What was done → the network and the seconds that it took after the cut."""
    cut = pxp.compact(model, mask, example=data.images[:1])
    start = time.process_time()
    repaired = pxp.repair(model, mask, data.images, "least_squares", progress=False)
    spent = time.process_time() - start
    found: dict[str, tuple[nn.Module, float]] = {"cut": (cut, 0.0), "repaired": (repaired, spent)}
    for before, (network, already) in list(found.items()):
        for epochs in EPOCHS:
            start = time.process_time()
            trained = pxp.finetune(network, data, epochs=epochs, progress=False)
            found[f"{before}, trained for {epochs} epochs"] = trained, already + time.process_time() - start
    return found


def measure(task: str) -> None:
    network, kind, _, _ = TASKS[task]
    data, model = pxp.load_dataset(), pxp.load_model(network)
    units = pxp.find_components(model, kind)
    images = pxp.reference_samples(data.reference, per_class=50, seed=100)
    draws = [pxp.reference_samples(data.reference, per_class=10, seed=seed) for seed in SEEDS[:DRAWS]]
    scores = pxp.attribute_draws(model, draws, units, pxp.LRP(BEST[task]), progress=False)
    rows = []
    for rate in FEW_RATES:
        right: dict[str, list[np.ndarray]] = {}
        seconds: dict[str, list[float]] = {}
        for one in scores:
            for name, (pruned, took) in ways(model, one.select(rate, scope="layer"), images).items():
                right.setdefault(name, []).append(hits(pruned, data.eval).numpy())
                seconds.setdefault(name, []).append(took)
        for name, found in right.items():
            mean = estimate(np.stack(found))
            accuracy = [round(float(value), 4) for value in (mean.mean, *mean.proportion())]
            rows.append(
                {"rate": rate, "way": name, "accuracy": accuracy, "seconds": round(float(np.median(seconds[name])), 2)}
            )
            print(f"{task:<12}", rows[-1], flush=True)
    path = ASSETS / "evidence" / f"finetuned-{task}.json"
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf8")


if __name__ == "__main__":
    command(measure, __doc__)
