"""What a network costs: parameters, bytes, operations, memory and time."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .components import example_input
from .replica import evaluating, replica

if TYPE_CHECKING:
    from torch.utils.benchmark import Timer


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
        Largest number of bytes that activations held at one time.
    latency : float
        Seconds, median.
    spread : float
        Interquartile range of the latency, seconds.
    batch : int
        Images per pass.
    threads : int
        Processor threads that were used; on a GPU they do not matter.
    layers : dict of str to int
        Operations per module that has weights of its own.
    """

    parameters: int
    bytes: int
    flops: int
    memory: int
    latency: float
    spread: float
    batch: int
    threads: int
    layers: dict[str, int]

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
        How long to measure the latency at least.

    Returns
    -------
    Cost
        Latencies are comparable only if measured on the same machine, with the same threads and batch.

    Raises
    ------
    ValueError
        Images that the model does not accept.
    """
    images = images.to(next((p for p in model.parameters() if p.is_floating_point()), images))
    example_input(model, images)  # images that do not fit are an error that says so
    held = [*model.parameters(), *model.buffers()]
    explicit = replica(model)  # torch's fast path for attention hides its operations from the counter
    with evaluating(model), torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            explicit(images)
        memory = peak_memory(lambda: model(images), images.device)
        time = timer(model, images).blocked_autorange(min_run_time=seconds)
    root = type(explicit).__name__
    counts = {name: sum(by.values()) for name, by in counter.get_flop_counts().items()}
    own = {
        name for name, module in explicit.named_modules() if next(module.parameters(recurse=False), None) is not None
    }
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in held),
        flops=int(counter.get_total_flops()),
        memory=memory,
        latency=time.median,
        spread=time.iqr,
        batch=len(images),
        threads=torch.get_num_threads(),
        layers={
            name.removeprefix(f"{root}."): int(number)
            for name, number in counts.items()
            if name.removeprefix(f"{root}.") in own
        },
    )


def compare_costs(named: Mapping[str, Cost]) -> str:
    """Put costs side by side: the totals, and the operations of every layer.

    Parameters
    ----------
    named : mapping of str to Cost
        Column → cost, such as those of the dense, the masked and the compacted network. Measured on equal batches.

    Returns
    -------
    str
        A table to print; a layer that a network does not have costs nothing.

    Raises
    ------
    ValueError
        No cost; batches of different sizes.
    """
    if not named or len({found.batch for found in named.values()}) > 1:
        raise ValueError(f"costs of one batch size are comparable, got {[found.batch for found in named.values()]}")
    layers = dict.fromkeys(layer for found in named.values() for layer in found.layers)
    rows = {
        "parameters": [f"{found.parameters:,}" for found in named.values()],
        "MiB": [f"{found.bytes / 2**20:.2f}" for found in named.values()],
        "activations, MiB": [f"{found.memory / 2**20:.2f}" for found in named.values()],
        "latency, ms": [f"{1000 * found.latency:.2f}" for found in named.values()],
        "MFLOPs": [f"{found.flops / 1e6:,.1f}" for found in named.values()],
        **{f"  {layer}": [f"{found.layers.get(layer, 0) / 1e6:,.1f}" for found in named.values()] for layer in layers},
    }
    first = max(len(title) for title in rows)
    width = max(len(cell) for cells in (named, *rows.values()) for cell in cells)
    return "\n".join(
        f"{title:<{first}}" + "".join(f"  {cell:>{width}}" for cell in cells)
        for title, cells in {"": list(named), **rows}.items()
    )


def timer(model: nn.Module, images: Tensor) -> Timer:
    """Torch's timer of one forward pass, with the threads that are set."""
    talkative = logging.getLogger("torch.utils.cpp_extension")  # it warns where there is a CUDA compiler but no GPU
    level = talkative.level
    talkative.setLevel(logging.ERROR)
    from torch.utils.benchmark import Timer

    talkative.setLevel(level)
    return Timer("model(images)", globals={"model": model, "images": images}, num_threads=torch.get_num_threads())


def peak_memory(run: Callable[[], object], device: torch.device | None = None) -> int:
    """Largest number of bytes that tensors held at one time beyond what they held before."""
    run()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Held() as held:
        run()
    return held.peak


class _Held(TorchDispatchMode):
    """Adds up the memory of all tensors that are made and not yet given up."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, weakref.ref] = {}

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
