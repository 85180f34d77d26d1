"""What one look at a forward pass does not show: operations that hide, branches, constants beside the images."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import relative
from torch import Tensor, nn
from torch.nn import functional as F

import pxp

LRP0 = pxp.LRP(pxp.Epsilon(0))


@torch.jit.script
def scripted(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        with torch._C.DisableTorchFunction():
            return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.saved_tensors[0], None


def into_a_view(x: Tensor, weight: Tensor) -> Tensor:
    place = x.new_zeros(len(x), 9)
    place[:, :8].copy_(x)
    return place[:, :8]


HIDDEN = {
    "TorchScript": lambda x, weight: scripted(x, weight),
    "vmap": lambda x, weight: torch.vmap(lambda one: weight @ one)(x),
    "a function of one's own": Product.apply,
    "writing into a view": into_a_view,
    "numpy": lambda x, weight: torch.from_numpy(x.detach().numpy() @ weight.detach().numpy().T),
}


class Net(nn.Module):
    """A convolution and a hidden layer; what comes behind them is tried."""

    def __init__(self, end=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.hidden, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 8), nn.Linear(8, 8, bias=False)
        self.end = end

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.hidden(F.relu(self.conv(x)).mean((2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.head(x) if self.end is None else self.end(x, self.head.weight)


@pytest.mark.parametrize("name", HIDDEN)
def test_what_torch_shows_to_nobody_is_refused(name, untouched):
    model = untouched(Net(HIDDEN[name]).double().eval())
    x, labels = torch.randn(3, 1, 8, 8).double(), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="cannot be followed"):
        pxp.heatmap(model, x, labels, LRP0)
    # which filters there are can be said all the same
    assert list(pxp.find_components(model, example=x[:1])) == ["conv"]


@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_hidden_beside_what_is_seen_is_refused(name):
    class Beside(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.features(x)
            return self.head(h) + HIDDEN[name](h, self.head.weight)

    x, labels = torch.randn(3, 1, 8, 8).double(), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="cannot be followed|numbers read from the images"):
        pxp.heatmap(Beside().double().eval(), x, labels, LRP0)


class Branches(Net):
    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)
        other = {"number": len(x) > 1, "value": x.abs().max() > 3.5, "never": False}[self.by]
        return F.linear(h, self.head.weight) if other else self.head(h)


@pytest.mark.parametrize("by", ["number", "value"])
def test_a_branch_to_what_has_no_rule_is_refused(by):
    x, labels = torch.randn(4, 1, 8, 8).clamp(-3, 3), torch.tensor([0, 1, 2, 0])
    model = Branches(by).eval()
    if by == "value":
        found = pxp.heatmap(model, x, labels, LRP0)  # nothing else runs with these
        assert torch.equal(found, pxp.heatmap(Branches("never").eval(), x, labels, LRP0))
        x[2, 0, 0, 0] = 5
    with pytest.raises(ValueError, match="does something else with .*linear with weights of its own"):
        pxp.heatmap(model, x, labels, LRP0)


def test_a_branch_of_a_later_batch_is_seen():
    x, labels = torch.randn(4, 1, 8, 8).clamp(-3, 3), torch.tensor([0, 1, 2, 0])
    x[3, 0, 0, 0] = 5
    model = Branches("value").eval()
    units = pxp.find_components(model, example=x[:1])
    pxp.attribute(model, (x[:3], labels[:3]), units, LRP0, batch_size=1)
    with pytest.raises(ValueError, match="something else with these images"):
        pxp.attribute(model, (x, labels), units, LRP0, batch_size=1)


LEAVING = {
    "item": lambda h, x: h * h.mean().item(),
    "tolist": lambda h, x: h + h.mean().tolist(),
    "numpy": lambda h, x: h * torch.from_numpy(h.detach().numpy()),
    "numpy's number": lambda h, x: h * h.detach().numpy().mean(),
    "a parameter": lambda h, x: h * nn.Parameter(torch.tensor(h.mean().item())),
    "a whole number": lambda h, x: h * int((h * 1000).sum()),
    "a part of it": lambda h, x: h * (int(h.mean().item() * 1e5) / 1e5),
    "a small tensor": lambda h, x: h * torch.tensor(int(float(x.mean()) * 80), dtype=torch.uint8),
    "a sum of numbers": lambda h, x: h / sum(row.sum().item() for row in x),
}


@pytest.mark.parametrize("how", LEAVING)
def test_values_that_leave_torch_and_come_back_are_refused(how, untouched):
    class Leaves(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(LEAVING[how](self.features(x), x))

    model = untouched(Leaves().eval())
    x, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match=r"computes \w+ with numbers read from the images"):
        pxp.heatmap(model, x, labels, LRP0)


def test_numbers_that_only_decide_or_never_change_are_no_such():
    class Asks(Net):
        def forward(self, x: Tensor) -> Tensor:
            scale = float(np.array([0.5]).sum()) if x.max().item() < 1e9 else 2.0
            return self.head(self.features(x) * scale)

    class Plain(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.features(x) * 0.5)

    x, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    assert torch.equal(*(pxp.heatmap(net().eval(), x, labels, LRP0) for net in (Asks, Plain)))


def test_numbers_that_are_read_for_others_are_no_faults():
    calls = [0]

    class Logs(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.features(x)
            mean = h.mean().item()
            self.spread = float((h - mean).square().mean())  # for a log
            self.share = float((h > 0.9 * float(h.amax())).float().mean())
            self.seen = x.shape
            calls[0] += 1
            return self.head(h * (1 - 1 / (1e12 + calls[0])))

    x, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    assert relative(*(pxp.heatmap(net().eval(), x, labels, LRP0) for net in (Logs, Net))) < 1e-5


class Loud(Net):
    """A gate for the loud images only, if there are any."""

    def __init__(self, *, asks: bool) -> None:
        super().__init__()
        self.asks = asks

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)
        loud = x.flatten(1).abs().amax(1) > 3.5
        if not self.asks or loud.any():
            h = torch.where(loud[:, None], h * torch.sigmoid(self.head(h)), h)
        return self.head(h)


def test_a_branch_to_what_has_a_rule_is_followed():
    x, labels = torch.randn(4, 1, 8, 8).double().clamp(-3, 3), torch.tensor([0, 1, 2, 0])
    x[2, 0, 0, 0] = 5
    asks, always = (Loud(asks=asks).double().eval() for asks in (True, False))
    for criterion in (LRP0, pxp.LRP("gamma")):
        found = pxp.heatmap(asks, x, labels, criterion)
        assert relative(found, pxp.heatmap(always, x, labels, criterion)) < 1e-12
    # with the gate as a constant
    point = x.clone().requires_grad_()
    h = always.features(point)
    gate = torch.where((x.flatten(1).abs().amax(1) > 3.5)[:, None], torch.sigmoid(always.head(h)), 1).detach()
    always.head(h * gate).gather(1, labels[:, None]).sum().backward()
    assert relative(pxp.heatmap(asks, x, labels, LRP0), x * point.grad) < 1e-12


class Positions(nn.Module):
    """Positions are computed from a table; with ``shared``, by the layer that the tokens go through."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.embed, self.place, self.act, self.head = nn.Linear(5, 8), nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)
        self.table, self.shared = nn.Parameter(torch.randn(1, 6, 5)), shared

    def forward(self, x: Tensor) -> Tensor:
        tokens, places = self.embed(x), (self.embed if self.shared else self.place)(self.table)
        return self.head((self.act(tokens) + self.act(places)).mean(1))


def test_layers_that_see_nothing_of_the_image_are_not_scored():
    torch.manual_seed(0)
    model, x, labels = Positions(shared=False).double().eval(), torch.randn(4, 6, 5).double(), torch.arange(4) % 3
    units = pxp.find_components(model, "neuron", example=x[:1])
    assert list(units) == ["embed"] and units.left_out == 8
    scores = pxp.attribute(model, (x, labels), units, LRP0).signed["embed"]
    h = model.embed(x).detach().requires_grad_()
    model.head((h.relu() + model.place(model.table).relu()).mean(1)).gather(1, labels[:, None]).sum().backward()
    assert relative(scores, (h * h.grad).sum((0, 1)) / 4) < 1e-12
    for other, gates in ((model, True), (Positions(shared=True).double().eval(), False)):
        units = pxp.find_components(other, "neuron", example=x[:1], gates=gates)
        with pytest.raises(ValueError, match="not clear which values of '(place|embed)' belong to which sample"):
            pxp.attribute(other, (x, labels), units, LRP0)
        with pytest.raises(ValueError, match="not clear which values of '(place|embed)' belong to which sample"):
            pxp.attribute(other, (x[:1], labels[:1]), units, LRP0)  # one set of positions, and one image


class Overwrites(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)
        h += self.head(h)
        return h.relu_()


def test_what_autograd_refuses_is_told_with_what_to_do():
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    model = Overwrites().eval()
    with pytest.raises(ValueError, match=r"Overwrites changes in place .* write x = x \+ y for x \+= y"):
        pxp.heatmap(model, x, labels, LRP0)
    with pytest.raises(ValueError, match="changes in place"):
        pxp.attribute(model, (x, labels), pxp.find_components(model, example=x[:1]), LRP0)


class AsksTheNorm(nn.Module):
    """Weighs channels by their gains, as NAM does, and takes the mean off again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)) - self.norm.running_mean.view(-1, 1, 1)
        gain = (self.norm.weight.abs() / self.norm.weight.abs().sum()).view(-1, 1, 1)
        return self.head(F.relu(x * torch.sigmoid(x * gain)).mean((2, 3)))


def test_a_merged_norm_still_answers():
    torch.manual_seed(0)
    model, x = AsksTheNorm().double().eval(), torch.randn(2, 1, 8, 8).double()
    for values in (model.norm.running_mean, model.norm.weight.data, model.norm.bias.data):
        values.normal_()
    found = pxp.heatmap(model, x, torch.tensor([0, 1]), LRP0)
    point = x.clone().requires_grad_()
    y = model.norm(model.conv(point)) - model.norm.running_mean.view(-1, 1, 1)
    gain = (model.norm.weight.abs() / model.norm.weight.abs().sum()).view(-1, 1, 1)
    out = model.head(F.relu(y * torch.sigmoid(y * gain).detach()).mean((2, 3)))
    (gradient,) = torch.autograd.grad(out[[0, 1], [0, 1]].sum(), point)
    assert relative(found, x * gradient) < 1e-12


class AsksTheAttention(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.embed, self.attn, self.head = (
            nn.Linear(5, 8),
            nn.MultiheadAttention(8, 2, batch_first=first),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).to(self.attn.in_proj_weight.dtype).view(len(x), -1, self.attn.embed_dim)
        tokens = tokens if self.attn.batch_first else tokens.transpose(0, 1)
        mixed = self.attn(tokens, tokens, tokens + self.attn.in_proj_bias[-8:], need_weights=False)[0]
        return self.head(mixed.mean(1 if self.attn.batch_first else 0))


class Padded(nn.Module):
    """An encoder of torch's that is told which tokens are padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embed, self.encoder, self.head = nn.Linear(5, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.arange(x.shape[1]).expand(len(x), -1) > 3
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=padding)[:, :4].mean(1))


@pytest.mark.parametrize("make", [lambda: AsksTheAttention(True), lambda: AsksTheAttention(False), Padded])
def test_an_explicit_attention_still_answers(make, untouched):
    torch.manual_seed(0)
    model, x, labels = untouched(make().double().eval()), torch.randn(2, 6, 5).double(), torch.tensor([0, 1])
    units = pxp.find_components(model, "head", example=x[:1])
    kept = pxp.attribute(model, (x, labels), units, pxp.LRP("gamma")).select(0.5)
    without = copy.deepcopy(model)
    for name, keep in kept.items():
        without.get_submodule(name).out_proj.weight.data[:, ~keep.repeat_interleave(4)] = 0
    with pxp.masked(model, kept), torch.no_grad():
        assert relative(model(x), without(x)) < 1e-12
