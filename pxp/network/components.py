"""Components: the units that are scored and pruned."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .attention import SUPPORTED, Attention, heads_of, is_head_layer, unsupported_attention
from .gated import incoming, is_gated, last_layer, unit_weights
from .layers import CONVOLUTIONS, LINEAR, by_output
from .projections import layer_of, rows, sources
from .replica import check_openable, replica
from .trace import Trace, trace_model

KINDS = {
    "filter": "output channel of a convolution",
    "neuron": "hidden unit: output of a linear layer that feeds an activation",
    "mlp_output": "output of the linear layer behind hidden units: what an MLP block adds to the residual stream",
    "head": "attention head",
}


@dataclass(frozen=True)
class Layer:
    """One layer of components.

    Attributes
    ----------
    name : str
        The layer's name in ``model.named_modules()``; of heads, the attention module; of hidden units of a gated MLP
        (SwiGLU), the MLP.
    size : int
        Number of components: output channels, output features or heads.
    site : tuple of str
        Modules whose output carries the components: the BatchNorm behind a convolution, else the layer itself. Of
        heads, what the replica of an attention gives to its output projection; of gated MLPs, what the replica gives
        to the last layer.
    activation : str or None
        Activation module that directly takes the site's output.
    kind : str
    parameters : int
        Weights and biases that go with one component: those that compute it, and of neurons and heads also those that
        read it.
    flops : int
        Floating-point operations for one image that go with one component, counted likewise (a multiply-add is two).
    """

    name: str
    size: int
    site: tuple[str, ...]
    activation: str | None = None
    kind: str = "filter"
    parameters: int = 0
    flops: int = 0


def check_components(units: object) -> None:
    """Raise TypeError unless these are what :func:`find_components` gives, and ValueError if there are none."""
    if not isinstance(units, Components):
        raise TypeError(f"units must come from pxp.find_components, got {type(units).__name__}")
    if not len(units):
        raise ValueError("there are no components: no layer is left in units")


class Components(Mapping[str, Layer]):
    """All components of one kind or several, by layer, in the order in which the layers run.

    Attributes
    ----------
    kind : str
        Several are joined with "+": ``"head+neuron"``.
    trace : Trace
        What was seen of the model's structure when the components were searched.
    model : nn.Module or None
        The model that they were found in, if it still exists.
    left_out : int
        Components of this kind that only weigh others, inside gates, and were not asked for.
    """

    def __init__(
        self, kind: str, layers: list[Layer], trace: Trace, model: nn.Module | None = None, left_out: int = 0
    ) -> None:
        self.kind = kind
        self.trace = trace
        self.left_out = left_out
        self._layers = {layer.name: layer for layer in layers}
        self._model = None if model is None else weakref.ref(model)

    @property
    def model(self) -> nn.Module | None:
        return None if self._model is None else self._model()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_model": None}  # neither copies nor files hold on to a model

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
        return self._of([layer for layer in self.values() if layer.name in wanted])

    def without(self, *names: str) -> Components:
        """The components of all layers but some.

        Raises
        ------
        KeyError
            If a layer is not among these.
        """
        unwanted = {self[name].name for name in names}
        return self._of([layer for layer in self.values() if layer.name not in unwanted])

    def of_kind(self, kind: str) -> Components:
        """The components of one kind.

        Raises
        ------
        ValueError
            If there are none.
        """
        layers = [layer for layer in self.values() if layer.kind == kind]
        if not layers:
            raise ValueError(f"there are no components of kind {kind!r}; there are {self.kind}")
        return self._of(layers)

    def _of(self, layers: list[Layer]) -> Components:
        kinds = {layer.kind for layer in layers}
        return Components(
            "+".join(kind for kind in self.kind.split("+") if kind in kinds), layers, self.trace, self.model
        )

    def describe(self, number: int | None = None) -> str:
        """How many of what: ``"416 filters"``; several kinds together are components."""
        number = self.total if number is None else number
        return f"{number:,} {'components' if '+' in self.kind else self.kind.replace('_', ' ') + 's'}"

    def need_model(self, model: nn.Module | None = None) -> nn.Module:
        """``model`` if it has these components, by default the one that they were found in."""
        model = self.model if model is None else model
        if model is None:
            raise ValueError("the model that these components were found in is gone; give model=")
        self.check(model)
        return model

    def check(self, model: nn.Module) -> None:
        """Raise ValueError unless ``model`` has every one of these layers with its size."""
        check_openable(model)
        modules = dict(model.named_modules())
        for layer in self.values():
            shown = layer.kind == "head" or is_gated(modules.get(layer.name))  # the site is of the replica only
            missing = [n for n in (layer.name, *([] if shown else layer.site)) if n not in modules]
            if missing:
                raise ValueError(f"these components are of another model: this one has no module {missing[0]!r}")
            found = _size(modules[layer.name], layer.kind)
            if found != layer.size:
                raise ValueError(
                    f"these components are of another model: layer {layer.name!r} has {found} "
                    f"{'heads' if layer.kind == 'head' else 'outputs'} here, not {layer.size}"
                )

    def __repr__(self) -> str:
        width = max(len("layer"), *(len(name) for name in self))
        inside = f"; {self.left_out:,} inside gates are left out (gates=True)" if self.left_out else ""
        rows = [f"{self.describe()} in {len(self)} layers{inside}", f"  {'layer':<{width}}  size  output taken at"]
        rows += [f"  {layer.name:<{width}}  {layer.size:4}  {', '.join(layer.site)}" for layer in self.values()]
        return "\n".join(rows)


def find_components(
    model: nn.Module, kind: str | Sequence[str] = "filter", *, gates: bool = False, example: Tensor | None = None
) -> Components:
    """Find the components of a model by running it once on a replica; no name is hard-coded.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    kind : {"filter", "neuron", "head", "mlp_output"} or a sequence of them
        ``"filter"``: output channels of all convolutions (grouped, depthwise and transposed ones too). ``"neuron"``:
        outputs of the linear layers that feed an activation module; of gated MLPs (timm's SwiGLU and GluMlp, Hugging
        Face's DINOv2), whose hidden units are products, the channels that the last layer reads, under the MLP's name.
        ``"head"``: attention heads, of the classes in ``pxp.network.attentions``. ``"mlp_output"``: outputs of the
        linear layer behind a layer of neurons; Hatefi et al. 2024 prune them together with the neurons. Such an output
        is what the block adds to one coordinate of the residual stream: pruning it saves a row of weights, but the
        coordinate itself stays, since other blocks write to it too. Several kinds are scored in one pass and ranked
        together.
    gates : bool, default False
        Also those inside gates, such as the filters of a squeeze-and-excitation block. They only weigh what others
        compute, so an explanation that takes gates as constants gives them relevance 0, and they would be pruned first.
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
        Unknown kind; a model without components of this kind (the message names the kinds that it has), or with an
        attention of an unsupported class, or with a layer whose BatchNorm also takes something else or that also runs
        without it; no input could be guessed and no ``example`` was given, or the model does not accept the one given.
    TypeError
        ``model`` is no module, ``kind`` neither a string nor several; a layer that is called by keyword.

    Examples
    --------
    >>> import pxp
    >>> units = pxp.find_components(pxp.load_model("vgg"), "filter")
    >>> units.total
    416
    """
    if not isinstance(kind, str | Iterable):
        raise TypeError(f"kind must be a string or a sequence of them, got {kind!r}")
    kinds = [kind] if isinstance(kind, str) else list(kind)
    if not kinds or len(set(kinds)) < len(kinds):
        raise ValueError(f"kind must be one or several different kinds, got {kind!r}")
    for one in kinds:
        if one not in KINDS:
            raise ValueError(f"unknown kind {one!r}; allowed: {', '.join(map(repr, KINDS))}")
    structure = trace_model(model, example)
    twin = replica(model)
    if "head" in kinds:
        unsupported = unsupported_attention(twin, structure.attentions)
        if unsupported:
            name, its_class = next(iter(unsupported.items()))
            raise ValueError(f"the heads of {name!r} ({its_class}) cannot be told apart; supported are {SUPPORTED}")
    every = {known: _layers(known, structure, twin) for known in KINDS}
    found = {
        known: [layer for layer in layers if gates or not _gates(layer, structure)] for known, layers in every.items()
    }
    left_out = sum(layer.size for one in kinds for layer in every[one]) - sum(
        e.size for one in kinds for e in found[one]
    )
    for one in kinds:
        if not found[one]:
            others = [f"{len(layers)} {known} layers" for known, layers in found.items() if layers]
            raise ValueError(
                f"{type(model).__name__} has no components of kind {one!r} ({KINDS[one]}); it has "
                f"{' and '.join(others) or 'none of any kind'}"
            )
    gated = [name for name, module in twin.named_modules() if is_gated(module)]
    for layer in (layer for one in kinds for layer in found[one] if layer.name in structure.norms):
        norm = structure.unclear(layer.name)
        if norm is not None:
            raise ValueError(
                f"what {layer.name!r} gives has no place of its own: its BatchNorm {norm!r} also takes "
                "something else, or it also runs without it; give each use a layer and a BatchNorm of its own"
            )
    order = {name: position for position, name in enumerate(_run_order(structure, [*structure.heads, *gated]))}
    layers = sorted((layer for one in kinds for layer in found[one]), key=lambda layer: order[layer.name])
    return Components("+".join(kinds), layers, structure, model, left_out)


def _gates(layer: Layer, structure: Trace) -> bool:
    """Whether the output depends on a layer only through gates."""
    inside = f"{layer.name}." if layer.name else ""
    inner = [name for name in structure.order if name == layer.name or name.startswith(inside)]
    return all(name in structure.gates for name in inner)


def _run_order(structure: Trace, around: list[str]) -> list[str]:
    """All layers, and the attentions and gated MLPs around some just before their own first layer."""
    names: list[str] = []
    waiting = around
    for name in structure.order:
        names += [module for module in waiting if name.startswith(f"{module}.") or module == ""]
        waiting = [module for module in waiting if module not in names]
        names.append(name)
    return names + waiting


def _layers(kind: str, structure: Trace, twin: nn.Module) -> list[Layer]:
    modules = dict(twin.named_modules())
    if kind == "head":
        return [_head_layer(name, twin.get_submodule(name), structure) for name in structure.heads]  # type: ignore[arg-type]
    readers = {name: reader_of(name, structure, modules) for name in structure.activations}
    gated = {name: module for name, module in modules.items() if is_gated(module)}
    last = {name: next(n for n, m in modules.items() if m is last_layer(module)) for name, module in gated.items()}
    gated = {name: module for name, module in gated.items() if last[name] in structure.order}
    if kind == "filter":
        names = [name for name in structure.order if isinstance(modules[name], CONVOLUTIONS)]
        names = [name for name in names if not any(f".{name}".startswith(f".{head}.") for head in structure.heads)]
    else:
        names = [n for n in structure.order if isinstance(modules[n], LINEAR) and n in structure.activations]
        names = [name for name in names if name.rpartition(".")[0] not in gated]  # half of a product
        if kind == "mlp_output":
            names = [reader for name in names if (reader := readers[name]) is not None]
            names = [name for name in [*names, *(last[name] for name in gated)] if name not in structure.activations]
    layers = []
    if kind == "neuron":
        layers += [_gated_layer(name, module, structure.positions[last[name]]) for name, module in gated.items()]
    for name in names:
        module, places = modules[name], structure.positions[name]
        fan_in = by_output(module).shape[1]
        reader = readers.get(name) if kind == "neuron" else None
        outgoing = 0 if reader is None else _size(modules[reader], "neuron")
        layers.append(
            Layer(
                name,
                _size(module, kind),
                structure.site(name),
                structure.activations.get(name),
                kind,
                fan_in + (module.bias is not None) + outgoing,
                2 * places * (fan_in + outgoing),
            )
        )
    return layers


def _gated_layer(name: str, mlp: nn.Module, places: int) -> Layer:
    """Hidden units of a gated MLP."""
    size = _size(mlp, "neuron")
    weights = unit_weights(mlp).shape[1] + last_layer(mlp).out_features
    biases = sum(0 if part.bias is None else part.bias.numel() // size for part in incoming(mlp))
    site = f"{name}.hidden" if name else "hidden"
    return Layer(name, size, (site,), None, "neuron", weights + biases, 2 * places * weights)


def reader_of(name: str, structure: Trace, modules: dict[str, nn.Module]) -> str | None:
    """The linear layer of the same parent that runs next and takes as many inputs as ``name`` has outputs."""
    after = structure.order[structure.order.index(name) + 1 :]
    parent = name.rpartition(".")[0]
    return next(
        (
            other
            for other in after
            if other.rpartition(".")[0] == parent
            and isinstance(layer := modules[other], LINEAR)
            and layer.in_features == _size(modules[name], "neuron")
        ),
        None,
    )


def _head_layer(name: str, attention: Attention, structure: Trace) -> Layer:
    start, heads = f"{name}." if name else "", attention.num_heads
    output = next(own for own, module in attention.named_modules() if module is attention.projection)
    parameters = attention.projection.weight.numel() // heads
    flops = 2 * structure.positions[start + output] * parameters + 2 * structure.products[name]
    for projection, letters in sources(attention):
        own, mine = layer_of(attention, projection), rows(attention, projection, letters)
        layer: Any = attention.get_submodule(own)
        weights = mine.shape[1] * layer.weight[0].numel() if len(mine) == heads else 0  # shared ones stay
        parameters += weights + (mine.shape[1] if weights and layer.bias is not None else 0)
        flops += 2 * structure.positions[start + own] * weights
    return Layer(name, heads, (f"{start}heads",), None, "head", parameters, flops)


def _size(module: nn.Module, kind: str) -> int:
    if kind == "head":
        return heads_of(module) if is_head_layer(module) else 0
    last = last_layer(module)
    if last is not None:
        return last.in_features
    return int(getattr(module, "out_channels", 0) or getattr(module, "out_features", 0))
