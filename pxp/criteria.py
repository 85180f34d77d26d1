"""Criteria: what a component is worth. Each is a small object with one method; a criterion of your own is another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from numbers import Integral
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .baseline import Baseline, as_baseline, on_the_way

if TYPE_CHECKING:
    from .probe import Probe

STARTS = ("logit", "one", "margin", "loss")
ABSOLUTE = ("token", "sample")


class Criterion(ABC):
    """What a component is worth; the base of all criteria.

    Attributes
    ----------
    absolute : {"token", "sample"}, default "token"
        Where ``scores`` take the absolute value of what :meth:`values` gives: of every token's value, or of a sample's
        sum over tokens. The sign is kept in ``scores.signed``: ``scores.select(rate, by="signed")``.
    has_sign : bool, default True
        Whether positive values mean useful for the true class, and negative ones harmful, see
        :meth:`pxp.Scores.select`.
    """

    absolute: str = "token"
    has_sign: ClassVar[bool] = True

    @abstractmethod
    def values(self, probe: Probe) -> Iterator[dict[str, Tensor]]:
        """Give, batch by batch, the value of every component for every sample.

        Parameters
        ----------
        probe : pxp.probe.Probe
            The model, ready to be asked: for reference samples, activations, gradients, weights.

        Yields
        ------
        dict of str to Tensor
            Layer → (samples, tokens, components), for every layer of ``probe.units``. :func:`pxp.attribute` sums over
            tokens and takes the mean over samples. What looks at no sample yields once, with one sample.
        """


@dataclass(frozen=True)
class Taylor(Criterion):
    r"""First-order Taylor expansion: activation × gradient (Molchanov et al. 2017).

    On a ReLU network this is LRP-0 with another start.

    Parameters
    ----------
    start : {"loss", "logit", "one", "margin"}, default "loss"
        What is differentiated: minus the cross-entropy loss (as in the source, with the sign that positive means
        useful), or as for :class:`pxp.LRP`.
    absolute : {"token", "sample"}, default "token"
        As for :class:`pxp.LRP`. With ``"sample"`` the score of a head is Michel et al.'s (2019) importance: the mean of
        \|∂loss/∂m\|, where m = 1 multiplies the head's output.
    """

    start: str = "loss"
    absolute: str = "token"

    def __post_init__(self) -> None:
        check_start(self.start)
        check_absolute(self.absolute)

    def values(self, probe: Probe) -> Iterator[dict[str, Tensor]]:
        for images, labels in probe.batches():
            yield probe.relevance(images, labels, start=self.start)


@dataclass(frozen=True)
class IntegratedGradients(Criterion):
    """Gradients at the component, averaged over images on the way from black to the image (Sundararajan et al. 2017).

    At the input of a network (:func:`pxp.heatmap`) the relevance of all pixels adds up, with enough steps, to the logit
    of the image minus that of black.

    Parameters
    ----------
    steps : int, default 20
        Images on the way, the last one being the image itself; costs as many passes.
    influence : bool, default False
        False: the averaged gradient times the component's change of activation between black and the image.
        True: the averaged gradient alone, the internal influence of Leino et al. 2018, as the paper's public code does.
    start : {"logit", "one", "margin", "loss"}, default "logit"
        What is differentiated.
    baseline : float or tuple of float, default 0.0
        The value of black in the images that are given, one for all channels or one for each. Black is 0 only where the
        images are not normalised: behind (x − mean) / std it is ``tuple(-m / s for m, s in zip(mean, std))``.

    Raises
    ------
    ValueError
        Unknown start; ``steps`` below 1; a baseline that is empty or not finite, or, when images are read, of another
        number of channels.
    TypeError
        A baseline that is neither a number nor a tuple of numbers.
    """

    steps: int = 20
    influence: bool = False
    start: str = "logit"
    baseline: Baseline = 0.0

    def __post_init__(self) -> None:
        check_start(self.start)
        object.__setattr__(self, "steps", as_count("steps", self.steps))
        object.__setattr__(self, "influence", bool(self.influence))
        object.__setattr__(self, "baseline", as_baseline(self.baseline))

    def __repr__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        shown = [f"{name}={value!r}" for name, value in values.items() if name != "baseline" or value != 0]
        return f"IntegratedGradients({', '.join(shown)})"

    def values(self, probe: Probe) -> Iterator[dict[str, Tensor]]:
        for images, labels in probe.batches():
            yield self._of_batch(probe, images, labels)

    def _of_batch(self, probe: Probe, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        # a layer that runs several times has a gradient and an activation for each of its calls
        flows: dict[tuple[str, int], Tensor] = {}
        ends: dict[tuple[str, int], Tensor] = {}
        starts: dict[str, list[Tensor]] = {}
        calls: Counter[str] = Counter()

        def note(name: str, output: Tensor, flow: Tensor) -> None:
            key = name, calls[name]
            calls[name] += 1
            flows[key] = flows[key] + flow if key in flows else flow.clone()
            ends[key] = output

        for step in range(1, self.steps + 1):
            calls.clear()
            point = on_the_way(images, self.baseline, step / self.steps)
            probe.backward(point, labels, note, start=self.start, exact=True)
        if not self.influence:
            black = on_the_way(images[:1], self.baseline, 0)
            probe.forward(black, lambda name, output: starts.setdefault(name, []).append(output.clone()))
        found: dict[str, Tensor] = {}
        for (name, call), flow in flows.items():
            # the backward pass visits the calls of a shared layer in reverse order
            change = 1.0 if self.influence else ends[name, call] - starts[name][-1 - call]
            value = probe.per_component(name, flow * change / self.steps)
            found[name] = found[name] + value if name in found else value
        return probe.completed(found, labels)


@dataclass(frozen=True)
class Activation(Criterion):
    """Mean activation over space and samples, after the non-linearity that follows (Molchanov et al. 2017).

    Where no activation module directly takes the output (before a residual sum, or where the activation is called as a
    function), the output itself. Of an attention head, whose channels have no preferred sign, the mean absolute output.
    """

    has_sign: ClassVar[bool] = False

    def values(self, probe: Probe) -> Iterator[dict[str, Tensor]]:
        for images, _ in probe.batches():
            found: dict[str, Tensor] = {}

            def note(name: str, output: Tensor, found: dict[str, Tensor] = found) -> None:
                layer = probe.units[name]
                if layer.activation is not None:
                    output = probe.twin.get_submodule(layer.activation).forward(output)
                value = probe.per_component(name, output.abs() if layer.kind == "head" else output)
                elements = output.numel() / (value.shape[0] * value.shape[2])
                found[name] = found.get(name, 0) + value / elements

            probe.forward(images, note)
            yield found


@dataclass(frozen=True)
class Magnitude(Criterion):
    """L2 norm of a component's incoming weights; looks at no image (Li et al. 2017, with L1).

    Of an attention head: of its query, key, value and output weights together; of a gated MLP's hidden unit: of both
    factors' weights.

    Parameters
    ----------
    folded : bool, default True
        Merge BatchNorm into the weights first. Raw weights compare layers on scales that BatchNorm then undoes.
    """

    folded: bool = True
    has_sign: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "folded", bool(self.folded))

    def values(self, probe: Probe) -> Iterator[dict[str, Tensor]]:
        yield {name: weight.norm(dim=1)[None, None] for name, weight in probe.weights(folded=self.folded).items()}


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform random scores, the chance level.

    Parameters
    ----------
    seed : int, default 0

    Raises
    ------
    ValueError
        A seed that is no whole number.
    """

    seed: int = 0
    has_sign: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", as_count("seed", self.seed, least=0))

    def values(self, probe: Probe) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        yield {
            name: torch.rand(layer.size, generator=generator, dtype=torch.float64)[None, None]
            for name, layer in probe.units.items()
        }


def as_count(name: str, value: object, least: int = 1) -> int:
    """A whole number as an int, whatever kind of number it was.

    Raises
    ------
    ValueError
        No whole number, or one below ``least``.
    """
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(value)


def check_start(start: str) -> None:
    """Raise ValueError unless ``start`` is one of the known ones."""
    if start not in STARTS:
        raise ValueError(f"unknown start {start!r}; allowed: {', '.join(map(repr, STARTS))}")


def check_absolute(absolute: str) -> None:
    """Raise ValueError unless ``absolute`` is one of the known ways."""
    if absolute not in ABSOLUTE:
        signed = "; scores.select(rate, by='signed') ranks with the sign" if absolute == "never" else ""
        raise ValueError(f"absolute must be one of {', '.join(map(repr, ABSOLUTE))}, got {absolute!r}{signed}")
