"""Parts, aliases, dropout, sizes and padding: what networks do between their layers."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import timm
import torch
import torchvision
from conftest import drawn, randomise, relative
from test_compact import difference, others
from timm.layers import CondConv2d, Conv2dSame, DropPath, LayerNorm2d, StdConv2d, drop_path
from timm.layers.conv2d_same import Conv2dSameExport
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer
from torchvision.ops import StochasticDepth, stochastic_depth
from vits import lively

import pxp
from pxp.compaction.channels import Expand, Select, Switch

X = torch.randn(3, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def half(units: pxp.Components, *layers: str) -> pxp.Mask:
    """Every second component of some layers, all of the others."""
    return pxp.Mask(
        units, {name: torch.arange(each.size) % 2 == 0 if name in layers else torch.ones(each.size, dtype=torch.bool)
                for name, each in units.items()},
    )  # fmt: skip


def exact(model: nn.Module, kinds="filter", x: Tensor = X, rates=(0, 0.4, 0.8, 1), seeds: int = 2) -> None:
    units = pxp.find_components(model, kinds, example=x)
    for rate in rates:
        for seed in range(seeds):
            mask = drawn(units, rate, seed)
            assert difference(model, mask, pxp.compact(model, mask, example=x), x) < 1e-10


# --- parts ------------------------------------------------------------------------------------------------------------


def two(x: Tensor, how: str) -> list[Tensor]:
    """The first eight channels of sixteen and the others."""
    channels = x.shape[1]
    if how == "a list with more":
        parts = list(x.split(4, 1))
        return [torch.cat(parts[:2], 1), torch.cat([*parts[2:]], 1)]
    if how == "a loop":
        return [part * 1.0 for part in torch.tensor_split(x, [8], dim=1)]
    if how == "star":
        first, *rest = x.split([8, 4, 4], dim=1)
        assert len(rest) == 2
        return [first, torch.cat(rest, -3)]
    if how == "backwards":
        return list(reversed(list(reversed(torch.chunk(x, 2, dim=-3)))))
    if how == "slices":
        return [x[:, : channels // 2], x[:, channels // 2 :, ...]]
    if how == "every second":  # other channels, the same sizes
        return [x[:, ::2], x[:, 1::2, :, :]]
    if how == "narrow":
        return [x.narrow(1, 0, 8), torch.narrow(x, 1, 8, 8)]
    return [torch.stack(x.unbind(1)[:8], 1), torch.stack(torch.unbind(x, 1)[8:], 1)]


class Parts(nn.Module):
    """Parts of the channels, one of them read twice, one as a gate."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.norm = how, nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)
        self.b, self.c, self.d = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Conv2d(24, 6, 1)
        self.fc = nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        parts = two(F.silu(self.norm(self.a(x))), self.how)
        parts.append(self.b(parts[-1]))
        y = self.d(torch.cat(parts, 1)).mean((2, 3))
        return self.fc(torch.cat([y, self.c(parts[0] * torch.tanh(parts[1])).mean((2, 3))], 1))


PARTS = ["a list with more", "a loop", "star", "backwards", "slices", "every second", "narrow"]


@pytest.mark.parametrize("how", [*PARTS, "unbind"])
def test_parts_of_the_channels(how):
    model = randomise(Parts(how))
    exact(model)
    if how != "unbind":  # of which each is one channel
        mask = half(pxp.find_components(model, example=X))
        mask["a"][:] = False
        mask["a"][[0, 3, 4, 6, 7, 12, 15]] = True
        small = pxp.compact(model, mask, example=X)
        assert small.get_submodule("a").out_channels == 7
        assert small.get_submodule("b").in_channels == (3 if how == "every second" else 2)
        assert small.get_submodule("d").in_channels == 7 + 8
        assert small.get_submodule("c").in_channels < 4 and others(small, Expand) == 0


class Tokens(nn.Module):
    """Parts of what lies in the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b, self.c = nn.Linear(3, 8), nn.Tanh(), nn.Linear(5, 4), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.act(self.a(x.flatten(2).transpose(1, 2))).split((5, 3), -1)
        return (self.b(first) + self.c(torch.cat([first[..., 1:], second], 2)[:, :]))[:, ::2].mean(1)


def test_parts_of_tokens():
    model = randomise(Tokens())
    exact(model, "neuron")
    small = pxp.compact(model, half(pxp.find_components(model, "neuron", example=X), "a"), example=X)
    assert small.get_submodule("a").out_features == 4 and small.get_submodule("b").in_features == 3
    assert others(small, Expand, Select) == 0


class Crops(nn.Module):
    """Slices of the other dimensions, and padding of zeros to a size that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        z = self.b(y)[:, :, ::2, 1:]
        height, width = (large - little for large, little in zip(y.shape[-2:], z.shape[2:], strict=True))
        return self.fc(self.c(torch.cat([F.pad(z, (0, width, 0, height)), y], 1)).mean((2, 3)))


def test_crops():
    model = randomise(Crops())
    exact(model)
    model.b.bias.data.zero_()
    mask = half(pxp.find_components(model, example=X), "a", "b")
    small = pxp.compact(model, mask, example=X)
    assert small.get_submodule("c").in_channels == 8 and others(small, Expand) == 0
    x = torch.randn(2, 3, 12, 15, dtype=torch.float64)
    assert difference(model, mask, small, x) < 1e-10


# --- aliases ----------------------------------------------------------------------------------------------------------


class Drop(nn.Module):
    """A dropout of one's own: scaled noise, by a method of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(x)

    def noise(self, x: Tensor) -> Tensor:
        return x * (1 + torch.rand_like(x)) if self.training else x


class Alias(nn.Module):
    """A layer whose output is read under two names; one of the readers keeps few channels."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.dead = how, nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1, bias=False)
        self.same, self.drop = nn.Sequential(nn.Identity(), nn.Identity()), Drop()
        self.dw, self.fc = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(16, 4)

    def alias(self, y: Tensor, x: Tensor) -> Tensor:
        if self.how == "a chain":
            return self.same(torch.concat((y,), dim=1))
        if self.how == "its type":
            return y.to(y.dtype)
        if self.how == "one part":
            return y.chunk(1, 1)[0]
        if self.how == "all of it":
            return y[:, :, :]
        if self.how == "dropout":
            return self.drop(y)
        if self.how == "a sum with nothing":
            return self.dead(x) + y
        return torch.cat([y, self.dead(x)], 1)[:, :8] if self.how == "cat with nothing" else y.clone()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.fc(torch.cat([self.dw(self.alias(y, x)), y], 1).mean((2, 3)))


ALIASES = ["a chain", "its type", "one part", "all of it", "dropout", "a sum with nothing", "cat with nothing", "clone"]


@pytest.mark.parametrize("how", ALIASES)
def test_aliases(how):
    model = randomise(Alias(how))
    used = ("a", "dw", "dead") if "nothing" in how else ("a", "dw")
    units = pxp.find_components(model, example=X).only(*used)
    nothing = {name: torch.zeros(8, dtype=torch.bool) for name in used if name == "dead"}
    mask = pxp.Mask(units, {**half(units, "dw"), **nothing})
    assert difference(model, mask, pxp.compact(model, mask, example=X), X) < 1e-10
    exact(model)


class Late(nn.Module):
    """A layer's output that is read again after the reader which keeps few channels has run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.dw = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=8)
        self.b, self.fc = nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardtanh(torch.cat([self.a(x)], 1))
        z = self.b(y * self.gate(x)) + self.b(self.dw(y.contiguous())) + self.b(y)
        return self.fc(z.mean((2, 3)))


def test_read_again_later():
    exact(randomise(Late()), seeds=4)


# --- training ---------------------------------------------------------------------------------------------------------


class Dropouts(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.p, self.a, self.norm = how, 0.5, nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.module = {"own": Drop(), "depth": StochasticDepth(0.5, "row"), "path": DropPath(0.5),
                       "3d": nn.Dropout3d(), "alpha": nn.AlphaDropout()}.get(how, nn.Identity())  # fmt: skip
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True) if how == "attention" else None
        self.b, self.fc = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.module(F.relu(self.norm(self.a(x))))
        if self.how == "F.dropout2d in place":
            F.dropout2d(x, self.p, training=self.training, inplace=True)
        elif self.how == "F.alpha_dropout":
            x = F.alpha_dropout(x, self.p, self.training)
        elif self.how == "p":
            x = F.dropout(x, self.p if self.training else 0.0)
        elif self.how == "torch.dropout":
            x = torch.dropout(x, self.p, self.training)
        elif self.how == "stochastic_depth":
            x = stochastic_depth(x, self.p, "batch", training=self.training)
        elif self.how == "drop_path":
            x = drop_path(x, self.p, self.training)
        elif self.how in ("scaled_dot_product_attention", "attention"):
            y = x.flatten(2).transpose(1, 2)
            if self.attention is None:
                y = F.scaled_dot_product_attention(y, y, y, dropout_p=self.p if self.training else 0.0)
            else:
                y = self.attention(y, y, y, need_weights=False)[0]
            x = y.transpose(1, 2).unflatten(2, x.shape[2:])
        return self.fc(self.b(x).mean((2, 3)))


@pytest.mark.parametrize(
    "how",
    ["own", "depth", "path", "3d", "alpha", "F.dropout2d in place", "F.alpha_dropout", "p", "torch.dropout",
     "stochastic_depth", "drop_path", "scaled_dot_product_attention", "attention"],
)  # fmt: skip
def test_dropout_is_random_in_training_only(how, untouched):
    model = untouched(randomise(Dropouts(how)))
    kinds = ("filter", "head") if how == "attention" else "filter"
    exact(model, kinds, rates=(0.4,))
    small = pxp.compact(model, half(pxp.find_components(model, kinds, example=X), "a"), example=X)
    assert small.get_submodule("a").out_channels == 4
    expected = small(X)
    again = pxp.compact(small, half(pxp.find_components(small, example=X), "b"), example=X)
    for network in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small)), again):
        x = X.repeat(8, 1, 1, 1)
        network.train()
        assert any(not torch.equal(network(x), network(x)) for _ in range(20))  # a whole batch may be dropped
        network.eval()
        assert torch.equal(network(x), network(x))
    assert torch.equal(small(X), expected)


def test_dropout_that_never_ends_or_never_is_stays_so():
    class Fixed(Dropouts):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.5, training=False))

    model = randomise(Fixed("none"))
    small = pxp.compact(model, half(pxp.find_components(model, example=X), "a"), example=X).train()
    assert torch.equal(small(X), small(X)) and others(small, Switch) == 0


def test_noise_leaves_the_random_state_as_it_is():
    model = randomise(Dropouts("p"))
    mask = half(pxp.find_components(model, example=X), "a")
    state = torch.get_rng_state()
    pxp.compact(model, mask, example=X)
    assert torch.equal(torch.get_rng_state(), state)


# --- convolutions -----------------------------------------------------------------------------------------------------


class Around(nn.Conv2d):
    """Pads by itself, as far as the image needs it."""

    def forward(self, x: Tensor) -> Tensor:
        side = -x.shape[-1] % 4
        return F.conv2d(
            F.pad(x, (0, side, 0, side)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


class Padded(nn.Module):
    """Constants meet the border of strided, dilated, grouped and depthwise convolutions."""

    def __init__(self, kind: type[nn.Conv2d]) -> None:
        super().__init__()
        self.a, self.b = kind(3, 8, 3, stride=2), kind(8, 8, 3, stride=2, groups=8)
        self.c, self.d, self.fc = (
            kind(8, 8, 2, dilation=3, groups=2, bias=False),
            kind(8, 6, 1, stride=2),
            nn.Linear(6, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.c(torch.sigmoid(self.b(torch.sigmoid(self.a(x))))))
        return self.fc(torch.sigmoid(self.d(x)).mean((2, 3)))


@pytest.mark.parametrize("kind", [Conv2dSame, Conv2dSameExport, Around])
def test_convolutions_that_pad_by_the_size_of_the_image(kind):
    model = randomise(Padded(kind))
    exact(model)
    mask = half(pxp.find_components(model, example=X), "a", "d")
    small = pxp.compact(model, mask, example=X)
    assert small.get_submodule("a").out_channels == 4 and small.get_submodule("d").out_channels == 3
    if kind is not Conv2dSameExport:  # which remembers the first size
        assert difference(model, mask, small, torch.randn(2, 3, 18, 18, dtype=torch.float64)) < 1e-10


@pytest.mark.parametrize("name", ["tf_mobilenetv3_small_minimal_100", "tf_efficientnet_lite0", "mixnet_s"])
def test_networks_with_the_padding_of_tensorflow(name):
    torch.manual_seed(0)
    model, x = randomise(timm.create_model(name)), torch.rand(2, 3, 64, 64, dtype=torch.float64)
    mask = drawn(pxp.find_components(model, example=x), 0.4)
    small = pxp.compact(model, mask, example=x)
    assert difference(model, mask, small, x) < 1e-10
    assert difference(model, mask, small, torch.rand(2, 3, 75, 90, dtype=torch.float64)) < 1e-10


class Mine(nn.Conv2d):
    """Nothing but a name."""


def test_subclasses_of_layers():
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / self.weight.abs().sum()

    model = randomise(nn.Sequential(Mine(3, 6, 3), nn.ReLU(), Mine(6, 6, 3), nn.Flatten(), nn.Linear(150, 4)))
    exact(model)
    # a weight that is computed from another has been made plain in the replica
    exact(randomise(nn.Sequential(Mine(3, 6, 3), nn.ReLU(), StdConv2d(6, 6, 3), nn.Flatten(), nn.Linear(294, 4))))
    model = randomise(nn.Sequential(Mine(3, 6, 3), nn.ReLU(), Scaled(6, 6, 3), nn.Flatten(), nn.Linear(150, 4)))
    units = pxp.find_components(model, example=X)
    mask = half(units, "0")  # what it reads may be cut
    assert difference(model, mask, pxp.compact(model, mask, example=X), X) < 1e-10
    with pytest.raises(ValueError, match=r"'2' \(Scaled\) computes with more than its weight"):
        pxp.compact(model, half(units, "2"), example=X)


class Mixture(nn.Module):
    """Convolutions whose weights depend on the image."""

    def __init__(self, padding: str) -> None:
        super().__init__()
        self.a, self.route, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8, 3), CondConv2d(8, 6, 3, 2, padding, num_experts=3)
        self.c, self.fc = nn.Conv2d(6, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        routes = torch.sigmoid(self.route(x.mean((2, 3))))
        return self.fc(self.c(self.b(x, routes)).mean((2, 3)))


@pytest.mark.parametrize("padding", ["", "same"])
def test_mixtures_of_experts_stay_whole(padding):
    exact(randomise(Mixture(padding)))


# --- sizes ------------------------------------------------------------------------------------------------------------


class Sizes(nn.Module):
    """What Python computes with sizes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b, self.fc = how, nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        if x.ndim != 4 or x.size(1) != 3 or not len(x.shape) == x.dim():
            raise ValueError("no images")
        x = x if more is None else x + more
        y = F.relu(self.a(x))
        images, channels, height, width = y.shape
        if self.how == "if":
            y = F.pad(y, (0, 1)) if width % 2 else y
        elif self.how == "range":
            y = sum(y[:, :, row : row + 1] for row in range(height // 2))
        elif self.how == "float":
            y = y * (height**-0.5) + math.sqrt(width) * float(channels)
        elif self.how == "ceil":
            y = F.interpolate(y, (math.ceil(height / 2), int(width * 0.7)))
        elif self.how == "assert":
            assert height == width and channels == 8, "no square"
        elif self.how == "view":
            y = y.view(images, channels, height * width).reshape(y.shape)
            y = y.flatten(2).unflatten(2, y.shape[-2:]).view(y.size()).expand(y.shape) / y.shape.numel() * len(x)
        return self.fc(self.b(y).mean((2, 3)))


@pytest.mark.parametrize("how", ["if", "range", "float", "ceil", "assert"])
def test_conditions_on_sizes(how):
    model = randomise(Sizes(how))
    exact(model)
    mask = half(pxp.find_components(model, example=X), "a")
    small = pxp.compact(model, mask, example=X)
    assert small.get_submodule("a").out_channels == 4
    assert difference(model, mask, small, X[:1].repeat(7, 1, 1, 1)) < 1e-10
    wide = torch.rand(2, 3, 16, 10, dtype=torch.float64)
    if how == "float":  # no number is needed before the network runs
        assert difference(model, mask, small, wide) < 1e-10
    else:
        with pytest.raises(AssertionError, match="another size than the one that the network was compacted for"):
            small(wide)
    exported = torch.export.export(small, (X,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
    with torch.no_grad():
        assert relative(exported.module()(X[:2]), small(X[:2])) < 1e-10


def test_the_number_of_images_must_not_decide():
    model = randomise(Sizes("view"))  # divides by a number of values, which is no decision, but asks for len(x)
    units = pxp.find_components(model, example=X)
    with pytest.raises(ValueError, match=r"what runs depends on the number of images \(at .*test_structures\.py:\d+\)"):
        pxp.compact(model, half(units, "a"), example=X)


def test_asking_for_sizes_does_not_keep_channels():
    class Asks(Sizes):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            images, channels, height, _ = y.size()
            gate = torch.sigmoid(y.mean((2, 3), keepdim=True))
            return self.fc(self.b(y * gate).flatten(2).mean(2) * (channels / height) + images - y.size(0))

    model = randomise(Asks("none"))
    exact(model)
    small = pxp.compact(model, half(pxp.find_components(model, example=X), "a"), example=X)
    assert small.get_submodule("b").in_channels == 4 and others(small, Expand, Select) == 0


# --- explained again --------------------------------------------------------------------------------------------------


def torchvision_vit() -> nn.Module:
    return VisionTransformer(24, 8, 3, 4, 16, 24, num_classes=5)


def timm_vit(name: str = "vit_tiny_patch16_224", **options) -> nn.Module:
    return timm.create_model(
        name, img_size=24, patch_size=8, embed_dim=32, num_heads=4, depth=3, num_classes=5, **options
    )


class ChannelsFirst(nn.Module):
    """A normalisation that is a subclass, between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.act = nn.Conv2d(3, 8, 3), LayerNorm2d(8), nn.Conv2d(8, 6, 1), nn.GELU()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.b(self.norm(self.a(x)))).mean((2, 3)))


AGAIN = {
    "torchvision": (torchvision_vit, ("head", "neuron", "mlp_output")),
    "timm": (timm_vit, ("head", "neuron", "mlp_output")),
    "layer scale": (lambda: timm_vit("deit3_small_patch16_224"), ("head", "neuron", "mlp_output")),
    "gated, rotated": (lambda: timm_vit("eva02_tiny_patch14_224"), "head"),
    "registers, gated": (lambda: timm_vit("vit_giant_patch14_reg4_dinov2", mlp_ratio=2), "head"),
    "channels first": (ChannelsFirst, "filter"),
}


@pytest.mark.parametrize("name", AGAIN)
def test_a_compacted_network_is_explained_as_the_masked_one(name):
    torch.manual_seed(0)
    make, kinds = AGAIN[name]
    model = lively(make())
    x, labels = torch.rand(3, 3, 24, 24, dtype=torch.float64), torch.tensor([0, 1, 2])
    units = pxp.find_components(model, kinds, example=x)
    kept = dict(drawn(units, 0.4))
    for lost, layer in enumerate(layer for layer in units.values() if layer.kind == "head"):
        kept[layer.name] = torch.arange(layer.size) >= lost  # a head fewer in every layer
    mask = pxp.Mask(units, kept)
    small = pxp.compact(model, mask, example=x)
    assert difference(model, mask, small, x) < 1e-10
    left = pxp.find_components(small, kinds, example=x)
    assert {name: layer.size for name, layer in left.items()} == {n: int(k.sum()) for n, k in kept.items() if k.any()}
    for rule in ("epsilon", "zplus", "gamma"):
        with pxp.masked(model, mask):
            expected = pxp.attribute(model, (x, labels), units, pxp.LRP(rule), progress=False)
            heat = pxp.heatmap(model, x, labels, pxp.LRP(rule))
        found = pxp.attribute(small, (x, labels), left, pxp.LRP(rule), progress=False)
        assert relative(pxp.heatmap(small, x, labels, pxp.LRP(rule)), heat) < 1e-9
        for layer in left:
            assert relative(found[layer], expected[layer][kept[layer]]) < 1e-9
    again = found.select(0.3)
    assert difference(small, again, pxp.compact(small, again, example=x), x) < 1e-10


# --- errors -----------------------------------------------------------------------------------------------------------


class Deciding(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv = how, nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.how == "loop":
            return torch.stack([image.mean((1, 2)) for image in x])
        if self.how == "item":
            return x * int(x.max().item())
        if self.how == "assignment":
            x[:, 0] = 0
        return x if self.how != "values" or x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("values", "what runs depends on the values of a tensor"),
        ("item", "what runs depends on the values of a tensor"),
        ("loop", "what runs depends on the number of images"),
        ("assignment", r"a part of a tensor is assigned \(x\[\.\.\.\] = y\)"),
    ],
)
def test_what_cannot_be_traced_is_named(how, why):
    model = randomise(nn.Sequential(nn.Sequential(Deciding(how)), nn.Flatten()))
    line = Deciding.forward.__code__.co_firstlineno
    units = pxp.find_components(model, example=X)
    with pytest.raises(
        ValueError, match=f"Sequential cannot be traced.*{why}.*in module '0.0'.*structures.py:"
    ) as caught:
        pxp.compact(model, half(units, "0.0.conv"), example=X)
    assert line < int(str(caught.value).rpartition(":")[2].strip(")")) <= line + 8


class Outside(nn.Module):
    """Gives what follows from the image to what takes numbers or tensors only."""

    def __init__(self, how) -> None:
        super().__init__()
        self.conv, self.how = nn.Conv2d(3, 4, 3), how

    def forward(self, x):
        return self.how(self.conv(x)).mean((2, 3))


@pytest.mark.parametrize(
    "how",
    [
        lambda x: x + torch.zeros(x.shape[0], 1, 1, 1),
        torchvision.transforms.Normalize([0.5] * 4, [0.5] * 4),
        lambda x: x + torch.from_numpy(x.detach().numpy()),
    ],
    ids=["size", "transform", "numpy"],
)
def test_functions_outside_of_torch_are_told_how_to_be_written(how):
    model = randomise(Outside(how))
    units = pxp.find_components(model, example=X)
    with pytest.raises(ValueError, match=r"(?s)Outside cannot be traced.*x\.new_zeros\(x\.shape\[0\], 3\)"):
        pxp.compact(model, half(units, "conv"), example=X)


class Misfit(nn.Module):
    """Works on the channels in an order of its own, in a module that is taken for a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        self.check = Checks()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.check(self.conv(x)).mean((2, 3)))


class Checks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training and x.shape[1] != 4:
            raise RuntimeError("four channels, please")
        return x


def test_what_cannot_run_is_named():
    model = randomise(Misfit())
    mask = half(pxp.find_components(model, example=X), "conv")
    with pytest.raises(
        ValueError, match=r"does not understand: four channels, please \(in module 'check', at .*structures\.py:\d+\)"
    ):
        pxp.compact(model, mask, example=X)
