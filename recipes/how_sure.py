"""The page *How sure* of the book: ``python recipes/how_sure.py`` writes it of what ``coverage.py`` has found."""

from __future__ import annotations

from pathlib import Path

import pxp

PAGE = Path(__file__).resolve().parent.parent / "book" / "how-sure.md"


def stored() -> dict:
    """What ``coverage.py`` has found."""
    return pxp.load_evidence("coverage")


def page(found: dict) -> str:
    rows = found["rows"]
    draws = sorted({row["draws"] for row in rows})
    images = sorted({row["images"] for row in rows})
    worlds = list(dict.fromkeys(row["world"] for row in rows))
    share = {(row["world"], row["draws"], row["images"]): row["covered"] for row in rows}
    head = "| | draws | " + " | ".join(f"{number:,}" for number in images) + " |\n"
    head += "| --- " * (2 + len(images)) + "|\n"
    lines = [
        f"| {world if number == draws[0] else ''} | {number} | "
        + " | ".join(f"{100 * share[world, number, size]:.0f}" for size in images)
        + " |"
        for world in worlds
        for number in draws
    ]
    return f"""\
# How sure

<!-- Written by `python recipes/how_sure.py`; edit that. -->

Two things vary when a criterion is measured: which reference samples (or seeds) were drawn, and which images the accuracy was measured
on. A curve that {{func}}`pxp.pruning_curve` makes keeps which image was right in which run, and its intervals cover both: a two-way analysis of variance with two random
factors, and t's distribution with Satterthwaite's degrees of freedom; for accuracies in Wilson's form, which stays between 0 and 1.

- {{func}}`pxp.compare` looks at the difference of two criteria. Where run $i$ of both saw the same references, what they have in common
  cancels, draw by draw and image by image. Where the draws have nothing in common, as a lottery's and a criterion's, their parts add up.
- A criterion that depends on no draw, as the magnitude of weights, has the images' part alone.
- Below three draws of a criterion that depends on them nothing can be said, and nothing is: no interval, no band in a figure.
- A curve that does not hold which image was right, made by hand or by an earlier version, has the draws' part alone, and says so.
- {{func}}`pxp.compare_all` adjusts the p-values for the number of comparisons (Holm).

## Do they hold what they promise?

An interval of 95 % should hold the truth 95 times of 100. How often it does, in per cent of {found["repetitions"]:,} repetitions: first in made-up
worlds, in which every draw has its accuracy and every image its difficulty; then drawn with replacement from what the shipped VGG got
right with 40 draws of references (or seeds) on 2,000 images, whose mean is the truth there. Columns: images that the interval is computed from.

{head}{chr(10).join(lines)}

Each number has an error of about one, of two where it is near 50. Ten draws or more are enough where draws vary evenly, and for differences in
pairs. Where draws are skewed, intervals stay short of what they promise; where
single draws collapse, nothing that is built on ten draws of which perhaps none has collapsed can cover: look at the runs, not at their mean
alone.

The numbers are data of the package, `evidence/coverage.json`, made by `recipes/coverage.py`.
"""


if __name__ == "__main__":
    PAGE.write_text(page(stored()), encoding="utf8")
