"""What a network costs: parameters, bytes, operations, memory and time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .components import example_input
from .replica import evaluating, replica


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
    from torch.utils.benchmark import Timer  # looks for a CUDA compiler when it is imported, and says so

    images = images.to(next((p for p in model.parameters() if p.is_floating_point()), images))
    example_input(model, images)  # images that do not fit are an error that says so
    held = [*model.parameters(), *model.buffers()]
    explicit = replica(model)  # torch's fast path for attention hides its operations from the counter
    with evaluating(model), torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            explicit(images)
        memory = peak_memory(lambda: model(images), images.device)
        timer = Timer("model(images)", globals={"model": model, "images": images}, num_threads=torch.get_num_threads())
        time = timer.blocked_autorange(min_run_time=seconds)
    root = type(model).__name__
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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))
