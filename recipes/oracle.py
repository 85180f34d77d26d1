"""What criteria know of the loss: ``python recipes/oracle.py TASK...`` writes ``pxp/assets/evidence/oracle-TASK.json``.

The oracle is the rise of the loss when one component alone is silenced (:class:`pxp.Ablation`), on the 1,000 images of
the tune split; criteria see ten draws of 10 references per class, of another split. For each criterion Spearman's rank
correlation with the oracle, over all components and layer by layer, with 95 % intervals over the draws: of what it
ranks by (``magnitude``), and, if it has a sign, of the signed scores.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from results import BASELINES, SEEDS, TASKS
from scipy import stats

import pxp
from pxp.data import ASSETS
from pxp.statistics import of_draws

RULES = {f"LRP-{rule}": pxp.LRP(rule) for rule in ("epsilon", "zplus", "gamma", "alpha2beta1")}


def correlations(scores: list[pxp.Scores], oracle: pxp.Scores, signed: bool) -> dict[str, list[float]]:
    """Mean, low and high, over all components (``""``) and for each layer."""
    found: dict[str, list[float]] = {}
    for layer in ("", *oracle):
        values = []
        for one in scores:
            ranked = one.signed if signed else one
            pair = [torch.cat([part[n] for n in ([layer] if layer else oracle)]) for part in (ranked, oracle.signed)]
            values.append(stats.spearmanr(*(part.numpy() for part in pair)).statistic)
        mean = of_draws(np.array(values))
        bounds = mean.interval() if len(values) > 1 else (np.nan, np.nan)
        found[layer] = [round(float(value), 3) for value in (mean.mean, *bounds)]
    return found


def measure(task: str) -> None:
    network, kind, _, _ = TASKS[task]
    data, model = pxp.load_dataset(), pxp.load_model(network)
    units = pxp.find_components(model, kind)
    oracle = pxp.attribute(model, data.tune, units, pxp.Ablation())
    draws = [pxp.reference_samples(data.reference, per_class=10, seed=seed) for seed in SEEDS]
    rows = {}
    for name, criterion in (RULES | BASELINES).items():
        scores = pxp.attribute_draws(model, draws, units, criterion, progress=False)
        scores = scores if any(one.draw for one in scores) else scores[:1]
        rows[name] = {"magnitude": correlations(scores, oracle, signed=False)}
        if scores[0].has_sign:
            rows[name]["signed"] = correlations(scores, oracle, signed=True)
        print(f"{task:<12} {name:<22}", {way: found[""] for way, found in rows[name].items()}, flush=True)
    path = ASSETS / "evidence" / f"oracle-{task}.json"
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    path.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    torch.set_num_threads(1)
    for each in parser.parse_args().tasks:
        measure(each)
