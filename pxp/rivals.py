"""Rivals of relevance: criteria that ask the weights, the activations, or the gradient squared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .criteria import Criterion
from .network.layers import LAYERS, LINEAR, TRANSPOSED
from .network.replica import eager
from .network.silence import reader_of

if TYPE_CHECKING:
    from .probe import Probe


@dataclass(frozen=True)
class Fisher(Criterion):
    r"""The mean square of :class:`pxp.Taylor`: E[(∂loss/∂m)²], where m = 1 multiplies the component's output.

    The diagonal of the empirical Fisher information with respect to these masks, and so, up to the factor ½, the loss
    that the cut costs by a second-order expansion around a trained network (Theis et al. 2018, arXiv:1801.05787,
    equation 8; Liu et al. 2021, arXiv:2108.00708, for groups). A square has no sign.
    """

    has_sign: ClassVar[bool] = False

    def values(self, probe: Probe) -> Iterator[dict[str, Tensor]]:
        for images, labels in probe.batches():
            found = probe.relevance(images, labels, start="loss")
            yield {name: value.sum(1, keepdim=True).square() for name, value in found.items()}


@dataclass(frozen=True)
class Variance(Criterion):
    """Variance of the activation over samples and places, after the non-linearity that follows.

    What hardly varies can be replaced by its mean (Variance-Based Pruning, arXiv:2507.12988, of MLP neurons, which also
    moves that mean into the next bias: ``pxp.repair(..., method="mean")``). Of a head, the sum over its channels.
    Where no activation module directly takes the output, the output itself.
    """

    has_sign: ClassVar[bool] = False

    def values(self, probe: Probe) -> Iterator[dict[str, Tensor]]:
        sums, squares = _moments(probe, (lambda a: a, torch.square))
        number = {name: total[1] for name, total in sums.items()}
        yield {
            name: _of_components(probe, name, squares[name][0] / number[name] - (total / number[name]).square())
            for name, (total, _) in sums.items()
        }


@dataclass(frozen=True)
class WeightedActivation(Criterion):
    r"""Norm of the activation times norm of the weights that read it.

    Wanda's idea (Sun et al. 2024, arXiv:2306.11695, \|W\| · ‖X‖ of single weights) for whole components: the root mean
    square of what the next layers read of it, after the non-linearity, times the L2 norm of the columns that read it.
    It needs neither labels nor gradients.

    Raises
    ------
    ValueError
        By :func:`pxp.attribute`: between a component and the layers that read it, something mixes channels, such as a
        LayerNorm.
    """

    has_sign: ClassVar[bool] = False

    def values(self, probe: Probe) -> Iterator[dict[str, Tensor]]:
        first: list[Tensor] = []
        (squares,) = _moments(probe, (torch.square,), first)
        outgoing = columns(probe, first[0])
        yield {
            name: _of_components(probe, name, total / number * outgoing[name]).sqrt()
            for name, (total, number) in squares.items()
        }


@dataclass(frozen=True)
class GeometricMedian(Criterion):
    """Mean distance of a component's incoming weights to those of the others in its layer; looks at no image.

    What lies near the geometric median of its layer can be replaced by the others (FPGM, He et al. 2019,
    arXiv:1811.00250, equation 6). The mean, where the source has the sum, so that layers of other sizes compare.

    Parameters
    ----------
    folded : bool, default True
        Merge BatchNorm into the weights first, as for :class:`pxp.Magnitude`.
    """

    folded: bool = True
    has_sign: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "folded", bool(self.folded))

    def values(self, probe: Probe) -> Iterator[dict[str, Tensor]]:
        # the direct way, since the one by products loses small distances
        yield {
            name: torch.cdist(weight, weight, compute_mode="donot_use_mm_for_euclid_dist").mean(1)[None, None]
            for name, weight in probe.weights(folded=self.folded).items()
        }


Moments = dict[str, tuple[Tensor, int]]  # layer → sum for each channel, and of how many values


def _moments(
    probe: Probe, functions: tuple[Callable[[Tensor], Tensor], ...], first: list[Tensor] | None = None
) -> tuple[Moments, ...]:
    """Sums of functions of the activations, for each channel, over all samples and places; in float64."""
    found: tuple[Moments, ...] = tuple({} for _ in functions)

    def note(name: str, output: Tensor) -> None:
        layer = probe.units[name]
        if layer.activation is not None:
            output = probe.twin.get_submodule(layer.activation).forward(output)
        channel = 1 if layer.kind == "filter" else -1
        values = output.movedim(channel, -1).flatten(0, -2).double()
        for each, function in zip(found, functions, strict=True):
            total, number = each.get(name, (torch.zeros_like(values[0]), 0))
            each[name] = total + function(values).sum(0), number + len(values)

    for images, _ in probe.batches():
        probe.forward(images, note)
        if first is not None and not first:
            first.append(images[:2])
    return found


def _of_components(probe: Probe, name: str, channels: Tensor) -> Tensor:
    """(1, 1, components) from (channels,), of which a head has several."""
    return channels.view(probe.units[name].size, -1).sum(1)[None, None]


@torch.no_grad()
def columns(probe: Probe, images: Tensor) -> dict[str, Tensor]:
    """The squared L2 norm of the weights that read each channel of each layer, (channels,).

    Which those are, two directional derivatives tell: every layer gives what it gave, so that a change of one of them
    reaches its readers and nobody else; and where channels are not mixed, the ratio of the two changes is the number of
    the channel from which they come.

    Raises
    ------
    ValueError
        They are mixed.
    """
    modules: dict[str, Any] = dict(probe.twin.named_modules())
    layers = {name: module for name, module in modules.items() if isinstance(module, LAYERS)}
    found: dict[str, Tensor] = {}
    for name in probe.units:
        inner = reader_of(modules[name])
        if inner is not None:
            found[name] = _column_norms(inner)
    rest = [name for name in probe.units if name not in found]
    if not rest:
        return found
    given: dict[str, list[Tensor]] = {name: [] for name in layers}
    with _hooked(layers, lambda name, inputs, output: given[name].append(output.clone())), eager():
        probe.twin(images)
    for name in rest:
        changes: list[list[tuple[str, Tensor | None]]] = []
        for coded in (False, True):
            with forward_ad.dual_level():
                changes.append(_read(probe, layers, given, name, images, coded))
        found[name] = _joined(probe, name, layers, *changes)
    return found


def _read(
    probe: Probe, layers: dict[str, Any], given: dict[str, list[Tensor]], changed: str, images: Tensor, coded: bool
) -> list[tuple[str, Tensor | None]]:
    """The change of every layer's input, call by call, when each channel of one changes by 1, or by its number."""
    seen: list[tuple[str, Tensor | None]] = []
    calls = dict.fromkeys(layers, 0)
    channel = 1 if probe.units[changed].kind == "filter" else -1

    def pinned(name: str, inputs: tuple, output: Tensor) -> Tensor:
        seen.append((name, forward_ad.unpack_dual(inputs[0]).tangent))
        kept = given[name][calls[name]].clone()
        calls[name] += 1
        if name != changed:
            return kept
        tangent = torch.ones_like(kept)
        generator = torch.Generator().manual_seed(0)
        kept = 1 + torch.rand(kept.shape, generator=generator).to(kept)  # where no activation lets nothing pass
        if coded:
            numbers = torch.arange(1, kept.shape[channel] + 1, dtype=kept.dtype, device=kept.device)
            tangent = (tangent.movedim(channel, -1) * numbers).movedim(-1, channel)
        return forward_ad.make_dual(kept, tangent)

    with _hooked(layers, pinned), eager():
        probe.twin(images)
    return seen


def _joined(
    probe: Probe,
    name: str,
    layers: dict[str, Any],
    plain: list[tuple[str, Tensor | None]],
    coded: list[tuple[str, Tensor | None]],
) -> Tensor:
    """The norms of the columns that read each channel."""
    unit = probe.units[name]
    number = layers[name].weight.shape[1 if isinstance(layers[name], TRANSPOSED) else 0]
    total = torch.zeros(number, dtype=torch.float64, device=layers[name].weight.device)
    for (reader, ones), (_, numbers) in zip(plain, coded, strict=True):
        if ones is None or numbers is None:
            continue
        layer = layers[reader]
        dimension = -1 if isinstance(layer, LINEAR) else 1
        ones, numbers = (t.movedim(dimension, -1).flatten(0, -2).double() for t in (ones, numbers))
        least = 1e-6 * numbers.abs().max()
        live = ones.abs() > least
        ratio = torch.where(live, numbers / torch.where(live, ones, 1), 0)
        origin = ratio.amax(0).round()
        if bool(torch.where(live, (ratio - origin).abs() > 1e-2, numbers.abs() > least).any()):
            raise ValueError(
                f"between {name!r} ({unit.kind}s) and {reader!r}, which reads it, channels are mixed; so no weights of "
                f"{reader!r} are those that read one {unit.kind}"
            )
        known = origin > 0
        total.index_add_(0, origin[known].long() - 1, _column_norms(layer)[known].to(total))
    return total


def _column_norms(layer: Any) -> Tensor:
    """Squared L2 norm of what a layer multiplies each of its inputs with, (inputs,), float64."""
    weight = layer.weight.double().square()
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, TRANSPOSED):
        return weight.flatten(1).sum(1)
    weight = weight.unflatten(0, (groups, -1)).flatten(3) if weight.ndim > 2 else weight[None, ..., None]
    return weight.sum((1, 3)).flatten()


class _hooked:
    """Calls ``note(name, inputs, output)`` after each layer; what it returns replaces the output."""

    def __init__(self, layers: dict[str, Any], note: Callable[[str, tuple, Tensor], Tensor | None]) -> None:
        self.layers, self.note = layers, note

    def __enter__(self) -> None:
        self.handles = [
            layer.register_forward_hook(lambda _, inputs, output, name=name: self.note(name, inputs, output))
            for name, layer in self.layers.items()
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
