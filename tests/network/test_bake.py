"""Weights that are computed from others: a replica holds their values, and everything agrees with the plain network."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import drawn, randomise, relative
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import pxp
from pxp.network.fold import fold_batch_norm
from pxp.network.replica import replica

RULES = [pxp.Epsilon(1e-9), pxp.Gamma(0.3), pxp.ZPlus(), pxp.AlphaBeta()]


class Signs(nn.Module):
    """A parametrization of one's own: binary weights with one scale for each output."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.sign() * weight.abs().flatten(1).mean(1).view(-1, *[1] * (weight.ndim - 1))


class Standardised(nn.Conv2d):
    """Weight standardisation as most people write it."""

    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, centred / (centred.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class Binary(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight.sign() * 0.3, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Equalised(nn.Linear):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.rand(self.out_features, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(input=x, weight=self.weight * self.gain, bias=self.bias * 0.5)


class Flattening(Equalised):
    """Does without nn.Flatten."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


class Upwards(nn.ConvTranspose2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight / self.weight.norm(), self.bias, self.stride)


def equalised_by_a_hook(layer: nn.Module) -> nn.Module:
    """StyleGAN's way: the parameter has another name and a hook sets the weight."""
    weight = layer.weight
    del layer.weight
    layer.register_parameter("weight_orig", weight)
    layer.weight = weight.detach() * 0

    def scale(module: nn.Module, inputs) -> None:
        module.weight = module.weight_orig * (2 / module.weight_orig[0].numel()) ** 0.5

    layer.register_forward_pre_hook(scale)
    return layer


def own_forward(layer: nn.Module) -> nn.Module:
    """A forward pass that belongs to the object."""
    weight, bias = layer.weight, layer.bias
    call = F.linear if isinstance(layer, nn.Linear) else F.conv2d
    layer.forward = lambda x: call(x, weight.tanh(), bias)
    return layer


def pruned_by_torch(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.4)
    prune.ln_structured(layer, "weight", 0.3, n=2, dim=0)
    return prune.random_unstructured(layer, "bias", 0.5)


def parametrised_by_two(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Signs())
    return parametrizations.spectral_norm(layer)


KINDS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "two parametrizations": parametrised_by_two,
    "old weight_norm": weight_norm,
    "old spectral_norm": spectral_norm,
    "prune": pruned_by_torch,
    "hook": equalised_by_a_hook,
    "own forward": own_forward,
}


def effective(layer: nn.Module) -> Tensor:
    """The weight that a layer without padding really uses: what it makes of each single input."""
    size = (layer.in_features,) if isinstance(layer, nn.Linear) else (layer.in_channels, *layer.kernel_size)
    inputs = torch.eye(torch.Size(size).numel()).double()
    with torch.no_grad():
        found = layer(inputs.view(-1, *size)) - layer(torch.zeros(1, *size).double())
    return found.flatten(1).t().reshape(-1, *size)


def plain_of(layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.Linear):
        made = nn.Linear(layer.in_features, layer.out_features)
    else:
        made = [nn.Conv1d, nn.Conv2d, nn.Conv3d][len(layer.kernel_size) - 1](
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, dilation=layer.dilation
        )
    made.double().weight.data = effective(layer)
    size = (layer.in_features,) if isinstance(layer, nn.Linear) else (layer.in_channels, *layer.kernel_size)
    with torch.no_grad():
        made.bias.copy_(layer(torch.zeros(1, *size).double()).flatten())
    return made


@pytest.fixture(params=[*KINDS, "StdConv2d", "ScaledStdConv2d", "Standardised"])
def both(request):
    """A network whose weights are computed, the same with plain weights, images and labels."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        classes = {"StdConv2d": StdConv2d, "ScaledStdConv2d": ScaledStdConv2d, "Standardised": Standardised}
        conv = classes.get(request.param, nn.Conv2d)
        model = nn.Sequential(
            conv(2, 6, 3, padding=0), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 8, 3, padding=0, bias=True), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 4),
        )  # fmt: skip
        model = randomise(model)
        model[0].bias = nn.Parameter(torch.rand(6).double() - 0.5)
        if request.param in KINDS:
            for place in (0, 3, 7):
                model[place] = KINDS[request.param](model[place])
        plain = nn.Sequential(*model)
        for place in (0, 3, 7):
            plain[place] = plain_of(model[place])
        x = torch.randn(60, 2, 9, 9).double()
        with torch.no_grad():
            model[9].bias -= model.eval()(x).mean(0)
            y = model(x).argmax(1)
    assert relative(plain(x), model.eval()(x)) < 1e-6
    return model, plain.eval(), x, y


def test_every_rule_agrees_with_the_plain_network(both, untouched):
    model, plain, x, y = both
    untouched(model)
    for kind in ("filter", "neuron"):
        units, same = (pxp.find_components(each, kind, example=x[:1]) for each in (model, plain))
        assert {name: layer.__dict__ for name, layer in units.items()} == {n: e.__dict__ for n, e in same.items()}
        for criterion in (*map(pxp.LRP, RULES), pxp.Taylor(), pxp.Magnitude(), pxp.Activation()):
            one, two = (pxp.attribute(m, (x[:4], y[:4]), units, criterion) for m in (model, plain))
            assert all(relative(one.signed[name], two.signed[name]) < 1e-6 for name in units), criterion
    for criterion in (*map(pxp.LRP, RULES), pxp.LRP("zplus", input="flat"), pxp.LRP("gamma", input="wsquare")):
        one, two = (pxp.heatmap(m, x[:4], y[:4], criterion) for m in (model, plain))
        assert relative(one, two) < 1e-6, criterion


def test_curves_agree_with_masks(both, untouched):
    model, plain, x, y = both
    untouched(model)
    rates = (0, 0.1, 0.3, 0.5)
    units = pxp.find_components(model, ["filter", "neuron"], example=x[:1])
    scores = pxp.attribute(model, (x[:8], y[:8]), units, pxp.LRP("zplus"))
    expected = []
    for rate in rates:
        with pxp.masked(model, scores.select(rate)):
            expected.append(pxp.accuracy(model, (x, y)))
        with pxp.masked(model, scores.select(rate)), pxp.masked(plain, scores.select(rate)), torch.no_grad():
            assert relative(plain(x), model(x)) < 1e-6
    assert pxp.pruning_curve(model, scores, (x, y), rates=rates, allow_shared=True).runs[0] == tuple(expected)
    assert len(set(expected)) > 1


def test_a_replica_holds_plain_layers_and_the_batch_norm_is_merged(both):
    model, plain, x, _ = both
    twin = replica(model)
    units = pxp.find_components(model, example=x[:1])
    fold_batch_norm(twin, units.trace)
    assert [type(module) for module in (twin[0], twin[3], twin[7])] == [nn.Conv2d, nn.Conv2d, nn.Linear]
    assert isinstance(twin[1], nn.Identity) and units["0"].site == ("1",)
    assert not any(module._forward_pre_hooks for module in twin.modules())
    assert {name for name, _ in twin.named_parameters()} == {
        name for name, _ in plain.named_parameters() if not name.startswith("1.")
    }
    assert relative(twin(x), model(x)) < 1e-6
    again = replica(replica(model))
    assert relative(again(x), model(x)) < 1e-12


OTHERS = {
    "Binary": (lambda: nn.Sequential(Binary(3, 5, 4, stride=2), nn.BatchNorm1d(5), nn.ReLU()), (3, 12)),
    "Flattening": (lambda: nn.Sequential(Flattening(12, 5), nn.BatchNorm1d(5), nn.ReLU()), (3, 4)),
    "Equalised": (lambda: nn.Sequential(nn.Flatten(), Equalised(12, 5), nn.BatchNorm1d(5), nn.ReLU()), (12,)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_subclasses_in_other_dimensions(name):
    make, shape = OTHERS[name]
    model = nn.Sequential(*make(), nn.Flatten(), nn.LazyLinear(3))
    model(torch.randn(3, *shape))
    model, x, y = randomise(model), torch.randn(3, *shape).double(), torch.arange(3)
    plain = copy.deepcopy(model)
    place = 1 if name == "Equalised" else 0
    plain[place] = plain_of(model[place])
    if name == "Flattening":
        plain.insert(0, nn.Flatten())
    for rule in RULES:
        assert relative(*(pxp.heatmap(each, x, y, pxp.LRP(rule)) for each in (model, plain))) < 1e-8


def test_a_transposed_subclass():
    model = randomise(nn.Sequential(Upwards(2, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 81, 3)))
    plain = copy.deepcopy(model)
    plain[0] = nn.ConvTranspose2d(2, 4, 3, stride=2).double()
    plain[0].weight.data, plain[0].bias.data = model[0].weight.data / model[0].weight.data.norm(), model[0].bias.data
    x, y = torch.randn(3, 2, 4, 4).double(), torch.arange(3)
    assert relative(plain(x), model(x)) < 1e-12
    for rule in RULES:
        assert relative(*(pxp.heatmap(each, x, y, pxp.LRP(rule)) for each in (model, plain))) < 1e-10


class StandardisedReflect(Standardised):
    """Pads by mirroring, which its class does outside of the convolution."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, size, stride, padding=size // 2, padding_mode="reflect")


class Apart(nn.Module):
    """Padding as a module, and a plain convolution of the weight that the original uses."""

    def __init__(self, original: nn.Conv2d, side: int) -> None:
        super().__init__()
        size, stride = original.kernel_size[0], original.stride[0]
        if isinstance(original, StandardisedReflect):
            self.pad: nn.Module = nn.ReflectionPad2d(size // 2)
        else:
            total = max((-(-side // stride) - 1) * stride + size - side, 0)
            before, after = total // 2, total - total // 2
            self.pad = nn.ZeroPad2d((before, after, before, after))
        self.conv = nn.Conv2d(original.in_channels, original.out_channels, size, stride)
        with torch.no_grad():
            # where the window lies inside the image the padding changes nothing
            probe = torch.zeros(original.in_channels * size**2, original.in_channels, 3 * size, 3 * size)
            inside = probe[:, :, size : 2 * size, size : 2 * size]
            inside.copy_(torch.eye(len(probe)).view_as(inside))
            stepwise = copy.deepcopy(original).float()
            stepwise.stride = (1, 1)
            self.conv.bias.copy_(stepwise(torch.zeros_like(probe[:1]))[0, :, size, size])
            found = stepwise(probe) - stepwise(torch.zeros_like(probe[:1]))
            start = size + (size - 1) // 2
            self.conv.weight.copy_(found[:, :, start, start].t().reshape(self.conv.weight.shape))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pad(x))


@pytest.mark.parametrize("kind", [StdConv2dSame, ScaledStdConv2dSame, StandardisedReflect])
@pytest.mark.parametrize("stride", [1, 2])
def test_what_a_layer_does_to_its_input_is_kept(kind, stride, untouched):
    model = nn.Sequential(kind(2, 4, 3, stride=stride), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    x, y = torch.randn(40, 2, 8, 8), torch.arange(40) % 3
    model(x)
    model, x = randomise(model), x.double()
    with torch.no_grad():
        model[4].bias -= model(x).mean(0)
        y = model(x).argmax(1)
    plain = nn.Sequential(Apart(model[0], 8), *model[1:]).eval()
    assert relative(plain(x), model(x)) < 1e-5
    untouched(model)
    units = pxp.find_components(model, example=x[:1])
    assert list(units) == ["0"] and units["0"].site == ("1",)
    scores = pxp.attribute(model, (x[:4], y[:4]), units, pxp.LRP("zplus"))
    for rule in RULES:
        assert relative(*(pxp.heatmap(each, x[:4], y[:4], pxp.LRP(rule)) for each in (model, plain))) < 1e-4, rule
    expected = []
    for rate in (0, 0.3, 0.8):
        with pxp.masked(model, scores.select(rate)):
            expected.append(pxp.accuracy(model, (x, y)))
    assert pxp.pruning_curve(model, scores, (x, y), rates=(0, 0.3, 0.8), allow_shared=True).runs[0] == tuple(expected)


class Dynamic(nn.Conv2d):
    """A weight that depends on the image."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * x.mean().sigmoid(), self.bias, padding=1)


class DynamicLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * x.detach().abs().max())


class Noisy(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight + torch.rand_like(self.weight), self.bias, padding=1)


class Rectified(nn.Conv2d):
    """What it gives is not the convolution's output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Quantised(nn.Conv2d):
    """Its input is rounded before."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * 4).round() / 4)


class LowRank(nn.Linear):
    """Two maps beside each other."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.down), self.up)


class Conditioned(nn.Conv2d):
    def forward(self, x: Tensor, also: Tensor) -> Tensor:
        return super().forward(x)


class Mixed(nn.Module):
    """Weights of several experts, mixed for every image (CondConv)."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.route = nn.Parameter(torch.randn(3, 4 * 4 * 9)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.route(x.mean((2, 3))).sigmoid() @ self.experts).view(-1, 4, 3, 3)
        return F.conv2d(x.flatten(0, 1)[None], weight, padding=1, groups=len(x)).view_as(x)


class Gives(nn.Module):
    """A layer that is given its weight by the module around it, computed from the image or from a code."""

    def __init__(self, dynamic: bool) -> None:
        super().__init__()
        self.layer, self.make, self.dynamic = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4 * 4 * 9), dynamic
        self.code = nn.Parameter(torch.ones(4))
        del self.layer.weight
        self.layer.weight = torch.zeros(4, 4, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight = self.make(x.mean((0, 2, 3)) if self.dynamic else self.code).view(4, 4, 3, 3)
        return self.layer(x)


class CallsWithTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Conditioned(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, x)


REFUSED = {
    "dynamic": (lambda: Dynamic(4, 4, 3), r"'2' \(Dynamic\) .* weight .*depends on the input"),
    "noisy": (lambda: Noisy(4, 4, 3), r"'2' \(Noisy\) .* its weight is another one each time"),
    "rectified": (lambda: Rectified(4, 4, 3, padding=1), r"'2' \(Rectified\) .* its forward changes what conv2d gives"),
    "quantised": (lambda: Quantised(4, 4, 3, padding=1), r"'2' .* changes the values of the input before it calls conv2d"),
    "two arguments": (CallsWithTwo, r"'2\.conv' \(Conditioned\) .* its forward cannot be run by itself"),
    "CondConv": (Mixed, r"'2' \(Mixed\) computes .*a weight that depends on the input"),
    "given": (lambda: Gives(True), r"'2\.layer' \(Conv2d\) computes .*a weight that depends on the input"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_weight_that_no_rule_can_use_is_refused_by_name(name, untouched):
    make, message = REFUSED[name]
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), make(), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    if name != "given":
        untouched(model)
    units = pxp.find_components(model, example=x[:1])
    for call in (lambda: pxp.heatmap(model, x, y), lambda: pxp.attribute(model, (x, y), units, pxp.LRP("zplus"))):
        with pytest.raises(ValueError, match=message):
            call()
    if name == "noisy":  # no copy computes what the model does
        with pytest.raises(ValueError, match=r"first at '2' \(Noisy\)"):
            pxp.attribute(model, (x, y), units, pxp.Activation())
    else:  # what needs no rule goes on
        assert pxp.attribute(model, (x, y), units, pxp.Activation()).samples == 2


@pytest.mark.parametrize("make", [DynamicLinear, LowRank])
def test_linear_layers_too(make):
    model = nn.Sequential(make(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    with pytest.raises(ValueError, match=rf"'0' \({make.__name__}\) is no plain Linear: its"):
        pxp.heatmap(model, torch.rand(2, 6), 1)


def test_a_batch_norm_behind_such_a_layer_is_refused_too():
    model = nn.Sequential(Rectified(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).eval()
    x = torch.rand(2, 1, 8, 8)
    units = pxp.find_components(model, example=x)
    with pytest.raises(ValueError, match=r"'0' \(Rectified\) is no plain Conv2d"):
        pxp.attribute(model, (x, torch.tensor([0, 1])), units, pxp.Taylor())
    # masks need no weight
    mask = drawn(units, 0.5)
    with pxp.masked(model, mask), torch.no_grad():
        assert bool((model[:2](x)[:, ~mask["0"]] == 0).all())
    assert pxp.pruning_curve(
        model, pxp.attribute(model, None, units, pxp.Random(0)), (x, torch.tensor([0, 1])), rates=[0]
    )


def test_a_weight_given_from_outside_that_does_not_depend_on_the_input():
    model = randomise(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), Gives(False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    )
    x, y = torch.randn(2, 1, 8, 8).double(), torch.tensor([0, 1])
    with torch.no_grad():
        model(x)
        plain = nn.Sequential(*model)
        plain[2] = nn.Conv2d(4, 4, 3, padding=1).double()
        plain[2].weight.data, plain[2].bias.data = model[2].layer.weight.clone(), model[2].layer.bias.data
    for rule in RULES:
        assert relative(*(pxp.heatmap(each, x, y, pxp.LRP(rule)) for each in (model, plain))) < 1e-10, rule
    normed = nn.Sequential(*model[:3], nn.BatchNorm2d(4), *model[3:]).double().eval()
    with pytest.raises(ValueError, match=r"'2\.layer' is given its weight from outside .* BatchNorm '3'"):
        pxp.heatmap(normed, x, y)


def test_a_parametrization_that_differs_from_call_to_call_is_named():
    class Jitter(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + torch.rand_like(weight)

    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    parametrize.register_parametrization(model[0], "weight", Jitter())
    with pytest.raises(ValueError, match=r"the weight of '0' is another one each time .*remove_parametrizations"):
        pxp.find_components(model, example=torch.rand(1, 1, 8, 8))


def test_parametrised_attention_and_batch_norm():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=nn.ReLU())
            self.head = nn.Linear(8, 3)
            parametrizations.weight_norm(self.encoder.self_attn.out_proj)
            parametrizations.spectral_norm(self.encoder.self_attn, "in_proj_weight")
            weight_norm(self.encoder.linear1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x).mean(1))

    torch.manual_seed(1)
    model, x = Net().double().eval(), torch.randn(3, 5, 8).double()
    twin = replica(model)
    assert relative(twin(x), model(x)) < 1e-12
    torch.manual_seed(1)
    plain = Net().double().eval()
    for module in plain.modules():
        for part in list(getattr(module, "parametrizations", ())):
            parametrize.remove_parametrizations(module, part)
    nn.utils.remove_weight_norm(plain.encoder.linear1)
    units = pxp.find_components(model, ["head", "neuron"], example=x)
    one, two = (pxp.attribute(each, (x, torch.arange(3)), units, pxp.LRP("zplus")) for each in (model, plain))
    assert all(relative(one.signed[name], two.signed[name]) < 1e-9 for name in units)


def test_a_layer_written_in_another_way_is_as_it_was():
    class Product(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.t() + self.bias

    class Parts(nn.Conv2d):
        """Image by image."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super(Parts, self).forward(image[None]) for image in x])

    model = randomise(nn.Sequential(Parts(1, 4, 3), nn.ReLU(), nn.Flatten(), Product(144, 3)))
    plain = copy.deepcopy(model)
    plain[0].__class__, plain[3].__class__ = nn.Conv2d, nn.Linear
    x, y = torch.randn(3, 1, 8, 8).double(), torch.arange(3)
    for rule in RULES:
        assert relative(*(pxp.heatmap(each, x, y, pxp.LRP(rule)) for each in (model, plain))) < 1e-10
