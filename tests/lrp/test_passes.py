"""Normalisations, gated products and activations by hand."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import relative
from oracle import scaled, straight
from torch import nn
from torch.nn import functional as F
from vits import lively

import pxp


@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm, timm.layers.LayerNorm, timm.layers.RmsNorm])
def test_normalisations_divide_by_a_constant(make):
    torch.manual_seed(0)
    norm = make(6).double()
    norm.weight.data.uniform_(0.5, 1.5)
    model = nn.Sequential(norm, nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double().eval()
    x = torch.randn(4, 6, dtype=torch.float64) + 0.5
    centred = isinstance(norm, nn.LayerNorm)
    value = x - x.mean(1, keepdim=True) * centred
    constant = norm.weight / (value.square().mean(1, keepdim=True) + (norm.eps or 2.3e-16)).sqrt()
    point = x.clone().requires_grad_()
    moved = (point - point.mean(1, keepdim=True) * centred) * constant.detach()
    moved = moved + norm.bias if getattr(norm, "bias", None) is not None else moved
    (gradient,) = torch.autograd.grad(model[1:](moved)[:, 1].sum(), point)
    found = pxp.heatmap(model, x, 1, pxp.LRP(pxp.Epsilon(1e-14)))
    assert relative(found, x * gradient) < 1e-9


@pytest.mark.parametrize("make", [timm.layers.SwiGLU, timm.layers.GluMlp])
def test_gated_products_by_hand(make):
    torch.manual_seed(0)
    gated = make(4, hidden_features=6)
    model = lively(nn.Sequential(nn.Linear(4, 4), gated, nn.Linear(4, 3)))
    x = torch.randn(3, 4, dtype=torch.float64)
    found = pxp.heatmap(model, x, 2, pxp.LRP(pxp.Epsilon(1e-14)))
    point = x.clone().requires_grad_()
    y = model[0](point)
    if make is timm.layers.SwiGLU:
        gate, value = straight(F.silu, gated.fc1_g(y)), gated.fc1_x(y)
    else:
        value, gate = gated.fc1(y).chunk(2, -1)
        if not gated.gate_last:
            raise AssertionError("the default of timm has changed")
    # a bounded gate is a constant, any other factor a signal
    product = scaled(gate * value, 0.5) if make is timm.layers.SwiGLU else torch.sigmoid(gate).detach() * value
    (gradient,) = torch.autograd.grad(model[2](gated.fc2(product))[:, 2].sum(), point)
    assert relative(found, x * gradient) < 1e-9
