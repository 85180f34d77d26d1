"""Exercises of *Pruning CNNs*."""

import pxp

from .kinds import Choice, Code, Open

CONTROL = Choice(
    number="5.1",
    title="What the control controls",
    minutes=10,
    stars=1,
    text="""
    A criterion prunes all 40 filters of one layer that turns out to be
    dispensable, and nothing else. How does its shuffled control do, and what
    does "criterion minus control" tell?
    """,
    options={
        "The control does worse: it prunes other filters.": (
            "It prunes as many of each layer, and of a layer that goes whole "
            "there are no others."
        ),
        "Both do the same, so the criterion knows nothing.": (
            "They do the same, but the criterion has found the layer. The "
            "difference does not see that."
        ),
        "Both do the same: the lead, if any, is the choice of the layer.": (
            "The control says which of two questions was answered, not "
            "whether the answer is worth something."
        ),
        "The control does as chance over the whole network does.": (
            "Chance takes filters from all layers; the control takes them "
            "where the criterion does."
        ),
    },
    right=3,
    hints=("How many ways are there to take 40 of 40?",),
    words="""
    The control prunes the same layer, and of a layer that goes whole there is
    no choice: criterion and control are one and the same mask, and the
    difference is 0. It is right that the choice *within* the layer has added
    nothing. It would be wrong to conclude that the criterion knows nothing: it
    has found the layer. The control asks which of the two questions was
    answered, not whether the answer is worth something.
    """,
)


def report(tuning, test):
    """The chosen criterion's name and its area, of curves by name."""
    chosen = max(tuning, key=lambda name: tuning[name].a_pr)
    return chosen, test[chosen].a_pr


def _on_test(tuning, test):
    return report(test, test)


def _promised(tuning, test):
    return report(tuning, tuning)


def _last(tuning, test):
    chosen = max(tuning, key=lambda name: tuning[name].accuracy[-1])
    return chosen, test[chosen].a_pr


def _without_zero(tuning, test):
    chosen, _ = report(tuning, test)
    return chosen, float(test[chosen].accuracy[1:].mean())


def _worst(tuning, test):
    chosen = min(tuning, key=lambda name: tuning[name].a_pr)
    return chosen, test[chosen].a_pr


def _curves(**accuracies):
    rates = (0, 0.1, 0.2, 0.3)
    return {name: pxp.Curve(rates, (a,)) for name, a in accuracies.items()}


def _cases():
    return [
        (
            _curves(
                epsilon=(0.92, 0.90, 0.86, 0.60),
                zplus=(0.92, 0.85, 0.80, 0.65),
                taylor=(0.92, 0.80, 0.60, 0.50),
            ),
            _curves(
                epsilon=(0.90, 0.86, 0.79, 0.51),
                zplus=(0.90, 0.88, 0.82, 0.70),
                taylor=(0.90, 0.84, 0.76, 0.59),
            ),
        ),
        (
            _curves(
                epsilon=(0.91, 0.86, 0.60, 0.20),
                zplus=(0.91, 0.83, 0.79, 0.40),
                taylor=(0.91, 0.82, 0.74, 0.46),
            ),
            _curves(
                epsilon=(0.93, 0.89, 0.81, 0.72),
                zplus=(0.93, 0.70, 0.50, 0.30),
                taylor=(0.93, 0.80, 0.70, 0.25),
            ),
        ),
    ]


CHOOSE = Code(
    number="5.2",
    title="Choose first, report later",
    minutes=20,
    stars=2,
    text="""
    Choose between LRP-ε, LRP-z⁺ and Taylor on 100 tuning images, with the
    first draw of references and the rates 0, 10, 20 and 30 %, for each of the
    two networks. Is the choice the winner on the test images, according to the
    table above? Write `report` first, which takes the curves by criterion on
    either set of images and gives the choice with its area as it may be
    reported. `data.tune` has the tuning images.
    """,
    reference=report,
    cases=_cases,
    mistakes={
        "You chose on the test images, which are for the report.": _on_test,
        "That is the worst on the tuning images.": _worst,
        "That is the area on the tuning images, of which the winner's is too "
        "high.": _promised,
        "You chose by the last rate; the area is over all of them.": _last,
        "The area counts rate 0, too.": _without_zero,
    },
    hints=(
        "Which curves may decide, and which may be reported?",
        "`max(tuning, key=…)`, then `test[…].a_pr`.",
    ),
)

AGAIN = Open(
    number="5.3",
    title="Score, prune, score again",
    minutes=60,
    stars=3,
    text="""
    One shot ranks all filters of the *intact* network. Once some are gone,
    others change their roles. Reach 30 % in three steps of 10 %, each with
    fresh scores of the network as it then is. Does the order of the criteria
    stay the same? Is the gain worth the extra attributions?

    A model report for two criteria and five draws follows: accuracy at 30 %,
    in one shot and in three steps.
    """,
    hints=("Inside `pxp.masked` what is silenced scores zero.",),
    words="""
    Watch `pxp.plots.kept_per_layer` as well: do fresh scores stop the cascade
    in which one layer is emptied because it looked weak at the start, or start
    one? A criterion of weight norms cannot gain from fresh scores, since
    pruning other filters does not change them. That every criterion that reads
    images gains is not shown: on these 100 images ε gains in all five draws,
    z⁺ gains in three and loses in two, once by a single image.
    """,
)

EXERCISES = (CONTROL, CHOOSE, AGAIN)
