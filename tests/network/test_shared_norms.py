"""A BatchNorm behind several layers is behind each of them, as if each had a copy of it."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import relative
from torch import Tensor, nn

import pxp


class Recurrent(nn.Module):
    """Two convolutions, one after the other, and a projection in parallel, all normalised by ``norms[0]``."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, 4, 3, padding=1) for channels in (2, 4, 2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(1 if shared else 3))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        norms = [self.norms[min(number, len(self.norms) - 1)] for number in range(3)]
        one = norms[0](self.convs[0](x)).relu()
        two = norms[1](self.convs[1](one)).relu()
        return self.fc((two + norms[2](self.convs[2](x)).sigmoid()).mean((2, 3)))


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    shared, own = Recurrent(True).double().eval(), Recurrent(False).double().eval()
    norm = shared.norms[0]
    for part in (norm.running_mean, norm.bias.data):
        part.normal_()
    for part in (norm.running_var, norm.weight.data):
        part.uniform_(0.5, 1.5)
    own.convs.load_state_dict(shared.convs.state_dict())
    own.fc.load_state_dict(shared.fc.state_dict())
    own.norms = nn.ModuleList(copy.deepcopy(norm) for _ in range(3))
    return shared, own


def test_each_layer_has_its_own_place(untouched):
    shared, own = pair()
    x, y = torch.randn(12, 2, 8, 8).double(), torch.arange(12) % 3
    assert relative(shared(x), own(x)) == 0
    for rule in ("epsilon", "gamma", "zplus"):
        criterion = pxp.LRP(rule)
        assert relative(*(pxp.heatmap(model, x, y, criterion) for model in (untouched(shared), own))) < 1e-9
        units, other = (pxp.find_components(model, example=x) for model in (shared, own))
        scores, expected = pxp.attribute(shared, (x, y), units, criterion), pxp.attribute(own, (x, y), other, criterion)
        for layer in units:
            assert relative(scores[layer], expected[layer]) < 1e-9
    for layer in units:
        kept = {name: torch.ones(4, dtype=torch.bool) for name in units}
        kept[layer][1:3] = False
        mask, same = pxp.Mask(units, kept), pxp.Mask(other, kept)
        with pxp.masked(shared, mask), pxp.masked(own, same), torch.no_grad():
            pruned = shared(x)
            assert relative(pruned, own(x)) == 0 and relative(pruned, shared.eval()(x)) == 0
        assert relative(pxp.compact(shared, mask, example=x)(x).detach(), pruned) < 1e-9
        assert relative(pruned, shared(x).detach()) > 1e-3
    curves = [
        pxp.pruning_curve(model, found, (x, y), rates=(0, 0.3, 0.6), progress=False, allow_shared=True)
        for model, found in ((shared, scores), (own, expected))
    ]
    assert curves[0].runs == curves[1].runs


class Bare(Recurrent):
    """The first convolution also runs without its norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.fc(self.convs[0](x).relu().mean((2, 3)))


class Elsewhere(Recurrent):
    """The norm also takes what no layer gives."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.fc(self.norms[0](torch.cat([x, x], 1)).mean((2, 3)))


@pytest.mark.parametrize("make", [Bare, Elsewhere])
def test_a_layer_without_a_place_of_its_own_is_named(make):
    model, x = make(True).eval(), torch.randn(2, 2, 8, 8)
    with pytest.raises(ValueError, match=r"what 'convs\.0' gives has no place of its own: its BatchNorm 'norms\.0'"):
        pxp.find_components(model, example=x)
    assert pxp.heatmap(model, x, torch.tensor([0, 1])).shape == x.shape


def test_a_norm_over_tokens_is_not_merged():
    """BatchNorm1d normalises dimension 1, which behind a linear layer may be that of the tokens."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).double()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(4, 6, 5).double()
    point = x.clone().requires_grad_()
    y = torch.arange(4) % 3
    (gradient,) = torch.autograd.grad(model.eval()(point).gather(1, y[:, None]).sum(), point)
    found = pxp.heatmap(model, x, y, pxp.LRP(pxp.Epsilon(0)))
    assert relative(found, x * gradient) < 1e-9
