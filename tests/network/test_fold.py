"""BatchNorm merged into the layer before it: every kind of BatchNorm, every place that a module is used in."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import randomise, relative
from timm.layers import BatchNormAct2d, SplitBatchNorm2d, SyncBatchNormAct
from torch import Tensor, nn
from torch.nn import functional as F

import pxp
from pxp.network.fold import fold_batch_norm
from pxp.network.replica import replica
from pxp.network.trace import trace


def statistics(model: nn.Module) -> nn.Module:
    """Random statistics, gains and biases for everything that has a running mean."""
    model = randomise(model)
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            for part, low, high in (
                ("running_mean", -0.3, 0.3),
                ("running_var", 0.5, 1.5),
                ("weight", -1.2, 1.4),
                ("bias", -0.4, 0.2),
            ):
                tensor = getattr(module, part, None)
                if tensor is not None:
                    tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model.double().eval()


class Frozen(nn.Module):
    """The frozen BatchNorm of detection libraries: no parameters, the epsilon in the forward pass."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class ABN(nn.BatchNorm2d):
    """BatchNorm and LeakyReLU in one, as in InPlaceABN."""

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu_(super().forward(x), 0.1)


class Squared(nn.BatchNorm2d):
    """Neither a BatchNorm nor one with something behind."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x


class Squashed(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.tanh())


class OfTheBatch(nn.BatchNorm2d):
    """Takes the batch's statistics also in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


def lazy(channels: int) -> nn.Module:
    made = nn.LazyBatchNorm2d()
    made(torch.rand(2, channels, 3, 3))
    return made


NORMS = {
    "SyncBatchNorm": nn.SyncBatchNorm,
    "LazyBatchNorm2d": lazy,
    "Frozen": Frozen,
    "ABN": ABN,
    "InstanceNorm2d": lambda channels: nn.InstanceNorm2d(channels, affine=True, track_running_stats=True),
    "BatchNormAct2d": lambda channels: BatchNormAct2d(
        channels, act_layer=nn.LeakyReLU, act_kwargs={"negative_slope": 0.1}
    ),
    "SyncBatchNormAct": SyncBatchNormAct,
    "SplitBatchNorm2d": SplitBatchNorm2d,
}


@pytest.mark.parametrize("name", NORMS)
def test_every_kind_of_batch_norm_is_merged_and_is_the_site(name, untouched):
    activated = name in ("ABN", "BatchNormAct2d")
    model = statistics(
        nn.Sequential(
            nn.Conv2d(2, 4, 3), NORMS[name](4), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), NORMS[name](5),
            nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 3),
        )
    )  # fmt: skip
    plain = copy.deepcopy(model)
    for place in (1, 4):
        norm = model[place]
        made = nn.BatchNorm2d(norm.running_mean.numel()).double().eval()
        made.load_state_dict(
            {part: getattr(norm, part) for part in ("weight", "bias", "running_mean", "running_var")}, strict=False
        )
        plain[place] = nn.Sequential(made, nn.LeakyReLU(0.1)) if activated else made
    x, y = torch.randn(30, 2, 8, 8).double(), torch.arange(30) % 3
    assert relative(plain(x), model(x)) < 1e-12
    untouched(model)
    units, same = (pxp.find_components(each, example=x[:1]) for each in (model, plain))
    assert [layer.site for layer in units.values()] == [("1",), ("4",)]
    for rule in ("epsilon", "gamma", "zplus", "alpha2beta1"):
        one = pxp.attribute(model, (x[:4], y[:4]), units, pxp.LRP(rule))
        two = pxp.attribute(plain, (x[:4], y[:4]), same, pxp.LRP(rule))
        assert all(relative(one.signed[layer], two.signed[layer]) < 1e-9 for layer in units), rule
        assert relative(*(pxp.heatmap(each, x[:4], y[:4], pxp.LRP(rule)) for each in (model, plain))) < 1e-9, rule
    mask = one.select(0.4)
    with pxp.masked(model, mask), torch.no_grad():
        assert bool((model[:2](x)[:, ~mask["0"]] == 0).all())
        expected = pxp.accuracy(model, (x, y))
    assert pxp.pruning_curve(model, one, (x, y), rates=(0.4,), allow_shared=True).runs[0] == (expected,)


@pytest.mark.parametrize("make", [Squared, Squashed, OfTheBatch])
def test_a_forward_pass_that_is_no_batch_norm_is_refused_by_name(make):
    model = statistics(nn.Sequential(nn.Conv2d(1, 4, 3), make(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)))
    x, y = torch.randn(4, 1, 8, 8).double(), torch.arange(4) % 3
    units = pxp.find_components(model, example=x)
    with pytest.raises(ValueError, match=rf"'1' \({make.__name__}\) has a forward of its own that is no BatchNorm"):
        pxp.attribute(model, (x, y), units, pxp.LRP())
    # masks and curves need nothing merged
    scores = pxp.attribute(model, None, units, pxp.Random(0))
    with pxp.masked(model, scores.select(0.5)):
        expected = pxp.accuracy(model, (x, y), batch_size=4)
    assert pxp.pruning_curve(model, scores, (x, y), rates=(0.5,)).runs[0] == (expected,)


def test_hooks_on_what_a_norm_contains_do_not_see_the_test():
    model = statistics(nn.Sequential(nn.Conv2d(1, 4, 3), BatchNormAct2d(4), nn.Flatten(), nn.Linear(144, 3)))
    x, seen = torch.randn(2, 1, 8, 8).double(), []
    units = pxp.find_components(model, example=x)
    model[1].act.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    fold_batch_norm(replica(model), units.trace)
    assert seen == []


# --- modules under several names ---------------------------------------------------------------------------------


class Twice(nn.Module):
    """One block under two names; the forward pass uses the one that is not listed, and a list that is no module."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)
        )
        self.features = nn.ModuleList([*self.backbone])
        self.parts = [*self.backbone]
        self.by_name = {"norm": self.backbone[1], "last": self.backbone[4]}
        self.fc, self.way = nn.Linear(6, 3), way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "dict":
            conv, _, relu, last, _ = self.backbone
            x = self.by_name["last"](last(relu(self.by_name["norm"](conv(x)))))
        else:
            for part in self.features if self.way == "alias" else self.parts:
                x = part(x)
        return self.fc(x.relu().mean((2, 3)))


@pytest.mark.parametrize("way", ["alias", "list", "dict"])
def test_a_norm_is_merged_wherever_it_is_used(way, untouched):
    model = statistics(Twice(way))
    x, y = torch.randn(40, 1, 8, 8).double(), torch.arange(40) % 3
    untouched(model)
    units = pxp.find_components(model, example=x[:1])
    assert [layer.site for layer in units.values()] == [("backbone.1",), ("backbone.4",)]
    twin = replica(model)
    fold_batch_norm(twin, units.trace)
    assert relative(twin(x), model(x)) < 1e-12
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(point).gather(1, y[:, None]).sum(), point)
    assert relative(pxp.heatmap(model, x, y, pxp.LRP(pxp.Epsilon(0))), x * gradient) < 1e-10
    scores = pxp.attribute(model, (x, y), units, pxp.LRP())
    assert all(bool((scores[name] != 0).any()) for name in units)
    for rate in (0, 0.4):
        with pxp.masked(model, scores.select(rate)):
            expected = pxp.accuracy(model, (x, y))
        assert pxp.pruning_curve(model, scores, (x, y), rates=(rate,), allow_shared=True).runs[0] == (expected,)


class Elsewhere(nn.Module):
    """A BatchNorm that takes a convolution's output, and then something that no layer gives."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.fc, self.way = nn.Linear(4, 3), way

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        x = self.norm(x) if self.way == "again" else self.norm(F.avg_pool2d(self.relu(x), 2))
        return self.fc(self.relu(x).mean((2, 3)))


@pytest.mark.parametrize("way", ["again", "pool"])
def test_a_norm_that_is_used_elsewhere_too_is_not_merged_and_is_no_site(way, untouched):
    model = statistics(Elsewhere(way))
    x, y = torch.randn(4, 1, 8, 8).double(), torch.arange(4) % 3
    structure = trace(untouched(model), x)
    assert structure.elsewhere == ("norm",)
    twin = replica(model)
    fold_batch_norm(twin, structure)
    assert relative(twin(x), model(x)) < 1e-12
    assert pxp.heatmap(model, x, y).isfinite().all()
    with pytest.raises(ValueError, match="what 'conv' gives has no place of its own: its BatchNorm 'norm'"):
        pxp.find_components(model, example=x)


class Recurrent(nn.Module):
    """Layers with one BatchNorm for all of them, or with one each; or a step that goes without it the second time."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.step = nn.Conv1d(2, 5, 3, padding=1), nn.Conv1d(5, 5, 3, padding=1)
        self.norm, self.other, self.fc, self.way = nn.BatchNorm1d(5), nn.BatchNorm1d(5), nn.Linear(5, 3), way

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        for _ in range(2):
            x = (self.other if self.way == "each its own" else self.norm)(self.step(x)).relu()
        return self.fc((self.step(x) if self.way == "bare at last" else x).mean(2))


def test_layers_that_share_a_norm_are_as_those_with_one_each(untouched):
    shared, apart = (statistics(Recurrent(way)) for way in ("shared", "each its own"))
    apart.load_state_dict(shared.state_dict())
    apart.other.load_state_dict(shared.norm.state_dict())
    x, y = torch.randn(30, 2, 9).double(), torch.arange(30) % 3
    assert relative(shared(x), apart(x)) < 1e-12
    one, two = (pxp.find_components(untouched(model), example=x[:1]) for model in (shared, apart))
    for criterion in (pxp.LRP("gamma"), pxp.LRP("zplus"), pxp.Taylor(), pxp.Activation(), pxp.Magnitude()):
        scores, same = (pxp.attribute(*each, criterion) for each in ((shared, (x, y), one), (apart, (x, y), two)))
        assert all(relative(scores[layer], same[layer]) < 1e-9 for layer in ("first", "step")), criterion
    assert relative(*(pxp.heatmap(model, x, y, pxp.LRP("gamma")) for model in (shared, apart))) < 1e-9
    for name in one:
        kept = {layer: torch.arange(5) != 2 if layer == name else torch.ones(5, dtype=torch.bool) for layer in one}
        more = {layer: torch.arange(5) != 4 if layer == name else torch.ones(5, dtype=torch.bool) for layer in one}
        mask = pxp.Mask(one, kept)
        with torch.no_grad():
            with pxp.masked(apart, pxp.Mask(two, kept)):
                expected = apart(x)
                with pxp.masked(apart, pxp.Mask(two, more)):
                    both = apart(x)
            with pxp.masked(shared, mask):
                assert relative(shared(x), expected) < 1e-12
                with pxp.masked(shared, pxp.Mask(one, more)):
                    assert relative(shared(x), both) < 1e-12
            assert relative(pxp.compact(shared, mask, example=x[:1])(x), expected) < 1e-12
    curves = [pxp.pruning_curve(*each, (x, y), rates=(0, 0.3, 0.6)).runs for each in ((shared, scores), (apart, same))]
    assert curves[0] == curves[1]


def test_a_layer_that_runs_without_its_norm_too_is_refused():
    with pytest.raises(ValueError, match="has no place of its own: its BatchNorm 'norm' .* it also runs without it"):
        pxp.find_components(statistics(Recurrent("bare at last")), example=torch.randn(1, 2, 9).double())


@pytest.mark.parametrize("tokens", [6, 8])
def test_a_norm_over_tokens_is_not_merged_into_channels(tokens, untouched):
    model = statistics(
        nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(tokens), nn.Linear(8, 8), nn.ReLU(), nn.Flatten(),
                      nn.Linear(8 * tokens, 3))
    )  # fmt: skip
    x, y = torch.randn(9, tokens, 3).double(), torch.arange(9) % 3
    structure = trace(untouched(model), x)
    assert structure.norms["0"] == ("",)
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(point).gather(1, y[:, None]).sum(), point)
    assert relative(pxp.heatmap(model, x, y, pxp.LRP(pxp.Epsilon(0))), x * gradient) < 1e-10
    units = pxp.find_components(model, "neuron", example=x[:1])
    scores = pxp.attribute(model, (x, y), units, pxp.LRP())
    with pxp.masked(model, scores.select(0.5)):
        expected = pxp.accuracy(model, (x, y))
    assert pxp.pruning_curve(model, scores, (x, y), rates=(0.5,), allow_shared=True).runs[0] == (expected,)


def test_a_question_about_the_shape_is_no_use():
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            batch, channels, *_ = x.shape
            assert x.size(1) == channels and x.dim() == 4
            return self.fc(self.norm(x).relu().view(batch, channels, -1).mean(2))

    units = pxp.find_components(Asks(), example=torch.rand(2, 1, 8, 8))
    assert units["conv"].site == ("norm",)


# --- transposed convolutions -------------------------------------------------------------------------------------

TRANSPOSED = {
    "1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), nn.BatchNorm1d(6), (4, 7)),
    "2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, bias=False),
        nn.BatchNorm2d(6),
        (4, 4, 5),
    ),
    "2d grouped": (lambda: nn.ConvTranspose2d(4, 8, (2, 3), groups=4, dilation=2), nn.BatchNorm2d(8), (4, 3, 4)),
    "3d": (lambda: nn.ConvTranspose3d(4, 6, 2, stride=2, groups=2), nn.BatchNorm3d(6), (4, 2, 3, 2)),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_a_norm_behind_a_transposed_convolution_is_merged(name):
    make, norm, shape = TRANSPOSED[name]
    model = nn.Sequential(make(), copy.deepcopy(norm), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    model(torch.randn(2, *shape))
    model, x = statistics(model), torch.randn(5, *shape).double()
    units = pxp.find_components(model, example=x)
    assert units["0"].site == ("1",) and units["0"].size == model[0].out_channels
    twin = replica(model)
    fold_batch_norm(twin, units.trace)
    assert isinstance(twin[1], nn.Identity) and relative(twin(x), model(x)) < 1e-12
    # torch's own fusion agrees
    fused = nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1], transpose=True) if model[0].groups == 1 else None
    if fused is not None:
        assert relative(twin[0].weight, fused.weight) < 1e-12 and relative(twin[0].bias, fused.bias) < 1e-12
