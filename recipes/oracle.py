"""What criteria know of the loss: ``python recipes/oracle.py TASK...`` writes ``pxp/assets/evidence/oracle-TASK.json``.

The oracle is the rise of the loss when one component alone is silenced (:class:`pxp.Ablation`), on the 1,000 images of
the tune split; criteria see ten draws of 10 references per class, of another split. For each criterion Spearman's rank
correlation with the oracle, over all components and layer by layer, with 95 % intervals over the draws: of what it
ranks by (``magnitude``), and, if it has a sign, of the signed scores. "X, shuffled" is the control: what the choice of
layers alone knows. ``"silenced"`` in the file is the oracle itself.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from results import BASELINES, CONTROLLED, SEEDS, TASKS, command
from scipy import stats

import pxp
from pxp.data import ASSETS
from pxp.statistics import of_draws

RULES = {f"LRP-{rule}": pxp.LRP(rule) for rule in ("epsilon", "zplus", "gamma", "alpha2beta1")}
CRITERIA = {**RULES, **BASELINES, "random": pxp.Random()}


def correlations(scores: list[pxp.Scores], oracle: pxp.Scores, signed: bool) -> dict[str, list[float | None]]:
    """Mean, low and high, over all components (``""``) and for each layer; of one draw, or none, the value alone."""
    found: dict[str, list[float | None]] = {}
    for layer in ("", *oracle):
        values = []
        for one in scores:
            ranked = one.signed if signed else one
            pair = [torch.cat([part[n] for n in ([layer] if layer else oracle)]) for part in (ranked, oracle.signed)]
            values.append(stats.spearmanr(*(part.numpy() for part in pair)).statistic)
        mean = of_draws(np.array(values))
        bounds = mean.interval() if len(values) > 1 else ()
        # a layer whose scores are all alike has no ranks: null in the file
        found[layer] = [None if np.isnan(value) else round(float(value), 3) for value in (mean.mean, *bounds)]
    return found


def measure(task: str) -> None:
    network, kind, _, _ = TASKS[task]
    data, model = pxp.load_dataset(), pxp.load_model(network)
    units = pxp.find_components(model, kind)
    oracle = pxp.attribute(model, data.tune, units, pxp.Ablation())
    draws = [pxp.reference_samples(data.reference, per_class=10, seed=seed) for seed in SEEDS]
    rows = {}
    for name, criterion in CRITERIA.items():
        scores = pxp.attribute_draws(model, draws, units, criterion, progress=False)
        versions = {name: scores if any(one.draw for one in scores) else scores[:1]}
        if name in CONTROLLED:
            versions[f"{name}, shuffled"] = [one.shuffled(seed) for one, seed in zip(scores, SEEDS, strict=True)]
        for version, those in versions.items():
            rows[version] = {"magnitude": correlations(those, oracle, signed=False)}
            if those[0].has_sign:
                rows[version]["signed"] = correlations(those, oracle, signed=True)
            print(f"{task:<12} {version:<22}", {way: each[""] for way, each in rows[version].items()}, flush=True)
    silenced = {layer: [float(f"{value:.6g}") for value in values] for layer, values in oracle.signed.items()}
    parts = {"silenced": silenced, "criteria": rows}
    text = [
        f'"{part}": {{\n' + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in each.items()) + "\n}"
        for part, each in parts.items()
    ]
    path = ASSETS / "evidence" / f"oracle-{task}.json"
    path.write_text("{\n" + ",\n".join(text) + "\n}\n", encoding="utf8")


if __name__ == "__main__":
    command(measure, __doc__)
