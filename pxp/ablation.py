"""Ablation, the oracle: take one component away and see what the loss does; exact, and as dear as that."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .compaction.compact import Blueprint
from .compaction.nodes import last_part, run_node
from .criteria import Criterion
from .masks import Mask, masked
from .network.check import same_outputs
from .network.components import Components
from .network.outputs import logits_of
from .network.replica import evaluating, replica
from .network.silence import reader_of, without_heads

if TYPE_CHECKING:
    from .probe import Probe


@dataclass(frozen=True)
class Ablation(Criterion):
    """Leave one out: how much the loss of each sample rises when this component alone is silenced.

    What first-order criteria estimate, measured; positive is useful. It says nothing of what several components do
    together. Everything that does not depend on the silenced component is computed once, for a network that
    :func:`pxp.compact` can trace; for others every component costs a whole forward pass.

    Raises
    ------
    ValueError
        By :func:`pxp.attribute`: a network that ends in a softmax or sigmoid; of it the loss is another.
    """

    def values(self, probe: Probe) -> Iterator[dict[str, Tensor]]:
        without: Callable[[Tensor], Iterator[tuple[str, int, Tensor]]] | None = None
        for images, labels in probe.batches():
            with torch.no_grad(), evaluating(probe.model):
                whole = probe.logits(images, labels)
                before = F.cross_entropy(whole, labels, reduction="none")
                given = F.cross_entropy(logits_of(probe.model(images.clone())), labels, reduction="none")
                if not torch.allclose(given, before, rtol=1e-3, atol=1e-3):
                    raise ValueError(
                        f"{type(probe.model).__name__} ends in a softmax or a sigmoid, of which the cross-entropy is "
                        "no loss; ablate the network that returns logits"
                    )
                found = {name: before.new_zeros(len(labels), 1, layer.size) for name, layer in probe.units.items()}
                without = without or ways(probe.model, probe.units, images)
                for name, index, logits in without(images):
                    found[name][:, 0, index] = F.cross_entropy(logits, labels, reduction="none") - before
            yield found


def ways(model: Any, units: Components, images: Tensor) -> Callable[[Tensor], Iterator[tuple[str, int, Tensor]]]:
    """How to get the logits without each component, one after the other: (layer, number of the component, logits).

    The faster way is taken where the network can be traced and, tried with one component of each layer, gives what
    masking gives.
    """
    few = images[:2]
    try:
        faster = Suffixes(Blueprint(replica(model), units, few[:1]), units)
        found = {name: next(faster.of(name, few)) for name in units}
    except Exception:  # whatever hinders it, masking gives the same
        return lambda given: _one_by_one(model, units, given)
    for name, logits in found.items():
        with masked(model, _only(units, name, 0)):
            if not same_outputs([logits], [logits_of(model(few.clone()))]):
                return lambda given: _one_by_one(model, units, given)
    return faster


def _one_by_one(model: Any, units: Components, images: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    for name, layer in units.items():
        for index in range(layer.size):
            with masked(model, _only(units, name, index)):
                yield name, index, logits_of(model(images.clone()))


def _only(units: Components, name: str, index: int) -> Mask:
    """Everything but one component."""
    kept = {other: torch.ones(layer.size, dtype=torch.bool) for other, layer in units.items()}
    kept[name][index] = False
    return Mask(units, kept)


class Suffixes:
    """Runs a traced network once, and for each component only what depends on it.

    Parameters
    ----------
    blueprint : Blueprint
    units : Components

    Raises
    ------
    ValueError
        A layer of components that the graph does not show.
    """

    def __init__(self, blueprint: Blueprint, units: Components) -> None:
        self.twin, self.nodes, self.units = blueprint.twin, list(blueprint.graph.nodes), units
        self.at: dict[str, set[fx.Node]] = {}  # layer → operations whose output carries its components
        modules = dict(self.twin.named_modules())
        for name, layer in units.items():
            places = (name,) if reader_of(modules[name]) is not None else layer.site
            wanted = {last_part(place, modules) for place in places}
            self.at[name] = {node for node in self.nodes if node.op == "call_module" and str(node.target) in wanted}
            if {str(node.target) for node in self.at[name]} != wanted:
                raise ValueError(f"{name!r} is not called in the graph")

    def __call__(self, images: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        values = self._values(images)
        for name in self.units:
            yield from ((name, index, logits) for index, logits in enumerate(self._of(name, images, values)))

    def of(self, name: str, images: Tensor) -> Iterator[Tensor]:
        """The logits without each component of one layer."""
        return self._of(name, images, self._values(images))

    def _values(self, images: Tensor) -> dict[fx.Node, Any]:
        values: dict[fx.Node, Any] = {}
        for node in self.nodes:
            values[node] = run_node(node, self.twin, values, images)
        return values

    def _of(self, name: str, images: Tensor, values: dict[fx.Node, Any]) -> Iterator[Tensor]:
        depends = set(self.at[name])
        for node in self.nodes:
            if any(source in depends for source in node.all_input_nodes):
                depends.add(node)
        suffix = [node for node in self.nodes if node in depends]
        last = {source: node for node in suffix for source in node.all_input_nodes if source in depends}
        over = {node: [source for source in last if last[source] is node] for node in suffix}  # after which nobody asks
        known = ChainMap({}, values)
        read = {node: self._read(name, node, known, images) for node in self.at[name]}
        for index in range(self.units[name].size):
            yield logits_of(self._without(name, index, over, read, known.new_child(), images))

    def _read(self, name: str, node: fx.Node, known: Mapping[fx.Node, Any], images: Tensor) -> Tensor | None:
        """What an attention's projection reads, or a gated MLP's last layer, where nothing comes after it."""
        reader = reader_of(self.twin.get_submodule(name))
        if reader is None:
            return None
        calls: list[tuple[Tensor, Tensor]] = []
        handle = reader.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
        try:
            given = run_node(node, self.twin, known, images)
        finally:
            handle.remove()
        given = given[0] if isinstance(given, tuple) else given
        return calls[0][0] if len(calls) == 1 and given is calls[0][1] else None

    def _without(
        self,
        name: str,
        index: int,
        over: dict[fx.Node, list[fx.Node]],
        read: dict[fx.Node, Tensor | None],
        known: ChainMap[fx.Node, Any],
        images: Tensor,
    ) -> Any:
        """The network's output without one component."""
        own = known.maps[0]
        for node, done in over.items():
            # a shared layer reads, the second time, what its first output has become
            stale = any(source in own for source in node.all_input_nodes)
            if node not in self.at[name]:
                own[node] = run_node(node, self.twin, known, images) if stale else known[node]
            elif reader_of(self.twin.get_submodule(name)) is not None:
                own[node] = self._narrowed(name, index, node, None if stale else read[node], known, images)
            else:
                given = run_node(node, self.twin, known, images) if stale else known[node]
                own[node] = given.clone()
                own[node].select(1 if self.units[name].kind == "filter" else -1, index).zero_()
            for source in done:
                del own[source]
        return own[self.nodes[-1]]

    def _narrowed(
        self,
        name: str,
        index: int,
        node: fx.Node,
        read: Tensor | None,
        known: Mapping[fx.Node, Any],
        images: Tensor,
    ) -> Any:
        """What an attention gives without one head, or a gated MLP without one hidden unit."""
        reader = reader_of(self.twin.get_submodule(name))
        weight, kept = reader.weight, torch.arange(self.units[name].size) != index
        reader.weight = nn.Parameter(without_heads(weight, kept), requires_grad=False)
        try:
            if read is None:
                return run_node(node, self.twin, known, images)
            given = reader(read)
            return (given, *known[node][1:]) if isinstance(known[node], tuple) else given
        finally:
            reader.weight = weight
