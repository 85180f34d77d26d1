"""Exercises of *Tuning in practice*."""

import numpy as np

from .kinds import Code, Number, Open

CURSE = Number(
    number="12.1",
    title="The winner's curse",
    minutes=5,
    stars=1,
    text="""
    All composites of a space are equally good, and `n` tuning images give each
    value a standard error of 0.02. You try 64 independent ones. How much too
    high is the winner's tuning value, to the nearest hundredth? Does it help
    to try 256?
    """,
    answer=0.048,
    step=0.004,
    why="The largest of 64 normal draws lies 2.3 or 2.4 deviations up.",
    mistakes={
        0.058: "That is √(2 ln 64) errors, a bound that is a fifth too high.",
        2.35: "That is in standard errors; how much is one?",
        2.4: "That is in standard errors; how much is one?",
        0.056: "That is for 256 of them.",
        4.7: "Give it as a share, as the standard error is.",
        4.8: "Give it as a share, as the standard error is.",
        5.0: "Give it as a share, as the standard error is.",
        0.02: "That is the error of one; the winner is the largest of 64.",
        0.16: "That multiplies by the root of 64: the largest of 64 lies not "
        "that far out.",
        0.0025: "That divides by the root of 64, as for a mean of 64.",
        0.0: "Their mean is not too high; the largest of them is.",
    },
    hints=(
        "How far above the mean is the largest of 64 normal draws?",
        "`np.random.default_rng(0).normal(size=(10000, 64)).max(1).mean()`.",
    ),
    words="""
    The largest of 64 normal draws lies about 2.3 standard deviations above the
    mean, so the promise is about 0.05 too high, of which nothing is kept. With
    256 it is about 2.8, so it gets worse, slowly. Real composites are
    correlated (they classify the same images), which is why the figure above
    shows less.
    """,
)


def place(full, short):
    """The place of the best by full in the list by short, from 1."""
    return int((short > short[full.argmax()]).sum()) + 1


def _from_zero(full, short):
    return place(full, short) - 1


def _other_way(full, short):
    return place(short, full)


def _worst(full, short):
    return place(full, -short)


def _index(full, short):
    return int(full.argmax())


def _argsort(full, short):
    return int(np.argsort(-short)[full.argmax()]) + 1


def _cases():
    rng = np.random.default_rng(0)
    full = rng.normal(size=40)
    return [(full, full + rng.normal(size=40) * scale) for scale in (0.3, 1, 3)]


FEWER = Code(
    number="12.2",
    title="Fewer rates",
    minutes=10,
    stars=2,
    text="""
    A trial measures 20 rates. Would five do? Take the stored curves of all 512
    trials, replace each area by the mean over the rates 0, 0.2, 0.4, 0.6 and
    0.8, and compute the rank correlation with the full area. Is the winner
    among the five best of the short list? Write `place`, which says so, of two
    arrays with a value for each trial.
    """,
    reference=place,
    cases=_cases,
    mistakes={
        "Places are counted from 1.": _from_zero,
        "That is the place of the *short* list's winner in the full list.": (
            _other_way
        ),
        "That is counted from the worst: the best has the highest value.": (
            _worst
        ),
        "`argsort` says which trial is at each place, not at which place a "
        "trial is.": _argsort,
        "That is where the winner stands among the trials, not its rank.": (
            _index
        ),
    },
    hints=(
        "How many have a higher value in the short list than the winner?",
        "`short > short[full.argmax()]`.",
    ),
)

OBJECTIVE = Open(
    number="12.3",
    title="Your own objective",
    minutes=45,
    stars=3,
    text="""
    You know that you will prune the ResNet by exactly 20 %. Tune for
    `objective="accuracy@0.2"` with 40 trials, then compare the winner at 20 %
    with z⁺ everywhere on `data.eval`, over ten draws of references. Is the
    setting that is best at one rate also good at the area, and the other way
    round?
    """,
    hints=("`pxp.winner(study)` gives the criterion and how to select.",),
    words="""
    `study = pxp.tune(model, refs, units, tuning, 40,
    objective="accuracy@0.2")`; then `pxp.winner(study)` gives the criterion,
    and `pxp.pruning_curve(model, scores, images, rates=[0, 0.2])` for ten
    draws the numbers to pair. A single rate is a noisier objective than an
    area, because twenty measurements are replaced by one: use more tuning
    images than you would for the area, and expect a part of the gain to vanish
    on unseen ones.
    """,
)

EXERCISES = (CURSE, FEWER, OBJECTIVE)
