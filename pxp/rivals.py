"""Rivals of relevance: criteria that ask the weights, the activations, or the gradient squared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .criteria import Criterion
from .network.components import Layer
from .network.layers import LAYERS, LINEAR, TRANSPOSED
from .network.replica import eager, replica
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
    Where no activation module directly takes the output, as where it is called as a function, the output itself.
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
    square of its output, after the activation module that directly takes it (one that is called as a function is not
    seen), times the L2 norm of the columns that read it. It needs neither labels nor gradients.

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
            name: (
                torch.cdist(weight, weight, compute_mode="donot_use_mm_for_euclid_dist").sum(1)[None, None]
                / max(1, len(weight) - 1)
            )
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

    Which those are, directional derivatives tell: every layer gives something of its own, whatever it is given, so that
    a change of one of them reaches its readers and nobody else. Where channels are not mixed, a change by a number of
    each channel's own arrives, relative to a change of all by 1, as one of these numbers.

    Raises
    ------
    ValueError
        They are mixed, or nothing was seen to read a channel.
    """
    modules: dict[str, Any] = dict(probe.twin.named_modules())
    found: dict[str, Tensor] = {}
    for name in probe.units:
        inner = reader_of(modules[name])
        if inner is not None:
            found[name] = _column_norms(inner)
    rest = [name for name in probe.units if name not in found]
    if rest:
        readers = _Readers(replica(probe.twin).double(), images.double())
        found |= {name: readers.columns(name, probe.units[name]) for name in rest}
    return found


class _Readers:
    """Sees what reads a layer's channels.

    Parameters
    ----------
    twin : nn.Module
        In float64; it is changed.
    images : Tensor
    """

    def __init__(self, twin: Any, images: Tensor) -> None:
        self.twin, self.images = twin, images
        self.layers: dict[str, Any] = {n: module for n, module in twin.named_modules() if isinstance(module, LAYERS)}
        self.given: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        with _hooked(self.layers, lambda name, inputs, output: self.given[name].append(output.clone())), eager():
            twin(images.clone())

    def columns(self, name: str, unit: Layer) -> Tensor:
        """The squared norms of what reads each channel of a layer."""
        generator = torch.Generator().manual_seed(0)
        jitter = torch.rand(unit.size, generator=generator, dtype=torch.float64)
        codes = (1 + (torch.arange(unit.size) + jitter) / unit.size).to(self.images)  # increasing, and in no proportion
        origins: dict[tuple[str, int], Tensor] = {}  # reader and its call → the channel that each of its inputs is
        # what it gives itself, or anything: an activation may let nothing pass for the one or the other
        idle = 0
        for scale in (0.0, 1.0, -1.0, 10.0, -10.0, 0.3, -0.3, 100.0, -100.0, 3.0, -3.0):
            before = sum(int((origin >= 0).sum()) for origin in origins.values())
            plain, coded = (self._changes(name, unit, scale, part) for part in (None, codes))
            for call, (ones, numbers) in enumerate(zip(plain, coded, strict=True)):
                if ones[1] is not None and numbers[1] is not None:
                    origin = self._origin(name, unit, ones[0], ones[1], numbers[1], codes)
                    known = origins.setdefault((ones[0], call), origin)
                    if bool(((known != origin) & (known >= 0) & (origin >= 0)).any()):
                        raise self._mixed(name, unit, ones[0])
                    origins[ones[0], call] = torch.maximum(known, origin)
            # three times nothing new is taken for all that there is, unless a channel is still unread
            idle = idle + 1 if before == sum(int((origin >= 0).sum()) for origin in origins.values()) else 0
            read = torch.cat([origin[origin >= 0] for origin in origins.values()] or [torch.zeros(0)])
            if idle == 3 and len(read.unique()) == unit.size:
                break
        total = self.images.new_zeros(unit.size)
        seen = torch.zeros_like(total, dtype=torch.bool)
        for (reader, _), origin in origins.items():
            known = origin >= 0
            total.index_add_(0, origin[known], _column_norms(self.layers[reader])[known])
            seen[origin[known]] = True
        if not bool(seen.all()):
            missing = (~seen).nonzero().flatten().tolist()
            raise ValueError(
                f"nothing was seen to read {unit.kind}s {missing[:5]} of {name!r}, so no weights are theirs"
            )
        return total

    def _changes(
        self, changed: str, unit: Layer, scale: float, codes: Tensor | None
    ) -> list[tuple[str, Tensor | None]]:
        """The change of every layer's input, call by call, when each channel of one changes by its code or by 1."""
        seen: list[tuple[str, Tensor | None]] = []
        calls = dict.fromkeys(self.layers, 0)
        generator = torch.Generator().manual_seed(round(10 * abs(scale)))

        def pinned(name: str, inputs: tuple, output: Tensor | None) -> Tensor:
            seen.append((name, forward_ad.unpack_dual(inputs[0]).tangent))
            if calls[name] == len(self.given[name]):
                raise ValueError(
                    f"{name!r} was called another number of times than before, or by its forward and not as a module; "
                    f"so what reads {unit.kind}s of {changed!r} cannot be told"
                )
            kept = self.given[name][calls[name]].clone()
            calls[name] += 1
            if name != changed:
                return kept
            if scale:
                kept = scale * torch.randn(kept.shape, generator=generator, dtype=torch.float64).abs().to(kept)
            channel = 1 if unit.kind == "filter" else -1
            tangent = torch.ones_like(kept)
            if codes is not None:
                tangent = (tangent.movedim(channel, -1) * codes).movedim(-1, channel)
            return forward_ad.make_dual(kept, tangent)

        idle = {name: layer for name, layer in self.layers.items() if self.given[name] and _does_nothing_else(layer)}
        busy = {name: layer for name, layer in self.layers.items() if name not in idle}
        with forward_ad.dual_level(), _replaced(idle, pinned), _hooked(busy, pinned), eager():
            self.twin(self.images.clone())
            return seen

    def _origin(self, name: str, unit: Layer, reader: str, ones: Tensor, numbers: Tensor, codes: Tensor) -> Tensor:
        """The channel that each input of a reader is; −1 where nothing passed."""
        dimension = -1 if isinstance(self.layers[reader], LINEAR) else 1
        ones, numbers = (t.movedim(dimension, -1).flatten(0, -2) for t in (ones, numbers))
        least = 1e-9 * numbers.abs().max()
        live = ones.abs() > least
        ratio = torch.where(live, numbers / torch.where(live, ones, 1), 0)
        nearest = self._near(ratio, codes)
        close = (codes[nearest] - ratio).abs() < 1e-9
        origin = torch.where(live, nearest, -1)
        highest = origin.amax(0)
        if bool(torch.where(live, ~close | (origin != highest), numbers.abs() > 4 * least).any()):
            raise self._mixed(name, unit, reader)
        return highest

    @staticmethod
    def _near(ratio: Tensor, codes: Tensor) -> Tensor:
        if len(codes) == 1:
            return torch.zeros_like(ratio, dtype=torch.long)
        right = torch.searchsorted(codes, ratio.contiguous()).clamp(1, len(codes) - 1)
        return torch.where(ratio - codes[right - 1] < codes[right] - ratio, right - 1, right)

    def _mixed(self, name: str, unit: Layer, reader: str) -> ValueError:
        return ValueError(
            f"between {name!r} ({unit.kind}s) and {reader!r}, which reads it, channels are mixed; so no weights of "
            f"{reader!r} are those that read one {unit.kind}"
        )


def _column_norms(layer: Any) -> Tensor:
    """Squared L2 norm of what a layer multiplies each of its inputs with, (inputs,), float64."""
    weight = layer.weight.double().square()
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, TRANSPOSED):
        return weight.flatten(1).sum(1)
    weight = weight.unflatten(0, (groups, -1)).flatten(3) if weight.ndim > 2 else weight[None, ..., None]
    return weight.sum((1, 3)).flatten()


def _does_nothing_else(layer: Any) -> bool:
    """Whether nobody misses a layer's own work: no subclass, no forward of its own, nobody behind it."""
    return type(layer) in LAYERS and "forward" not in vars(layer) and not layer._forward_hooks


class _replaced:
    """Calls ``instead(name, inputs, None)`` in the place of each layer, whose own work is not done."""

    def __init__(self, layers: dict[str, Any], instead: Callable[[str, tuple, Tensor | None], Tensor]) -> None:
        self.layers, self.instead = layers, instead

    def __enter__(self) -> None:
        for name, layer in self.layers.items():
            layer.forward = lambda *inputs, name=name, **options: self.instead(name, inputs, None)

    def __exit__(self, *_: object) -> None:
        for layer in self.layers.values():
            del layer.forward


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
