"""Many masks of one model, measured together: what two of the pruned networks have in common is computed once.

Masks of neighbouring rates are alike, most of all in the first layers, whose filters are often the last to go. So the
networks that the masks leave are cut out of the model, as :func:`pxp.compact` does, and written as one network with an
output for every mask, in which no value is computed twice.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn

from .batches import BATCH_SIZE, Data, batches, check_classes, distinct, fingerprints
from .compaction.compact import Blueprint
from .curve import Curve
from .masks import Mask, masked
from .network.attention import Attention
from .network.bake import plain
from .network.check import same_outputs
from .network.fold import fold_batch_norm
from .network.layers import Identity, for_weight
from .network.outputs import logits_of, tensors
from .network.replica import check_values, evaluating, replica
from .network.silence import without_heads
from .repair import repair

logger = logging.getLogger(__name__)
ROOM = 2**30  # bytes of weights; a merged network that has more takes no further mask


class Sweep:
    """Measures a model's accuracy under masks, and each mask only once.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    data, classes, batch_size
        As for :func:`pxp.accuracy`.
    mended : (str, Tensor), optional
        Method and images: measure the networks that :func:`pxp.repair` makes.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        *,
        classes: Sequence[int] | None = None,
        batch_size: int = BATCH_SIZE,
        mended: tuple[str, Tensor] | None = None,
    ) -> None:
        self.mended = mended
        self.model, self.data, self.classes, self.batch_size = model, data, classes, batch_size
        self._blueprint: Blueprint | None = None
        self._can_cut = True
        self._lock = Lock()  # tuning may run in threads; only the private copy of the model is ever changed
        self._known: dict[tuple, Tensor] = {}
        self.marks: set[str] = set()  # of the images, in their order: several if a loader shuffles them

    def accuracies(self, masks: Sequence[Mask], progress: Callable[[int], object] | None = None) -> list[float]:
        """Accuracy under each mask, in their order; as :meth:`hits`."""
        return self.hits(masks, progress).double().mean(1).tolist()

    def hits(self, masks: Sequence[Mask], progress: Callable[[int], object] | None = None) -> Tensor:
        """Which images are classified correctly under each mask.

        Parameters
        ----------
        masks : sequence of Mask
        progress : callable, optional
            Told after every batch how many images, counted once per new mask, are done.

        Returns
        -------
        Tensor
            bool, (masks, images), in the order of ``masks``.

        Raises
        ------
        ValueError
            As :func:`pxp.accuracy` and :func:`pxp.masked`.
        """
        keys = [tuple((name, kept.cpu().numpy().tobytes()) for name, kept in mask.items()) for mask in masks]
        new = {key: mask for key, mask in zip(keys, masks, strict=True) if key not in self._known}
        found: list[Tensor] = []
        for run in self._networks(list(new.values())):
            mark = hashlib.blake2b(digest_size=8)
            found += correct(self.model, run, self.data, self.classes, self.batch_size, progress, mark)
            self.marks.add(mark.hexdigest())
        self._known |= zip(new, found, strict=True)
        return torch.stack([self._known[key] for key in keys]) if keys else torch.zeros(0, 0, dtype=torch.bool)

    def curve(self, rates: tuple[float, ...], right: np.ndarray, **about: Any) -> Curve:
        """The curve of these hits, bool (runs, rates, images), which this sweep has measured.

        If a loader shuffles its images, it is not known which one was right where.
        """
        if len(self.marks) == 1:
            return Curve.of_hits(rates, right, *self.marks, **about)
        logger.warning("the data come in another order each time, so the curve does not know its images: shuffle=False")
        return Curve(rates, tuple(tuple(row) for row in right.mean(2).tolist()), **about)

    def _networks(self, masks: list[Mask]) -> Iterator[Callable[[Tensor], tuple[Tensor, ...]]]:
        """Functions that together give the logits under all masks, in their order."""
        if self.mended is not None:  # each has weights of its own
            method, images = self.mended
            for mask in masks:
                yield _alone(repair(self.model, mask, images, method, batch_size=self.batch_size, progress=False))
            return
        few = self._few() if masks else None
        while masks:
            number, network = self._merged(masks)
            if network is not None:
                yield network
            else:
                with silenced(self.model, masks[0], few) as twin:
                    same = few is None or self._gives_the_same(twin, masks[0], few)
                    if same:
                        yield _alone(twin)
                if not same:
                    with masked(self.model, masks[0]):
                        yield _alone(self.model)
            masks = masks[number:]

    def _merged(self, masks: list[Mask]) -> tuple[int, nn.Module | None]:
        """One network for as many masks as there is room for; None for a model that cannot be cut."""
        merger, number = Merger(), 0
        with self._lock:
            if not self._can_cut:
                return 1, None
            try:
                if self._blueprint is None:
                    images, _ = next(batches(self.data, 1))
                    self._blueprint = Blueprint(replica(self.model), masks[0].units, images)
                while number < len(masks) and merger.bytes <= ROOM:
                    merger.add(*self._blueprint.cut(masks[number]))
                    number += 1
                network = merger.network(self._blueprint.noise)
                with torch.no_grad():
                    self._blueprint.check(masks[:number], network(self._blueprint.noise))
            except Exception as error:  # whatever hinders it, masking gives the same
                self._can_cut = False
                logger.warning(
                    "%s cannot be cut, so masks are measured one at a time: %s", type(self.model).__name__, error
                )
                return 1, None
        return number, network

    def _few(self) -> Tensor | None:
        """Two images, as the model takes them."""
        images, _ = next(batches(self.data, 2), (None, None))
        reference = next((p for p in self.model.parameters() if p.is_floating_point()), images)
        return None if images is None else images.to(reference)

    def _gives_the_same(self, twin: nn.Module, mask: Mask, images: Tensor) -> bool:
        """Whether the faster way to mask a model gives what masking it gives.

        It does not where something else reads the weights, or what a hook makes of the output.
        """
        with torch.no_grad(), evaluating(self.model):
            found = list(tensors(twin(images.clone())))
            with masked(self.model, mask):
                expected, again = (list(tensors(self.model(images.clone()))) for _ in range(2))
        if not same_outputs(again, expected):
            raise ValueError(
                f"{type(self.model).__name__} gives something else each time, so its accuracy is a matter of luck; "
                "are its outputs random in evaluation mode?"
            )
        return same_outputs(found, expected)


class Merger:
    """Writes several networks as one; a part or a value that two of them share is there once.

    Attributes
    ----------
    bytes : int
        Of the weights so far.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._graph = fx.Graph()
        self._parts: dict[str, Any] = {}
        self._outputs: list[Any] = []
        self._values: dict[tuple, fx.Node] = {}
        self._names: dict[tuple, list[str]] = {}  # parts that may be equal, by what is quickly compared

    def add(self, parts: dict[str, Any], graph: fx.Graph) -> None:
        """Add a network: its modules and tensors by name, and the graph that calls them."""
        needed: set[fx.Node] = set()
        for node in reversed(graph.nodes):
            if node.op in ("placeholder", "output") or node in needed:
                needed.update((node, *node.all_input_nodes))
        own: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            if node not in needed:
                continue
            arguments, options = (fx.map_arg(given, own.__getitem__) for given in (node.args, node.kwargs))
            if node.op == "output":
                self._outputs.append(arguments[0])
                continue
            target = self._part(parts[str(node.target)]) if node.op in ("call_module", "get_attr") else node.target
            value = (node.op, target, repr(arguments), repr(options))  # a node's repr is its name
            if value not in self._values:
                self._values[value] = self._graph.create_node(node.op, target, arguments, options)
            own[node] = self._values[value]

    def network(self, images: Tensor) -> fx.GraphModule:
        """The network; gives a tuple with the output of every one that was added."""
        self._graph.output(tuple(self._outputs))
        return _channels_last(fx.GraphModule(self._parts, self._graph).eval(), images)

    def _part(self, part: nn.Module | Tensor) -> str:
        """The name of this part, or of one that is equal."""
        tensors = [part] if isinstance(part, Tensor) else [*part.parameters(), *part.buffers()]
        alike = self._names.setdefault((type(part), *(tensor.shape for tensor in tensors)), [])
        name = next((name for name in alike if _equal(self._parts[name], part)), None)
        if name is None:
            name = f"part{len(self._parts)}"
            alike.append(name)
            self._parts[name] = part
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return name


def _equal(one: Any, other: Any) -> bool:
    """Whether two parts compute the same, or two of their attributes are the same."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, nn.Module):
        return _equal(vars(one), vars(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return bool(one == other)


N = TypeVar("N", bound=nn.Module)


@torch.no_grad()
def _channels_last(network: N, images: Tensor) -> N:
    """Convolutions over images run faster with the channels last in memory, where nothing needs them first.

    Those over volumes cannot be so, and ``x.view(len(x), -1)`` of what they give is an error.
    """
    if any(parameter.ndim > 4 for parameter in network.parameters()):
        return network
    try:
        made = network.to(memory_format=torch.channels_last)
        made.forward(images.clone())  # the call itself would print where the error is
        return made
    except RuntimeError:
        return network.to(memory_format=torch.contiguous_format)


@contextmanager
def silenced(model: nn.Module, mask: Mask, images: Tensor | None = None) -> Iterator[nn.Module]:
    """The masked model, computed faster: BatchNorm merged, the pruned rows zeroed, and channels last for such images.

    What cannot be written into a replica's weights is masked as in :func:`pxp.masked`.
    """
    mask.units.check(model)
    twin = replica(model)
    try:
        fold_batch_norm(twin, mask.units.trace)
    except ValueError:  # what cannot be merged can be masked
        twin = replica(model)
    modules = dict(twin.named_modules())
    rest = {name: torch.ones_like(kept) for name, kept in mask.items()}
    for name, kept in mask.items():
        layer, sites = modules[name], mask.units[name].site
        if isinstance(layer, Attention):
            weight = without_heads(layer.projection.weight, kept)
            layer.projection.weight = nn.Parameter(weight, requires_grad=False)
        elif plain(layer) and (sites == (name,) or all(isinstance(modules[site], Identity) for site in sites)):
            keep = kept.to(layer.weight.device)
            layer.weight = nn.Parameter(layer.weight * for_weight(layer, keep), requires_grad=False)
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias * keep, requires_grad=False)
        else:
            rest[name] = kept
    twin = twin if images is None else _channels_last(twin, images)
    with masked(twin, Mask(mask.units, rest)):
        yield twin


@torch.no_grad()
def correct(
    model: nn.Module,
    run: Callable[[Tensor], tuple[Tensor, ...]],
    data: Data,
    classes: Sequence[int] | None,
    batch_size: int,
    progress: Callable[[int], object] | None = None,
    mark: Any = None,
) -> Tensor:
    """Which samples several networks classify correctly.

    Parameters
    ----------
    model : nn.Module
        Tells where the images belong and in which precision; not called.
    run : callable
        Gives the logits of all networks for a batch of images.
    data, classes, batch_size
        As for :func:`pxp.accuracy`, whose errors these are.
    progress : callable, optional
        Told after every batch for how many images, counted once per network, that is done.
    mark : hash of :mod:`hashlib`, optional
        Updated with every batch's images and labels.

    Returns
    -------
    Tensor
        bool, (networks, samples).
    """
    check_values(model)
    reference = next((p for p in model.parameters() if p.is_floating_point()), None)
    wanted = None if classes is None else torch.as_tensor(distinct(classes))
    if wanted is not None and int(wanted.min()) < 0:
        raise ValueError(f"class {int(wanted.min())} does not exist: classes are counted from 0")
    found = []
    for images, labels in batches(data, batch_size):
        if wanted is not None:
            wanted = wanted.to(labels.device)
            members = torch.isin(labels, wanted)
            images, labels = images[members], labels[members]
            labels = (labels[:, None] == wanted).int().argmax(1)
        if len(labels) == 0:
            continue
        if mark is not None:
            mark.update(f"{fingerprints(images)} {labels.tolist()}".encode())
        rows = []
        for output in run(images if reference is None else images.to(reference)):
            logits = logits_of(output)
            if wanted is None:
                check_classes(labels, logits)
            else:
                check_classes(wanted, logits, "classes")
            chosen = logits if wanted is None else logits[:, wanted.to(logits.device)]
            answered = ~chosen.isnan().any(1)  # NaN is no answer, though argmax would find one
            rows.append(((chosen.argmax(1) == labels.to(chosen.device)) & answered).cpu())
        found.append(torch.stack(rows))
        if progress is not None:
            progress(found[-1].numel())
    if not found:
        raise ValueError("there is no sample to evaluate" + ("" if classes is None else f" of classes {list(classes)}"))
    return torch.cat(found, dim=1)


def hits(model: nn.Module, data: Data, *, classes: Sequence[int] | None = None, batch_size: int = BATCH_SIZE) -> Tensor:
    """Which samples one model classifies correctly, bool (samples,); arguments and errors are those of ``accuracy``."""
    with evaluating(model):
        return correct(model, _alone(model), data, classes, batch_size)[0]


def _alone(model: nn.Module) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return lambda images: (model(images.clone()),)  # a network may change them
