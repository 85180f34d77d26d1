"""Exercises of *Traps*."""

import copy

import torch
from torch import nn

from . import small
from .kinds import Choice, Code, Open

NO_SIGN = Choice(
    number="6.1",
    title="Why z⁺ has no sign",
    minutes=10,
    stars=1,
    text="""
    The signed and the magnitude order of LRP-z⁺ gave nearly the same curve.
    Why? And why *nearly*?
    """,
    options={
        "Its relevance is never negative; the rest is rounding.": (
            "It has the sign of what it starts with. Which sample starts with "
            "something negative?"
        ),
        "Its shares are never negative; a negative logit turns them.": (
            "Such a sample, mostly one that the network gets wrong, counts "
            "with opposite signs in the two means."
        ),
        "It explains every class alike, so the signs cancel.": (
            "That z⁺ hardly notices the class is true, and says nothing "
            "about signs."
        ),
        "The network has few negative weights.": (
            "It has as many as others; z⁺ leaves them out of the shares."
        ),
    },
    right=2,
    hints=(
        "Which of the factors in a z⁺ share can be negative behind a ReLU?",
        "Relevance starts with the true class's logit.",
    ),
    words="""
    Behind a ReLU all inputs of a layer are non-negative, so z⁺ distributes
    relevance by $a_i w_{ij}^+ / (\\sum_i a_i w_{ij}^+ + b_j^+)$: shares that
    are non-negative. A sample that starts with a positive logit gives
    non-negative relevance everywhere, and the mean of absolute values is the
    mean. *Nearly*, because the start is the logit of the true class, which can
    be negative, mostly for a sample that the network gets wrong. Such a sample
    contributes with opposite signs to the two means.
    """,
)


def batch_logits(model, images):
    """Logits with the batch's statistics in every BatchNorm."""
    training = copy.deepcopy(model)
    for module in training.modules():
        module.train(isinstance(module, torch.nn.BatchNorm2d))
    with torch.no_grad():
        return training(images)


def _as_it_is(model, images):
    with torch.no_grad():
        return model(images)


def _all_training(model, images):
    with torch.no_grad():
        return copy.deepcopy(model).train()(images)


def _children(model, images):
    training = copy.deepcopy(model)
    for module in training.modules():
        module.train(isinstance(module, nn.Dropout))
    with torch.no_grad():
        return training(images)


def _twice(model, images):
    training = copy.deepcopy(model)
    for module in training.modules():
        module.train(isinstance(module, torch.nn.BatchNorm2d))
    with torch.no_grad():
        training(images)
        return training.eval()(images)


OWN_TRAP = Code(
    number="6.2",
    title="A trap of your own",
    minutes=15,
    stars=2,
    text="""
    Batch statistics are a trap of the same family: measure the VGG pruned by
    40 % (LRP-ε, first draw) with its BatchNorm layers in `train()` mode, in
    which they use the statistics of the batch instead of the stored ones. Is
    the accuracy higher or lower than with everything in `eval()` mode? Why?
    Write `batch_logits` first: dropout stays in `eval()` mode, and since
    BatchNorm's stored statistics change in `train()` mode, it works on a copy.
    """,
    reference=batch_logits,
    cases=lambda: [(small.network(), small.images(16) + 0.5)],
    mistakes={
        "That is with the stored statistics.": _as_it_is,
        "Dropout is on, too: `model.train()` switches it.": _all_training,
        "That is the dropout in `train()` mode, and BatchNorm is not.": (
            _children
        ),
        "That is back in `eval()` mode, with statistics that moved a tenth "
        "of the way.": _twice,
    },
    hints=(
        "`copy.deepcopy(model)`, then switch single modules.",
        "`module.train(isinstance(module, torch.nn.BatchNorm2d))`.",
    ),
    words="""
    Higher: without the pruned filters every BatchNorm gets other means and
    variances than those it has stored, and the batch's own centre and scale
    its inputs again. It is no fair measurement, since an image's answer then
    depends on the others of its batch. [Repair](14_repair.ipynb) makes a
    method of it.
    """,
)

ANOTHER_BLOCK = Open(
    number="6.3",
    title="Another block",
    minutes=45,
    stars=3,
    text="""
    Is the last block the only one that the ResNet can miss? Silence each
    residual block whole, alone and in pairs (`pxp.Mask` with the block's
    filters of `conv2` pruned), and rank the blocks by how much the
    accuracy falls without them.
    Would LRP-ε that is told of the best pair be better still at 30 %?
    """,
    hints=("`pxp.Mask.all(channels)` is the mask to start with.",),
    words="""
    Build the mask from `pxp.Mask.all(channels)`: `kept =
    dict(pxp.Mask.all(channels)); kept[f"{block}.conv2"] =
    torch.zeros(channels[f"{block}.conv2"].size, dtype=torch.bool)`. Blocks
    that change the width of the stream have a convolution on the skip path as
    well (`downsample.0`) and cannot be silenced by `conv2` alone. Report the
    accuracy on `data.tune`, choose there, and measure the choice on
    `data.eval`: with eight blocks and 28 pairs the best one is partly luck.
    """,
)

EXERCISES = (NO_SIGN, OWN_TRAP, ANOTHER_BLOCK)
