"""Exercises of *Pruning heads*."""

import torch
from torch import nn

import pxp

from .kinds import Choice, Code, Open

ELSEWHERE = Choice(
    number="8.1",
    title="Cutting elsewhere",
    minutes=5,
    stars=1,
    text="""
    Somebody silences a head by zeroing (a) its queries, (b) the weights of its
    values but not their bias. What does the head do then?
    """,
    options={
        "In both cases nothing: a product with zero is zero.": (
            "(a) A softmax of zeros is not zero. (b) The bias is still there."
        ),
        "(a) It writes nothing. (b) It writes a constant.": (
            "With zero queries all products with keys are zero. What is the "
            "softmax of zeros?"
        ),
        "(a) It writes the average value. (b) It writes a constant.": (
            "It is blind, not silent; only zeros at the input of the output "
            "projection remove its term."
        ),
        "(a) It looks at its own token. (b) It writes nothing.": (
            "Nothing prefers the own token. And attention weights sum to one, "
            "so the bias of the values arrives whole."
        ),
    },
    right=3,
    hints=("What is the softmax of zeros?", "Attention weights sum to one."),
    words="""
    (a) With zero queries all products with keys are 0, the softmax is uniform,
    and the head writes the *average value* of all tokens: it is blind, not
    silent. (b) Every value is the bias $b_v$, and since attention weights sum
    to one, the head writes $W_h b_v$ for every token and every image: a
    constant that later layers have never seen without its signal. It is the
    trap of a filter zeroed in front of its BatchNorm. Only zeros at the input
    of the output projection (or zero columns) remove the term.
    """,
)


@torch.no_grad()
def ablation(model, units, images, labels):
    """Scores, layer → (heads,): what removing each head alone changes.

    The mean over images of the absolute change of the true class's logit.
    """

    def true_logit():
        return model(images).gather(1, labels[:, None])

    full, values = true_logit(), {}
    for name, layer in units.items():
        values[name] = torch.zeros(layer.size, dtype=torch.float64)
        for head in range(layer.size):
            kept = dict(pxp.Mask.all(units))
            kept[name][head] = False
            with pxp.masked(model, pxp.Mask(units, kept)):
                values[name][head] = (true_logit() - full).abs().mean()
    return values


@torch.no_grad()
def _each(model, units, images, alone, of):
    """What of makes of the change of the logits, head by head."""
    full, values = model(images), {}
    for name, layer in units.items():
        values[name] = torch.zeros(layer.size, dtype=torch.float64)
        for head in range(layer.size):
            kept = dict(pxp.Mask.all(units))
            kept[name] = torch.arange(layer.size) != head
            if alone:
                kept[name] = ~kept[name]
            with pxp.masked(model, pxp.Mask(units, kept)):
                values[name][head] = of(model(images), full)
    return values


def _cancelling(model, units, images, labels):
    def of(now, full):
        return (now - full).gather(1, labels[:, None]).mean().abs()

    return _each(model, units, images, False, of)


def _falling(model, units, images, labels):
    def of(now, full):
        return (full - now).gather(1, labels[:, None]).mean()

    return _each(model, units, images, False, of)


def _predicted(model, units, images, labels):
    def of(now, full):
        return (now - full).gather(1, full.argmax(1)[:, None]).abs().mean()

    return _each(model, units, images, False, of)


def _all_classes(model, units, images, labels):
    return _each(
        model, units, images, False, lambda now, full: (now - full).abs().mean()
    )


def _only_this(model, units, images, labels):
    def of(now, full):
        return (now - full).gather(1, labels[:, None]).abs().mean()

    return _each(model, units, images, True, of)


@torch.no_grad()
def _never_restored(model, units, images, labels):
    full = model(images).gather(1, labels[:, None])
    values, kept = {}, dict(pxp.Mask.all(units))
    for name, layer in units.items():
        values[name] = torch.zeros(layer.size, dtype=torch.float64)
        for head in range(layer.size):
            kept[name][head] = False
            with pxp.masked(model, pxp.Mask(units, kept)):
                now = model(images).gather(1, labels[:, None])
            values[name][head] = (now - full).abs().mean()
    return values


def _summed(*case):
    number = len(case[2])
    return {name: number * v for name, v in ablation(*case).items()}


class _Attends(nn.Module):
    """Two blocks of attention with four heads, and a classifier."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.MultiheadAttention(16, 4, batch_first=True)
        self.second = nn.MultiheadAttention(16, 4, batch_first=True)
        self.classifier = nn.Linear(16, 5)

    def forward(self, x):
        x = x + self.first(x, x, x, need_weights=False)[0]
        x = x + self.second(x, x, x, need_weights=False)[0]
        return self.classifier(x.mean(1))


def _cases():
    model = _Attends().eval()
    images = torch.randn(6, 7, 16)
    units = pxp.find_components(model, "head", example=images[:1])
    with torch.no_grad():
        labels = (
            model(images).argmax(1) + torch.tensor([0, 1, 0, 2, 0, 0])
        ) % 5
    return [(model, units, images, labels)]


ASK = Code(
    number="8.2",
    title="Ask each head directly",
    minutes=15,
    stars=2,
    text="""
    Forty-eight heads are few enough to try. Write `ablation`: remove each head
    alone with a `pxp.Mask` and take the mean absolute change of the true
    class's logit; `kept = dict(pxp.Mask.all(units))` is a mask's content to
    start with. Does LRP-ε, which needs one backward pass, rank the heads as
    this does? And does the sharpness of a head's attention agree with it? (The
    shipped `pxp.Ablation()`, which takes the rise of the loss instead, tells
    whether so expensive a ranking prunes better.)
    """,
    reference=ablation,
    cases=_cases,
    mistakes={
        "You took the mean over the images first: changes of opposite sign "
        "cancel.": _cancelling,
        "No head came back: the next one was removed as well.": (
            _never_restored
        ),
        "That is the sum over the images, not their mean.": _summed,
        "That has a sign: by how much the logit falls. The absolute change is "
        "asked for.": _falling,
        "That is the predicted class's logit; some images are of another "
        "one.": _predicted,
        "That is the mean over all classes' logits.": _all_classes,
        "That is with all *other* heads of the layer silenced: True in a mask "
        "means kept.": _only_this,
    },
    hints=(
        "Two loops: over layers, and over a layer's heads.",
        "`with pxp.masked(model, pxp.Mask(units, kept)): …`",
    ),
    words="""
    On this draw relevance agrees with single removals better (0.79) than
    sharpness does (0.53), without an interval. The shipped ranking by single
    removals, by the rise of the loss, prunes worse; the one by the logit was
    not pruned with. One reading, not tested: what a head does alone is not
    what it does when others are gone.
    """,
)

AFTER_EVERY_CUT = Open(
    number="8.3",
    title="Score again after every cut",
    minutes=30,
    stars=3,
    text="""
    One-shot pruning trusts scores of the unpruned network. Prune half of the
    heads, score the masked network again, and prune the next quarter by the
    new scores. `pxp.attribute` takes any module, so write a copy of the
    network with the pruned columns of `out_proj` set to zero. Does it help,
    and from which rate on? Report on `data.eval`, with several draws.
    """,
    hints=("The number of rounds that a head survives is a ranking.",),
    words="""
    Set the columns of pruned heads to zero in a deep copy; their scores are
    then exactly zero, so they stay at the bottom of the ranking and `select`
    with a growing rate keeps them pruned. The number of rounds that a head
    survives is a ranking, and `pxp.pruning_curve` takes it like any other. For
    this network the first ranking stays good enough at these rates: twice the
    backward passes buy nothing that five draws and 200 images can tell from
    zero. With more and smaller steps it may be otherwise.
    """,
)

EXERCISES = (ELSEWHERE, ASK, AFTER_EVERY_CUT)
