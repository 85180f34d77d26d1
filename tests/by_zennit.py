"""Relevance by zennit."""

from __future__ import annotations

import copy
import itertools

import torch
from conftest import relative
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from zennit import rules as zennit_rules
from zennit.core import Composite
from zennit.layer import Sum
from zennit.torchvision import ResNetBasicBlockCanonizer, ResNetBottleneckCanonizer

TINY = 1e-12


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def folded(model: nn.Module, x: Tensor) -> nn.Module:
    """The same network without BatchNorm, by torch's own fusion of neighbours, and without in-place activations."""
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        children = list(parent.named_children())
        for (one, conv), (two, norm) in itertools.pairwise(children):
            if isinstance(conv, AFFINE) and isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                setattr(parent, one, fuse_conv_bn_eval(conv, norm, transpose=isinstance(conv, TRANSPOSED)))
                setattr(parent, two, nn.Identity())
    for module in twin.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    assert relative(twin(x).detach(), model(x).detach()) < (1e-12 if x.dtype == torch.float64 else 1e-4)
    return twin


def zennit_relevance(
    model: nn.Module, x: Tensor, labels: Tensor, rule_of
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Relevance of the input, and signed and magnitude score of every output channel, by zennit."""
    twin = folded(model, x)

    def module_map(ctx, name, module):
        if isinstance(module, AFFINE):
            return rule_of(name)
        if isinstance(module, nn.ReLU):
            return zennit_rules.Pass()
        return zennit_rules.Norm(stabilizer=TINY) if isinstance(module, (Sum, *AVERAGES)) else None

    composite = Composite(module_map, canonizers=[ResNetBasicBlockCanonizer(), ResNetBottleneckCanonizer()])
    flows: dict[str, Tensor] = {}
    x = x.clone().requires_grad_()
    with composite.context(twin):
        handles = [
            module.register_forward_hook(
                lambda module, inputs, output, name=name: (
                    output.register_hook(lambda flow: flows.__setitem__(name, flow)) and None
                )
            )
            for name, module in twin.named_modules()
            if isinstance(module, AFFINE)
        ]
        logits = twin(x)
        start = torch.zeros_like(logits)
        chosen = torch.arange(len(x)), labels
        start[chosen] = logits.detach()[chosen]
        (heat,) = torch.autograd.grad(logits, x, start)
        for handle in handles:
            handle.remove()
    per_sample = {name: flow.flatten(2).sum(2) if flow.ndim > 2 else flow for name, flow in flows.items()}
    signed = {name: value.mean(0) for name, value in per_sample.items()}
    return heat, signed, {name: value.abs().mean(0) for name, value in per_sample.items()}
