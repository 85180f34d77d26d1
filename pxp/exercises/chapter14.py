"""Exercises of *Repair*."""

import torch

from .kinds import Code, Number, Open

SLOPE = Number(
    number="14.1",
    title="Who stands in",
    minutes=5,
    stars=1,
    text="""
    A layer gives $h_1 + h_2$. Neuron 2 goes; on every image it was
    $h_2 = h_1 / 2 + 1$. Which weight does neuron 1 get by least squares,
    without ridge? (What becomes of the bias, and what is left of the error?
    The solution says.)
    """,
    answer=1.5,
    step=0.01,
    why="""Its own weight, and half of one for the neuron that is gone.""",
    mistakes={
        0.5: "That is the *change* of the weight; it was 1 before.",
        1: "That is the repair by means, which only moves the bias.",
        2: "Each unit of neuron 1 stood for half a unit of neuron 2.",
        2.5: "The constant goes into the bias, not into the weight.",
        0.75: "Nothing is averaged here: the missing part is added.",
    },
    hints=(
        "Write what is missing, h₂, as a multiple of h₁ plus a constant.",
        "What is missing is added to the weight that is there already.",
    ),
    words="""
    What is missing is $h_2 = 0.5\\,h_1 + 1$, a straight line in what is left.
    So the weight becomes 1 + 0.5 = 1.5, the bias grows by 1, and nothing is
    left of the error: the layer gives on every image what it gave before. A
    neuron that the others determine costs nothing, once the layer behind them
    has new weights.
    """,
)


def refit(x, target, weight, bias, ridge):
    """Weight and bias with which a layer's outputs are nearest to target.

    x is (images, inputs), as the repaired layers before deliver them, target
    (images, outputs); weight (outputs, inputs) and bias (outputs,) are those
    that the layer has. The *change* of the weight is paid for: ridge times
    its square is added to the sum of the squared errors.
    """
    lack = target - (x @ weight.T + bias)
    middle, shift = x.mean(0), lack.mean(0)
    x, lack = x - middle, lack - shift
    gram = x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype)
    change = torch.linalg.solve(gram, x.T @ lack).T
    return weight + change, bias + shift - change @ middle


def _change(x, target, weight, bias, ridge):
    new, moved = refit(x, target, weight, bias, ridge)
    return new - weight, moved - bias


def _to_zero(x, target, weight, bias, ridge):
    return refit(
        x, target, torch.zeros_like(weight), torch.zeros_like(bias), ridge
    )


def _without_means(x, target, weight, bias, ridge):
    lack = target - (x @ weight.T + bias)
    gram = x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype)
    return weight + torch.linalg.solve(gram, x.T @ lack).T, bias


def _mean_alone(x, target, weight, bias, ridge):
    return weight, bias + (target - x @ weight.T - bias).mean(0)


def _bias_forgotten(x, target, weight, bias, ridge):
    new, _ = refit(x, target, weight, bias, ridge)
    return new, bias


def _bias_unmoved(x, target, weight, bias, ridge):
    new, _ = refit(x, target, weight, bias, ridge)
    return new, bias + (target - x @ weight.T - bias).mean(0)


def _no_ridge(x, target, weight, bias, ridge):
    return refit(x, target, weight, bias, 0)


def _of_the_mean(x, target, weight, bias, ridge):
    return refit(x, target, weight, bias, ridge * len(x))


def _bias_paid(x, target, weight, bias, ridge):
    lack = target - (x @ weight.T + bias)
    wide = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    gram = wide.T @ wide + ridge * torch.eye(wide.shape[1], dtype=x.dtype)
    change = torch.linalg.solve(gram, wide.T @ lack).T
    return weight + change[:, :-1], bias + change[:, -1]


def _on_its_side(x, target, weight, bias, ridge):
    new, moved = refit(x, target, weight, bias, ridge)
    return new.T, moved


def _cases():
    order = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.randn(*shape, generator=order, dtype=torch.float64)

    found = []
    for images, inputs, outputs, ridge in ((40, 3, 2, 1.0), (25, 4, 3, 5.0)):
        x = some(images, inputs) @ some(inputs, inputs) + 2
        made = some(outputs, inputs), some(outputs)
        target = x @ some(inputs, outputs) + 0.3 * some(images, outputs)
        found.append((x, target, *made, ridge))
    return found


REFIT = Code(
    number="14.2",
    title="A layer refitted",
    minutes=20,
    stars=3,
    text="""
    Write `refit` for a linear layer: the weight and the bias with which its
    outputs come nearest to `target`, where every change of the weight costs
    `ridge` times its square, and the bias is free. Solve for the change. The
    squared errors are *summed* over the images here; the chapter's covariances
    are means, so `ridge` is its λ times the number of images.
    """,
    reference=refit,
    cases=_cases,
    mistakes={
        "Without the ridge: it belongs on the diagonal of XᵀX.": _no_ridge,
        "That is the change; the layer's own weight and bias are added.": (
            _change
        ),
        "That draws the weights towards zero, not towards the old ones.": (
            _to_zero
        ),
        "The bias is free, so take x and what is missing from their means.": (
            _without_means
        ),
        "The bias is free: the ridge is for the weight alone.": _bias_paid,
        "That is the repair by means; the weight may change, too.": (
            _mean_alone
        ),
        "The bias moves too, so that the means agree.": _bias_forgotten,
        "The new weight moves the mean again; the bias has to make up.": (
            _bias_unmoved
        ),
        "The ridge is added to the *sum* of the squares, not to the mean.": (
            _of_the_mean
        ),
        "A weight is (outputs, inputs).": _on_its_side,
    },
    hints=(
        "What is missing, R, is target minus what the layer gives now.",
        "With X and R from their means, (XᵀX + ridge·I) Δᵀ = XᵀR.",
        "The bias makes the means agree: mean of R, less Δ times mean of x.",
    ),
)

ONE_CLASS = Open(
    number="14.3",
    title="Mended on one kind of clothes",
    minutes=30,
    stars=2,
    text="""
    Repair the VGG at 40 % by least squares with 100 images of a single class,
    each class in turn. How well does each repaired network know the class that
    it was mended on, and how well the others? Which class mends best, and does
    a hundred images of all classes do better?
    """,
    hints=("The labels choose the images; the repair never sees them.",),
    words="""
    Each knows its own class about as well as the whole network does, also the
    five that the cut had lost (dress, coat, sneaker, bag and ankle boot, of
    which it knew 0.22 at most). Of the others it knows half, most after
    bags (0.72), least after sandals and ankle boots (0.30 and 0.32). Part of
    it is a habit: these two answer with their own class to two thirds of all
    images, where one tenth would be right. The hundred images of all classes
    reach 0.93. A repair keeps what its images need; one draw each, on 500 test
    images.
    """,
)

EXERCISES = (SLOPE, REFIT, ONE_CLASS)
