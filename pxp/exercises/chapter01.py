"""Exercises of *Why prune*."""

import pxp

from . import small
from .kinds import Choice, Code, Open

TOGETHER = Choice(
    number="1.1",
    title="One by one is not together",
    minutes=5,
    stars=1,
    text="""
    In the figure of single filters most filters of the last layer cost nothing
    when silenced alone. Someone concludes: *then I can remove all of them*.
    What does follow? Think of the smallest example, two filters, before you
    choose.
    """,
    options={
        "Nothing is lost: costs of nothing add up to nothing.": (
            "They would if filters did not interact. Let the next layer take "
            "the larger of two equal maps."
        ),
        "All is lost, since every filter stands for its own feature.": (
            "If each stood for its own, silencing it alone would cost "
            "something."
        ),
        "At most as much is lost as by the most expensive single one.": (
            "Two filters may share one task: each alone can be missed, both "
            "cannot. No single cost bounds that."
        ),
        "Nothing: filters may stand in for each other, and then each costs "
        "nothing and all cost everything.": (
            "Redundancy is a property of a set, and single removals do not "
            "see it."
        ),
    },
    right=4,
    hints=(
        "What if two filters compute exactly the same?",
        "Let the next layer read the larger of both.",
    ),
    words="""
    Let two filters compute exactly the same map $a$, and let the next layer
    use $\\max(a_1, a_2)$, or ask only whether $a_1 + a_2$ is positive.
    Silence one: the other still delivers, the decision is the same. Silence
    both: nothing arrives. Redundancy is a property of a *set* of filters, so a
    criterion that ranks single filters can only approximate it.
    """,
)


def most_first(model, scores, images, rates):
    """Accuracies, one per rate, when the most relevant filters go first."""
    curve = pxp.pruning_curve(
        model,
        scores,
        images,
        rates=rates,
        order="most",
        progress=False,
    )
    return curve.accuracy


def _least_first(model, scores, images, rates):
    return pxp.pruning_curve(
        model,
        scores,
        images,
        rates=rates,
        progress=False,
    ).accuracy


def _cases():
    model = small.network()
    rates = (0, 0.2, 0.4, 0.6)
    test = small.labelled(model, seed=2)
    return [(model, small.scores(), test, rates)]


OTHER_END = Code(
    number="1.2",
    title="The other end",
    minutes=10,
    stars=1,
    text="""
    `scores.select(rate, order="most")` prunes the *most* relevant filters
    first. Write `most_first`, which measures the accuracy at each rate, then
    predict how many filters of the VGG you must take away until it guesses.
    The solution compares with random removal.
    """,
    reference=most_first,
    cases=_cases,
    mistakes={
        "That is what is left when the least relevant go first.": (
            _least_first
        ),
        "That is the share of errors; accuracy is asked for.": (
            lambda *case: 1 - most_first(*case)
        ),
        "That is one number, the mean over the rates.": (
            lambda *case: float(most_first(*case).mean())
        ),
        "That is in per cent; accuracies here are between 0 and 1.": (
            lambda *case: 100 * most_first(*case)
        ),
    },
    hints=(
        "`pxp.pruning_curve` takes an `order`, as `select` does.",
        "The curve's `accuracy` has one value for each rate.",
    ),
)

YOUR_OWN = Open(
    number="1.3",
    title="Your own network",
    minutes=30,
    stars=3,
    text="""
    Take a network of your own, or `pxp.load_model("resnet")`, or a torchvision
    model with its pretrained weights and your own images. Draw its random
    pruning curve, over all layers and for single layers. Which layers are the
    most redundant? Does their number of filters explain it, or their place in
    the network?
    """,
    hints=("`units.only(name)` are the components of one layer.",),
    words="""
    There is no single answer. In residual networks compare the layers inside a
    block with those that write to the residual stream: the stream carries what
    earlier blocks wrote past a damaged layer, but a filter at the end of a
    block is read by every later block. On the VGG here wider layers
    can spare more, so their number of filters could explain much. To tell it
    from depth, compare layers of equal width: its three of 96 keep 73, 81 and
    89 %, with neighbouring intervals that overlap.
    """,
)

EXERCISES = (TOGETHER, OTHER_END, YOUR_OWN)
