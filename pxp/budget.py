"""Selecting to a budget: prune until the network that :func:`pxp.compact` makes costs no more than it may."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .compact import compact
from .components import Components, example_input
from .cost import timer
from .prune import Mask, guarded
from .replica import evaluating, replica

STEP = 0.05  # share of the components' cost that goes before relevance per cost is ranked anew


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
        self.dense = self.measured(model)

    def measured(self, model: nn.Module) -> float:
        """One figure of :func:`pxp.cost`, without the time that the others take."""
        if self.quantity == "parameters":
            return sum(parameter.numel() for parameter in model.parameters())
        with evaluating(model), torch.inference_mode():
            if self.quantity == "latency":
                # the fastest of many: what else the machine does must not decide what is pruned
                return min(timer(model, self.images).blocked_autorange(min_run_time=0.2).times)
            with FlopCounterMode(display=False) as counter:
                replica(model)(self.images)
        return counter.get_total_flops()

    def left(self, mask: Mask) -> float:
        """Share of the dense network's cost that the compacted one has."""
        return self.measured(compact(self.model, mask, example=self.images)) / self.dense

    def fits(self, mask: Mask) -> bool:
        return self.left(mask) <= self.share

    def along(self, masks: Callable[[int], Mask], number: int) -> Mask:
        """The first that fits of ``masks(0)``, …, ``masks(number)``, each of which prunes more than the one before."""
        if not self.fits(masks(number)):
            raise self._out_of_reach()
        return self._first(masks, number)

    def per_cost(self, keys: Mapping[str, Tensor], units: Components, cost: str, min_keep: int) -> Mask:
        """Prune the lowest ``keys`` per ``cost``; after every step, what a filter costs is less by its lost inputs."""
        sizes = [layer.size for layer in units.values()]
        key = torch.cat([keys[name] for name in units])
        stays = torch.cat([guarded(keys[name], min_keep) for name in units])
        if cost == "latency":
            dense = latencies(self.model, units, self.images)
        else:
            dense = {name: float(getattr(layer, cost)) for name, layer in units.items()}
        step = STEP * sum(dense[name] * layer.size for name, layer in units.items())
        mask = Mask(units, {name: torch.ones(layer.size, dtype=torch.bool) for name, layer in units.items()})
        while True:
            small = compact(self.model, mask, example=self.images)
            now = {name: price * _inputs_left(name, units, self.model, small) for name, price in dense.items()}
            price = torch.cat([torch.full((units[name].size,), now[name], dtype=torch.float64) for name in units])
            alive = torch.cat(list(mask.values()))
            free = alive & ~stays
            queue = torch.argsort((key / price).masked_fill(~free, torch.inf), stable=True)[: int(free.sum())]
            number = min(len(queue), 1 + int((price[queue].cumsum(0) < step).sum()))

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


def latencies(model: nn.Module, units: Components, example: Tensor | None = None) -> dict[str, float]:
    """Measured seconds of each layer of components, divided by its size; of heads, without the softmax's own time."""
    seconds = _seconds(replica(model), _batch(model, example))
    return {
        name: sum(value for inner, value in seconds.items() if f"{inner}.".startswith(f"{name}.")) / layer.size
        for name, layer in units.items()
    }


def _batch(model: nn.Module, example: Tensor | None) -> Tensor:
    one = example_input(model, example)
    return one if example is None else example.to(one)


def _inputs_left(name: str, units: Components, model: nn.Module, small: nn.Module) -> float:
    """Share of a filter's inputs that are left; neurons and heads read the residual stream, which stays."""
    layers = dict(small.named_modules())
    if units[name].kind != "filter" or name not in layers:
        return 1.0
    before, now = (next(m.get_submodule(name).parameters())[0].numel() for m in (model, small))
    return now / before


def _seconds(model: nn.Module, images: Tensor, repeats: int = 5) -> dict[str, float]:
    """Least seconds of every module that has weights of its own."""
    times: dict[str, list[float]] = {}
    wait = torch.cuda.synchronize if images.is_cuda else lambda: None
    began = 0.0

    def start(module: nn.Module, inputs: object) -> None:
        nonlocal began
        wait()
        began = time.perf_counter()

    def stop(name: str):
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            wait()
            times.setdefault(name, []).append(time.perf_counter() - began)

        return hook

    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None and next(module.children(), None) is None:
            module.register_forward_pre_hook(start)
            module.register_forward_hook(stop(name))
    with evaluating(model), torch.inference_mode():
        for _ in range(repeats + 1):
            model(images)
    return {name: min(values[1:] or values) for name, values in times.items()}
