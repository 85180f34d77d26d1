"""Exercises of *Pruning neurons*."""

import pxp

from . import small
from .kinds import Choice, Code, Open

ACTIVATION = Choice(
    number="9.1",
    title="Another activation",
    minutes=5,
    stars=1,
    text="""
    The mask zeroes a neuron *before* its activation. For GELU, SiLU and ReLU
    this removes it. What would happen with a sigmoid, and where should the
    zero go?
    """,
    options={
        "Nothing else: a neuron that is zero says nothing.": (
            "What it says is the sigmoid of zero. How much is that?"
        ),
        "It would emit one half; the zero goes behind the activation.": (
            "A constant that its column passes on to every token is the "
            "BatchNorm trap in another dress."
        ),
        "It would emit one; the zero goes behind the activation.": (
            "The place is right. What is the sigmoid of zero?"
        ),
        "It would emit one half; its bias should be zeroed, too.": (
            "The zero is written behind the bias already. What the sigmoid "
            "makes of zero is the matter."
        ),
    },
    right=2,
    hints=("GELU(0), SiLU(0) and ReLU(0) are 0. And σ(0)?",),
    words="""
    $\\sigma(0) = 1/2$: the neuron would not be silent but emit a constant one
    half, which its column passes on to every token: the BatchNorm trap of
    [Traps](06_traps.ipynb) in another dress. Put the zero behind the
    activation, at the input of the second linear layer, or zero the column
    there.
    """,
)


def left(scores, rate, number):
    """Layer → components kept at a rate, at least number of each."""
    mask = scores.select(rate, min_keep=number)
    return {layer: int(kept.sum()) for layer, kept in mask.items()}


def _free(scores, rate, number):
    return left(scores, rate, 0)


def _lifted(scores, rate, number):
    return {
        layer: max(count, number)
        for layer, count in left(scores, rate, 0).items()
    }


def _each_layer(scores, rate, number):
    mask = scores.select(rate, scope="layer", min_keep=number)
    return {layer: int(kept.sum()) for layer, kept in mask.items()}


def _gone(scores, rate, number):
    kept = left(scores, rate, number)
    return {layer: scores.units[layer].size - kept[layer] for layer in kept}


def _cases():
    found = small.scores(pxp.Taylor())
    uneven = {
        layer: each * 10**-place
        for place, (layer, each) in enumerate(found.items())
    }
    given = pxp.Scores(found.units, uneven, uneven)
    return [(given, 0.6, 3), (given, 0.7, 2)]


MINIMUM = Code(
    number="9.2",
    title="A minimum for every block",
    minutes=10,
    stars=2,
    text="""
    LRP-ε leaves five blocks almost empty at 90 %. Write `left`, which counts
    what `select` keeps of each layer when it must keep a minimum, and look at
    its counts. Predict first: does the guard help, or cost accuracy? The
    solution computes the curve with at least 8 per block.
    """,
    reference=left,
    cases=_cases,
    mistakes={
        "That is without the minimum.": _free,
        "You lifted the counts afterwards, so more is kept than the rate "
        "says: others must go instead.": _lifted,
        "That is ranked layer by layer; the guard leaves the ranking "
        "global.": _each_layer,
        "These are pruned, not kept: True in a mask means kept.": _gone,
    },
    hints=("`select` has an argument for it.", "`min_keep`."),
    words="""
    Over these rates the guard costs about two hundredths (interval 0.6 to
    3.0), all of it at 90 %: what it spares in the empty blocks is taken
    from the first one, which does most of the work.
    """,
)

EXCHANGE_RATE = Open(
    number="9.3",
    title="A better exchange rate",
    minutes=40,
    stars=3,
    text="""
    Between raw and per cost lies a family: divide the score by
    $\\mathrm{cost}^{\\,\\alpha}$ with $0 \\le \\alpha \\le 1$. Choose $\\alpha$
    on `data.tune`, for a saving of half of the parameters, and report the
    result on `data.eval` beside "per kind".
    """,
    hints=("`rescaled` multiplies the scores of each layer by a number.",),
    words="""
    Build the scores with `rescaled`: multiplied by
    $\\mathrm{cost}^{\\,1-\\alpha}$ they are divided by
    $\\mathrm{cost}^{\\,\\alpha}$ after the division by the cost. Five values of
    $\\alpha$ are enough. With two kinds of constant size, $\\alpha$ and "per
    kind" are the same one-parameter family: only the ratio of the two divisors
    counts. The extremes lose and the middle is flat: an $\\alpha$ of a
    quarter, a half or three quarters does about as well on `data.tune`, so
    take the one in the middle. "Per kind", which amounts to an $\\alpha$ of
    about 0.7 here, needs no tuning, and on `data.eval` a half is not ahead of
    it (the extremes are raw and per cost of the figure above). With
    `cost="flops"` the same cells answer for operations.
    """,
)

EXERCISES = (ACTIVATION, MINIMUM, EXCHANGE_RATE)
