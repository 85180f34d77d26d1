"""Finding components in any module tree, the depth groups, and what BatchNorm folding needs to know."""

from __future__ import annotations

import copy
import itertools

import pytest
import timm
import torch
import torchvision
from conftest import Grouped, mlp, network, randomise, relative, without_biases
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from vits import two_blocks

import pxp
from pxp.models import VGG
from pxp.network.fold import fold_batch_norm
from pxp.network.replica import replica
from pxp.network.trace import trace_model

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def build(name: str) -> nn.Module:
    library, _, rest = name.partition("/")
    if library == "timm":
        return timm.create_model(rest, pretrained=False)
    if name.startswith("vgg"):
        with torch.device("meta"):  # initialising 120 million weights of linear layers takes seconds
            model = torchvision.models.get_model(name, weights=None, init_weights=False)
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        sizes = (512, 64, 32, 10)
        for index, (before, after) in zip((0, 3, 6), itertools.pairwise(sizes), strict=True):
            model.classifier[index] = nn.Linear(before, after, device="meta")
        return randomise(model.to_empty(device="cpu")).float()
    return torchvision.models.get_model(name, weights=None)


# name → (filters, image side); BatchNorms that follow no convolution are DenseNet's in front of one
ZOO = {
    "vgg16": (4224, 32),
    "vgg16_bn": (4224, 32),
    "resnet18": (4800, 32),
    "resnet50": (26560, 32),
    "mobilenet_v2": (17056, 32),
    "mobilenet_v3_small": (None, 32),
    "efficientnet_b0": (None, 32),
    "shufflenet_v2_x0_5": (None, 32),
    "densenet121": (None, 32),
    "timm/resnet18": (4800, 32),
    "timm/mobilenetv2_050": (None, 32),
    "timm/test_efficientnet": (None, 32),
    "timm/seresnet18": (None, 32),
    "timm/test_resnet": (None, 32),
    "timm/test_byobnet": (None, 32),
}


@pytest.fixture(scope="module", params=ZOO)
def zoo(request):
    filters, side = ZOO[request.param]
    torch.manual_seed(0)
    model = randomise(build(request.param)).float()
    x = torch.randn(2, 3, side, side)
    return request.param, model, x, pxp.find_components(model, example=x), filters


def test_filters_of_the_libraries_networks(zoo):
    _name, model, example, _units, filters = zoo
    units = pxp.find_components(model, gates=True, example=example)
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert set(units) == set(convolutions)
    assert all(units[n].size == m.out_channels for n, m in convolutions.items())
    assert units.total == sum(m.out_channels for m in convolutions.values())
    if filters is not None:
        assert units.total == filters
    order = []
    handles = [m.register_forward_hook(lambda *_, n=n: order.append(n)) for n, m in convolutions.items()]
    with torch.no_grad():
        model(zoo[2])
    for handle in handles:
        handle.remove()
    assert list(units) == order


def test_every_batch_norm_behind_a_convolution_is_folded_and_the_outputs_stay(zoo):
    name, model, x, units, _ = zoo
    twin = replica(model)
    fold_batch_norm(twin, units.trace)
    left = [n for n, m in twin.named_modules() if isinstance(m, NORMS)]
    if name == "densenet121":
        # the BatchNorms in front of the convolutions follow a concatenation; denselayers' second ones are folded
        assert all(
            n.endswith(("norm1", "transition1.norm", "transition2.norm", "transition3.norm", "norm5")) for n in left
        )
        assert len(left) == 58 + 3 + 1
    else:
        assert left == []
    with torch.no_grad():
        assert relative(twin(x), model(x)) < 1e-3


def test_lrp_runs_on_the_libraries_networks(zoo, untouched):
    _name, model, x, units, _ = zoo
    untouched(model)
    scores = pxp.attribute(model, (x, torch.tensor([1, 2])), units, pxp.LRP("epsilon", low="zplus", high="gamma"))
    gates = [n for n in units if ".se." in n or ".fc1" in n or ".fc2" in n or "conv_reduce" in n]
    for layer in units:
        assert bool((scores[layer] != 0).any()) or layer in gates, layer


@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "timm/test_efficientnet", "timm/seresnet18", "timm/resnet18"],
)
def test_the_logit_is_conserved_through_any_block_without_biases(name):
    """ReLU, SiLU, Hardswish, gates of squeeze-and-excitation, residual sums: the input receives the whole logit."""
    model = without_biases(randomise(build(name)))
    x, labels = torch.randn(2, 3, 32, 32).double(), torch.tensor([3, 8])
    logits = model(x).detach().gather(1, labels[:, None])[:, 0]
    heat = pxp.heatmap(model, x, labels, pxp.LRP(pxp.Epsilon(1e-12)))
    torch.testing.assert_close(heat.flatten(1).sum(1), logits, rtol=1e-6, atol=1e-12)
    if name.endswith(("efficientnet_b0", "v3_small", "test_efficientnet")):
        # there is one convolution that everything passes through last
        units = pxp.find_components(model, example=x)
        last = list(units)[-1]
        scores = pxp.attribute(model, (x, labels), units.only(last), pxp.LRP(pxp.Epsilon(1e-12)))
        assert float(scores.signed[last].sum()) == pytest.approx(float(logits.mean()), rel=1e-6)


@pytest.mark.parametrize("name", ["efficientnet_b0", "timm/test_efficientnet"])
def test_gates_are_constant(name):
    model = randomise(build(name))
    x, labels = torch.randn(2, 3, 32, 32).double(), torch.tensor([1, 2])
    units = pxp.find_components(model, gates=True, example=x)
    scores = pxp.attribute(model, (x, labels), units, pxp.LRP())
    inside = [n for n in units if n.endswith((".fc1", ".fc2", "se.conv_reduce", "se.conv_expand"))]
    assert inside and all(bool((scores[n] == 0).all()) for n in inside)
    assert all(bool((scores[n] != 0).any()) for n in units if n not in inside)
    alone = pxp.attribute(model, (x, labels), units.only(inside[-1]), pxp.LRP())
    assert bool((alone[inside[-1]] == 0).all())


class Defined(nn.Module):
    """Defined in another order than executed; one module runs twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(4, 4, 3)
        self.unused = nn.Conv2d(4, 7, 3)
        self.shared = nn.Conv2d(4, 4, 1)
        self.first = nn.Conv2d(1, 4, 3)
        self.alias = self.first
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.first(x).relu()).relu()
        return self.fc(self.last(self.shared(x)).mean((2, 3)))


def test_order_of_execution_and_shared_modules_once():
    units = pxp.find_components(Defined(), example=torch.zeros(1, 1, 9, 9))
    assert list(units) == ["first", "shared", "last"]
    assert units.total == 12
    assert len(units) == 3


def test_shared_layer_sums_its_calls():
    model = randomise(Defined())
    x, labels = torch.randn(2, 1, 9, 9).double(), torch.tensor([0, 2])
    units = pxp.find_components(model, example=x)
    scores = pxp.attribute(model, (x, labels), units, pxp.LRP(pxp.Epsilon(0)))
    outputs = []
    handle = model.shared.register_forward_hook(lambda m, i, o: outputs.append(o))
    logits = model(x).gather(1, labels[:, None]).sum()
    handle.remove()
    gradients = torch.autograd.grad(logits, outputs)
    by_hand = sum((o * g).sum((2, 3)) for o, g in zip(outputs, gradients, strict=True))
    assert relative(scores.signed["shared"], by_hand.mean(0).detach()) < 1e-12
    assert relative(scores["shared"], by_hand.abs().mean(0).detach()) < 1e-12


def test_integrated_gradients_of_a_shared_layer_match_its_calls():
    model = randomise(Defined())
    x, labels = torch.randn(3, 1, 9, 9).double(), torch.tensor([0, 2, 1])
    units, steps = pxp.find_components(model, example=x), 4
    scores = pxp.attribute(model, (x, labels), units, pxp.IntegratedGradients(steps))

    def calls(point: torch.Tensor) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        outputs: list[torch.Tensor] = []
        handle = model.shared.register_forward_hook(lambda m, i, o: outputs.append(o))
        logits = model(point).gather(1, labels[:, None]).sum()
        handle.remove()
        return outputs, torch.autograd.grad(logits, outputs)

    runs = [calls(x * k / steps) for k in range(steps + 1)]
    by_hand = 0
    for call in range(2):
        gradient = sum(gradients[call] for _, gradients in runs[1:]) / steps
        by_hand = by_hand + (gradient * (runs[-1][0][call] - runs[0][0][call])).sum((2, 3)).detach()
    assert relative(scores.signed["shared"], by_hand.mean(0)) < 1e-12


def test_neurons():
    units = pxp.find_components(mlp(), "neuron")
    assert {name: layer.size for name, layer in units.items()} == {"0": 10, "2": 8}
    units = pxp.find_components(VGG(), "neuron")
    assert {name: layer.size for name, layer in units.items()} == {"classifier.0": 128, "classifier.3": 128}
    assert units["classifier.0"].activation == "classifier.1"


def test_one_and_three_dimensions():
    _model, x, _labels, units = network("conv1d")
    assert [layer.size for layer in units.values()] == [6, 8, 8]
    assert [layer.site for layer in units.values()] == [("1",), ("4",), ("6",)]
    cube = randomise(nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Flatten(), nn.Linear(108, 3)))
    x = torch.randn(2, 1, 5, 5, 5).double()
    units = pxp.find_components(cube, example=x)
    assert units["0"].site == ("1",)
    scores = pxp.attribute(cube, (x, torch.tensor([0, 1])), units, pxp.LRP("zplus"))
    assert scores["0"].shape == (4,)


def test_sites_are_behind_the_batch_norm():
    units = pxp.find_components(Grouped(), example=torch.zeros(1, 3, 18, 18))
    assert {name: layer.site for name, layer in units.items()} == {
        "stem": ("stem",),
        "dilated.0": ("dilated.1",),
        "depthwise.0": ("depthwise.1",),
        "project": ("project",),
        "expand.0": ("expand.0",),
    }
    assert {name: layer.activation for name, layer in units.items()} == {
        "stem": "relu",
        "dilated.0": "dilated.2",
        "depthwise.0": None,
        "project": None,
        "expand.0": "expand.1",
    }


class PreActivation(nn.Module):
    """BatchNorm takes a convolution's output that a skip connection also takes: it must not be folded."""

    def __init__(self, join: str) -> None:
        super().__init__()
        self.conv1, self.norm, self.relu = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv3, self.join, self.fc = nn.Conv2d(8, 4, 1), join, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        y = self.conv2(self.relu(self.norm(x)))
        if self.join == "add":
            y = y + x
        elif self.join == "inplace":
            y += x
        elif self.join == "cat":
            y = self.conv3(torch.cat([y, x], dim=1))
        else:
            y = torch.stack((y, x)).sum(0)
        return self.fc(y.mean((2, 3)))


@pytest.mark.parametrize("join", ["add", "inplace", "cat", "stack"])
def test_a_batch_norm_that_is_not_the_only_reader_is_not_folded(join):
    model = randomise(PreActivation(join))
    x, _labels = torch.randn(4, 1, 8, 8).double(), torch.tensor([0, 1, 2, 0])
    units = pxp.find_components(model, example=x)
    twin = replica(model)
    fold_batch_norm(twin, units.trace)
    assert relative(twin(x), model(x).detach()) < 1e-12
    # every mask silences the filter wherever it goes
    for filter in range(4):
        kept = {name: torch.ones(layer.size, dtype=torch.bool) for name, layer in units.items()}
        kept["conv1"][filter] = False
        seen: list[Tensor] = []
        handles = [model.conv1.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o))]
        with pxp.masked(model, pxp.Mask(units, kept)):
            # a hook that was there before the mask's sees what is there without it
            handles.append(model.conv1.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o)))
            model(x)
        for handle in handles:
            handle.remove()
        assert bool((seen[1][:, filter] == 0).all()) and not bool((seen[0][:, filter] == 0).any())


def test_batch_norm_without_affine_or_frozen_is_folded():
    for norm in (nn.BatchNorm2d(4, affine=False), torchvision.ops.FrozenBatchNorm2d(4)):
        model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        model = randomise(model)
        x = torch.randn(2, 1, 8, 8).double()
        units = pxp.find_components(model, example=x)
        twin = replica(model)
        fold_batch_norm(twin, units.trace)
        assert isinstance(twin[1], nn.Identity) and relative(twin(x), model(x).detach()) < 1e-12


def test_batch_norm_with_batch_statistics_is_an_error():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(144, 3)
    )
    units = pxp.find_components(model, example=torch.randn(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"BatchNorm '1' has no running statistics"):
        pxp.attribute(model, (torch.randn(2, 1, 8, 8), torch.tensor([0, 1])), units, pxp.LRP())


def test_norms_that_layers_share_are_folded_into_each():
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
            self.norm, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(self.norm(self.two(self.norm(self.one(x)).relu())).mean((2, 3)))

    model, x = randomise(Shares()), torch.randn(2, 1, 8, 8).double()
    units = pxp.find_components(model, example=x)
    twin = replica(model)
    fold_batch_norm(twin, units.trace)
    assert isinstance(twin.norm, nn.Identity) and relative(twin(x), model(x).detach()) < 1e-12


def test_subsets_of_layers():
    units = pxp.find_components(VGG())
    names = list(units)
    assert list(units.only(names[3], names[1])) == [names[1], names[3]]
    assert list(units.without(names[0])) == names[1:]
    assert units.only(names[0]).total == 16
    for call in (units.only, units.without):
        with pytest.raises(KeyError, match=r"no filter layer 'nowhere'; there are features.0"):
            call("nowhere")
    text = repr(units)
    assert text.startswith("416 filters in 7 layers") and "features.17    96  features.18" in text


def test_scores_of_a_subset_are_those_of_the_whole():
    model, x, labels, units = network("resnet")
    whole = pxp.attribute(model, (x, labels), units, pxp.LRP("gamma"))
    for name in ("layer1.0.conv1", "layer3.0.downsample.0", "layer4.1.conv2"):
        part = pxp.attribute(model, (x, labels), units.only(name), pxp.LRP("gamma"))
        assert relative(part.signed[name], whole.signed[name]) < 1e-12


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_find_components_without_gradients(mode):
    model = VGG()
    with mode():
        assert pxp.find_components(model).total == 416
        assert pxp.find_components(model, example=torch.zeros(1, 1, 28, 28)).total == 416


def test_guessed_inputs():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.ReLU(), nn.Linear(20, 10))
    assert trace_model(flat).order == ("1", "3")
    small = nn.Sequential(nn.Conv2d(1, 3, 5), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 24 * 24, 10))  # 28 × 28 only
    assert pxp.find_components(small).total == 3
    assert pxp.find_components(timm.create_model("test_resnet")).total > 0
    odd = nn.Sequential(nn.Conv2d(5, 3, 3), nn.Flatten(), nn.Linear(3 * 9, 10))
    with pytest.raises(ValueError, match=r"could not guess an input of Sequential .*pass example="):
        pxp.find_components(odd)
    assert pxp.find_components(odd, example=torch.zeros(1, 5, 5, 5)).total == 3


# --- depth groups ------------------------------------------------------------------------------------------------


def test_an_activation_times_a_constant_is_an_activation():
    activation = timm.models.nfnet.GammaAct("gelu", gamma=1.7, inplace=True)
    model = randomise(nn.Sequential(nn.Linear(6, 8), activation, nn.Linear(8, 3)))
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert pxp.find_components(model, "neuron")["0"].activation == "1"
    hidden = model[0](x)
    straight = hidden * (1.7 * nn.functional.gelu(hidden) / hidden).detach()
    (gradient,) = torch.autograd.grad(model[2](straight)[:, 1].sum(), x)
    found = pxp.heatmap(model, x.detach(), 1, pxp.LRP(pxp.Epsilon(1e-14)))
    assert relative(found, x.detach() * gradient) < 1e-9


def _groups(name: str) -> dict[str, str]:
    model = build(name)
    return pxp.depth_groups(model, trace_model(model, torch.zeros(1, 3, 32, 32)))


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn"])
def test_groups_of_vgg16_are_the_papers(name):
    groups = _groups(name)
    assert list(groups.values()) == ["low"] * 4 + ["middle"] * 5 + ["high"] * 4 + ["fc"] * 3
    assert [n for n in groups if groups[n] == "fc"] == ["classifier.0", "classifier.3", "classifier.6"]


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_groups_of_resnets_are_the_papers(name):
    groups = _groups(name)
    group_of = {"conv1": "low", "layer1": "low", "layer2": "middle", "layer3": "middle", "layer4": "high", "fc": "fc"}
    assert groups == {layer: group_of[layer.partition(".")[0]] for layer in groups}
    assert groups["layer2.0.downsample.0"] == "middle" and groups["layer4.0.downsample.0"] == "high"
    model = build(name)
    wrapped = nn.ModuleDict({"net": nn.Sequential(model)})
    prefixed = trace_model(model, torch.zeros(1, 3, 32, 32))
    renamed = type(prefixed)(
        tuple(f"net.0.{n}" for n in prefixed.order), {f"net.0.{n}": v for n, v in prefixed.norms.items()}, {}
    )
    assert list(pxp.depth_groups(wrapped, renamed).values()) == list(groups.values())


@pytest.mark.parametrize(
    ("convolutions", "expected"),
    [
        (1, "l"),
        (2, "lh"),
        (3, "lmh"),
        (4, "lmmh"),
        (5, "llmhh"),
        (8, "llmmmmhh"),
        (9, "lllmmmhhh"),
        (13, "llllmmmmmhhhh"),
    ],
)
def test_groups_by_depth(convolutions, expected):
    model = nn.Sequential(*[nn.Conv2d(1, 1, 1) for _ in range(convolutions)], nn.Flatten(), nn.Linear(16, 2))
    groups = pxp.depth_groups(model, trace_model(model, torch.zeros(1, 1, 4, 4)))
    assert "".join(group[0] for group in groups.values()) == expected + "f"


def test_groups_of_an_mlp():
    model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(3, 3), nn.ReLU())], nn.Linear(3, 2))
    groups = pxp.depth_groups(model, trace_model(model))
    assert list(groups.values()) == ["low", "middle", "middle", "high", "fc"]


def test_composite_prints_every_layers_rule():
    model = VGG()
    lrp = pxp.LRP("epsilon", low=pxp.AlphaBeta(), high="gamma", fc="zplus", input=pxp.ZBox(0, 1))
    text = repr(lrp.composite(model)).splitlines()
    rows = [line.split(maxsplit=2) for line in text[1:]]
    assert [row[0] for row in rows] == list(pxp.find_components(model)) + [f"classifier.{i}" for i in (0, 3, 6)]
    assert [row[1] for row in rows] == ["low"] * 2 + ["middle"] * 3 + ["high"] * 2 + ["fc"] * 3
    assert [row[2] for row in rows] == [
        "ZBox(0, 1)", "AlphaBeta(2, 1)", *["Epsilon(1e-06)"] * 3, *["Gamma()"] * 2, *["ZPlus()"] * 3,
    ]  # fmt: skip


def test_lrp_prints_what_it_does():
    assert repr(pxp.LRP()) == "LRP('epsilon')"
    assert repr(pxp.LRP("zplus", start="one", path_steps=4, zero_params="bias", input="flat")) == (
        "LRP('zplus', input='flat', start='one', path_steps=4, zero_params='bias')"
    )
    assert repr(pxp.LRP(low="zplus")) == "LRP(low='zplus', middle='epsilon', high='epsilon', fc='epsilon')"
    assert pxp.LRP("gamma") == pxp.LRP("gamma") != pxp.LRP("zplus")


def test_costs_by_hand():
    units = pxp.find_components(two_blocks(), ("head", "neuron", "mlp_output"))
    head, neuron, output = list(units.values())[:3]
    # 4 channels: rows of q, k, v with biases, columns of the output projection; 10 tokens
    assert head.parameters == 3 * (4 * 12 + 4) + 4 * 12
    assert head.flops == 2 * 10 * 4 * (4 * 12) + 2 * 2 * 10 * 10 * 4
    assert neuron.parameters == 12 + 1 + 12 and neuron.flops == 2 * 10 * 24
    assert output.parameters == 10 + 1 and output.flops == 2 * 10 * 10


# --- transposed convolutions -------------------------------------------------------------------------------------


def upsampling(groups: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups, output_padding=1),
        nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, groups=groups), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2])
def test_filters_of_transposed_convolutions(groups, untouched):
    model, x = randomise(upsampling(groups)), torch.randn(40, 1, 7, 7).double()
    with torch.no_grad():
        model[9].bias -= model(x).mean(0)
        labels = model(x).argmax(1)
    untouched(model)
    units = pxp.find_components(model, example=x)
    assert {name: (layer.size, layer.site) for name, layer in units.items()} == {
        "0": (4, ("0",)), "2": (6, ("3",)), "5": (4, ("5",)),
    }  # fmt: skip
    # what one filter costs, by hand and by torch's counter
    assert units["2"].parameters == 4 // groups * 9 + 1 and units["2"].flops == 2 * 25 * (4 // groups) * 9
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model[2](torch.zeros(1, 4, 5, 5).double())
    assert counter.get_total_flops() == units["2"].flops * 6
    # a filter's weights are those of which its output is made
    weights = pxp.attribute(model, None, units, pxp.Magnitude())["2"]
    factor = (model[3].weight / (model[3].running_var + model[3].eps).sqrt()).detach()
    for index in range(6):
        group, place = divmod(index, 6 // groups)
        own = model[2].weight.detach().unflatten(0, (groups, -1))[group, :, place] * factor[index]
        assert float(weights[index]) == pytest.approx(float(own.norm()), rel=1e-9)
    scores = pxp.attribute(model, (x[:4], labels[:4]), units, pxp.LRP("zplus"))
    expected = []
    for rate in (0, 0.2, 0.5):
        mask = scores.select(rate)
        zeroed = copy.deepcopy(model)
        with torch.no_grad():
            zeroed[0].weight[~mask["0"]], zeroed[0].bias[~mask["0"]] = 0, 0
            zeroed[3].weight[~mask["2"]], zeroed[3].bias[~mask["2"]] = 0, 0
            kept = mask["5"].view(groups, -1).repeat_interleave(6 // groups, 0)[..., None, None]
            zeroed[5].weight.mul_(kept)
            zeroed[5].bias[~mask["5"]] = 0
            with pxp.masked(model, mask):
                assert relative(model(x), zeroed(x)) < 1e-12
                expected.append(pxp.accuracy(model, (x, labels)))
    assert pxp.pruning_curve(model, scores, (x, labels), rates=(0, 0.2, 0.5), allow_shared=True).runs[0] == tuple(
        expected
    )
    assert len(set(expected)) > 1
    with pytest.raises(
        ValueError, match=r"'[25]' is a transposed convolution, of which compaction cannot take anything"
    ):
        pxp.compact(model, mask, example=x)
