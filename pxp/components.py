"""Components: the units that are scored and pruned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .replica import CONVOLUTIONS, Trace, replica, trace

KINDS = {
    "filter": "output channel of a convolution",
    "neuron": "hidden unit: output of a linear layer that feeds an activation",
}


@dataclass(frozen=True)
class Layer:
    """One layer of components.

    Attributes
    ----------
    name : str
        The layer's name in ``model.named_modules()``.
    size : int
        Number of components: output channels or output features.
    site : tuple of str
        Modules whose output carries the components (the BatchNorm behind a convolution, else the layer itself).
    activation : str or None
        Activation module that directly takes the site's output.
    """

    name: str
    size: int
    site: tuple[str, ...]
    activation: str | None = None


class Components(Mapping[str, Layer]):
    """All components of one kind, by layer, in the order in which the layers run.

    Attributes
    ----------
    kind : str
    trace : Trace
        What was seen of the model's structure when the components were searched.
    """

    def __init__(self, kind: str, layers: list[Layer], trace: Trace) -> None:
        self.kind = kind
        self.trace = trace
        self._layers = {layer.name: layer for layer in layers}

    def __getitem__(self, name: str) -> Layer:
        if name not in self._layers:
            raise KeyError(f"no {self.kind} layer {name!r}; there are {', '.join(self._layers)}")
        return self._layers[name]

    def __contains__(self, name: object) -> bool:
        return name in self._layers

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def total(self) -> int:
        """Number of components over all layers."""
        return sum(layer.size for layer in self.values())

    def only(self, *names: str) -> Components:
        """The components of some layers.

        Raises
        ------
        KeyError
            If a layer is not among these.
        """
        wanted = {self[name].name for name in names}
        return Components(self.kind, [layer for layer in self.values() if layer.name in wanted], self.trace)

    def without(self, *names: str) -> Components:
        """The components of all layers but some.

        Raises
        ------
        KeyError
            If a layer is not among these.
        """
        unwanted = {self[name].name for name in names}
        return Components(self.kind, [layer for layer in self.values() if layer.name not in unwanted], self.trace)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError unless ``model`` has every one of these layers with its size."""
        modules = dict(model.named_modules())
        for layer in self.values():
            missing = [name for name in (layer.name, *layer.site) if name not in modules]
            if missing:
                raise ValueError(f"these components are of another model: this one has no module {missing[0]!r}")
            found = _size(modules[layer.name])
            if found != layer.size:
                raise ValueError(
                    f"these components are of another model: layer {layer.name!r} has {found} outputs here, "
                    f"not {layer.size}"
                )

    def __repr__(self) -> str:
        width = max(len("layer"), *(len(name) for name in self))
        rows = [f"{self.total:,} {self.kind}s in {len(self)} layers", f"  {'layer':<{width}}  size  output taken at"]
        rows += [f"  {layer.name:<{width}}  {layer.size:4}  {', '.join(layer.site)}" for layer in self.values()]
        return "\n".join(rows)


def find_components(model: nn.Module, kind: str = "filter", *, example: Tensor | None = None) -> Components:
    """Find the components of a model by running it once on a replica; no name is hard-coded.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    kind : {"filter", "neuron"}
        ``"filter"``: output channels of all convolutions (grouped and depthwise ones too). ``"neuron"``: outputs of the
        linear layers that feed an activation module.
    example : Tensor, optional
        One batch of inputs. Default: zeros of a shape that the model accepts, found by trying the usual image sizes
        (or the first linear layer's features).

    Returns
    -------
    Components
        In order of first execution; a module that is used twice is counted once.

    Raises
    ------
    ValueError
        Unknown kind; a model without components of this kind (the message names the kinds that it has); no input could
        be guessed and no ``example`` was given.

    Examples
    --------
    >>> import pxp
    >>> units = pxp.find_components(pxp.load_model("vgg"), "filter")
    >>> units.total
    416
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; allowed: {', '.join(map(repr, KINDS))}")
    structure = trace_model(model, example)
    modules = dict(model.named_modules())
    found = {known: _layers(known, structure, modules) for known in KINDS}
    if not found[kind]:
        others = [f"{len(layers)} {known} layers" for known, layers in found.items() if layers]
        raise ValueError(
            f"{type(model).__name__} has no components of kind {kind!r} ({KINDS[kind]}); it has "
            f"{' and '.join(others) or 'none of any kind'}"
        )
    return Components(kind, found[kind], structure)


def trace_model(model: nn.Module, example: Tensor | None = None) -> Trace:
    """Trace ``model`` on ``example``, or on zeros of the first usual shape that it accepts."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    replica(model)  # what cannot be copied is an error of its own
    if example is not None:
        try:
            return trace(model, example[:1].to(reference))
        except (RuntimeError, ValueError) as problem:
            shape = tuple(example.shape)
            raise ValueError(f"the model does not accept images of shape {shape}: {problem}") from problem
    candidates = _input_shapes(model)
    error: Exception | None = None
    for shape in candidates:
        try:
            return trace(model, torch.zeros(1, *shape, device=reference.device, dtype=reference.dtype))
        except (RuntimeError, ValueError, AssertionError) as problem:
            error = problem
    raise ValueError(
        f"could not guess an input of {type(model).__name__} (tried {', '.join(map(str, candidates)) or 'nothing'}); "
        "pass example=<one batch of inputs>"
    ) from error


def _input_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    config = getattr(model, "default_cfg", None) or {}  # timm
    shapes: list[tuple[int, ...]] = []
    if isinstance(config.get("input_size"), tuple | list):
        shapes.append(tuple(config["input_size"]))
    first = next((m for m in model.modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))), None)
    if isinstance(first, nn.Linear):
        shapes.append((first.in_features,))
        # an image that is flattened first
        for channels in (1, 3):
            side = round((first.in_features / channels) ** 0.5)
            if channels * side**2 == first.in_features:
                shapes.append((channels, side, side))
    elif first is not None:
        dims = len(first.kernel_size)
        shapes += [(first.in_channels, *[side] * dims) for side in ((224, 64, 32, 28) if dims < 3 else (32, 64))]
    return shapes


def _layers(kind: str, structure: Trace, modules: dict[str, nn.Module]) -> list[Layer]:
    wanted = CONVOLUTIONS if kind == "filter" else (nn.Linear,)
    return [
        Layer(name, _size(modules[name]), structure.site(name), structure.activations.get(name))
        for name in structure.order
        if isinstance(modules[name], wanted) and (kind == "filter" or name in structure.activations)
    ]


def _size(module: nn.Module) -> int:
    return int(getattr(module, "out_channels", 0) or getattr(module, "out_features", 0))
