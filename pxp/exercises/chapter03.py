"""Exercises of *Toy networks*."""

import torch
from torch import nn

import pxp

from .kinds import Code, Number, Open

NOTHING_LOST = Number(
    number="3.1",
    title="Why nothing is lost",
    minutes=10,
    stars=1,
    text="""
    A layer of neurons is followed by a linear layer. You remove each neuron
    with probability $p$, independently; ignore the bias. What is the expected
    logit, compared to before, and what is its standard deviation, if all
    neurons contribute about the same? Answer with a number: how many times as
    large is the deviation with 30 neurons as it is with 200, the logit being
    the same? (And why is a removal of the neurons that are *silent at one
    sample* different? The solution says.)
    """,
    answer=2.6,
    step=0.1,
    why="It is the root of 200/30.",
    mistakes={
        6.67: "That is the ratio of the variances.",
        0.39: "That is the other way round: 200 against 30.",
        1.0: "They would be equal if the number of neurons did not matter.",
        0.15: "That is the ratio of the numbers.",
    },
    hints=(
        "With n equal contributions of 1/n, which variance has their sum?",
        "p(1 − p) · n · 1/n²; the deviation is its root.",
    ),
    words="""
    The expected logit is $(1 - p)$ times the old one, for every class, so the
    order of the classes is kept on average. The deviation is the root of
    $p(1 - p) \\sum_i c_i^2$ over the contributions $c_i$. With $n$
    contributions of size $1/n$ it falls like $1/\\sqrt{n}$: with 30 neurons it
    is about two and a half times what it is with 200. The neurons silent at
    one sample are not an independent choice: they are the ones that fire
    *elsewhere*. Their removal changes nothing at the sample and shifts
    everything on the other side of the plane in the same direction.
    """,
)


def class_accuracy(net, mask, points, labels):
    """Accuracy under a mask for each class, in per cent, as a list."""
    with torch.no_grad(), pxp.masked(net, mask):
        hit = net(points).argmax(1) == labels
    return [
        100 * float(hit[labels == c].double().mean()) for c in labels.unique()
    ]


def _unmasked(net, mask, points, labels):
    return class_accuracy(net, pxp.Mask.all(mask.units), points, labels)


def _of_answers(net, mask, points, labels):
    with torch.no_grad(), pxp.masked(net, mask):
        said = net(points).argmax(1)
    return [
        100 * float((labels[said == c] == c).double().mean())
        for c in labels.unique()
    ]


def _overall(net, mask, points, labels):
    with torch.no_grad(), pxp.masked(net, mask):
        hit = net(points).argmax(1) == labels
    return [100 * float(hit.double().mean())] * len(labels.unique())


def _turned(net, mask, points, labels):
    kept = {name: ~part for name, part in mask.items()}
    return class_accuracy(net, pxp.Mask(mask.units, kept), points, labels)


def _cases():
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU()
    )
    net = net.append(nn.Linear(12, 3)).eval()
    points = torch.randn(90, 2)
    with torch.no_grad():
        logits = net(points)
    labels = (logits - logits.mean(0)).argmax(1)
    units = pxp.find_components(net, "neuron", example=points[:1])
    kept = {
        name: torch.arange(layer.size) % 3 > 0 for name, layer in units.items()
    }
    with torch.no_grad():
        net[4].bias -= logits.mean(0)
    return [(net, pxp.Mask(units, kept), points, labels)]


ONE_CLASS = Code(
    number="3.2",
    title="Prune towards one class",
    minutes=15,
    stars=2,
    text="""
    Score the spiral networks with 50 reference samples of class 0 only
    (`classes=[0]`), by LRP-ε, and remove a third. What happens to class 0, and
    to the mean of the others? Write `class_accuracy`, which you need for it.
    """,
    reference=class_accuracy,
    cases=_cases,
    mistakes={
        "That is without the mask; measure inside `with pxp.masked(…)`.": (
            _unmasked
        ),
        "That is the share of right answers among the *answers* of a class.": (
            _of_answers
        ),
        "That is one accuracy over all samples.": _overall,
        "A share is not in per cent.": (
            lambda *case: [value / 100 for value in class_accuracy(*case)]
        ),
        "That is with the kept neurons silenced: True in a mask means kept.": (
            _turned
        ),
    },
    hints=(
        "Which samples are of class c? `labels == c`.",
        "The mean of hits over these samples, once for each class.",
    ),
)

NARROW = Open(
    number="3.3",
    title="How narrow is narrow?",
    minutes=30,
    stars=3,
    text="""
    On the spiral, with a third removed, no lead of LRP-ε over dice is shown at
    width 200, and a large one at width 30. Where between does it begin? Decide
    before you run it what you will call a lead, and how many networks you need
    to see it.
    """,
    hints=(
        "The interval of the difference is as wide as ten networks make it.",
    ),
    words="""
    The chapter takes width 100 and calls a lead what ten networks show with an
    adjusted p below 0.05, against dice and against the shuffled control.
    """,
)

EXERCISES = (NOTHING_LOST, ONE_CLASS, NARROW)
