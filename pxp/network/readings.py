"""Numbers that a forward pass reads from the images and takes up again, where no explanation can follow them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .outputs import tensors
from .replica import eager, replica
from .signals import Signals, without_functions

NUMBERS = ("add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide", "pow", "radd", "rmul",
           "truediv", "rtruediv", "iadd", "imul", "isub", "itruediv")  # fmt: skip


class _Constants(Signals):
    """Notes what operations on signals take beside them: numbers, and sums of tensors that follow from no image.

    Parameters
    ----------
    twin, images
        As for :class:`Signals`.
    read : mapping of int to str
        Operations, counted, that take what was read from the images: a fault for what follows from them.
    """

    def __init__(self, twin: nn.Module, images: Tensor, read: Collection[int] = ()) -> None:
        super().__init__(twin, images)
        self.taken: list[tuple[str, str, tuple[float, ...]]] = []  # module, operation, what it takes
        self.read, self.own = read, {id(parameter) for parameter in twin.parameters()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given, name = [*args, *(kwargs or {}).values()], getattr(func, "__name__", str(func)).strip("_")
        at = None
        if any(self.of(tensor) is not None for tensor in tensors(given)):
            at, whole = len(self.taken), int if name in NUMBERS else float  # elsewhere whole numbers are sizes
            numbers = [value for value in given if isinstance(value, float | np.floating | whole | np.integer)]
            others = [t for t in tensors(given) if self.of(t) is None and t not in self._values]
            with without_functions():
                numbers += [float(t.detach().sum()) for t in others if id(t) not in self.own and not t.is_complex()]
            self.taken.append((self.inside[-1], name, tuple(float(number) for number in numbers)))
        result = super().__torch_function__(func, types, args, kwargs)
        if at in self.read:
            fault = f"{name} with numbers read from the images (.item(), .numpy())"
            made = args[0] if result is None else result
            for tensor in tensors(made):
                known = self.of(tensor)
                if known is not None:
                    self.mark(tensor, replace(known, faults=known.faults | {(self.inside[-1], fault)}))
        return result


def read_values(model: nn.Module, images: Tensor) -> frozenset[tuple[str, str]]:
    """Operations on the way to the output that take numbers which left torch (by ``item`` or ``numpy``).

    They are others for other images, and the same for the same. Only as far as two images let the same operations run;
    what differs afterwards, every explaining pass shows.
    """
    generator = torch.Generator().manual_seed(0)
    one, other = (scale * torch.rand(images.shape, generator=generator).to(images) for scale in (1, 3))

    def run(given: Tensor, read: Collection[int] = ()) -> tuple[_Constants, Any]:
        twin, given = replica(model), given.clone()
        seen = _Constants(twin, given, read)
        with torch.no_grad(), eager(), seen.watching():
            return seen, twin(given)

    runs = [run(given)[0].taken for given in (one, one, other)]
    read = set()
    for at, (first, again, changed) in enumerate(zip(*runs, strict=False)):
        if not first[:2] == again[:2] == changed[:2]:
            break
        values = [np.array(each[2]) for each in (first, again, changed)]
        if len({each.shape for each in values}) == 1 and not np.isnan(values).any():
            if (values[0] == values[1]).all() and (values[0] != values[2]).any():
                read.add(at)
    if not read:
        return frozenset()
    seen, output = run(one, read)
    answer = next(tensors(getattr(output, "logits", output)), None)
    reached = None if answer is None else seen.of(seen.logits(answer))
    return frozenset() if reached is None else frozenset(f for f in reached.faults if "read from the images" in f[1])
