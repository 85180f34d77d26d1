"""What passes relevance on: activations, normalisations, products and gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zennit.core import Hook

from .carry import Anew, Carry


class Identity(Hook):
    """Elementwise activations pass relevance on unchanged: f(x) = x · (f(x) / x) with the fraction held constant.

    ReLU and LeakyReLU need no hook, their gradient is f(x) / x already.
    """

    def register(self, module: nn.Module):
        self._alone = not module._forward_hooks  # else the output may be another than the activation's own
        return module.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        x = inputs[0]
        if not x.requires_grad:
            return None
        value = None if self._alone else output.detach()

        def make(x: Tensor) -> Tensor:
            known = x.detach()
            return x * torch.where(known == 0, 0, (module.forward(known) if value is None else value) / known)

        return Anew.apply((output.detach(),), make, x)


class Normalisation(Hook):
    """LayerNorm and RMSNorm: the division by the standard deviation is by a constant (Ali et al. 2022).

    What remains is linear: y = (x − mean) · w/std + b, and without the mean in RMSNorm.
    """

    def register(self, module: nn.Module):
        return module.register_forward_hook(self._hook)

    @staticmethod
    def _hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        x = inputs[0]
        if not x.requires_grad:
            return None
        weight: Tensor | None = getattr(module, "weight", None)
        channels_first = "2d" in type(module).__name__
        dims = (1,) if channels_first else tuple(range(-len(module.normalized_shape), 0))  # type: ignore[arg-type]
        if weight is not None and channels_first:
            weight = weight.reshape(-1, 1, 1)
        centred = isinstance(module, nn.LayerNorm)
        value = x.detach()
        square = value.var(dims, correction=0, keepdim=True) if centred else value.square().mean(dims, keepdim=True)
        stabiliser = getattr(module, "eps", None)
        scale = (square + (torch.finfo(x.dtype).eps if stabiliser is None else stabiliser)).rsqrt()

        def weigh(grad: Tensor, scale: Tensor) -> tuple[Tensor]:
            flow = grad * scale if weight is None else (grad * weight).mul_(scale)
            return (flow.sub_(flow.mean(dims, keepdim=True)) if centred else flow,)

        return Carry.apply((output.detach(),), (scale,), weigh, x)


class Half(Hook):
    """A product of two signals gives half of its relevance to each (Achtibat et al. 2024, eq. 11).

    Placed behind the product: halving what flows back there halves it on both ways.
    """

    def register(self, module: nn.Module):
        return module.register_forward_hook(self._hook)

    @staticmethod
    def _hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not output.requires_grad:
            return None
        return Carry.apply((output.detach(),), (), lambda grad: (grad / 2,), output)


class Constant(Hook):
    """A gate is a constant factor: the signal that it multiplies takes all the relevance (Arras et al. 2017)."""

    def register(self, module: nn.Module):
        return module.register_forward_hook(lambda module, inputs, output: output.detach())
