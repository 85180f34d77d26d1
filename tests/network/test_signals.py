"""Gates and products by structure, whatever their names."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from conftest import relative
from small import Calls, around, samples
from torch import Tensor, nn
from torch.nn import functional as F

import pxp


class Gated(nn.Module):
    """x · f(g(x)) for a gate of several shapes."""

    def __init__(self, end, combine=None) -> None:
        super().__init__()
        self.reduce, self.expand, self.end = nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False), end
        self.combine = combine or (lambda x, gate: x * gate)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.end(self.expand(torch.relu(self.reduce(x.mean((2, 3))))))
        return self.combine(x, gate[:, :, None, None])


GATES = {
    "module": (nn.Sigmoid(), None),
    "function": (torch.sigmoid, None),
    "hard": (nn.Hardsigmoid(), lambda x, gate: gate * x),
    "expanded like the signal": (torch.sigmoid, lambda x, gate: x * gate.expand_as(x)),
    "in place": (torch.sigmoid, lambda x, gate: x.clone().mul_(gate)),
    "shifted": (torch.tanh, lambda x, gate: x * (1 + gate)),
    "scaled and clipped": (lambda g: nn.functional.relu6(g + 3) / 6, None),
    "of a gate": (torch.sigmoid, lambda x, gate: x * (gate * torch.sigmoid(x.mean(1, keepdim=True)))),
    "by einsum": (torch.sigmoid, lambda x, gate: torch.einsum("nc,nchw->nchw", gate[:, :, 0, 0], x)),
    "by a listed einsum": (torch.sigmoid, lambda x, gate: torch.einsum("nchw,ncij->nchw", [x, gate])),
    "by a product of matrices": (
        torch.sigmoid, lambda x, gate: (gate @ x.flatten(2).unsqueeze(2)).view_as(x),
    ),
    "by keyword": (torch.sigmoid, lambda x, gate: torch.mul(input=x, other=gate)),
    "softmax over branches": (
        lambda g: torch.softmax(torch.stack([g, 2 * g]), 0)[0], lambda x, gate: x * gate + x * (1 - gate),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GATES)
def test_a_gate_is_a_constant(name, untouched):
    end, combine = GATES[name]
    model = untouched(around(Gated(end, combine), biases=False))
    x, labels = samples()
    found = pxp.heatmap(model, x, labels, pxp.LRP(pxp.Epsilon(0)))
    point = x.clone().requires_grad_()
    hidden = model[0](point)
    gated = model[1](hidden.detach()) / hidden.detach() * hidden  # the factor, whatever it is, as a constant
    (gradient,) = torch.autograd.grad(model[2:](gated).gather(1, labels[:, None]).sum(), point)
    assert relative(found, x * gradient) < 1e-9


@pytest.mark.parametrize(
    "combine",
    [
        lambda x: x * x.flip(1),
        lambda x: x.square(),
        lambda x: x**2,
        lambda x: torch.pow(x, exponent=2.0),
        lambda x: x ** torch.full((10,), 2.0, dtype=x.dtype),
        lambda x: torch.einsum("nchw,nchw->nchw", x, x),
        lambda x: torch.mul(x, x.roll(1, 1)),
        lambda x: x.mean((2, 3), keepdim=True) * x,  # FiLM
        lambda x: torch.nn.functional.silu(x) * x.flip(1),
        lambda x: (x.flatten(2) @ x.flatten(2).mT).unsqueeze(2).expand(-1, -1, 8, -1),
    ],
)
def test_other_products_are_shared(combine):
    """Half to each factor, so that relevance is conserved."""
    model = around(Calls(combine), biases=False)
    x, labels = samples()
    total = pxp.heatmap(model, x, labels, pxp.LRP(pxp.Epsilon(0))).sum((1, 2, 3))
    expected = model(x).gather(1, labels[:, None])[:, 0]
    assert relative(total, expected) < 1e-9


@pytest.mark.parametrize(
    ("make", "share"),
    [
        (lambda: torchvision.models.efficientnet_b0(), 0.3),
        (lambda: torchvision.models.mobilenet_v3_small(), 0.3),
        (lambda: timm.create_model("seresnet18"), 0.02),
        (lambda: timm.create_model("legacy_seresnet18"), 0.02),
    ],
)
def test_filters_inside_gates_are_no_components(make, share):
    torch.manual_seed(0)
    model = make().eval()
    example = torch.rand(1, 3, 64, 64)
    units, everything = (pxp.find_components(model, example=example, gates=gates) for gates in (False, True))
    assert units.left_out == everything.total - units.total > share * everything.total and everything.left_out == 0
    assert f"; {units.left_out:,} inside gates are left out (gates=True)" in repr(units).splitlines()[0]
    scores = pxp.attribute(model, (torch.rand(2, 3, 64, 64), torch.tensor([0, 1])), everything, pxp.LRP())
    inside = [name for name in everything if name not in units]
    assert inside and all(float(scores[name].max()) == 0 for name in inside)


class End(nn.Module):
    def __init__(self, body: nn.Module, end) -> None:
        super().__init__()
        self.body, self.end = body, end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.body(x))


@pytest.mark.parametrize(
    "end",
    [
        nn.Softmax(1), nn.LogSoftmax(1), nn.Sigmoid(), lambda z: nn.functional.softmax(z, 1), lambda z: z.softmax(-1),
        lambda z: torch.log_softmax(z, 1), torch.sigmoid,
    ],
)  # fmt: skip
def test_a_network_that_ends_in_probabilities_is_explained_from_its_logits(end):
    body = around(nn.ReLU())
    x, labels = samples()
    model = End(body, end)
    for criterion in (pxp.LRP(), pxp.LRP("zplus"), pxp.LRP(start="margin"), pxp.Taylor()):
        assert relative(pxp.heatmap(model, x, labels, criterion), pxp.heatmap(body, x, labels, criterion)) < 1e-12


class Answers(nn.Module):
    """A network whose features, first in its answer, come before a head with weights of its own."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.conv, self.weight, self.first = nn.Conv2d(3, 6, 3), nn.Parameter(torch.randn(3, 6)), first

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.conv(x).relu().mean((2, 3))
        answer = {"features": features, "logits": F.linear(features, self.weight)}
        return dict(sorted(answer.items(), key=lambda pair: pair[0] != self.first))


@pytest.mark.parametrize("first", ["features", "logits"])
def test_logits_are_followed_wherever_they_stand(first):
    x, labels = samples()
    with pytest.raises(ValueError, match="computes linear with weights of its own"):
        pxp.heatmap(Answers(first).double(), x, labels)
