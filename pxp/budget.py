"""Selecting to a budget: prune until the network that :func:`pxp.compact` makes costs no more than it may."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from .compaction.compact import Blueprint
from .cost import layer_seconds, pass_seconds
from .masks import Mask
from .network.components import Components, reader_of
from .network.replica import evaluating, replica
from .network.trace import example_input
from .rates import fraction
from .scores import Scores, guarded, per_cost, prices_of

STEP = 0.05  # share of the components' cost that goes before relevance per cost is ranked anew
NOTHING = 1e-9


def within_budget(
    scores: Scores,
    *,
    model: nn.Module | None = None,
    flops: float | None = None,
    parameters: float | None = None,
    latency: float | None = None,
    by: str = "magnitude",
    order: str = "least",
    scope: str = "global",
    min_keep: int = 0,
    cost: str | Mapping[str, float] | None = None,
    example: Tensor | None = None,
) -> Mask:
    """Prune as little as it takes until the network that :func:`pxp.compact` makes costs no more than it may.

    Parameters
    ----------
    scores : Scores
    model : nn.Module, optional
        By default the one that the components were found in.
    flops, parameters, latency : float
        Give one: the share of the model's operations, of its parameters, or of its measured seconds that may be left,
        in [0, 1].
    by, order, scope, min_keep
        As for :meth:`pxp.Scores.select`.
    cost : {"parameters", "flops", "latency"} or mapping of str to float, optional
        Rank by score per cost, as for :meth:`pxp.Scores.select`; ``"latency"`` is measured by :func:`pxp.latencies`.
        Costs are updated as neighbours go: a filter, a neuron or an MLP output costs less by its lost inputs, a neuron
        also by the lost outputs of the layer that reads it.
    example : Tensor, optional
        As for :func:`pxp.compact`; the batch that operations are counted and seconds measured on.

    Returns
    -------
    Mask

    Raises
    ------
    ValueError
        None or several of the budgets; one outside [0, 1] or out of reach; ``cost`` with ``scope="layer"``; the model
        is needed and gone; as :meth:`pxp.Scores.select` and :func:`pxp.compact`.

    Examples
    --------
    >>> mask = pxp.within_budget(scores, model=model, flops=0.5)  # doctest: +SKIP
    """
    shares = {"flops": flops, "parameters": parameters, "latency": latency}
    given = {name: share for name, share in shares.items() if share is not None}
    if len(given) != 1:
        raise ValueError("give exactly one of flops, parameters and latency")
    ((quantity, share),) = given.items()
    share = fraction(quantity, share)
    if cost is not None and scope == "layer":
        raise ValueError('score per cost ranks across layers; use scope="global"')
    model, units = scores.units.need_model(model), scores.units
    options: dict[str, Any] = {"by": by, "order": order, "scope": scope, "min_keep": min_keep}
    price = prices_of(units, latencies(model, units, example) if cost == "latency" else cost)
    scores.select(0.0, **options)  # a wrong value is an error before the work
    budget = Budget(model, quantity, share, example)
    if cost is not None:
        return budget.per_cost(scores if by == "magnitude" else scores.signed, units, price, order, min_keep)
    number = units.total if scope == "global" else max(layer.size for layer in units.values())
    return budget.along(lambda step: scores.select(step / number, **options), number)


def latencies(model: nn.Module, units: Components, example: Tensor | None = None) -> dict[str, float]:
    """Measured seconds of each layer of components with all that runs inside it, divided by its size.

    Parameters
    ----------
    model : nn.Module
    units : Components
        Of ``model``.
    example : Tensor, optional
        The batch to measure on; default one input, found as by :func:`pxp.find_components`.

    Returns
    -------
    dict of str to float
        Seconds per component; what :meth:`pxp.Scores.select` takes as ``cost``.

    Raises
    ------
    ValueError
        Components of another model; an example that the model does not accept.
    """
    units.check(model)
    seconds = layer_seconds(replica(model), _batch(model, example))
    return {
        # the fastest pass: what else the machine does must not decide what is pruned
        name: sum(min(times) for inner, times in seconds.items() if f"{inner}.".startswith(f"{name}.")) / layer.size
        for name, layer in units.items()
    }


class Budget:
    """Measures what is left of a network's cost, and finds the mask that just fits.

    Parameters
    ----------
    model : nn.Module
    quantity : {"flops", "parameters", "latency"}
    share : float
        What may remain of the dense network's cost, in [0, 1].
    example : Tensor, optional
        As for :func:`pxp.compact`; the batch that operations are counted and seconds measured on.
    """

    def __init__(self, model: nn.Module, quantity: str, share: float, example: Tensor | None = None) -> None:
        self.model, self.quantity, self.share = model, quantity, share
        self.images = _batch(model, example)
        # torch's fast path for attention hides its operations
        self.dense = self.measured(replica(model) if quantity == "flops" else model)
        self._blueprint: Blueprint | None = None

    def measured(self, model: nn.Module) -> float:
        """One figure of :func:`pxp.cost`, without the time that the others take."""
        if self.quantity == "parameters":
            return sum(parameter.numel() for parameter in model.parameters())
        with evaluating(model), torch.inference_mode():
            if self.quantity == "latency":
                # the fastest of many, for the same reason as above
                return min(pass_seconds(model, self.images, 0.2))
            with FlopCounterMode(display=False) as counter:
                model(self.images)
        return counter.get_total_flops()

    def network(self, mask: Mask) -> fx.GraphModule:
        """What :func:`pxp.compact` makes; the model is traced only once."""
        if self._blueprint is None:
            self._blueprint = Blueprint(self.model, mask.units, self.images)
        return self._blueprint.network(mask)

    def left(self, mask: Mask) -> float:
        """Share of the dense network's cost that the compacted one has."""
        return self.measured(self.network(mask)) / self.dense

    def fits(self, mask: Mask) -> bool:
        return self.left(mask) <= self.share

    def along(self, masks: Callable[[int], Mask], number: int) -> Mask:
        """The first that fits of ``masks(0)``, …, ``masks(number)``, each of which prunes more than the one before."""
        if not self.fits(masks(number)):
            raise self._out_of_reach()
        return self._first(masks, number)

    def per_cost(
        self, scores: Mapping[str, Tensor], units: Components, price: Mapping[str, float], order: str, min_keep: int
    ) -> Mask:
        """Prune by score per cost; after every step a component costs less by the weights that went with others."""
        sizes = [layer.size for layer in units.values()]
        sign = 1 if order == "least" else -1
        score = torch.cat([scores[name] for name in units])
        stays = torch.cat([guarded(sign * scores[name], min_keep) for name in units])
        step = STEP * sum(price[name] * layer.size for name, layer in units.items())
        mask = Mask(units, {name: torch.ones(layer.size, dtype=torch.bool) for name, layer in units.items()})
        while True:
            left = weights_left(self.model, self.network(mask), units)
            now = torch.cat([torch.full((n,), price[k] * left[k]).double() for k, n in zip(units, sizes, strict=True)])
            alive = torch.cat(list(mask.values()))
            free = alive & ~stays
            queue = torch.argsort((sign * per_cost(score, now)).masked_fill(~free, torch.inf), stable=True)
            queue = queue[: int(free.sum())]
            number = min(len(queue), 1 + int((now[queue].cumsum(0) < step).sum()))

            def after(count: int, alive: Tensor = alive, queue: Tensor = queue) -> Mask:
                left = alive.index_fill(0, queue[:count], False).split(sizes)
                return Mask(units, dict(zip(units, left, strict=True)))

            mask = after(number)
            if self.fits(mask):
                return self._first(after, number)
            if number == len(queue):
                raise self._out_of_reach()

    def _first(self, masks: Callable[[int], Mask], number: int) -> Mask:
        low, high = 0, number
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.fits(masks(middle)) else (middle + 1, high)
        return masks(low)

    def _out_of_reach(self) -> ValueError:
        return ValueError(
            f"{self.quantity}={self.share:g} cannot be reached: with all gone that may go, more than that is left"
        )


def _batch(model: nn.Module, example: Tensor | None) -> Tensor:
    one = example_input(model, example)
    return one if example is None else example.to(one).clone()  # which a network may change


def weights_left(model: nn.Module, small: nn.Module, units: Components) -> dict[str, float]:
    """Share of the weights that go with one component of each layer which its compacted network still has.

    They go with the components in front of a layer, and those of a neuron also with the outputs that read it. A head's
    weights read and write the residual stream, which stays.
    """
    dense, rest = dict(replica(model).named_modules()), dict(small.named_modules())

    def shape(modules: Mapping[str, nn.Module], name: str | None) -> tuple[int, int]:
        """Outputs, and weights of each."""
        if name is None or name not in modules:
            return 0, 0
        weight = next(modules[name].parameters())
        return len(weight), weight[0].numel()

    shares = {}
    for name, layer in units.items():
        then = reader_of(name, units.trace, dense) if layer.kind == "neuron" else None
        now, before = (shape(modules, name)[1] + shape(modules, then)[0] for modules in (rest, dense))
        # what has become constant has no layer and costs nothing, but is divided by
        shares[name] = 1.0 if layer.kind == "head" else max(now / before if name in rest else 0, NOTHING)
    return shares
