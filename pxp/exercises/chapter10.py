"""Exercises of *Which layers, or which filters?*."""

import pxp

from . import small
from .kinds import Choice, Code, Open

BY_LAYER = Choice(
    number="10.1",
    title="Ranked layer by layer",
    minutes=10,
    stars=1,
    text="""
    With `scope="layer"` every layer loses the same share. What is the part
    *layers* of a criterion's lead over chance that is ranked layer by layer,
    too, and what is its shuffled control?
    """,
    options={
        "As large as before; the control is as it was.": (
            "Nothing is decided about layers any more."
        ),
        "Zero; the control is chance that is ranked layer by layer.": (
            "All that is left is *which*, and chance must be ranked layer by "
            "layer, too."
        ),
        "Zero; the control is the criterion itself.": (
            "The control still takes other filters of each layer."
        ),
        "Zero; the control is chance over the whole network.": (
            "Chance over the whole network takes equal shares on average "
            "only, and far from it in small layers."
        ),
    },
    right=2,
    hints=("How many of each layer does dice take, ranked layer by layer?",),
    words="""
    Every criterion, and chance as well (ranked layer by layer), takes the same
    number from each layer, so nothing is decided about layers: that part is 0
    by construction, and the shuffled control *is* chance with the same shares.
    All that is left is *which*. Compare it with chance that is ranked layer by
    layer, too: chance over the whole network takes equal shares on average
    only, and far from it in small layers.
    """,
)


def upside_down(scores):
    """Scores with the same layers' shares, the most relevant first."""
    values = {layer: each.max() - each for layer, each in scores.items()}
    turned = pxp.Scores(scores.units, values, values)
    return scores.arranged_by(turned)


def _most(scores):
    top = max(float(each.max()) for each in scores.values())
    return {layer: top - each for layer, each in scores.items()}


def _turned_layers(scores):
    return {layer: each.max() - each for layer, each in scores.items()}


def _as_they_are(scores):
    return dict(scores)


def _flipped(scores):
    return {layer: each.flip(0) for layer, each in scores.items()}


UPSIDE_DOWN = Code(
    number="10.2",
    title="Upside down",
    minutes=15,
    stars=2,
    text="""
    Keep the layers of LRP-ε at 20 % of the VGG's filters, but take the *most*
    relevant filters of each. How much is that worse than dice within the same
    layers? Use three draws and 100 tuning images. Write `upside_down` first;
    `arranged_by` helps.
    """,
    reference=upside_down,
    cases=lambda: [(small.scores(),), (small.scores(pxp.Taylor()),)],
    mistakes={
        "The values are turned round over the whole network, so other layers "
        "lose.": _most,
        "The values of each layer are turned round and are other values now, "
        "so other layers lose: hand out the *old* values in the new order.": (
            _turned_layers
        ),
        "These are the scores as they were.": _as_they_are,
        "You turned round the filters' places, not their ranking.": _flipped,
    },
    hints=(
        "Each layer must keep its values, and give them to other filters.",
        "`scores.arranged_by(other)`: which scores have the opposite order?",
    ),
    words="""
    By thirteen points in the mean (0.66 against 0.79; three draws, no
    interval): within a layer the most relevant filters are not any filters.
    """,
)

WITHOUT = Open(
    number="10.3",
    title="Where, without attribution",
    minutes=60,
    stars=3,
    text="""
    The layers' sensitivities to *random* removal need no attribution at all.
    Let each layer lose as much as it stands alone: choose one accuracy that no
    layer alone may fall below, such that 20 % of all filters go, and prune by
    dice within the layers. How near does this come to the layers of LRP-ε with
    dice inside? Choose on `data.tune`, report on `data.eval`.

    A model report follows: shares from sensitivities at eight rates,
    interpolated between them.
    """,
    hints=("`pxp.sensitivity` measures each layer alone.",),
    words="""
    Shares by sensitivity reach 0.70, LRP-ε's layers 0.79, dice over the whole
    network 0.34: about four fifths of the way, without an interval. The
    lotteries overlap, and it is one choice of shares, made on 100 tuning
    images. So much of what LRP-ε knows of this network's layers may be had by
    trying each of them.
    """,
)

EXERCISES = (BY_LAYER, UPSIDE_DOWN, WITHOUT)
