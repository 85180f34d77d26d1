"""Exercises of *From pixels to filters*."""

import torch

import pxp

from . import small
from .kinds import Choice, Code, Open

CONSERVATION = Choice(
    number="4.1",
    title="Conservation across layers",
    minutes=5,
    stars=1,
    text="""
    The last column of the table sums the signed relevance over the filters of
    each layer. Without biases, what would all these sums be? Why do they
    differ here?
    """,
    options={
        "One, since relevance is a share.": (
            "Relevance starts with the logit, not with one; "
            '`pxp.LRP(start="one")` would begin so.'
        ),
        "The mean logit of the true class; here biases keep a part of it.": (
            "Each layer's bias keeps its share of what arrives, of either "
            "sign: a layer may hold more than the logit."
        ),
        "Zero, since positive and negative relevance cancel.": (
            "They cancel to what arrived from above, and that is the logit."
        ),
        "More in wider layers, which have more filters to sum over.": (
            "A wider layer divides the same relevance among more filters."
        ),
    },
    right=2,
    hints=("Where does relevance start, and what may keep some of it?",),
    words="""
    Without biases each layer's relevances sum to the mean logit of the true
    class: relevance is conserved from layer to layer. With biases (and
    BatchNorm always brings one) each layer's bias keeps the share $b_j/z_j$ of
    its outputs' relevance, of either sign. So the sums drift away from the
    logit. `print(pxp.conservation(model, refs.images, refs.labels))` lists
    what each layer absorbs. See *How much arrives* in [LRP
    foundations](02_lrp_foundations.ipynb).
    """,
)


def by_hand(model, images, labels, units, criterion):
    """The scores of all layers, from calls with one sample each."""
    singles = [
        pxp.attribute(
            model, (x[None], y[None]), units, criterion, progress=False
        ).signed
        for x, y in zip(images, labels, strict=True)
    ]
    return {
        layer: torch.stack([one[layer].abs() for one in singles]).mean(0)
        for layer in units
    }


def _signed(model, images, labels, units, criterion):
    both = (images, labels)
    return pxp.attribute(model, both, units, criterion, progress=False).signed


def _summed(model, images, labels, units, criterion):
    found = by_hand(model, images, labels, units, criterion)
    return {name: len(images) * part for name, part in found.items()}


def _sum_first(*case):
    return {name: part.abs() for name, part in _signed(*case).items()}


def _first_only(model, images, labels, units, criterion):
    return by_hand(model, images[:1], labels[:1], units, criterion)


def _cases():
    model = small.network()
    units = pxp.find_components(model, "filter", example=small.images(1))
    images, labels = small.labelled(model)
    five = images[:5], labels[:5]
    criteria = (pxp.LRP("epsilon"), pxp.Taylor())
    return [(model, *five, units, criterion) for criterion in criteria]


MAGNITUDE = Code(
    number="4.2",
    title="Magnitude by hand",
    minutes=10,
    stars=2,
    text="""
    `scores[layer]` is a mean over samples. Compute it yourself for all layers
    from calls of `pxp.attribute` with one reference sample each, whose
    `signed` scores are that sample's relevance. The solution checks it on this
    chapter's network against one call with five samples.
    """,
    reference=by_hand,
    cases=_cases,
    mistakes={
        "These are signed means: the mean of *absolute* values is asked for.": (
            _signed
        ),
        "You took the mean over the samples first, and then the absolute "
        "value: samples of opposite sign cancel.": _sum_first,
        "That is the sum over the samples, not their mean.": _summed,
        "That is the first sample's.": _first_only,
    },
    hints=(
        "For each sample its own signed scores; then their absolute values.",
        "`torch.stack(…).abs().mean(0)`, in this order.",
    ),
)

BETTER = Open(
    number="4.3",
    title="Better reference samples?",
    minutes=30,
    stars=3,
    text="""
    Random samples were used throughout. Could chosen ones do better with the
    same number? Rank the images of each class by the network's confidence in
    the true class, draw ten times from the most confident quarter and ten
    times from the least confident one, and compare with the ten random draws
    by `pxp.compare_all`. Before you run it, say which you expect to be best.
    """,
    hints=("`pxp.reference_samples` also draws from a pair (images, labels).",),
    words="""
    Of the quarter that the network is surest of, ten draws prune *worse* than
    ten draws at random, and the interval excludes 0. For the least sure
    quarter no difference is shown. If you expected clean, typical images to be
    the best references, this is the surprise.

    Why is not measured here. Sure images may have large logits, hence large
    relevance; `pxp.LRP(start="one")` divides each sample's relevance by its
    logit and would tell whether that is the reason. Or they are too much alike
    to use the filters that decide the hard cases.
    """,
)

EXERCISES = (CONSERVATION, MAGNITUDE, BETTER)
