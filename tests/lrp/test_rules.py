"""Every rule: by hand, against zennit's own rules, against finite differences, and in its limits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from by_zennit import TINY, zennit_relevance
from conftest import network, randomise, relative, without_biases
from torch import Tensor, nn
from zennit import rules as zennit_rules

import pxp
from pxp.lrp.rules import make_rule
from pxp.models import VGG
from pxp.network.fold import fold_batch_norm
from pxp.network.replica import replica

BIAS = [None, "bias"]


RULES = {
    "epsilon": (lambda z: pxp.Epsilon(TINY, zero_params=z), lambda z: zennit_rules.Epsilon(TINY, zero_params=z)),
    "epsilon 0.5": (lambda z: pxp.Epsilon(0.5, zero_params=z), lambda z: zennit_rules.Epsilon(0.5, zero_params=z)),
    **{
        f"gamma {gamma}": (
            lambda z, gamma=gamma: pxp.Gamma(gamma, zero_params=z, epsilon=TINY),
            lambda z, gamma=gamma: zennit_rules.Gamma(gamma, stabilizer=TINY, zero_params=z),
        )
        for gamma in (0.0, 0.25, 5.0)
    },
    "gamma stabilised": (
        lambda z: pxp.Gamma(0.25, zero_params=z, epsilon=0.1),
        lambda z: zennit_rules.Gamma(0.25, stabilizer=0.1, zero_params=z),
    ),
    "zplus": (
        lambda z: pxp.ZPlus(zero_params=z, epsilon=TINY),
        lambda z: zennit_rules.ZPlus(stabilizer=TINY, zero_params=z),
    ),
    "alpha2beta1": (
        lambda z: pxp.AlphaBeta(2, 1, zero_params=z, epsilon=TINY),
        lambda z: zennit_rules.AlphaBeta(2, 1, stabilizer=TINY, zero_params=z),
    ),
    "alpha1beta0": (
        lambda z: pxp.AlphaBeta(1, 0, zero_params=z, epsilon=TINY),
        lambda z: zennit_rules.AlphaBeta(1, 0, stabilizer=TINY, zero_params=z),
    ),
}


LOW, HIGH = -3.0, 4.0


INPUT_RULES = {
    "flat": (
        lambda z: pxp.Flat(zero_params=z, epsilon=TINY),
        lambda z: zennit_rules.Flat(stabilizer=TINY, zero_params=z),
    ),
    "wsquare": (
        lambda z: pxp.WSquare(zero_params=z, epsilon=TINY),
        lambda z: zennit_rules.WSquare(stabilizer=TINY, zero_params=z),
    ),
    "zbox": (
        lambda z: pxp.ZBox(LOW, HIGH, zero_params=z, epsilon=TINY),
        lambda z: zennit_rules.ZBox(LOW, HIGH, stabilizer=TINY, zero_params=z),
    ),
}


SMALL = ["mlp", "vgg", "resnet", "bottleneck", "grouped", "conv1d"]


@pytest.mark.parametrize("zero_params", BIAS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SMALL)
def test_components_and_input_agree_with_zennit(name, rule, zero_params):
    _agrees(name, rule, zero_params)


def upsampling() -> tuple[nn.Module, Tensor]:
    """Transposed convolutions with a BatchNorm behind, with and without a ReLU; inputs of both signs."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
        nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 5, (2, 3), dilation=2, padding=1, bias=False),
        nn.AvgPool2d(2), nn.ConvTranspose2d(5, 4, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    return randomise(model), torch.randn(3, 2, 7, 7).double()


def volumes() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.ConvTranspose3d(2, 4, 2, stride=2), nn.BatchNorm3d(4), nn.ReLU(), nn.Flatten(2), nn.ConvTranspose1d(4, 3, 3),
        nn.ReLU(), nn.Flatten(), nn.Linear(3 * 66, 3),
    )  # fmt: skip
    return randomise(model), torch.randn(3, 2, 2, 2, 2).double()


@pytest.mark.parametrize("rule", [*RULES, *INPUT_RULES])
@pytest.mark.parametrize("make", [upsampling, volumes])
def test_transposed_convolutions_agree_with_zennit(make, rule):
    ours, theirs = (RULES | INPUT_RULES)[rule]
    (model, x), labels = make(), torch.arange(3)
    units = pxp.find_components(model, example=x)
    if rule in INPUT_RULES:
        first, lrp = units.trace.order[0], pxp.LRP(pxp.Epsilon(TINY), input=ours(None))
        rule_of = lambda layer: theirs(None) if layer == first else zennit_rules.Epsilon(TINY)  # noqa: E731
    else:
        lrp, rule_of = pxp.LRP(ours(None)), lambda layer: theirs(None)
    heat, signed, _ = zennit_relevance(model, x, labels, rule_of)
    found = pxp.attribute(model, (x, labels), units, lrp)
    assert max(relative(found.signed[layer], signed[layer]) for layer in units) < 1e-8
    assert relative(pxp.heatmap(model, x, labels, lrp), heat) < 1e-8


class Up(nn.Module):
    """A transposed convolution, or the same map as a matrix; the size of its output is told, as in a U-Net."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...], size: tuple[int, ...], matrix: bool) -> None:
        super().__init__()
        self.layer, self.size, self.matrix = layer, size, None
        if matrix:
            inputs = math.prod(shape)
            with torch.no_grad():
                nothing = layer(torch.zeros(1, *shape).double(), output_size=size)
                every = layer(torch.eye(inputs).double().view(inputs, *shape), output_size=size)
                self.matrix = nn.Linear(inputs, nothing.numel()).double()
                self.matrix.weight.copy_((every - nothing).flatten(1).t())
                self.matrix.bias.copy_(nothing.flatten())
            self.shape = nothing.shape[1:]

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.layer(x, output_size=self.size)
            if self.matrix is None
            else self.matrix(x.flatten(1)).view(-1, *self.shape)
        )


MAPS = {
    "grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 3, 3), (8, 7)),
    "padded": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=3, padding=1, dilation=2, bias=False), (2, 3, 2), (11, 7)),
    "1d": (lambda: nn.ConvTranspose1d(4, 4, 4, stride=3, groups=4), (4, 5), (18,)),
    "3d": (lambda: nn.ConvTranspose3d(2, 2, 2, stride=2), (2, 2, 2, 2), (4, 5, 4)),
}


@pytest.mark.parametrize(
    "rule",
    [
        "epsilon",
        pxp.Gamma(0.25),
        pxp.Gamma(0.25, zero_params="bias"),
        "zplus",
        "alpha2beta1",
        "flat",
        "wsquare",
        pxp.ZBox(-4, 4),
    ],
    ids=repr,
)
@pytest.mark.parametrize("name", MAPS)
def test_a_transposed_convolution_is_the_same_map_as_a_matrix(name, rule):
    make, shape, size = MAPS[name]
    layer = make().double()
    both = [Up(layer, shape, size, matrix) for matrix in (False, True)]
    outputs = both[0](torch.zeros(1, *shape).double()).numel()
    last = nn.Linear(outputs, 3).double()
    x, labels = torch.randn(3, *shape).double(), torch.arange(3)
    for signed in (x, x.abs()):
        heats = []
        for up in both:
            model = nn.Sequential(up, nn.ReLU(), nn.Flatten(), last).eval()
            lrp = (
                pxp.LRP("epsilon", input=rule) if rule in ("flat", "wsquare") or "ZBox" in repr(rule) else pxp.LRP(rule)
            )
            heats.append(pxp.heatmap(model, signed, labels, lrp))
        if rule == "flat":  # a matrix has weights also where the convolution has none
            assert heats[0].isfinite().all() and bool((heats[0] != 0).any())
        else:
            assert relative(*heats) < 1e-9


class Columns(nn.Module):
    """Linear layers over the channels and over the tokens, which they see transposed, and one over a slice."""

    def __init__(self, contiguous: bool) -> None:
        super().__init__()
        self.one, self.tokens, self.part = nn.Linear(6, 8), nn.Linear(5, 5), nn.Linear(4, 7)
        self.relu, self.head, self.contiguous = nn.ReLU(), nn.Linear(7, 3), contiguous

    def forward(self, x: Tensor) -> Tensor:
        tidy = (lambda value: value.contiguous()) if self.contiguous else (lambda value: value)
        x = self.relu(self.one(tidy(x.flip(1)[:, ::1])))
        x = self.relu(self.tokens(tidy(x.transpose(1, 2)))).transpose(1, 2)
        x = self.relu(self.part(tidy(x[..., ::2])))
        return self.head(tidy(x.permute(1, 0, 2)).mean(0))


@pytest.mark.parametrize(
    "rule", ["epsilon", "gamma", "zplus", "alpha2beta1", pxp.Gamma(0.1, zero_params="bias")], ids=repr
)
def test_inputs_that_are_views(rule):
    x, labels = torch.randn(3, 5, 6).double(), torch.arange(3)
    model = randomise(Columns(False))
    tidy = Columns(True).double().eval()
    tidy.load_state_dict(model.state_dict())
    units = pxp.find_components(model, "neuron", example=x)
    assert list(units) == ["one", "tokens", "part"]
    one, two = (pxp.attribute(each, (x, labels), units, pxp.LRP(rule)) for each in (model, tidy))
    assert all(relative(one.signed[name], two.signed[name]) < 1e-10 for name in units)
    assert relative(*(pxp.heatmap(each, x, labels, pxp.LRP(rule)) for each in (model, tidy))) < 1e-10


class Viewing(nn.Linear):
    """Its output is a view."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1)).view(len(x), -1)[:, :]


@pytest.mark.parametrize("rule", ["epsilon", "gamma", "zplus", "alpha2beta1"])
def test_outputs_that_are_views(rule):
    model = randomise(
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), Viewing(48, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    )
    plain = nn.Sequential(*model[:2], nn.Flatten(), nn.Linear(48, 6), nn.ReLU(), model[4]).double().eval()
    plain[3].load_state_dict(model[2].state_dict())
    x, labels = torch.randn(3, 1, 6, 6).double(), torch.arange(3)
    assert relative(*(pxp.heatmap(each, x, labels, pxp.LRP(rule)) for each in (model, plain))) < 1e-10
    units, same = (pxp.find_components(each, "neuron", example=x) for each in (model, plain))
    one, two = (
        pxp.attribute(model, (x, labels), units, pxp.LRP(rule)),
        pxp.attribute(plain, (x, labels), same, pxp.LRP(rule)),
    )
    assert relative(one.signed["2"], two.signed["3"]) < 1e-10


@pytest.mark.parametrize("rule", ["epsilon", "gamma 0.25", "zplus", "alpha2beta1"])
@pytest.mark.parametrize("name", ["vgg16_bn", "resnet18"])
def test_torchvision_networks_agree_with_zennit(name, rule):
    _agrees(name, rule, None)


def test_full_resnet50_agrees_with_zennit():
    _agrees("resnet50", "epsilon", None)


def _agrees(name, rule, zero_params):
    ours, theirs = RULES[rule]
    model, x, labels, units = network(name, samples=2)
    heat, signed, magnitude = zennit_relevance(model, x, labels, lambda layer: theirs(zero_params))
    scores = pxp.attribute(model, (x, labels), units, pxp.LRP(ours(zero_params)))
    for layer in units:
        assert relative(scores.signed[layer], signed[layer]) < 1e-8, layer
        assert relative(scores[layer], magnitude[layer]) < 1e-8, layer
    assert relative(pxp.heatmap(model, x, labels, pxp.LRP(ours(zero_params))), heat) < 1e-8


@pytest.mark.parametrize("zero_params", BIAS)
@pytest.mark.parametrize("rule", INPUT_RULES)
@pytest.mark.parametrize("name", SMALL)
def test_input_rules_agree_with_zennit(name, rule, zero_params):
    ours, theirs = INPUT_RULES[rule]
    model, x, labels, units = network(name, samples=2)
    first = units.trace.order[0]
    heat, _, _ = zennit_relevance(
        model, x, labels, lambda layer: theirs(zero_params) if layer == first else zennit_rules.Epsilon(TINY)
    )
    lrp = pxp.LRP(pxp.Epsilon(TINY), input=ours(zero_params))
    assert relative(pxp.heatmap(model, x, labels, lrp), heat) < 1e-8
    # the input's rule changes no component
    plain = pxp.attribute(model, (x, labels), units, pxp.LRP(pxp.Epsilon(TINY)))
    with_it = pxp.attribute(model, (x, labels), units, lrp)
    assert all(torch.equal(plain.signed[layer], with_it.signed[layer]) for layer in units)


def test_input_rules_give_relevance_to_black_pixels():
    model, x, labels, _units = network("vgg", samples=2)
    x = x.clamp(min=0)  # half of the pixels are exactly black
    for rule, (ours, theirs) in INPUT_RULES.items():
        heat, _, _ = zennit_relevance(
            model,
            x,
            labels,
            lambda layer, theirs=theirs: theirs(None) if layer == "features.0" else zennit_rules.Epsilon(TINY),
        )
        found = pxp.heatmap(model, x, labels, pxp.LRP(pxp.Epsilon(TINY), input=ours(None)))
        assert relative(found, heat) < 1e-6, rule
        assert bool((found[x == 0] != 0).any())


def test_black_pixels_in_half_precision():
    """float16 cannot hold the tiny value that stands for black in float32, but has one of its own."""
    model, x, labels, _ = network("vgg", samples=2)
    x = x.clamp(min=0).half()
    expected = pxp.heatmap(model.float(), x.float(), labels, pxp.LRP("zplus", input="flat"))
    found = pxp.heatmap(model.half(), x, labels, pxp.LRP("zplus", input="flat"))
    assert found.dtype == torch.float16 and bool((found[x == 0] != 0).any()) and bool(found.isfinite().all())
    assert relative(found.float(), expected) < 0.05


def test_box_can_differ_by_channel():
    model, x, labels, _ = network("grouped", samples=2)
    low, high = torch.tensor([-3.0, -4.0, -5.0]).view(1, 3, 1, 1), torch.tensor([3.0, 5.0, 4.0]).view(1, 3, 1, 1)
    box = zennit_rules.ZBox(low.double(), high.double(), stabilizer=TINY)
    heat, _, _ = zennit_relevance(
        model, x, labels, lambda layer: box if layer == "stem" else zennit_rules.Epsilon(TINY)
    )
    lrp = pxp.LRP(pxp.Epsilon(TINY), input=pxp.ZBox(low, high, epsilon=TINY))
    assert relative(pxp.heatmap(model, x, labels, lrp), heat) < 1e-8


@pytest.mark.parametrize("name", ["vgg", "bottleneck"])
def test_a_rule_per_group_agrees_with_zennit(name):
    model, x, labels, units = network(name, samples=2)
    choice = {"low": "alpha2beta1", "middle": "gamma 0.25", "high": "zplus", "fc": "epsilon"}
    groups = pxp.depth_groups(model, units.trace)
    assert set(groups.values()) == set(choice)
    _, signed, _ = zennit_relevance(model, x, labels, lambda layer: RULES[choice[groups[layer]]][1](None))
    lrp = pxp.LRP(**{group: RULES[rule][0](None) for group, rule in choice.items()})
    scores = pxp.attribute(model, (x, labels), units, lrp)
    assert max(relative(scores.signed[layer], signed[layer]) for layer in units) < 1e-8


@pytest.mark.parametrize("name", ["vgg", "resnet"])
@pytest.mark.parametrize("rule", ["epsilon", "gamma 0.25", "zplus", "alpha2beta1"])
def test_shipped_networks_agree_with_zennit(name, rule, data):
    ours, theirs = RULES[rule]
    model = pxp.load_model(name).double()
    x, labels = data.tune.images[:4].double(), data.tune.labels[:4]
    units = pxp.find_components(model)
    heat, signed, _ = zennit_relevance(model, x, labels, lambda layer: theirs(None))
    scores = pxp.attribute(model, (x, labels), units, pxp.LRP(ours(None)))
    assert max(relative(scores.signed[layer], signed[layer]) for layer in units) < 1e-8
    assert relative(pxp.heatmap(model, x, labels, pxp.LRP(ours(None))), heat) < 1e-8
    # float32 is as exact as zennit's float32
    half = pxp.load_model(name)
    _, rough, _ = zennit_relevance(half, x.float(), labels, lambda layer: theirs(None))
    single = pxp.attribute(half, (x, labels), units, pxp.LRP(ours(None)))
    error = max(relative(single.signed[layer], signed[layer]) for layer in units)
    assert error < max(1e-4, 3 * max(relative(rough[layer].double(), signed[layer]) for layer in units))


# a = (2, −1, 1); output 0: w = (1, 1, 1), b = 1, contributions (2, −1, 1), z = 3;
#                 output 1: w = (−1, 2, 1), b = −1, contributions (−2, −2, 1), z = −4
HAND = {
    "LRP-0": (lambda z: pxp.Epsilon(0, zero_params=z), [2, -1, 1], [-2, -2, 1]),
    "LRP-0 bias": (lambda z: pxp.Epsilon(0, zero_params="bias"), [3, -1.5, 1.5], [-8 / 3, -8 / 3, 4 / 3]),
    "ε = 1": (lambda z: pxp.Epsilon(1.0), [1.5, -0.75, 0.75], [-1.6, -1.6, 0.8]),
    "z+": (lambda z: pxp.ZPlus(epsilon=0), [1.5, 0, 0.75], [0, 0, -4]),
    "z+ bias": (lambda z: pxp.ZPlus(epsilon=0, zero_params="bias"), [2, 0, 1], [0, 0, -4]),
    "α2β1": (lambda z: pxp.AlphaBeta(2, 1, epsilon=0), [3, -3, 1.5], [1.6, 1.6, -8]),
    "α2β1 bias": (lambda z: pxp.AlphaBeta(2, 1, epsilon=0, zero_params="bias"), [4, -3, 2], [2, 2, -8]),
    "γ = 1": (lambda z: pxp.Gamma(1, epsilon=0), [12 / 7, -3 / 7, 6 / 7], [-16 / 9, -16 / 9, 4 / 9]),
    "γ = 1 bias": (
        lambda z: pxp.Gamma(1, epsilon=0, zero_params="bias"),
        [12 / 5, -3 / 5, 6 / 5],
        [-16 / 7, -16 / 7, 4 / 7],
    ),
    "w²": (lambda z: pxp.WSquare(epsilon=0), [0.75, 0.75, 0.75], [-4 / 7, -16 / 7, -4 / 7]),
    "w² bias": (lambda z: pxp.WSquare(epsilon=0, zero_params="bias"), [1, 1, 1], [-2 / 3, -8 / 3, -2 / 3]),
    "flat": (lambda z: pxp.Flat(epsilon=0), [1, 1, 1], [-4 / 3, -4 / 3, -4 / 3]),
    "zB": (lambda z: pxp.ZBox(-1, 2, epsilon=0), [9 / 5, 0, 6 / 5], [0, 0, -4]),
}


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("case", HAND)
def test_six_numbers_by_hand(case, kind):
    rule, *expected = HAND[case]
    weight = torch.tensor([[1.0, 1, 1], [-1, 2, 1]]).double()
    layer = nn.Linear(3, 2) if kind == "linear" else nn.Conv2d(3, 2, 1)
    layer.double()
    layer.weight.data, layer.bias.data = weight.reshape(layer.weight.shape), torch.tensor([1.0, -1]).double()
    model = nn.Sequential(layer) if kind == "linear" else nn.Sequential(layer, nn.Flatten())
    x = torch.tensor([[2.0, -1, 1]]).double().repeat(2, 1).reshape(2, 3, *[1] * (0 if kind == "linear" else 2))
    found = pxp.heatmap(model, x, torch.tensor([0, 1]), pxp.LRP(rule(None)))
    torch.testing.assert_close(found.flatten(1), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_lrp_0_is_gradient_times_input_by_finite_differences():
    model = randomise(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)))
    x, step = torch.randn(1, 1, 6, 6).double(), 1e-6
    heat = pxp.heatmap(model, x, 2, pxp.LRP(pxp.Epsilon(0)))
    differences = torch.zeros_like(x).flatten()
    for i in range(x.numel()):
        move = torch.zeros_like(differences)
        move[i] = step
        move = move.view_as(x)
        differences[i] = ((model(x + move) - model(x - move))[0, 2] / (2 * step)).item()
    assert relative(heat, differences.view_as(x) * x) < 1e-7


def test_lrp_0_of_a_filter_is_the_derivative_by_a_factor_on_it():
    """Score = d logit / d factor where the filter's output is multiplied by the factor: Σ activation × gradient."""
    model, x, labels, units = network("resnet", samples=2)
    scores = pxp.attribute(model, (x, labels), units, pxp.LRP(pxp.Epsilon(0)))
    step = 1e-6
    for layer, filter in (("conv1", 3), ("layer1.0.conv2", 5), ("layer2.0.downsample.0", 1), ("layer4.1.conv1", 70)):
        (site,) = units[layer].site
        logits = []
        for factor in (1 + step, 1 - step):
            scale = torch.ones(units[layer].size, 1, 1).double()
            scale[filter] = factor
            handle = model.get_submodule(site).register_forward_hook(lambda m, i, o, scale=scale: o * scale)
            logits.append(model(x).gather(1, labels[:, None]).detach())
            handle.remove()
        derivative = float(((logits[0] - logits[1]) / (2 * step)).mean())
        assert float(scores.signed[layer][filter]) == pytest.approx(derivative, rel=1e-6, abs=1e-9)


CONSERVING = [pxp.Epsilon(TINY), pxp.Gamma(0.25, epsilon=TINY), pxp.Gamma(epsilon=TINY), pxp.ZPlus(epsilon=TINY),
              pxp.AlphaBeta(2, 1, epsilon=TINY), pxp.AlphaBeta(1, 0, epsilon=TINY)]  # fmt: skip


@pytest.mark.parametrize("rule", CONSERVING, ids=repr)
@pytest.mark.parametrize("name", ["vgg"])
def test_every_layer_conserves_relevance_without_biases(name, rule):
    model, x, labels, units = network(name)
    without_biases(model)
    logit = float(model(x).detach().gather(1, labels[:, None]).mean())
    scores = pxp.attribute(model, (x, labels), units, pxp.LRP(rule))
    for layer in units:
        assert float(scores.signed[layer].sum()) == pytest.approx(logit, rel=1e-7), layer


@pytest.mark.parametrize("input", [None, pxp.ZBox(-5, 5, epsilon=TINY), pxp.Flat(epsilon=TINY)], ids=repr)
@pytest.mark.parametrize("rule", CONSERVING, ids=repr)
@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_the_input_receives_the_logit_without_biases(name, rule, input):
    if input is None and getattr(rule, "beta", 0):
        pytest.skip("αβ: an output at the image's corner may have no negative contribution")
    model, x, labels, _ = network(name, samples=2)
    without_biases(model)
    heat = pxp.heatmap(model, x, labels, pxp.LRP(rule, input=input))
    torch.testing.assert_close(
        heat.flatten(1).sum(1), model(x).gather(1, labels[:, None])[:, 0].detach(), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("rule", ["epsilon", "gamma", "zplus", "alpha2beta1"])
def test_zero_params_conserves_in_spite_of_biases(rule):
    model, x, labels, units = network("vgg")
    logit = float(model(x).detach().gather(1, labels[:, None]).mean())
    kept = pxp.attribute(model, (x, labels), units, pxp.LRP(rule, zero_params="bias"))
    lost = pxp.attribute(model, (x, labels), units, pxp.LRP(rule))
    assert float(kept.signed["features.0"].sum()) == pytest.approx(logit, rel=1e-3)
    assert float(lost.signed["features.0"].sum()) != pytest.approx(logit, rel=1e-2)


def _scores(rule):
    model, x, labels, units = network("vgg")
    x = x.abs()
    model.classifier[-1].bias.data += 10  # positive logits, for which γ → ∞ is z⁺
    return pxp.attribute(model, (x, labels), units, pxp.LRP(rule)), pxp.heatmap(model, x, labels, pxp.LRP(rule))


@pytest.mark.parametrize(
    ("one", "other", "bound"),
    [
        (pxp.Gamma(0, epsilon=TINY), pxp.Epsilon(TINY), 1e-10),
        (pxp.Gamma(1e9, epsilon=TINY), pxp.ZPlus(epsilon=TINY), 1e-7),
        (pxp.AlphaBeta(1, 0, epsilon=TINY), pxp.ZPlus(epsilon=TINY), 1e-12),
        (pxp.AlphaBeta(1, 0, epsilon=TINY, zero_params="bias"), pxp.ZPlus(epsilon=TINY, zero_params="bias"), 1e-12),
        (pxp.Epsilon(0), pxp.Epsilon(1e-14), 1e-9),
    ],
    ids=["γ=0 is ε", "γ→∞ is z+", "α1β0 is z+", "α1β0 is z+, no bias", "ε→0 is LRP-0"],
)
def test_limits(one, other, bound):
    (a, heat_a), (b, heat_b) = _scores(one), _scores(other)
    assert max(relative(a.signed[layer], b.signed[layer]) for layer in a) < bound
    assert relative(heat_a, heat_b) < bound


def test_rules_differ_from_each_other():
    found = [_scores(rule)[1] for rule in ("epsilon", "gamma", "zplus", "alpha2beta1")]
    for i, one in enumerate(found):
        assert all(relative(one, other) > 1e-2 for other in found[:i])


def test_gamma_defaults_differ_for_convolutions_and_linear_layers():
    model, x, labels, units = network("vgg")
    default = pxp.attribute(model, (x, labels), units, pxp.LRP("gamma"))
    explicit = pxp.attribute(model, (x, labels), units, pxp.LRP(pxp.Gamma(0.25), fc=pxp.Gamma(0.05)))
    assert all(torch.equal(default.signed[layer], explicit.signed[layer]) for layer in units)


class CReLU(nn.Module):
    """The output that the ReLU takes is used a second time, with the other sign."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.conv1 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        self.relu, self.fc = nn.ReLU(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv1(self.relu(self.conv0(x)))
        return self.fc(torch.cat([self.relu(z), self.relu(-z)], 1).mean((2, 3)))


class SharedLayer(nn.Module):
    """A layer that runs twice, once with a ReLU behind it and once without."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.fc = nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(self.relu(self.conv(self.relu(self.stem(x))))).mean((2, 3)))


@pytest.mark.parametrize("make", [CReLU, SharedLayer])
def test_gamma_keeps_negative_outputs_where_a_relu_is_not_the_only_reader(make):
    model = randomise(make())
    x, labels = torch.randn(3, 1, 8, 8).double(), torch.tensor([0, 1, 2])
    units = pxp.find_components(model, example=x)
    first = units.trace.order[0]
    found = pxp.attribute(model, (x, labels), units, pxp.LRP(pxp.Gamma(0.25, epsilon=TINY)))
    composite = pxp.LRP(pxp.Gamma(0.25, epsilon=TINY)).composite(model, units.trace)
    for rule in composite.rules.values():
        if hasattr(rule, "rectified"):
            rule.rectified = False
    careful = pxp.attribute(model, (x, labels), units, composite)
    assert relative(found.signed[first], careful.signed[first]) < 1e-10


@pytest.mark.parametrize("rule", ["epsilon", "gamma", "zplus", "alpha2beta1", "flat", "wsquare", pxp.ZBox(-4, 4)])
@pytest.mark.parametrize("name", ["grouped", "resnet"])
def test_rules_leave_the_outputs_as_they_are(name, rule):
    model, x, _, units = network(name)
    twin = replica(model)
    fold_batch_norm(twin, units.trace)
    expected = twin(x)
    with pxp.LRP(rule).composite(model, units.trace).context(twin):
        assert torch.equal(twin(x.clone().requires_grad_()), expected)


@pytest.mark.parametrize("rule", ["gamma", "zplus", "alpha2beta1"])
def test_wide_linear_layers_in_blocks_are_the_same(rule, monkeypatch):
    model, x, labels, _units = network("mlp")
    whole = pxp.heatmap(model, x, labels, pxp.LRP(rule))
    monkeypatch.setattr("pxp.lrp.carry._BLOCK", 24)
    assert relative(pxp.heatmap(model, x, labels, pxp.LRP(rule)), whole) < 1e-13


@pytest.mark.parametrize("rule", [pxp.ZPlus(epsilon=0), pxp.Gamma(0.25, epsilon=0), pxp.Epsilon(0)], ids=repr)
def test_no_stabiliser_gives_no_nan_on_a_relu_network(rule):
    model, x, labels, units = network("vgg")
    scores = pxp.attribute(model, (x, labels), units, pxp.LRP(rule))
    assert all(bool(values.isfinite().all()) for values in scores.values())


def test_half_precision():
    model, x, labels, units = network("vgg")
    for rule in ("epsilon", "gamma", "zplus", "alpha2beta1"):
        exact = pxp.attribute(model, (x, labels), units, pxp.LRP(rule))
        for dtype in (torch.float16, torch.bfloat16):
            rough = pxp.attribute(copy.deepcopy(model).to(dtype), (x, labels), units, pxp.LRP(rule))
            bound = 0.1 if rule != "alpha2beta1" else 1.0
            assert relative(rough["features.14"], exact["features.14"]) < bound, (rule, dtype)


def test_identity_passes_relevance_through_smooth_activations():
    for activation in (nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.Tanh(), nn.ELU()):
        model = without_biases(randomise(nn.Sequential(nn.Linear(6, 8), activation, nn.Linear(8, 3))))
        x = torch.randn(4, 6).double()
        heat = pxp.heatmap(model, x, 1, pxp.LRP(pxp.Epsilon(TINY)))
        torch.testing.assert_close(heat.sum(1), model(x)[:, 1].detach(), rtol=1e-8, atol=1e-10)


def test_names_make_rules():
    assert isinstance(make_rule("epsilon"), pxp.Epsilon) and make_rule("epsilon").epsilon == 1e-6
    rule = make_rule("alpha2beta1", "bias")
    assert (rule.alpha, rule.beta, rule.zero_params) == (2, 1, "bias")
    same = pxp.Gamma(0.1)
    assert make_rule(same) is same
    assert [repr(make_rule(name)) for name in ("gamma", "zplus", "flat", "wsquare")] == [
        "Gamma()", "ZPlus()", "Flat()", "WSquare()",
    ]  # fmt: skip
    assert repr(pxp.Gamma(0.25, zero_params="bias")) == "Gamma(0.25, zero_params='bias')"
    assert repr(pxp.ZBox(0, 1)) == "ZBox(0, 1)"
    assert repr(pxp.AlphaBeta()) == "AlphaBeta(2, 1)"


def test_a_copied_rule_is_not_shared():
    composite = pxp.LRP(pxp.Gamma(0.25)).composite(VGG(), pxp.find_components(VGG()).trace)
    rules = [composite.rules[name] for name in composite.groups]
    assert len({id(rule) for rule in rules}) == len(rules)
