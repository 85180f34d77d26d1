"""What users write around and inside their networks: casts, hooks, closures, weights that are kept small."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import relative
from torch import Tensor, nn
from torch.nn import functional as F

import pxp

LRP0 = pxp.LRP(pxp.Epsilon(0))
LABELS = torch.tensor([0, 1, 2])


class Casts(nn.Module):
    """Asks for float32 at its beginning, in the middle, or for what it fills."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.how = nn.Conv2d(1, 4, 3), nn.Linear(4, 3), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.float() if self.how == "first" else x).relu()
        x = x.to(torch.float32) if self.how == "middle" else x
        x = x.mean((2, 3))
        if self.how == "filled":
            place = torch.zeros(x.shape)
            place[:, :] = x
            x = place
        return self.head(x)


@pytest.mark.parametrize("how", ["first", "middle", "filled"])
@pytest.mark.parametrize("rule", ["epsilon", "zplus", "gamma"])
def test_a_cast_changes_nothing(how, rule):
    x = torch.rand(3, 1, 8, 8)
    plain, casts = (Casts(name).eval() for name in ("", how))
    found = pxp.heatmap(casts, x, LABELS, pxp.LRP(rule))
    assert relative(found, pxp.heatmap(plain, x, LABELS, pxp.LRP(rule))) < 1e-5


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.act, self.two = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.act(self.one(x)))


MORE = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).double()
HOOKS = {
    "a matrix": ("two", lambda module, inputs, output: output + inputs[0] @ MORE.t()),
    "a layer as a function": ("act", lambda module, inputs, output: output + F.linear(output, MORE.t() @ MORE)),
    "einsum": ("one", lambda module, inputs, output: torch.einsum("nc,dc->nd", output, MORE.t() @ MORE)),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", HOOKS)
def test_a_linear_map_of_a_hook_is_seen(name, when):
    """A rule would not reach it; under LRP-0, where a gradient would do, nothing tells it apart."""
    model, x = Mlp().double().eval(), torch.rand(3, 6).double()
    where, hook = HOOKS[name]
    if when == "before":
        model.get_submodule(where).register_forward_hook(hook)
    units = pxp.find_components(model, "neuron", example=x)
    if when == "after":
        pxp.attribute(model, (x, LABELS), units, pxp.LRP("zplus"))
        model.get_submodule(where).register_forward_hook(hook)
    with pytest.raises(ValueError, match="weights of its own" if when == "before" else "find its components again"):
        pxp.attribute(model, (x, LABELS), units, pxp.LRP("zplus"))


def test_a_hook_that_scales_is_followed():
    model, x = Mlp().double().eval(), torch.rand(3, 6).double()
    model.act.register_forward_hook(lambda module, inputs, output: 2 * output)
    point = x.clone().requires_grad_()
    model(point).gather(1, LABELS[:, None]).sum().backward()
    assert relative(pxp.heatmap(model, x, LABELS, LRP0), x * point.grad) < 1e-12


class Cuts(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.act(self.one(x)).data)


class Turns(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.act(self.one(x)).T.mT)


def test_data_cuts_the_gradient_and_other_attributes_do_not():
    x = torch.rand(3, 6)
    with pytest.raises(ValueError, match="no LRP rule"):
        pxp.heatmap(Cuts().eval(), x, LABELS, pxp.LRP())
    assert torch.equal(pxp.heatmap(Turns().eval(), x, LABELS, LRP0), pxp.heatmap(Mlp().eval(), x, LABELS, LRP0))


class Closes(nn.Module):
    """A lambda that a copy keeps runs the layers of the model that was copied."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.end = lambda x: torch.relu(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.end(self.conv(x)).mean((2, 3)))


def test_layers_of_the_model_itself_do_not_run(untouched):
    model, x = untouched(Closes().train()), torch.rand(3, 1, 8, 8)
    for call in (
        lambda: pxp.find_components(model, example=x),
        lambda: pxp.heatmap(model, x, LABELS, LRP0),
    ):
        with pytest.raises(ValueError, match="'norm' of the model itself runs inside a copy"):
            call()


class MaxNorm(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=1.0)
        return super().forward(x)


class Standardised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True).clamp(min=1), self.bias)


def test_a_weight_that_is_kept_small_is_that_weight():
    """It is so already, but a BatchNorm that is merged makes it larger."""
    torch.manual_seed(0)
    model = nn.Sequential(
        MaxNorm(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), Standardised(144, 8), nn.BatchNorm1d(8), nn.ReLU(),
        nn.Linear(8, 3),
    ).double()  # fmt: skip
    x = torch.randn(3, 1, 8, 8).double()
    model(x)
    for norm in (model[1], model[5]):
        norm.weight.data *= 5
    model[4].weight.data /= model[4].weight.norm(dim=1, keepdim=True)
    model.eval()
    point = x.clone().requires_grad_()
    model(point).gather(1, LABELS[:, None]).sum().backward()
    assert relative(pxp.heatmap(model, x, LABELS, LRP0), x * point.grad) < 1e-10
    units = pxp.find_components(model, example=x)
    mask = pxp.attribute(model, (x, LABELS), units, pxp.LRP()).select(0.5)
    small = pxp.compact(model, mask, example=x)
    with pxp.masked(model, mask), torch.no_grad():
        assert relative(small(x), model(x)) < 1e-10


class OneByOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.head(self.conv(one[None]).relu().mean((2, 3))) for one in x.unbind(0)])


def test_layers_that_run_once_for_each_sample():
    torch.manual_seed(0)
    model, x = OneByOne().double().eval(), torch.rand(3, 1, 8, 8).double()
    units = pxp.find_components(model, example=x)
    with pytest.raises(ValueError, match=r"'conv' belong to which sample.* batch_size=1 helps"):
        pxp.attribute(model, (x, LABELS), units, pxp.Taylor())
    found = pxp.attribute(model, (x, LABELS), units, pxp.Taylor(), batch_size=1)
    whole = nn.Sequential(model.conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.head)
    expected = pxp.attribute(whole, (x, LABELS), pxp.find_components(whole, example=x), pxp.Taylor())
    assert relative(found["conv"], expected["0"]) < 1e-12


class Views(nn.Module):
    """As LeNet does: a view of what a pool gives, which must not have its channels last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(36, 3)
        self.mix = nn.Parameter(torch.randn(1, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        return self.head(x.view(x.size(0), -1) * self.mix.view(1, -1))


def test_curves_of_networks_that_need_their_channels_first(caplog):
    model, x, labels = Views().eval(), torch.rand(12, 1, 8, 8), torch.arange(12) % 3
    units = pxp.find_components(model, example=x)
    scores = pxp.attribute(model, (x, labels), units, pxp.LRP())
    rates = (0, 0.25, 0.5, 0.75)
    found = pxp.pruning_curve(model, scores, (x, labels), rates=rates, allow_shared=True).accuracy
    for rate, accuracy in zip(rates, found, strict=True):
        with pxp.masked(model, scores.select(rate)), torch.no_grad():
            assert accuracy == float((model(x).argmax(1) == labels).double().mean())
    assert not caplog.records


class Scaled(nn.Module):
    """Normalises its images itself, in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.second = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)
        self.head, self.in_place = nn.Linear(6, 3), in_place

    def forward(self, x: Tensor) -> Tensor:
        x = x.sub_(0.5).div_(0.25) if self.in_place else (x - 0.5) / 0.25
        return self.head(self.second(self.norm(self.conv(x)).relu()).relu().mean((2, 3)))


def scores_by(criterion):
    def scores(model, data, units):
        found = pxp.attribute(model, data, units, criterion, batch_size=2)
        return torch.cat(list(found.values()))

    return scores


def under_masks(model, data, units):
    scores = pxp.attribute(model, data, units, pxp.Magnitude())
    masks = [scores.select(0.4), scores.select(0.7)]
    cut = pxp.accuracies(model, masks, data, batch_size=2)
    with pxp.masked(model, masks[0]):  # hooks: it cannot be cut
        cut += pxp.accuracies(model, masks[1:], data, batch_size=2)
    return torch.tensor([*cut, pxp.accuracy(model, data, batch_size=2)])


def mended(method):
    def repaired(model, data, units):
        mask = pxp.attribute(model, data, units, pxp.Magnitude()).select(0.4)
        return pxp.repair(model, mask, data[0], method, batch_size=2)(torch.full((1, 1, 8, 8), 0.3))

    return repaired


def as_compacted(model, data, units):
    mask = pxp.attribute(model, data, units, pxp.Magnitude()).select(0.4)
    pxp.latencies(model, units, data[0])
    return pxp.compact(model, mask, example=data[0])(torch.full((1, 1, 8, 8), 0.3))


def trained(model, data, units):
    """With the first layer frozen, nobody keeps the images for a gradient, and so sees that they were changed."""
    student = copy.deepcopy(model)
    student.conv.requires_grad_(False)
    taught = pxp.finetune(student, data, epochs=2, teacher=model, progress=False)
    return torch.cat([parameter.detach().flatten() for parameter in taught.parameters()])


@pytest.mark.parametrize(
    "made",
    [
        trained,
        *(
            scores_by(c)
            for c in (pxp.LRP("epsilon"), pxp.LRP("gamma"), pxp.Taylor(), pxp.Taylor(start="loss"), pxp.Activation())
        ),
        *(scores_by(c) for c in (pxp.IntegratedGradients(3), pxp.Fisher(), pxp.Variance(), pxp.WeightedActivation())),
        scores_by(pxp.Ablation()),
        lambda model, data, units: pxp.heatmap(model, *data, pxp.LRP("epsilon")),
        lambda model, data, units: torch.tensor(list(pxp.conservation(model, *data).arrives.values())),
        lambda model, data, units: torch.tensor(pxp.cost(model, data[0], seconds=0.001).flops),
        under_masks,
        as_compacted,
        *map(mended, ("mean", "statistics", "least_squares")),
    ],
)
def test_images_stay_as_they_are(made):
    """What a network does to its input in place is done once for each pass, and not to the user's images."""
    data, found = (torch.rand(7, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2, 0])), []
    kept = data[0].clone()
    for in_place in (True, False):
        model = Scaled(in_place).eval()
        units = pxp.find_components(model, example=data[0])
        found.append(made(model, data, units))
        assert torch.equal(data[0], kept)
    assert found[1].abs().sum() > 0
    assert relative(found[0].detach(), found[1].detach()) < 1e-5
