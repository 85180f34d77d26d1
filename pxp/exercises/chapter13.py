"""Exercises of *From masks to speed*."""

from .kinds import Code, Number, Open

QUADRATIC = Number(
    number="13.1",
    title="The quadratic law",
    minutes=5,
    stars=1,
    text="""
    Half of the filters of *every* convolution of a plain CNN go. Which share
    of the operations is left, roughly, in per cent, and why is the first layer
    an exception?
    """,
    answer=25,
    step=1,
    why="Half of the inputs times half of the outputs.",
    unit="%",
    mistakes={
        50: "That is right for the first layer, whose inputs stay.",
        75: "That is what is gone; what is left is asked for.",
        12.5: "Inputs and outputs are halved; the size of the kernel stays.",
        0.25: "In per cent, please.",
    },
    hints=("A convolution's work is proportional to inputs times outputs.",),
    words="""
    A convolution's work is proportional to its inputs times its outputs. If
    both are halved, a quarter is left. The first layer's inputs are the
    image's channels, which stay, so half of its work is left. The same holds
    for the last layer's outputs.
    """,
)


def heaviest(work):
    """A set of the layers that do most, and the share of one in all work.

    work is layer → operations; of several that tie the set has all.
    """
    most = max(work.values())
    names = {name for name, value in work.items() if value == most}
    return names, most / sum(work.values())


def _first(work):
    return {max(work, key=work.get)}, heaviest(work)[1]


def _one_name(work):
    return max(work, key=work.get), heaviest(work)[1]


def _together(work):
    names, share = heaviest(work)
    return names, share * len(names)


def _of_the_rest(work):
    names, share = heaviest(work)
    return names, share / (1 - share)


def _count(work):
    return heaviest(work)[0], max(work.values())


HEAVIEST = Code(
    number="13.2",
    title="Where the time is",
    minutes=10,
    stars=2,
    text="""
    `pxp.cost(...).layers` counts operations per layer. Which layer of the VGG
    does most of the work, or which layers if several tie, and which share of
    all has each? Write `heaviest`. How many of their filters does LRP-ε remove
    at 30 %?
    """,
    reference=heaviest,
    cases=lambda: [
        ({"a": 10, "b": 40, "c": 40, "d": 30},),
        ({"a": 10, "b": 30, "c": 20},),
        ({"c": 7, "a": 7, "b": 7},),
    ],
    mistakes={
        "Several layers tie, and `max` alone gives the first.": _first,
        "A set is asked for, since layers may tie.": _one_name,
        "That is the share of all of them together.": _together,
        "That is relative to the *other* layers' work, not to all.": (
            _of_the_rest
        ),
        "These are operations; the share of them is asked for.": _count,
    },
    hints=("Find the largest value first, then everyone who has it.",),
)

RATE = Open(
    number="13.3",
    title="Your own exchange rate",
    minutes=60,
    stars=3,
    text="""
    Rank by score divided by `flops ** a` for a few `a` between 0 and 1, choose
    `a` on `data.tune` at 80 % of the work, and report on `data.eval`. Does any
    `a` beat both ends? On the VGG, on the ResNet? The solution tries three
    values.
    """,
    hints=("`pxp.Scores(units, values, values)` makes scores of values.",),
    words="""
    `data.tune` (500 images here) chooses a = 0.1 on the ResNet, and on 500
    images of `data.eval` it beats both ends: a = 0 by some two points, a = 1
    by almost half of the images. On the VGG all three lie within two points of
    each other. The intervals cover the images only, since this is one draw of
    references; whether 0.1 wins with other draws takes ten of them to say.
    """,
)

EXERCISES = (QUADRATIC, HEAVIEST, RATE)
