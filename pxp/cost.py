"""What a network costs: parameters, bytes, operations, memory and time."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .network.replica import evaluating, replica
from .network.trace import example_input

# attribute of a cost → its title, what one unit of it is, and how it is written
QUANTITIES = {
    "parameters": ("parameters", 1, ",.0f"),
    "bytes": ("MiB", 2**20, ",.2f"),
    "memory": ("activations, MiB", 2**20, ",.2f"),
    "latency": ("latency, ms", 1e-3, ",.3f"),
    "flops": ("MFLOPs", 1e6, ",.1f"),
}


@dataclass(frozen=True, repr=False)
class Cost:
    """The cost of one forward pass over one batch.

    Attributes
    ----------
    parameters : int
    bytes : int
        Of parameters and buffers.
    flops : int
        Floating-point operations of matrix products and convolutions for the whole batch (a multiply-add is two), by
        torch's counter.
    memory : int
        Largest number of bytes that activations held at one time; of a layer, while it ran.
    latency : float
        Seconds, median. On a GPU between two of its own events, else by the clock.
    spread : float
        Interquartile range of the latency, seconds.
    batch : int
        Images per pass.
    threads : int
        Processor threads that were used; on a GPU they do not matter.
    by_layer : dict of str to Cost
        The cost of every module that runs or has parameters, without the modules inside it: parameters and operations
        add up to the total. ``""`` is what the model itself does between its modules. Memory and time are those of a
        copy in which attentions show their parts, which fused ones hide; measuring takes each module some
        microseconds, so that times add up to a little more than one pass.
    """

    parameters: int
    bytes: int
    flops: int
    memory: int
    latency: float
    spread: float
    batch: int
    threads: int
    by_layer: dict[str, Cost] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, int]:
        """Operations of every module that does any."""
        return {name: part.flops for name, part in self.by_layer.items() if part.flops}

    def __repr__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return (
            f"{self.parameters:,} parameters ({self.bytes / 2**20:.2f} MiB), {self.flops / 1e6:,.1f} MFLOPs, "
            f"{self.memory / 2**20:.1f} MiB of activations, {1000 * self.latency:.2f} ms ± {1000 * self.spread:.2f} "
            f"(batch {self.batch}, {threads})"
        )


def cost(model: nn.Module, images: Tensor, *, seconds: float = 0.5) -> Cost:
    """Measure what one forward pass costs, in evaluation mode and without gradients.

    Parameters
    ----------
    model : nn.Module
        Dense, masked (inside :func:`pxp.masked`) or compact. Left as it is.
    images : Tensor
        One batch.
    seconds : float, default 0.5
        How long to measure the latency at least; that of the layers is the median of five passes.

    Returns
    -------
    Cost
        Latencies are comparable only if measured on the same machine, with the same threads and batch.

    Raises
    ------
    ValueError
        Images that the model does not accept.
    """
    images = images.to(next((p for p in model.parameters() if p.is_floating_point()), images)).clone()
    example_input(model, images)  # images that do not fit are an error that says so
    explicit = _explicit(model)
    flops: dict[str, int] = {}
    peaks: dict[str, int] = {}
    with evaluating(model), torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            for name, before, after in _stretches(explicit, images, counter.get_total_flops):
                flops[name] = flops.get(name, 0) + int(after - before)
        with _peaks(images.device) as peak:
            for name, _, most in _stretches(explicit, images, peak):
                peaks[name] = max(peaks.get(name, 0), most)
        memory = peak_memory(lambda: model(images), images.device)
        latency, spread = _middle(pass_seconds(model, images, seconds))
    times = layer_seconds(explicit, images)
    measured = partial(Cost, batch=len(images), threads=torch.get_num_threads())
    held = _own_tensors(explicit)
    by_layer = {}
    for name in dict.fromkeys([*flops, *held]):
        parameters, buffers = held.get(name, ([], []))
        median, quartiles = _middle(times.get(name, [0.0]))
        by_layer[name] = measured(
            parameters=sum(p.numel() for p in parameters),
            bytes=_bytes([*parameters, *buffers]),
            flops=flops.get(name, 0),
            memory=peaks.get(name, 0),
            latency=median,
            spread=quartiles,
        )
    return measured(
        parameters=sum(p.numel() for p in model.parameters()),
        bytes=_bytes([*model.parameters(), *model.buffers()]),
        flops=int(counter.get_total_flops()),
        memory=memory,
        latency=latency,
        spread=spread,
        by_layer=by_layer,
    )


def compare_costs(named: Mapping[str, Cost], layers: str = "flops") -> str:
    """Put costs side by side: the totals, and one of them for every layer.

    Parameters
    ----------
    named : mapping of str to Cost
        Column → cost, such as those of the dense, the masked and the compacted network. Measured on equal batches.
    layers : {"flops", "parameters", "bytes", "memory", "latency"}
        What to print for every layer.

    Returns
    -------
    str
        A table to print; a layer that a network does not have costs nothing.

    Raises
    ------
    ValueError
        No cost; batches of different sizes; ``layers`` that is not among the allowed ones.
    """
    if not named or len({found.batch for found in named.values()}) > 1:
        raise ValueError(f"costs of one batch size are comparable, got {[found.batch for found in named.values()]}")
    parts = per_layer(named, layers)
    rows: dict[str, list[str]] = {}
    for quantity, (title, unit, style) in QUANTITIES.items():
        rows[title] = [format(getattr(found, quantity) / unit, style) for found in named.values()]
        if quantity == layers:
            rows |= {f"  {name}": [format(value, style) for value in values] for name, values in parts.items()}
    first = max(len(title) for title in rows)
    width = max(len(cell) for cells in (named, *rows.values()) for cell in cells)
    return "\n".join(
        f"{title:<{first}}" + "".join(f"  {cell:>{width}}" for cell in cells)
        for title, cells in {"": list(named), **rows}.items()
    )


def per_layer(named: Mapping[str, Cost], quantity: str) -> dict[str, list[float]]:
    """Of every layer that costs anything, this quantity of each cost, in the unit of :data:`QUANTITIES`."""
    if quantity not in QUANTITIES:
        raise ValueError(f"layers must be one of {', '.join(map(repr, QUANTITIES))}, got {quantity!r}")
    unit = QUANTITIES[quantity][1]
    found = {
        name: [getattr(cost.by_layer[name], quantity) / unit if name in cost.by_layer else 0 for cost in named.values()]
        for name in dict.fromkeys(name for cost in named.values() for name in cost.by_layer)
    }
    return {name or "(model)": values for name, values in found.items() if any(values)}


def layer_seconds(model: nn.Module, images: Tensor, passes: int = 5) -> dict[str, list[float]]:
    """Seconds that every module took without the modules inside it, once per pass."""
    mark, seconds = _clock(images.device)
    times: dict[str, list[float]] = {}
    with evaluating(model), torch.inference_mode():
        model(images)  # the first pass is slower
        for number in range(passes):
            for name, began, ended in _stretches(model, images, mark):
                each = times.setdefault(name, [0.0] * passes)
                each[number] += seconds(began, ended)
    return times


def pass_seconds(model: nn.Module, images: Tensor, at_least: float) -> list[float]:
    """Seconds of one forward pass, measured again and again for a while, with the threads that are set."""
    if images.is_cuda:
        mark, seconds = _clock(images.device)
        times: list[float] = []
        while sum(times) < at_least or not times:
            began = mark()
            model(images)
            times.append(seconds(began, mark()))
        return times
    talkative = logging.getLogger("torch.utils.cpp_extension")  # it warns where there is a CUDA compiler but no GPU
    level = talkative.level
    talkative.setLevel(logging.ERROR)
    from torch.utils.benchmark import Timer

    talkative.setLevel(level)
    timer = Timer("model(images)", globals={"model": model, "images": images}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=at_least).times


def peak_memory(run: Callable[[], object], device: torch.device | None = None) -> int:
    """Largest number of bytes that tensors held at one time beyond what they held before."""
    run()
    with _peaks(device) as peak:
        run()
        return peak()


def _explicit(model: nn.Module) -> nn.Module:
    """A replica, for torch's fast path for attention hides its operations; as sparing with memory as the model."""
    twin = replica(model)
    twins = dict(twin.named_modules())
    for name, module in model.named_modules():
        if getattr(module, "inplace", False) and name in twins:
            twins[name].inplace = True
    return twin


def _stretches(model: nn.Module, images: Tensor, mark: Callable[[], Any]) -> Iterator[tuple[str, Any, Any]]:
    """Run once: (module, mark, next mark) of every stretch of the run, with the innermost module that then runs."""
    running: list[str] = []
    found: list[tuple[str, Any, Any]] = []
    last: Any = None

    def turn(change: Callable[[], object]) -> Callable[..., None]:
        def hook(*_: object) -> None:
            nonlocal last
            now = mark()
            if running:
                found.append((running[-1], last, now))
            change()
            last = now

        return hook

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(turn(partial(running.append, name)), prepend=True))
        handles.append(module.register_forward_hook(turn(running.pop)))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    yield from found


def _clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """What marks a moment, and the seconds between two; a GPU marks it itself, so that nothing waits for it."""
    if device.type != "cuda":
        return time.perf_counter, lambda began, ended: ended - began

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def seconds(began: torch.cuda.Event, ended: torch.cuda.Event) -> float:
        ended.synchronize()
        return began.elapsed_time(ended) / 1000

    return mark, seconds


def _middle(times: list[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    low, median, high = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return float(median), float(high - low)


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _own_tensors(model: nn.Module) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Module → parameters and buffers that it holds itself; what several share counts for the first."""
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for index, tensors in enumerate((model.named_parameters(), model.named_buffers())):
        for name, tensor in tensors:
            found.setdefault(name.rpartition(".")[0], ([], []))[index].append(tensor)
    return found


@contextmanager
def _peaks(device: torch.device | None) -> Iterator[Callable[[], int]]:
    """A function that gives the largest number of bytes held since it was last called, beyond what was held before."""
    if device is None or device.type != "cuda":
        with _Held() as held:
            yield held.since
        return
    before = torch.cuda.memory_allocated(device)

    def since() -> int:
        most = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.reset_peak_memory_stats(device)
        return most

    torch.cuda.reset_peak_memory_stats(device)
    yield since


class _Held(TorchDispatchMode):
    """Adds up the memory of all tensors that are made and not yet given up."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, weakref.ref] = {}

    def since(self) -> int:
        """The most since this was last asked."""
        most, self.peak = self.peak, self.now
        return most

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._note((args, kwargs), made=False)  # parameters and inputs were there before
        result = func(*args, **(kwargs or {}))
        self._note(result, made=True)
        return result

    def _note(self, tensors: object, made: bool) -> None:
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = id(storage), storage.nbytes() if made else 0
            if key not in self.seen:
                self.seen[key] = weakref.ref(storage, partial(self._given_up, key, size))
                self.now += size
                self.peak = max(self.peak, self.now)

    def _given_up(self, key: int, size: int, _: weakref.ref) -> None:
        self.seen.pop(key, None)
        self.now -= size
