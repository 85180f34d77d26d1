"""Exercises of *LRP foundations*."""

import torch
from torch import nn

from .kinds import Choice, Code, Open

TEN_TIMES = Choice(
    number="2.1",
    title="Ten times and a tenth",
    minutes=5,
    stars=1,
    text="""
    Multiply `W1` by 10 and divide `W2` by 10. What happens to the output, to
    the LRP-0 relevance of the hidden units and of the inputs, and to a score
    that looks at the norm of the rows of `W1`? And does LRP-ε with an ε of 0.5
    see it?
    """,
    options={
        "All change, since the hidden units are ten times as large.": (
            "The second layer divides by ten again: what each hidden unit "
            "contributes to the output is what it was."
        ),
        "Output and LRP-0 stay; the norm grows tenfold; LRP-ε changes.": (
            "A fixed ε is small beside hidden values that are ten times as "
            "large, so it absorbs less of them."
        ),
        "Output, LRP-0 and LRP-ε stay; only the norm grows.": (
            "Nearly. The hidden values are ten times as large, and a fixed ε "
            "is added to them."
        ),
        "The output stays; LRP-0 of the hidden units grows tenfold.": (
            "Relevance is a share of the output, contribution by "
            "contribution, and these stay."
        ),
    },
    right=2,
    hints=(
        "A ReLU lets a positive factor through.",
        "Write LRP-0's share of a hidden unit as h · w; which factor grew, "
        "which fell?",
    ),
    words="""
    The output stays the same, because a ReLU commutes with positive factors.
    Under LRP-0 the relevances stay the same too: contributions $h_j w_j$ to
    the output do not change, and in the first layer the factor cancels in
    $c_{ij} / z_j$. Under LRP-ε that holds only as ε → 0: the hidden $z_j$ grow
    tenfold, so a fixed ε absorbs less of them, as the chapter measures. The
    weight norm grows tenfold although the network computes the same function,
    so a global ranking by weight magnitude compares layers on arbitrary scales.
    """,
)


def zplus_layer(a, weight, relevance):
    """Hand relevance (N, out) down to the inputs (N, in) by z⁺."""
    up, down = weight.clamp(min=0), weight.clamp(max=0)
    support = a.clamp(min=0) @ up.T + a.clamp(max=0) @ down.T
    ratio = relevance / (support + 1e-12)
    return a.clamp(min=0) * (ratio @ up) + a.clamp(max=0) * (ratio @ down)


def _short(a, weight, relevance):
    up = weight.clamp(min=0)
    return a * ((relevance / (a @ up.T + 1e-12)) @ up)


def _positive_inputs(a, weight, relevance):
    return _short(a.clamp(min=0), weight, relevance)


def _undivided(a, weight, relevance):
    up, down = weight.clamp(min=0), weight.clamp(max=0)
    return a.clamp(min=0) * (relevance @ up) + a.clamp(max=0) * (
        relevance @ down
    )


def _half_down(a, weight, relevance):
    up, down = weight.clamp(min=0), weight.clamp(max=0)
    support = a.clamp(min=0) @ up.T + a.clamp(max=0) @ down.T
    return a.clamp(min=0) * ((relevance / (support + 1e-12)) @ up)


def _every_sign(a, weight, relevance):
    return a * ((relevance / (a @ weight.T)) @ weight)


def _cases():
    torch.manual_seed(0)
    layer = nn.Linear(6, 3, bias=False).double()
    a = torch.randn(20, 6, dtype=torch.float64)
    with torch.no_grad():
        relevance = layer(a) * torch.rand(20, 3, dtype=torch.float64)
    return [(a, layer.weight.detach(), relevance)]


ANY_SIGN = Code(
    number="2.2",
    title="z⁺ for inputs of any sign",
    minutes=15,
    stars=2,
    text="""
    Write `zplus_layer(a, weight, relevance)` that hands the relevance (N, out)
    of a linear layer without bias down to its inputs (N, in), for inputs of
    any sign. Use matrix products only. The solution compares with
    `pxp.heatmap` on a single `nn.Linear` with random inputs (`pxp.heatmap`
    starts at the target's logit: `relevance` is then the logit in the target's
    column and 0 elsewhere), and shows that the short version, which only
    clamps the weight, is wrong there.
    """,
    reference=zplus_layer,
    cases=_cases,
    mistakes={
        "To clamp the weight alone is right where no input is negative.": (
            _short
        ),
        "Negative inputs with negative weights are positive contributions, "
        "and are missing.": _positive_inputs,
        "They are in the sum, and get nothing handed down: negative inputs "
        "with negative weights.": _half_down,
        "Each contribution is to be divided by the sum of all.": _undivided,
        "These are all contributions; z⁺ takes the positive ones.": _every_sign,
    },
    hints=(
        "A contribution a · w is positive in two ways.",
        "a⁺w⁺ + a⁻w⁻: both in the sum, and both in what is handed down.",
    ),
)

COMPOSITE = Open(
    number="2.3",
    title="Your own composite",
    minutes=30,
    stars=3,
    text="""
    `pxp.LRP(low="zplus", middle="gamma", high="epsilon", fc="epsilon")` gives
    one rule to each depth group. Find a composite whose maps you like on ten
    images, and state in one sentence what you optimised for. Then change the
    target to a wrong class. Does your composite notice?
    """,
    hints=("`similarity` of this chapter measures the second question.",),
    words="""
    There is no single answer. A usual one is ε in the fully connected layers
    and the high group, γ in the middle, z⁺ below. The chapter measures with
    `similarity` whether a composite notices the target. The usual one does.
    Where z⁺ stands matters: below, in the convolutions, it leaves a part of
    the difference; in the fully connected layers alone it is enough to lose
    it. Hatefi et al. (2024) search over such composites for pruning.
    """,
)

EXERCISES = (TEN_TIMES, ANY_SIGN, COMPOSITE)
