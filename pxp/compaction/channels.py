"""The small layers that a compacted network needs between its own: they move, add and fill in channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


class Expand(nn.Module):
    """Give back all channels: the live ones at their places, constants elsewhere."""

    live: Tensor
    rest: Tensor

    def __init__(self, live: Tensor, rest: Tensor, dim: int) -> None:
        super().__init__()
        self.register_buffer("live", live)
        self.register_buffer("rest", rest)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        rest = self.rest.view(-1, *[1] * (x.ndim - 1 - self.dim))
        whole = rest.expand(*x.shape[: self.dim], *rest.shape[:1], *x.shape[self.dim + 1 :])
        return whole.index_copy(self.dim, self.live, x)


class Constant(nn.Module):
    """A tensor of which every channel is constant; takes only the number of inputs from its argument.

    ``shape`` gives for every dimension its size without any input and what each input adds.
    """

    rest: Tensor

    def __init__(self, rest: Tensor, shape: Sequence[tuple[int, int]], dim: int) -> None:
        super().__init__()
        view = [1] * len(shape)
        view[dim] = -1
        self.register_buffer("rest", rest.view(view))
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest.expand([size + x.shape[0] * each if each else size for size, each in self.shape])


class Select(nn.Module):
    """Some of the channels."""

    index: Tensor

    def __init__(self, index: Tensor, dim: int) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.dim, self.index)


class Join(nn.Module):
    """The sum of two tensors that hold different channels of the same whole."""

    first: Tensor | None
    second: Tensor

    def __init__(self, first: Tensor, second: Tensor, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("first", None if len(first) == size else first)
        self.register_buffer("second", second)
        self.size, self.dim = size, dim

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        # where the channels lie last in memory they are indexed there, which is much faster and keeps that layout
        last = self.dim == 1 and x.ndim == 4 and not x.is_contiguous()
        dim = -1 if last else self.dim
        x, y = (part.movedim(1, -1) if last else part for part in (x, y))
        if self.first is not None:
            shape = list(x.shape)
            shape[dim] = self.size
            x = x.new_zeros(shape).index_copy(dim, self.first, x)
        x = x.index_add(dim, self.second, y)
        return x.movedim(-1, 1) if last else x


class Affine(nn.Module):
    """A factor and a summand per channel."""

    def __init__(self, scale: Tensor | None, shift: Tensor | None, dim: int) -> None:
        super().__init__()
        self.scale = None if scale is None else nn.Parameter(scale)
        self.shift = None if shift is None else nn.Parameter(shift)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        view = (-1, *[1] * (x.ndim - 1 - self.dim))
        x = x if self.scale is None else x * self.scale.view(view)
        return x if self.shift is None else x + self.shift.view(view)


class Switch(nn.Module):
    """A function that takes other arguments, at these places or of these names, in training: dropout, for example."""

    def __init__(self, function: Callable[..., Any], others: Mapping[int | str, Any]) -> None:
        super().__init__()
        self.function, self.others = function, dict(others)

    def forward(self, *args: Any, **options: Any) -> Any:
        if self.training:
            args = tuple(self.others.get(place, given) for place, given in enumerate(args))
            options = {name: self.others.get(name, given) for name, given in options.items()}
        return self.function(*args, **options)

    def extra_repr(self) -> str:
        return f"{getattr(self.function, '__name__', self.function)}, in training {self.others}"
