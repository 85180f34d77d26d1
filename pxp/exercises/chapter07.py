"""Exercises of *LRP for transformers*."""

import torch
from torch.nn import functional as F

from .kinds import Choice, Code, Open

CONSTANT = Choice(
    number="7.1",
    title="A constant added to all logits",
    minutes=10,
    stars=1,
    text="""
    Add 1 to each of the three logits of the six-number example. Which of $s$,
    $o$, and the relevances of AttnLRP and CP-LRP change, and what happens to
    AttnLRP's sum over the logits? What does AttnLRP give to three *equal*
    logits, in total?
    """,
    options={
        "Nothing changes: a softmax ignores what is added to all.": (
            "Weights and output stay. AttnLRP multiplies by the logits "
            "themselves, which are others now."
        ),
        "AttnLRP's relevances change, and so does their sum.": (
            "What is added to them is in proportion to R − s ΣR; sum that "
            "over the logits."
        ),
        "CP-LRP's relevances change, AttnLRP's stay.": (
            "CP-LRP gives the logits nothing, before and after."
        ),
        "AttnLRP's relevances change, and their sum stays.": (
            "What is added sums to zero. Three equal logits get nothing in "
            "total."
        ),
    },
    right=4,
    hints=(
        "AttnLRP: each logit gets x (R − s ΣR). What does x + 1 add?",
        "The weights s sum to one.",
    ),
    words="""
    The weights $s$ and the output stay, since a softmax ignores a common
    shift, and so does all of CP-LRP. AttnLRP's relevances change: $R^x_i = x_i
    (R^s_i - s_i \\sum_j R^s_j)$ grows by the bracket, that is by $(0.3, -0.6,
    0.3)$. The brackets sum to zero, because $\\sum_i s_i = 1$, so the sum over
    the logits stays −0.12. For three equal logits $x_i = c$ the sum is $c
    \\cdot 0 = 0$: all the relevance of the weights ends in the constant of the
    expansion. The split among single logits depends on a quantity that the
    network cannot see. What the logits are made of, $q$ and $k$, fixes it.
    """,
)


def painted(images, order, gone, side):
    """Images (N, C, H, W) with each one's first gone patches black.

    order (N, patches) numbers the patches of side pixels row by row.
    """
    columns = F.unfold(images, side, stride=side)
    columns = columns.unflatten(1, (images.shape[1], -1))
    hidden = torch.zeros_like(order, dtype=torch.bool)
    hidden = hidden.scatter(1, order[:, :gone], True)
    columns = columns.masked_fill(hidden[:, None, None], 0).flatten(1, 2)
    return F.fold(columns, images.shape[2:], side, stride=side)


def _last(images, order, gone, side):
    return painted(images, order.flip(1), gone, side)


def _one_for_all(images, order, gone, side):
    return painted(images, order[:1].expand_as(order), gone, side)


def _column_by_column(images, order, gone, side):
    return painted(images.mT, order, gone, side).mT


def _first_channel(images, order, gone, side):
    rest = painted(images[:, :1], order, gone, side)
    return torch.cat([rest, images[:, 1:]], 1)


def _ranks(images, order, gone, side):
    return painted(images, order.argsort(1), gone, side)


def _grey(images, order, gone, side):
    mean = images.mean((2, 3), keepdim=True)
    return painted(images - mean, order, gone, side) + mean


def _cases():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 2, 8, 12, generator=generator)
    order = torch.rand(3, 6, generator=generator).argsort(1)
    finer = torch.rand(3, 24, generator=generator).argsort(1)
    return [(images, order, 2, 4), (images, order, 0, 4), (images, finer, 9, 2)]


PAINT = Code(
    number="7.2",
    title="Paint in place of taking out",
    minutes=20,
    stars=2,
    text="""
    Write `painted`, which sets patches to black and leaves all tokens in. In
    the solution a test made of it takes the place of `take_out`, with the
    orders of AttnLRP, integrated gradients of 10 and of 50 steps, brightest
    first and random. Which orders win now, and what does that say about the
    test?
    """,
    reference=painted,
    cases=_cases,
    mistakes={
        "These are the *last* patches of the order.": _last,
        "All images lost the first one's patches; each has its own order.": (
            _one_for_all
        ),
        "Patches are numbered row by row, yours column by column.": (
            _column_by_column
        ),
        "Only one channel is black.": _first_channel,
        "You read the order as ranks: its first number is the patch that "
        "goes first.": _ranks,
        "These are grey: black is 0 here.": _grey,
    },
    hints=(
        "`F.unfold(images, side, stride=side)` gives the patches as columns.",
        "`scatter` marks `order[:, :gone]`; `F.fold` puts the columns back.",
    ),
    words="""
    Painted black, integrated gradients of 50 steps win, and brightest first is
    no longer worse than chance: the test rewards an order for removing ink,
    because black is both the baseline of the path and the paint. Which map is
    best depends on what *gone* means.
    """,
)

POSITION = Open(
    number="7.3",
    title="What does the position embedding know?",
    minutes=30,
    stars=3,
    text="""
    A large part of the logits ends at the position embedding. Is that
    knowledge of the network, or the share of patches without ink? Design a
    measurement that can tell.
    """,
    hints=("Give each patch the position of another one.",),
    words="""
    Shuffle the patches: the same patches, as many of them blank, each with the
    position embedding of another place. The position embedding's relevance
    falls from 1.7 logits to about zero, and the logit to a quarter. So blank
    patches alone do not make the share. But the shuffled network hardly
    recognises the garment, so that the share depends on place is one reading
    of two.

    Blank patches do hold relevance of position, a patch with ink only half as
    much, if faint pixels count as blank. If any pixel above 0 makes ink, no
    difference was found. So state the threshold. Most patches have ink, and
    together they hold the larger part by each of the three thresholds.

    Another way changes the question: explain the difference from the mean
    image, by adding the mean token to the position embedding and taking it
    from the token. The logits are the same, the books are not; then say which
    constant *you* want to be "nothing".
    """,
)

EXERCISES = (CONSTANT, PAINT, POSITION)
