"""Exercises of *Composite search*."""

import math

from .kinds import Code, Number, Open

IDLE = Number(
    number="11.1",
    title="Why the low group is idle",
    minutes=5,
    stars=1,
    text="""
    The VGG has seven convolutions with 16, 16, 48, 48, 96, 96 and 96 filters;
    the first two are the low group. How many scores, of all 416, can differ
    between two settings that differ in the rule of the low group only?
    """,
    answer=16,
    step=0.5,
    why="They are the filters that the second convolution reads.",
    mistakes={
        32: "These are all filters of the low group. Does a layer's rule "
        "decide its own filters' scores?",
        0: "One of the two rules does decide something.",
        416: "Relevance is handed down, so nothing above the low group sees "
        "its rule.",
        48: "Whose scores depend on the second convolution's rule?",
    },
    hints=(
        "A rule divides a layer's relevance among its *inputs*.",
        "What the first convolution's inputs get is no filter's score.",
    ),
    words="""
    A rule says how a layer divides its relevance among its *inputs*. The
    second convolution's rule decides what the first convolution's filters get:
    16 of 416 filters. The first convolution's rule decides what the pixels
    get, and no filter is a pixel. So two settings that differ in the low
    group's rule only differ in 16 scores at most.
    """,
)


def trials(good, total, sure, repeats):
    """Random trials until one of the good among total is found.

    With the probability sure; repeats: a setting may come again.
    """
    missed, number = 1.0, 0
    while 1 - missed < sure:
        gone = 0 if repeats else number
        missed *= (total - good - gone) / (total - gone)
        number += 1
    return number


def _always_repeats(good, total, sure, repeats):
    return trials(good, total, sure, True)


def _never_repeats(good, total, sure, repeats):
    return trials(good, total, sure, False)


def _one_less(good, total, sure, repeats):
    return trials(good, total, sure, repeats) - 1


def _of_misses(good, total, sure, repeats):
    return trials(good, total, 1 - sure, repeats)


def _expected(good, total, sure, repeats):
    return (
        math.ceil(total / good) if repeats else round((total + 1) / (good + 1))
    )


BUDGET = Code(
    number="11.2",
    title="Another budget",
    minutes=10,
    stars=2,
    text="""
    How many trials of pure random search are needed to be 95 % sure of a
    setting among the ten best of 512? Write `trials`, for a search that never
    tries a setting twice, and for Optuna's random sampler, which may. The
    solution checks both on the table with 2,000 simulated searches.
    """,
    reference=trials,
    cases=lambda: [
        (10, 512, 0.95, False),
        (10, 512, 0.95, True),
        (1, 20, 0.52, False),
        (1, 20, 0.52, True),
    ],
    mistakes={
        "A search that never tries a setting twice has fewer left each time.": (
            _always_repeats
        ),
        "A search that may repeat draws from all of them each time.": (
            _never_repeats
        ),
        "One trial too few: then it is not quite as sure.": _one_less,
        "`sure` is the probability to find one, not to miss all.": _of_misses,
        "That is how long it takes on average.": _expected,
    },
    hints=(
        "What is the probability that all trials miss?",
        "(502 / 512) · (501 / 511) · … without repeats; powers with them.",
    ),
)

LEAVE = Open(
    number="11.3",
    title="Leave the grid",
    minutes=45,
    stars=3,
    text="""
    `pxp.tune(..., space="extended")` also searches γ, ε and α themselves,
    biases in or out of each group's denominators, and averaging over a path.
    Run 60 trials on the ResNet: `study = pxp.tune(model, refs, units, tuning,
    60, space="extended", sampler="tpe")`, then `pxp.tuned_curve(study, model,
    draws, units, test)`. Does it beat z⁺ everywhere on `data.eval`, over ten
    draws of references? Look at `pxp.plots.kept_per_layer` of the winner: has
    it emptied a layer? If so, search again with `min_keep=4`.

    A model report follows: such a search, as shipped, its curve over ten draws
    on the 2,000 images, and what it keeps of each layer.
    """,
    hints=('`pxp.load_study("resnet-extended")` is such a search.',),
    words="""
    The chapter reports the shipped search: what it gains over z⁺ everywhere,
    and the layer of which it keeps the least at 40 %.
    """,
)

EXERCISES = (IDLE, BUDGET, LEAVE)
