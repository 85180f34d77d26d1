"""Exercises of *Repair*."""

import torch

from .kinds import Code, Number, Open

TWO_INPUTS = Number(
    number="14.1",
    title="Two inputs, one left",
    minutes=5,
    stars=1,
    text="""
    A layer computes $y = a_1 + a_2$, and on all images $a_2 = a_1 / 2$. The
    second input is pruned. Which weight does least squares give to the first
    one, if nothing draws it towards its old value? What error is left?
    """,
    answer=1.5,
    step=0.02,
    why="Nothing is lost: what goes was half of what stays.",
    mistakes={
        1.0: "That is the old weight: what the second input gave is missing.",
        2.0: "These are both weights added; the second input is smaller.",
        0.5: "That is what is to be added to the old weight.",
        0.75: "That is the mean of what both inputs gave.",
    },
    hints=(
        "Write y with a₁ alone.",
        "y = a₁ + a₁/2.",
    ),
    words="""
    On these images $y = a_1 + a_1/2$, so the weight is 1.5 and nothing is
    lost: the pruned input was redundant. What least squares cannot bring back
    is the part of a pruned input that the kept ones do not predict.
    """,
)


def refit(x, targets, kept):
    """Weights (out, in) whose outputs are closest to the targets (N, out).

    Of inputs x (N, in) only those that are kept, bool (in,), count;
    the others get 0. There is no bias, and nothing draws the weights.
    """
    weight = torch.zeros(targets.shape[1], x.shape[1], dtype=x.dtype)
    found = torch.linalg.lstsq(x[:, kept], targets).solution
    weight[:, kept] = found.T
    return weight


def _fit_then_prune(x, targets, kept):
    return refit(x, targets, torch.ones_like(kept)) * kept


def _only_kept(x, targets, kept):
    return refit(x, targets, kept)[:, kept]


def _pruned(x, targets, kept):
    return refit(x, targets, ~kept)


def _transposed(x, targets, kept):
    return refit(x, targets, kept).T


def _cases():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator)
    x = x @ torch.randn(5, 5, generator=generator)
    weight = torch.randn(3, 5, generator=generator)
    return [(x, x @ weight.T, torch.tensor([True, False, True, True, False]))]


REFIT = Code(
    number="14.2",
    title="Least squares by hand",
    minutes=15,
    stars=2,
    text="""
    Write `refit`, the heart of the repair, for a linear layer without bias.
    The solution takes the VGG's classifier: how much nearer do its logits come
    to what they were?
    """,
    reference=refit,
    cases=_cases,
    mistakes={
        "You fitted all inputs and then pruned: these weights still count on "
        "what is gone.": _fit_then_prune,
        "Pruned inputs need a column, of zeros.": _only_kept,
        "That fits the pruned inputs: True means kept.": _pruned,
        "That is transposed: outputs are the first dimension.": _transposed,
    },
    hints=(
        "`torch.linalg.lstsq(inputs, targets).solution` is (in, out).",
        "Give it `x[:, kept]`, and put its rows where they belong.",
    ),
)

AGAIN = Open(
    number="14.3",
    title="When does the criterion matter again?",
    minutes=30,
    stars=3,
    text="""
    After the repair chance is close to LRP-ε on the VGG at 40 %. Rank within
    each layer, repair by least squares, and go on to 80 and 90 %: which
    criteria can then be told apart, and which cannot? Decide first how you
    will compare seven criteria at two rates.

    A model report from the shipped curves follows.
    """,
    hints=("`pxp.compare_all(curves, against=…)` adjusts for their number.",),
    words="""
    The chapter compares over all five rates, adjusted for six comparisons.
    What it cannot tell apart it does not call equal: the criteria beside
    LRP, its control and dice have three draws, which make wide intervals.
    """,
)

EXERCISES = (TWO_INPUTS, REFIT, AGAIN)
