"""The smaller network gives the masked network's logits, for every architecture and any mask."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from conftest import NETWORKS, drawn, network, randomise, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from small import Switched
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import MobileNetV2
from vits import GATED, MODELS, images_of, lively, two_blocks

import pxp
from pxp.compaction.channels import Affine, Constant, Expand, Join, Select
from pxp.compaction.follow import Compactor


def weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def difference(model: nn.Module, mask: pxp.Mask, small: nn.Module, x: Tensor) -> float:
    with pxp.masked(model, mask):
        expected = model(x)
    found = small(x)
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9))


def others(small: nn.Module, *kinds: type) -> int:
    return sum(isinstance(module, kinds) for module in small.modules())


SMALL = [name for name in NETWORKS if name not in ("resnet18", "resnet50")]


@pytest.mark.parametrize("rate", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("name", SMALL)
def test_small_networks(name, rate, untouched):
    model, x, _, units = network(name)
    untouched(model)
    for seed in range(3):
        mask = drawn(units, rate, seed)
        small = pxp.compact(model, mask, example=x)
        assert difference(model, mask, small, x) < 1e-10
        assert weights(small) < weights(model) or rate < 0.5
        assert {p.data_ptr() for p in small.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())


@pytest.mark.parametrize("rate", [0, 0.3, 0.8, 1])
@pytest.mark.parametrize("name", MODELS)
def test_transformers(name, rate, untouched):
    torch.manual_seed(0)
    model = untouched(lively(MODELS[name]()))
    x, _ = images_of(model, 3)
    units = pxp.find_components(model, "head" if name in GATED else ("head", "neuron", "mlp_output"))
    for seed in range(2):
        mask = drawn(units, rate, seed)
        assert difference(model, mask, pxp.compact(model, mask), x) < 1e-10
    small = pxp.compact(model, mask)
    assert weights(small) <= weights(model) + 200  # a key's bias that EvaAttention keeps as a buffer
    if rate == 1 and name not in GATED:
        assert not any("attn" in name or "mlp" in name for name, _ in small.named_modules())


def library_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(pxp.load_model(name))


LIBRARIES = {
    "torchvision/resnext50_32x4d": 0.75,  # only whole groups of a grouped convolution can go
    "torchvision/resnet50": 0.55,
    "torchvision/mobilenet_v2": 0.5,
    "torchvision/efficientnet_b0": 0.6,
    "torchvision/mobilenet_v3_small": 0.8,
    "torchvision/densenet121": 0.5,
    "torchvision/shufflenet_v2_x1_0": 0.6,
    "torchvision/squeezenet1_1": 0.5,
    "torchvision/vgg11_bn": 0.999,  # nearly all of its weights are in the classifier
    "timm/resnet18": 0.55,
    "timm/test_efficientnet": 0.65,
    "timm/resnetv2_50": 0.55,
}


BIG = {"torchvision/vgg11_bn", "torchvision/densenet121", "timm/resnetv2_50"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.weekly] * (name in BIG)) for name in LIBRARIES])
def test_libraries_networks(name):
    model = library_model(name)
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    units = pxp.find_components(model, "filter", example=x)
    for rate in (0.4, 1):
        mask = drawn(units, rate)
        small = pxp.compact(model, mask, example=x)
        assert difference(model, mask, small, x) < 1e-10
        if rate < 1:
            assert weights(small) < LIBRARIES[name] * weights(model)


@pytest.mark.parametrize(
    ("name", "kinds"), [("vgg", ("filter", "neuron")), ("resnet", "filter"), ("vit", ("head", "neuron"))]
)
def test_shipped_networks(name, kinds, data, untouched):
    model = untouched(pxp.load_model(name))
    units = pxp.find_components(model, kinds)
    scores = pxp.attribute(model, pxp.reference_samples(data.reference, 1), units, pxp.LRP())
    images = data.eval.images[:200]
    for rate in (0.1, 0.5, 0.9):
        mask = scores.select(rate)
        small = pxp.compact(model, mask)
        assert difference(model, mask, small, images) < 1e-5
        with pxp.masked(model, mask):
            assert pxp.accuracy(model, data.eval) == pxp.accuracy(small, data.eval)


def mobilenet() -> nn.Module:
    """Depthwise convolutions between expansions and residual sums."""
    torch.manual_seed(0)
    setting = [[1, 16, 1, 1], [3, 24, 2, 2], [3, 32, 2, 1]]
    return randomise(MobileNetV2(5, width_mult=0.25, inverted_residual_setting=setting))


def drawable() -> dict[str, tuple[nn.Module, Tensor, pxp.Components]]:
    found = {}
    for name in ("vgg16_bn", "bottleneck", "grouped", "resnet"):
        model, x, _, units = network(name)
        found[name] = model, x, units
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=generator)
    found["mobilenet"] = mobilenet(), x, pxp.find_components(mobilenet(), example=x)
    model = two_blocks()
    found["transformer"] = model, x[..., :12, :12], pxp.find_components(model, ("head", "neuron", "mlp_output"))
    return found


MASKS = drawable()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(MASKS)), st.data())
def test_any_mask(name, draw):
    model, x, units = MASKS[name]
    kept = {}
    for layer, each in units.items():
        how = draw.draw(st.sampled_from(["all", "none", "one", "some"]))
        bools = {"all": [True] * each.size, "none": [False] * each.size}.get(how)
        if how == "one":
            bools = [i == 3 % each.size for i in range(each.size)]
        kept[layer] = torch.tensor(bools or draw.draw(st.lists(st.booleans(), min_size=each.size, max_size=each.size)))
    mask = pxp.Mask(units, kept)
    assert difference(model, mask, pxp.compact(model, mask, example=x), x) < 1e-10


def test_layers_have_the_kept_sizes():
    model, _, _, units = network("vgg")
    mask = drawn(units, 0.5)
    small = pxp.compact(model, mask)
    sizes = [int(kept.sum()) for kept in mask.values()]
    convolutions = [m for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == sizes
    assert [m.in_channels for m in convolutions] == [1, *sizes[:-1]]
    assert small.get_submodule("classifier.0").in_features == sizes[-1]
    assert others(small, Expand, Select, Join, Constant) == 0


def test_a_branch_of_which_nothing_is_kept_is_gone():
    model, x, _, units = network("resnet")
    kept = {name: torch.ones(layer.size, dtype=torch.bool) for name, layer in units.items()}
    kept["layer2.1.conv2"][:] = False
    small = pxp.compact(model, pxp.Mask(units, kept))
    assert not [name for name, _ in small.named_modules() if name.startswith("layer2.1.conv")]
    kept["layer2.1.conv2"][:] = True
    kept["layer2.1.conv1"][:] = False  # the second convolution is then a constant: its bias
    mask = pxp.Mask(units, kept)
    small = pxp.compact(model, mask)
    assert not [name for name, m in small.named_modules() if name.startswith("layer2.1.conv")]
    assert difference(model, mask, small, x) < 1e-10


def test_a_residual_branch_computes_only_what_it_keeps():
    model, _, _, units = network("resnet")
    mask = drawn(units, 0.5)
    small = pxp.compact(model, mask)
    for name, kept in mask.items():
        assert small.get_submodule(name).out_channels == int(kept.sum())
    assert others(small, Expand) == 0 and others(small, Join) == 8  # eight blocks


def test_depthwise_convolutions_lose_their_channels():
    model = library_model("torchvision/mobilenet_v2")
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    units = pxp.find_components(model, "filter", example=x)
    expand, depthwise = "features.3.conv.0.0", "features.3.conv.1.0"
    kept = {name: torch.ones(layer.size, dtype=torch.bool) for name, layer in units.items()}
    kept[expand][::2] = False
    mask = pxp.Mask(units, kept)
    small = pxp.compact(model, mask, example=x)
    made = small.get_submodule(depthwise)
    assert made.groups == made.out_channels == units[expand].size // 2
    assert difference(model, mask, small, x) < 1e-10


def test_heads_are_gone():
    model = pxp.load_model("vit")
    units = pxp.find_components(model, "head")
    mask = drawn(units, 0.5)
    small = pxp.compact(model, mask)
    for name, kept in mask.items():
        attention = small.get_submodule(name)
        assert attention.num_heads == int(kept.sum()) and attention.out_proj.in_features == 8 * int(kept.sum())
        assert attention.q_proj.out_features == 8 * int(kept.sum())


class Raw(nn.Module):
    """A convolution whose raw output is read twice, and a BatchNorm that cannot be merged."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.c, self.fc = nn.Conv2d(12, 5, 1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        raw = self.a(x)
        y = self.b(F.relu(self.norm(raw))) + raw
        return self.fc(torch.sigmoid(self.c(torch.cat([y, raw], 1))).mean((2, 3)))


class Shared(nn.Module):
    """One convolution that runs twice, on inputs with different live channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.twice(F.gelu(self.twice(torch.relu(self.stem(x))))).amax((2, 3)))


class Gated(nn.Module):
    """A gate whose pruned channels are not 0 but σ(0), an average with a border, and a maximum over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1)
        self.pool, self.last, self.fc = nn.AvgPool2d(3, 2, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.pool(torch.sigmoid(self.gate(x)))
        x = self.last(x) * torch.sigmoid(x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("make", [Raw, Shared, Switched, Gated])
@pytest.mark.parametrize("rate", [0.3, 0.7, 1])
def test_hard_structures(make, rate):
    torch.manual_seed(0)
    model = randomise(make())
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    units = pxp.find_components(model, "filter", example=x)
    for seed in range(4):
        mask = drawn(units, rate, seed)
        assert difference(model, mask, pxp.compact(model, mask, example=x), x) < 1e-10


class TokensFirst(nn.Module):
    """(tokens, images, channels), as PyTorch's attention has it by default; images folded into the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.attention = nn.Conv2d(3, 6, 3, 3), nn.MultiheadAttention(6, 2)
        self.norm, self.up, self.act, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)
        self.last, self.fc = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).permute(2, 0, 1)
        y = self.norm(self.attention(y, y, y, need_weights=False)[0])
        tokens, images = y.shape[:2]
        y = self.norm(self.down(self.act(self.up(y))))
        y = self.norm(self.last(self.act(y.flatten(0, 1)))).view(tokens, images, -1)
        return self.fc(y.mean(0))


class Video(nn.Module):
    """The frames of all films are one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.GroupNorm(2, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        films, frames = x.shape[:2]
        y = self.norm(self.b(F.relu(self.a(x.flatten(0, 1))))).mean((2, 3))
        return self.fc(y.view(films, frames, -1).mean(1))


class One(nn.Module):
    """Takes one image at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.Conv2d(6, 6, 3)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.b(F.relu(self.a(x)))).view(6, -1).mean(1)[None])


class Squeezed(nn.Module):
    """Drops every dimension of size one, also that of a single image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.act(self.b(self.a(x).mean((2, 3), keepdim=True).squeeze()))))


class Cropped(nn.Module):
    """Sizes of one tensor in the slices of others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.place, self.up, self.act, self.down = (
            nn.Parameter(torch.randn(1, 30, 6)),
            nn.Linear(6, 8),
            nn.GELU(),
            nn.Linear(8, 6),
        )
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        z = F.relu(self.b(y))
        height = z.shape[2]
        y = (y[:, :, :height, :height] + z).flatten(2).transpose(1, 2)
        y = y + self.place[:, : y.size(1)]
        return self.fc((y + self.down(self.act(self.up(y)))).mean(1))


class ReadsWeights(nn.Module):
    """Types and weights of layers that are cut, read before and after the layers run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.up, self.act = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 8), nn.ReLU()
        self.bias, self.fc = nn.Parameter(torch.randn(6)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.relu(self.a(x.to(self.a.weight.dtype)))).mean((2, 3)).to(self.b.weight.device)
        return self.fc(F.linear(self.act(self.up(x)), self.up.weight.t(), self.bias))


class InPlace(nn.Module):
    """Tensors that are changed in place and read under their first name; operators, methods and functions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 6, 3, padding=1) for i in (3, 6, 6))
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        first = y
        y += 1.0
        y += self.b(F.relu(first))
        torch.relu_(y)
        z = self.c(first)
        again = z
        z.add_(1.0).mul_(first)
        F.relu(again, inplace=True)
        F.hardtanh(z, -1.0, 5.0, True)
        size = side = z.shape[2]
        size += 1
        z *= size - side
        return self.fc((z + first).mean((2, 3)))


class Divided(nn.Module):
    """An average that is none: constants change."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Linear(6, 4)
        self.pool = nn.AvgPool2d(2, divisor_override=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.pool(torch.sigmoid(self.a(x)))).mean((2, 3)))


class NormTwice(nn.Module):
    """One BatchNorm behind a convolution, and behind what is no channel by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        raw = self.a(x)
        x = self.b(F.relu(self.norm(raw)) + raw)
        return self.fc(self.norm(x.flip(1)).mean((2, 3)))


ODD = {
    "tokens first": (TokensFirst, (3, 9, 9), ("head", "neuron")),
    "video": (Video, (2, 3, 9, 9), "filter"),
    "one image": (One, (3, 9, 9), "filter"),
    "squeezed": (Squeezed, (3, 9, 9), ("filter", "neuron")),
    "sizes in slices": (Cropped, (3, 7, 7), ("filter", "neuron")),
    "weights read": (ReadsWeights, (3, 9, 9), ("filter", "neuron")),
    "in place": (InPlace, (3, 9, 9), "filter"),
    "divisor": (Divided, (3, 9, 9), "filter"),
    "norm twice": (NormTwice, (3, 9, 9), "filter"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_structures(name, untouched):
    make, shape, kinds = ODD[name]
    torch.manual_seed(0)
    model = untouched(randomise(make()))
    x = torch.randn(1 if name == "one image" else 4, *shape, dtype=torch.float64)
    units = pxp.find_components(model, kinds, example=x)
    for rate in (0, 0.4, 0.8, 1):
        for seed in range(3):
            mask = drawn(units, rate, seed)
            assert difference(model, mask, pxp.compact(model, mask, example=x), x) < 1e-10


def test_layers_whose_weights_are_read_are_cut():
    torch.manual_seed(0)
    model, x = randomise(ReadsWeights()), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    mask = drawn(pxp.find_components(model, ("filter", "neuron"), example=x), 0.5)
    small = pxp.compact(model, mask, example=x)
    assert small.get_submodule("a").out_channels == int(mask["a"].sum()) < 6
    assert small.get_submodule("up").out_features == int(mask["up"].sum()) < 8
    assert {name: value.shape for name, value in small.named_parameters() if "_weight" in name} == {"up_weight": (8, 6)}
    assert small.half()(x.half()).dtype == torch.float16  # the type that is asked for is that of the smaller network


class Outputs(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.fc, self.how = nn.Conv2d(3, 6, 3), nn.Linear(6, 4), how

    def forward(self, x: Tensor):
        x = F.relu(self.a(x))
        logits = self.fc(x.mean((2, 3)))
        return {"logits": logits, "features": [x]} if self.how == "dict" else (logits, x)


@pytest.mark.parametrize("how", ["tuple", "dict"])
def test_several_outputs(how, monkeypatch):
    torch.manual_seed(0)
    model, x = randomise(Outputs(how)), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    mask = drawn(pxp.find_components(model, example=x), 0.5)
    small = pxp.compact(model, mask, example=x)
    with pxp.masked(model, mask), torch.no_grad():
        torch.testing.assert_close(small(x), model(x))
    run = Compactor.run

    def misread(compactor):
        parts, graph = run(compactor)
        parts["expand"].rest[:] = 1  # the second output only
        return parts, graph

    monkeypatch.setattr(Compactor, "run", misread)
    with pytest.raises(ValueError, match="has a structure that compaction does not understand"):
        pxp.compact(model, mask, example=x)


@pytest.mark.parametrize(
    ("name", "kinds"), [("vgg", ("filter", "neuron")), ("resnet", "filter"), ("vit", ("head", "neuron"))]
)
def test_twice(name, kinds, data):
    """As small as at once, and equal."""
    model, x = pxp.load_model(name), data.eval.images[:20]
    units = pxp.find_components(model, kinds)
    first, second = drawn(units, 0.3, 1), drawn(units, 0.3, 2)
    small = pxp.compact(model, first)
    left = pxp.find_components(small, kinds)
    mask = pxp.Mask(left, {name: kept[first[name]] for name, kept in second.items()})
    smaller = pxp.compact(small, mask)
    at_once = pxp.compact(model, pxp.Mask(units, {name: first[name] & second[name] for name in units}))
    with torch.no_grad():
        assert relative(smaller(x), at_once(x)) < 1e-5
    assert weights(smaller) == weights(at_once)
    assert others(smaller, Expand, Select, Join) == others(at_once, Expand, Select, Join)
    scores = pxp.attribute(small, pxp.reference_samples(data.reference, 1), left, pxp.LRP())
    mask = scores.select(0.3)
    assert difference(small, mask, pxp.compact(small, mask), x) < 1e-5


@pytest.mark.parametrize("name", ["Raw", "Gated", "grouped", "resnet"])
def test_twice_with_what_lies_between_the_layers(name):
    if name in NETWORKS:
        model, x, _, _ = network(name)
    else:
        model, x = randomise({"Raw": Raw, "Gated": Gated}[name]()), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    used = set()
    for seed in range(4):
        small = pxp.compact(model, drawn(pxp.find_components(model, example=x), 0.2, seed), example=x)
        mask = drawn(pxp.find_components(small, example=x), 0.2, seed)
        used |= {type(module) for module in small.modules()}
        assert difference(small, mask, pxp.compact(small, mask, example=x), x) < 1e-10
    assert used & {Affine, Constant, Expand, Join, Select}


def test_hooks_are_not_lost_silently():
    model, _, _, units = network("vgg")
    with pxp.masked(model, drawn(units, 0.3, 1)), pytest.raises(ValueError, match="'features.1' carries forward hooks"):
        pxp.compact(model, drawn(units, 0.3, 2))


def test_it_trains():
    model, x, labels, units = network("resnet")
    small = pxp.compact(model, drawn(units, 0.5)).train()
    assert all(p.requires_grad and p.is_leaf for p in small.parameters())
    before = F.cross_entropy(small(x), labels)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(small(x), labels).backward()
        optimizer.step()
    assert F.cross_entropy(small(x), labels) < before
    assert torch.equal(copy.deepcopy(small)(x), small(x))


@pytest.mark.parametrize("name", ["vgg", "resnet", "vit"])
def test_it_exports(name):
    model = pxp.load_model(name)
    small = pxp.compact(model, drawn(pxp.find_components(model, "head" if name == "vit" else "filter"), 0.5))
    x = torch.rand(3, 1, 28, 28)
    exported = torch.export.export(small, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    with torch.no_grad():
        assert relative(exported.module()(x), small(x)) < 1e-5
        more = torch.rand(5, 1, 28, 28)
        assert relative(exported.module()(more), small(more)) < 1e-5


def test_it_compiles():
    model = pxp.load_model("resnet")
    small = pxp.compact(model, drawn(pxp.find_components(model), 0.5))
    x = torch.rand(2, 1, 28, 28)
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert relative(compiled(x), small(x)) < 1e-5


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_files(name, tmp_path):
    model = pxp.load_model(name)
    units = pxp.find_components(model, ("head", "neuron") if name == "vit" else "filter")
    small = pxp.compact(model, drawn(units, 0.6))
    with torch.no_grad():
        next(small.parameters()).mul_(1.5)  # as if it had been trained
    pxp.save_compact(small, tmp_path / "small.safetensors")
    loaded = pxp.load_compact(tmp_path / "small.safetensors")
    x = torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(loaded(x), small(x))
    assert not loaded.training
    pxp.save_compact(loaded, tmp_path / "again.safetensors")


def test_files_of_ones_own_network(tmp_path):
    model, x, _, units = network("grouped")
    small = pxp.compact(model, drawn(units, 0.2), example=x)
    path = tmp_path / "small.safetensors"
    pxp.save_compact(small, path)
    with pytest.raises(ValueError, match="pass model=<one like it>"):
        pxp.load_compact(path)
    another = NETWORKS["grouped"][0]()
    with torch.no_grad():
        assert torch.equal(pxp.load_compact(path, another)(x), small(x))
    with pytest.raises(ValueError, match="of another model"):
        pxp.load_compact(path, pxp.load_model("vgg"))
    with pytest.raises(ValueError, match=r"only what pxp\.compact made can be written"):
        pxp.save_compact(model, path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="no compact file written by pxp, or it is damaged"):
        pxp.load_compact(path)


def test_the_model_that_is_passed_is_left_as_it_is(tmp_path, untouched):
    model, _, _, units = network("resnet")
    pxp.save_compact(pxp.compact(model, drawn(units, 0.4)), tmp_path / "small.safetensors")
    another = untouched(pxp.load_model("resnet"))
    loaded = pxp.load_compact(tmp_path / "small.safetensors", another)
    assert next(loaded.parameters()).dtype == torch.float64 and next(another.parameters()).dtype == torch.float32


def indices(state: dict[str, Tensor], change) -> dict[str, Tensor]:
    return {
        name: change(value) if value.dtype == torch.int64 and value.ndim else value for name, value in state.items()
    }


HARM = {
    "a string": lambda extra, state: extra.update(example="abc"),
    "no example": lambda extra, state: extra.update(example=None),
    "negative": lambda extra, state: extra.update(example=[1, -1, 28, 28]),
    "another": lambda extra, state: extra.update(example=[1, 3, 28, 28]),
    "huge": lambda extra, state: extra.update(example=[1, 1, 10**9, 10**9]),
    "name": lambda extra, state: extra.update(model="none such"),
    "no name": lambda extra, state: extra.update(model=5),
    "list": lambda extra, state: extra.update(model=["resnet"]),
    "another network": lambda extra, state: extra.update(model="vgg"),
    "out of range": lambda extra, state: state.update(indices(state, lambda index: index + 1000)),
    "other places": lambda extra, state: state.update(indices(state, lambda index: index.flip(0))),
    "integers": lambda extra, state: state.update({name: value.long() for name, value in state.items()}),
    "one other type": lambda extra, state: state.update({"fc.weight": state["fc.weight"].double()}),
    "a missing weight": lambda extra, state: state.pop("fc.weight"),
    "one too many": lambda extra, state: state.update(more=torch.zeros(2)),
}


@pytest.mark.parametrize("how", HARM)
def test_harmed_files(how, tmp_path):
    path = tmp_path / "small.safetensors"
    model = pxp.load_model("resnet")
    pxp.save_compact(pxp.compact(model, drawn(pxp.find_components(model), 0.4)), path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["pxp"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    state = {name.removeprefix("state/"): value for name, value in tensors.items() if name.startswith("state/")}
    HARM[how](header["extra"], state)
    tensors = {name: value for name, value in tensors.items() if not name.startswith("state/")}
    save_file(tensors | {f"state/{name}": value for name, value in state.items()}, path, {"pxp": json.dumps(header)})
    with pytest.raises(ValueError, match=r"small\.safetensors does not fit this network"):
        pxp.load_compact(path)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.fc(x.mean((2, 3)) if x.sum() > -1e9 else x.amax((2, 3)))


def test_errors(untouched):
    torch.manual_seed(0)
    model = untouched(Untraceable().eval())
    x = torch.rand(1, 1, 8, 8)
    units = pxp.find_components(model, "filter", example=x)
    with pytest.raises(ValueError, match="Untraceable cannot be traced"):
        pxp.compact(model, drawn(units, 0.5), example=x)
    with pytest.raises(TypeError, match=r"mask must be a pxp\.Mask"):
        pxp.compact(model, {"conv": torch.ones(4)})
    with pytest.raises(ValueError, match="of another model"):
        pxp.compact(pxp.load_model("vgg"), drawn(units, 0.5))


class UsesWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.attention = nn.Conv2d(3, 8, 3, 3), nn.MultiheadAttention(8, 4, batch_first=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        z, weights = self.attention(y, y, y)
        return self.fc(z.mean(1)) + weights[:, :, 0].sum(1, keepdim=True)


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))
        y[:, :2].zero_()
        return self.fc(y)


def test_operations_that_cannot_be_cut_are_named():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    model = randomise(UsesWeights())
    for rate in (0.5, 1):
        mask = drawn(pxp.find_components(model, "head", example=x), rate)
        with pytest.raises(ValueError, match="single heads of 'attention' cannot be taken out: its attention weights"):
            pxp.compact(model, mask, example=x)
    mask = drawn(pxp.find_components(model, "filter", example=x), 0.5)
    assert difference(model, mask, pxp.compact(model, mask, example=x), x) < 1e-10
    model = randomise(Writes())
    with pytest.raises(ValueError, match=r"cannot be made smaller: 'zero_' \(zero_\) changes a tensor in place"):
        pxp.compact(model, drawn(pxp.find_components(model, example=x), 0.5), example=x)


def test_heads_that_cannot_be_taken_out_are_named():
    torch.manual_seed(0)
    model = lively(
        timm.create_model("vit_tiny_patch16_224", embed_dim=24, num_heads=3, depth=1, img_size=32, num_classes=4)
    )
    attention = model.blocks[0].attn
    attention.norm = nn.LayerNorm(24).double()
    units = pxp.find_components(model, "head")
    kept = {name: torch.tensor([True, False, True]) for name in units}
    with pytest.raises(ValueError, match=r"single heads of 'blocks\.0\.attn' cannot be taken out: it normalises"):
        pxp.compact(model, pxp.Mask(units, kept))


def test_layers_inside_an_untraced_module_are_named():
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, 3), nn.Flatten(2), nn.TransformerEncoderLayer(9, 3, 16, batch_first=True), nn.Flatten(),
        nn.Linear(72, 4),
    ).eval()  # fmt: skip
    x = torch.rand(2, 1, 9, 9)
    heads = drawn(pxp.find_components(model, "head", example=x), 0.5)
    why = r"'2\.self_attn' lies inside '2' \(TransformerEncoderLayer\), which is traced as one operation"
    with pytest.raises(ValueError, match=why):
        pxp.compact(model, heads, example=x)
    filters = drawn(pxp.find_components(model, "filter", example=x), 0.5)
    assert difference(model, filters, pxp.compact(model, filters, example=x), x) < 1e-6


@pytest.mark.parametrize("harm", [lambda weight: weight.mul_(1.01), lambda weight: weight.fill_(torch.nan)])
def test_a_misread_structure_is_noticed(harm, monkeypatch):
    model, x, _, units = network("vgg")
    run = Compactor.run

    def misread(compactor):
        parts, graph = run(compactor)
        with torch.no_grad():
            harm(next(part for part in parts.values() if isinstance(part, nn.Conv2d)).weight)
        return parts, graph

    monkeypatch.setattr(Compactor, "run", misread)
    with pytest.raises(ValueError, match="has a structure that compaction does not understand"):
        pxp.compact(model, drawn(units, 0.3), example=x)


def test_flattening_behind_tokens():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)).eval()
    x = torch.rand(2, 3, 4)
    mask = drawn(pxp.find_components(model, "neuron", example=x), 0.5)
    assert difference(model, mask, pxp.compact(model, mask, example=x), x) < 1e-6


def test_in_inference_mode():
    model, x, _, units = network("resnet")
    mask = drawn(units, 0.5)
    with torch.inference_mode():
        small = pxp.compact(model, mask, example=x)
    assert difference(model, mask, small, x) < 1e-10 and next(small.parameters()).requires_grad


def test_a_transformer_of_dynamic_size():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5, dynamic_img_size=True).eval()
    units = pxp.find_components(model, ("head", "neuron"), example=torch.rand(1, 3, 32, 32))
    mask = drawn(units, 0.5)
    small = pxp.compact(model, mask, example=torch.rand(1, 3, 32, 32))
    for side in (32, 64):
        assert difference(model, mask, small, torch.rand(2, 3, side, side)) < 1e-5
