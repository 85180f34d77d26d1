"""The page *What was measured* of the book: ``python recipes/measured.py`` writes it of what other recipes have found.

``results.py`` (criteria and their controls), ``leaders.py`` (the best of a grid), ``oracle.py`` (leave one out),
``repairs.py`` and ``finetuned.py`` (repair; – where they have not measured a task).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

import pxp

ASSETS = Path(pxp.__file__).parent / "assets"
PAGE = Path(__file__).resolve().parent.parent / "book" / "measured.md"
HEADS = {"vgg": "VGG, filters", "resnet": "ResNet, filters", "vit-heads": "ViT, heads", "vit-neurons": "ViT, neurons"}


def table(names: Iterable[str], cell: Callable[[str, str], str]) -> str:
    """Markdown, a row for each name and a column for each task."""
    lines = ["| | " + " | ".join(HEADS.values()) + " |", "| --- " * (1 + len(HEADS)) + "|"]
    return "\n".join(lines + [f"| {name} | " + " | ".join(cell(name, task) for task in HEADS) + " |" for name in names])


def ranged(mean: float | None, low: float | None = None, high: float | None = None) -> str:
    """In hundredths."""
    if mean is None:
        return "–"
    bounds = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * mean:.1f}{bounds}"


def page() -> str:
    curves = {task: pxp.load_curves(task) for task in HEADS}
    oracle = {task: pxp.load_evidence(f"oracle-{task}")["criteria"] for task in HEADS}
    shuffled = {name.removesuffix(", shuffled"): name for name in curves["vgg"] if name.endswith(", shuffled")}
    criteria = list(dict.fromkeys(name for rows in curves.values() for name in rows if name not in shuffled.values()))

    def area(name: str, task: str) -> str:
        curve = curves[task].get(name)
        return ranged(None) if curve is None else ranged(curve.a_pr, *curve.a_pr_interval())

    def filters(name: str, task: str) -> str:
        found = pxp.compare(curves[task][name], curves[task][shuffled[name]])
        return ranged(found.difference, found.low, found.high)

    def layers(name: str, task: str) -> str:
        found = pxp.compare(curves[task][shuffled[name]], curves[task]["random"])
        return ranged(found.difference, found.low, found.high)

    def rank(name: str, task: str) -> str:
        found = oracle[task].get(name, {}).get("magnitude", {"": [None]})
        return ranged(*found[""])

    def rank_within(name: str, task: str) -> str:
        found = oracle[task].get(name, {}).get("magnitude", {})
        values = [row[0] for layer, row in found.items() if layer and row[0] is not None]
        return ranged(float(np.mean(values))) if values else ranged(None)

    repaired = {t: pxp.load_curves(f"repair-{t}") for t in HEADS if (ASSETS / f"curves/repair-{t}.json").exists()}
    mended = list(dict.fromkeys(key.split(", none, ")[0] for key in repaired["vit-heads"] if ", none, " in key))

    def mending(rate: float, scope: str) -> Callable[[str, str], str]:
        def cell(name: str, task: str) -> str:
            found = [repaired.get(task, {}).get(f"{name}, {how}, {scope}") for how in ("none", "least_squares")]
            if found[0] is None or found[1] is None:
                return ranged(None)
            (cut, at), (after, _) = ((curve, curve.rates.index(rate)) for curve in found)
            low, high = after.interval()
            return f"{ranged(cut.accuracy[at])} → {ranged(after.accuracy[at], low[at], high[at])}"

        return cell

    trained = {
        t: pxp.load_evidence(f"finetuned-{t}") for t in HEADS if (ASSETS / f"evidence/finetuned-{t}.json").exists()
    }
    ways = list(dict.fromkeys(row["way"] for rows in trained.values() for row in rows))

    def training(name: str, task: str) -> str:
        rows = [row for row in trained.get(task, []) if row["way"] == name and row["rate"] == 0.8]
        return f"{ranged(*rows[0]['accuracy'])}, {rows[0]['seconds']:.1f} s" if rows else ranged(None)

    grid = pxp.load_curves("vgg-leaders")
    signs = {
        "epsilon": "ε",
        "zplus": "z⁺",
        "gamma": "γ",
        "alpha2beta1": "α2β1",
        "magnitude": "absolute",
        "signed": "signed",
    }
    default = ", ".join(["epsilon"] * 4 + ["magnitude"])
    against = pxp.compare_all(grid, against=default)

    trials = pxp.load_study("vgg-grid").trials
    tuned = {
        ", ".join(trial.params[part] for part in ("low", "middle", "high", "fc", "by")): trial.value for trial in trials
    }

    def leader(name: str) -> str:
        found = ranged(grid[name].a_pr, *grid[name].a_pr_interval())
        row = against.get((name, default))
        gain = "– | –" if row is None else f"{ranged(row.difference, row.low, row.high)} | {row.adjusted:.3f}"
        rules = " | ".join(signs[part] for part in name.split(", "))
        return f"| {rules} | {ranged(tuned[name])} | {found} | {gain} |"

    leaders = "\n".join(map(leader, grid))
    ranked = list(oracle["vgg"])
    return f"""\
# What was measured

<!-- Written by `python recipes/measured.py`; edit that. -->

The numbers behind the chapters, all on the networks that ship with the package: two small convolutional
networks and one vision transformer with 0.2 million parameters, on Fashion-MNIST. What holds for them need
not hold for yours; how to find out for yours is what the chapters are for. All values are in hundredths;
brackets are 95 % intervals ([how sure](how-sure.md) they are).

## Criteria

Area under the pruning curve, $A_{{PR}}$: accuracy, averaged over the rates 0, 5, … 95 %, on the 2,000 images
that no search has seen. Ten draws of ten reference images per class; what depends on no draw is measured
once. "Tuned" is the winner of a search on the tuning images, in the paper's or the extended space, "tuned on"
that of another task; "softmax cp" and "zplus" are CP-LRP and z⁺ in the softmax; – was not measured.

{table(criteria, area)}

## The best of the grid, on other images

The twenty best of the 512 composites of the VGG's grid, in the order of the 500 tuning images on which they were
chosen (with one draw of references), and what they reach as above. The last columns are the difference to ε
everywhere and its p-value, adjusted for the nineteen comparisons (Holm).

| low | middle | high | fc | ranked by | tuned | $A_{{PR}}$ | minus ε everywhere | p |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{leaders}

## Which layers, or which components?

A ranking over the whole network decides two things: how much each layer loses, and what it loses. Scores that
are shuffled within each layer ({{py:meth}}`pxp.Scores.shuffled`) prune as many components of each layer, but
chosen by chance. Intervals are for one comparison each; {{doc}}`chapter 10
<../notebooks/10_layers_or_filters>` adjusts for all 32. First what the choice *of* layers adds, the shuffled
scores minus a random ranking:

{table(shuffled, layers)}

Then what the choice *within* layers adds, the criterion minus its shuffled self:

{table(shuffled, filters)}

## Leave one out

What silencing costs can be measured: the rise of the loss when one component alone is silenced
({{py:class}}`pxp.Ablation`), here on the 1,000 images of the tune split. Spearman's rank correlation with it
of what a criterion ranks by; intervals over ten draws of references. "ablation" ranks by the mean absolute
rise on the 100 references, which the network was trained on. Intervals hold the draws, not the oracle's
images.

{table(ranked, rank)}

The same within each layer, averaged over the layers:

{table(ranked, rank_within)}

## Repair

What a cut breaks behind it can be mended without labels ({{py:func}}`pxp.repair`): by least squares on 500 images of
the reference split, layer by layer. Accuracy on the 2,000 images as cut → repaired, with 40 % gone, ranked over
the whole network. "LRP" is ε (z⁺ on the ResNet). All are measured over ten draws of references, but what is
repaired of Taylor, activation and Fisher over three, so their intervals are wider, and magnitude once, since
it depends on no draw. {{doc}}`Chapter 14 <../notebooks/14_repair>` reads these tables.

{table(mended, mending(0.4, "global"))}

With 80 % gone, ranked within each layer:

{table(mended, mending(0.8, "layer"))}

What labels buy: masks of LRP within each layer, 80 % gone, of the first three of the ten draws; as cut or as
repaired, and then trained on the same 500 images with their labels ({{py:func}}`pxp.finetune`). Seconds are
those of one processor.

{table(ways, training)}

The curves are data of the package ({{func}}`pxp.load_curves`), made by `recipes/results.py`, as `vgg-leaders` by
`recipes/leaders.py` and as `repair-TASK` by `recipes/repairs.py`; so are the correlations
({{func}}`pxp.load_evidence`), made by `recipes/oracle.py`, and the last table, by `recipes/finetuned.py`.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf8")
