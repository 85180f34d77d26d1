"""Masks: which components are kept, and how the others are silenced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from .files import load_tensors, save_tensors
from .network.components import Components
from .network.gated import is_gated
from .network.replica import eager
from .network.silence import silence_heads, silence_units


class ByLayer(Mapping[str, Tensor]):
    """A 1-D tensor per layer of components, in the order in which the layers run."""

    def __init__(self, units: Components, tensors: Mapping[str, Tensor], what: str = "") -> None:
        what = what or type(self).__name__
        if set(tensors) != set(units):
            odd = sorted(set(tensors) ^ set(units))
            raise ValueError(f"{what} and components name different layers: {', '.join(odd)}")
        for name, layer in units.items():
            if not isinstance(tensors[name], Tensor):
                raise TypeError(f"{what} of layer {name!r} must be a tensor, got {type(tensors[name]).__name__}")
            if tensors[name].shape != (layer.size,):
                raise ValueError(
                    f"{what} of layer {name!r} must have shape ({layer.size},), got {tuple(tensors[name].shape)}"
                )
        self.units = units
        self._tensors = {name: tensors[name] for name in units}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise KeyError(f"no layer {name!r}; there are {', '.join(self._tensors)}")
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def need_same_components(self, other: ByLayer, what: str) -> None:
        """Raise a ValueError that names what differs, if ``other`` has other layers, kinds or sizes."""
        sizes = [{name: (layer.kind, layer.size) for name, layer in one.units.items()} for one in (self, other)]
        odd = sorted(name for name, _ in sizes[0].items() ^ sizes[1].items())
        if odd:
            raise ValueError(f"{what} are of other components: {', '.join(dict.fromkeys(odd))}")


class Mask(ByLayer):
    """Which components are kept: one bool tensor per layer, True = kept.

    Parameters
    ----------
    units : Components
    kept : mapping of str to Tensor
        bool, (size,) per layer.

    Raises
    ------
    ValueError
        Layers, sizes or dtypes that do not fit ``units``.
    TypeError
        Something else than tensors.
    """

    def __init__(self, units: Components, kept: Mapping[str, Tensor]) -> None:
        super().__init__(units, kept)
        for name, tensor in kept.items():
            if tensor.dtype != torch.bool:
                raise ValueError(f"mask of layer {name!r} must be bool, got {tensor.dtype}")

    @property
    def kept(self) -> int:
        """Number of kept components."""
        return sum(int(tensor.sum()) for tensor in self.values())

    @property
    def rate(self) -> float:
        """Fraction of components that are pruned."""
        return 1 - self.kept / self.units.total

    @classmethod
    def all(cls, units: Components) -> Mask:
        """Keep everything."""
        return cls(units, {name: torch.ones(layer.size, dtype=torch.bool) for name, layer in units.items()})

    def __and__(self, other: Mask) -> Mask:
        """Keep what both keep."""
        return self._with(other, torch.logical_and)

    def __or__(self, other: Mask) -> Mask:
        """Keep what one of the two keeps."""
        return self._with(other, torch.logical_or)

    def __invert__(self) -> Mask:
        """Keep what this one prunes."""
        return Mask(self.units, {name: ~kept for name, kept in self.items()})

    def _with(self, other: Mask, combined: Callable[[Tensor, Tensor], Tensor]) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        self.need_same_components(other, "the masks")
        return Mask(self.units, {name: combined(kept, other[name].to(kept.device)) for name, kept in self.items()})

    def save(self, path: str | Path) -> None:
        """Write as safetensors."""
        save_tensors(path, "mask", self.units, {"kept": self})

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            Not a file of this kind, damaged, or written by a newer pxp.
        """
        units, tensors, _ = load_tensors(path, "mask")
        return cls(units, tensors["kept"])

    def __repr__(self) -> str:
        width = max(len("layer"), *(len(name) for name in self))
        rows = [
            f"{self.kept:,} of {self.units.describe()} kept ({self.rate:.1%} pruned)",
            f"  {'layer':<{width}}  kept  of",
        ]
        rows += [f"  {name:<{width}}  {int(kept.sum()):4}  {len(kept)}" for name, kept in self.items()]
        return "\n".join(rows)


@contextmanager
def masked(model: nn.Module, mask: Mask) -> Iterator[nn.Module]:
    """Silence the pruned components while the context lasts; weights are never touched.

    A pruned filter emits exactly zero after its BatchNorm, a pruned head gives exactly zero to the output projection
    (torch's fast path included). A compiled model runs as it is written while the context lasts, since what is compiled
    takes no notice of new masks. On exit, also by an exception, the model is what it was.
    Contexts nest: a component is silent if any of the masks prunes it.

    Parameters
    ----------
    model : nn.Module
        The model whose components ``mask`` was made for.
    mask : Mask

    Yields
    ------
    nn.Module
        The same model.

    Raises
    ------
    ValueError
        A mask of another model.

    Examples
    --------
    >>> with pxp.masked(model, mask):  # doctest: +SKIP
    ...     pxp.accuracy(model, data.eval)
    """
    if not isinstance(mask, Mask):
        raise TypeError(f"mask must be a pxp.Mask, got {type(mask).__name__}")
    mask.units.check(model)
    modules = dict(model.named_modules())
    handles = []
    try:
        for name, kept in mask.items():
            layer = mask.units[name]
            if bool(kept.all()):
                continue
            if layer.kind == "head":
                handles += silence_heads(modules[name], kept)
                continue
            if is_gated(modules[name]):
                handles += silence_units(modules[name], kept)
                continue
            silence, shared = _silence(~kept, layer.kind == "filter"), mask.units.trace.shared(name)
            for norm in shared:
                handles += _silence_behind(modules[name], modules[norm], silence)
            for site in () if shared else layer.site:
                handles.append(modules[site].register_forward_hook(silence))
        with eager():
            yield model
    finally:
        for handle in handles:
            handle.remove()


def _silence(pruned: Tensor, filters: bool):
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        off = pruned.to(output.device)
        return output.masked_fill(off.reshape(-1, *[1] * (output.ndim - 2)) if filters else off, 0)

    return hook


def _silence_behind(layer: nn.Module, norm: nn.Module, silence: Callable) -> list:
    """Silence a BatchNorm that several layers share where it takes the output of this one."""
    given: dict[int, Tensor] = {}  # of every run that the norm has still to come to

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        given[id(output)] = output

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output if given.pop(id(inputs[0]), None) is None else silence(module, inputs, output)

    return [layer.register_forward_hook(note), norm.register_forward_hook(hook)]
