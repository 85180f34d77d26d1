"""The pieces of autograd that rules are made of: values as they are, another backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ..network.layers import LINEAR, TRANSPOSED

_BLOCK = 2**20  # weights


def stabilize(d: Tensor, epsilon: float) -> Tensor:
    """d + ε·sign(d), with sign(0) = 1: a denominator that is never zero."""
    return d + torch.copysign(d.new_tensor(epsilon), d)


def with_parameters(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The module's own forward with other parameters; the module is not touched, its hooks do not run."""
    changed = copy.copy(module)
    for name in ("weight", "bias"):  # of a layer that is given its weight from outside
        changed.__dict__.pop(name, None)
    changed._parameters = {"weight": weight, "bias": bias}  # type: ignore[dict-item]
    return changed.forward


def as_called(module: nn.Module, x: Tensor, output: Tensor) -> nn.Module:
    """The module so that ``forward(x)`` gives an output of this size, which a transposed convolution may be told."""
    if not isinstance(module, TRANSPOSED):
        return module
    sizes = zip(x.shape[2:], module.stride, module.padding, module.dilation, module.kernel_size, strict=True)
    smallest = [(size - 1) * stride - 2 * pad + dilation * (k - 1) + 1 for size, stride, pad, dilation, k in sizes]  # type: ignore[operator]
    more = tuple(size - least for size, least in zip(output.shape[2:], smallest, strict=True))
    if more == module.output_padding:
        return module
    told = copy.copy(module)
    told.output_padding = more
    return told


def lean(module: nn.Module, change: Callable[[Tensor], Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply the module to ``x`` with the weight ``change(weight)`` and another bias, without storing that weight.

    Backward makes it anew, and a large linear layer goes through it in blocks of rows that fit the processor's cache.
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    if not isinstance(module, LINEAR):
        return _block(module, weight, change, x, bias)
    rows = max(1, _BLOCK // module.in_features)
    weights = weight.split(rows)
    biases = [None] * len(weights) if bias is None else bias.split(rows)
    blocks = [_block(module, part, change, x, shift) for part, shift in zip(weights, biases, strict=True)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)


def _block(
    module: nn.Module, weight: Tensor, change: Callable[[Tensor], Tensor], x: Tensor, bias: Tensor | None
) -> Tensor:
    changed = change(weight)
    weight_at, start = changed.data_ptr(), changed.storage_offset()

    # what is kept of the weight may be a view of it: transposed, or expanded over a batch that is not contiguous
    def pack(tensor: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
        return tensor if tensor.data_ptr() != weight_at else (tensor.shape, tensor.stride())

    def unpack(packed: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
        return packed if isinstance(packed, Tensor) else change(weight).as_strided(*packed, start)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return with_parameters(module, changed, bias)(x)


class Once:
    """Tensors that the backward pass takes once: memory falls on the way, and what was taken may be overwritten."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = [tensors]

    def take(self) -> tuple[Tensor, ...]:
        if not self._tensors:
            raise RuntimeError("a rule's graph can be walked back only once; run the model again")
        return self._tensors.pop()


def over(z: Tensor, denominator: Tensor) -> Tensor:
    """z / denominator, written over the denominator: a large new tensor costs more than the division."""
    return torch.div(z, denominator, out=denominator)


def scaled(grad: Tensor, *shares: Tensor) -> tuple[Tensor, ...]:
    return tuple(share.mul_(grad) for share in shares)


class Carry(Function):
    """A tensor with the values of ``value`` whose gradient goes, weighed with the shares, to ``carriers``."""

    @staticmethod
    def forward(
        ctx,
        value: tuple[Tensor],
        shares: tuple[Tensor, ...],
        weigh: Callable[..., tuple[Tensor, ...]],
        *carriers: Tensor,
    ) -> Tensor:
        ctx.shares, ctx.weigh = Once(*shares), weigh
        return value[0]  # in a tuple, so that autograd sees a new tensor, not an input returned as it is

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, None, None, *ctx.weigh(grad, *ctx.shares.take())


class Anew(Function):
    """The values now, their graph only in the backward pass: what that needs is computed again instead of kept.

    ``Anew.apply((values,), make, *inputs)`` gives the values; ``make(*inputs)`` computes them with the graph that the
    backward pass follows.
    """

    @staticmethod
    def forward(ctx, value: tuple[Tensor], make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.make = make
        return value[0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            made = ctx.make(*inputs)
        return None, None, *torch.autograd.grad(made, inputs, grad)


class Redistribute(Function):
    """Backward pass of a rule whose relevance does not contain the input as a factor: g = R / x.

    ``terms(x)`` gives (sign, input, weight, bias) of the passes whose signed sum is the denominator.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        value: tuple[Tensor],
        terms: Callable[[Tensor], list[tuple[float, Tensor, Tensor, Tensor | None]]],
        module: nn.Module,
        epsilon: float,
    ) -> Tensor:
        ctx.save_for_backward(x, value[0])
        ctx.terms, ctx.module, ctx.epsilon = terms, module, epsilon
        return value[0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, z = ctx.saved_tensors
        with torch.enable_grad():
            terms = []
            for sign, tensor, weight, bias in ctx.terms(x.detach()):
                tensor = tensor.requires_grad_()
                terms.append((sign, tensor, with_parameters(ctx.module, weight, bias)(tensor)))
        denominator = sum(sign * out.detach() for sign, _, out in terms)
        share = z * grad / stabilize(denominator, ctx.epsilon)
        relevance = torch.zeros_like(x)
        for sign, tensor, out in terms:
            (gradient,) = torch.autograd.grad(out, tensor, share)
            relevance += sign * tensor.detach() * gradient
        return torch.where(x == 0, 0, relevance / x), None, None, None, None
