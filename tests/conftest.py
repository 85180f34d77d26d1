"""Small networks with non-trivial parameters, and the state of a model to compare before and after."""

from __future__ import annotations

import contextlib
import copy
import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")

import numpy as np
import pytest
import torch
from outside import chromium, computed, node, opened  # noqa: F401  # fixtures
from PIL import Image
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

import pxp
from pxp.data import IMAGENETTE_CLASSES
from pxp.models import VGG, SmallResNet
from pxp.network.components import Components, Layer
from pxp.network.trace import Trace

FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def figures():
    """Figures are closed and matplotlib's style is put back."""
    import matplotlib.pyplot as plt

    style = dict(plt.rcParams)
    yield
    plt.close("all")
    plt.rcParams.update(style)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Float64, eval mode, random biases and random BatchNorm statistics, gains and biases: a wrong fold then shows."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | FrozenBatchNorm2d):
            uniform(module.running_mean, -0.3, 0.3)
            uniform(module.running_var, 0.5, 1.5)
            if module.weight is not None:
                uniform(module.weight, 0.6, 1.4)
                uniform(module.bias, -0.2, 0.2)
        elif isinstance(module, nn.Linear) or (hasattr(module, "kernel_size") and hasattr(module, "weight")):
            fan_in = module.weight[0].numel()
            uniform(module.weight, -((6 / fan_in) ** 0.5), (6 / fan_in) ** 0.5)
            if module.bias is not None:
                uniform(module.bias, -0.2, 0.2)
    return model.double().eval()


def without_biases(model: nn.Module) -> nn.Module:
    """No bias anywhere, also none after BatchNorm is folded: the case in which relevance is conserved."""
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            module.running_mean.zero_()
        if isinstance(getattr(module, "bias", None), Tensor):
            module.bias.data.zero_()
    return model


class Grouped(nn.Module):
    """Strided, dilated, grouped and depthwise convolutions, some without a ReLU behind: inputs of both signs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.dilated = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.depthwise = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, groups=8), nn.BatchNorm2d(16))
        self.average = nn.AvgPool2d(2)
        self.project = nn.Conv2d(16, 6, 1)
        self.expand = nn.Sequential(nn.Conv2d(6, 12, 1, groups=2), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.fc = nn.Linear(12 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.average(self.depthwise(self.dilated(self.relu(self.stem(x)))))
        return self.fc(self.expand(self.project(x)).flatten(1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Linear(8, 5)
    )


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 6, 5, padding=2), nn.BatchNorm1d(6), nn.ReLU(),
        nn.Conv1d(6, 8, 3, stride=2, bias=False), nn.BatchNorm1d(8), nn.ReLU(),
        nn.Conv1d(8, 8, 3, dilation=2, groups=2), nn.AvgPool1d(2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip


def resnet18() -> nn.Module:
    import torchvision

    return torchvision.models.resnet18(num_classes=5)


def resnet50() -> nn.Module:
    import torchvision

    return torchvision.models.resnet50(num_classes=5)


class NarrowResNet50(ResNet):
    """torchvision's ResNet-50 (its Bottleneck blocks, strides and names), an eighth as wide."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self._norm_layer = nn.BatchNorm2d
        self.inplanes, self.dilation, self.groups, self.base_width = 8, 1, 1, 64
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1)
        for index, (width, blocks) in enumerate(zip((8, 16, 32, 64), (3, 4, 6, 3), strict=True), start=1):
            layer = self._make_layer(Bottleneck, width, blocks, stride=1 if index == 1 else 2)
            setattr(self, f"layer{index}", layer)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(256, 5)


def vgg16_bn() -> nn.Module:
    """torchvision's VGG-16-BN at an eighth of its width."""
    from torchvision.models.vgg import VGG as TorchvisionVGG
    from torchvision.models.vgg import cfgs, make_layers

    features = make_layers([width if width == "M" else width // 8 for width in cfgs["D"]], batch_norm=True)
    features[0] = nn.Conv2d(3, 8, 3, padding=1)
    for i, module in enumerate(features):
        if isinstance(module, nn.Conv2d) and i:
            features[i] = nn.Conv2d(module.in_channels, module.out_channels, 3, padding=1)
    model = TorchvisionVGG(nn.Identity(), num_classes=5, init_weights=False)
    model.features, model.avgpool = features, nn.AdaptiveAvgPool2d((1, 1))
    model.classifier = nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 5)
    )
    return model


NETWORKS = {
    "mlp": (mlp, (12,)),
    "vgg": (VGG, (1, 28, 28)),
    "vgg16_bn": (vgg16_bn, (3, 32, 32)),
    "resnet": (SmallResNet, (1, 28, 28)),
    "resnet18": (resnet18, (3, 32, 32)),
    "resnet50": (resnet50, (3, 32, 32)),
    "bottleneck": (NarrowResNet50, (3, 32, 32)),
    "grouped": (Grouped, (3, 18, 18)),
    "conv1d": (conv1d, (2, 21)),
}


def network(name: str, samples: int = 3, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor, pxp.Components]:
    """A randomised network with signed inputs, labels and its filters (neurons of the MLP)."""
    torch.manual_seed(seed)
    make, shape = NETWORKS[name]
    model = randomise(make(), seed)
    images = torch.randn(samples, *shape, dtype=torch.float64)
    labels = torch.arange(samples) % 5
    units = pxp.find_components(model, "neuron" if name == "mlp" else "filter", example=images)
    return model, images, labels, units


def snapshot(model: nn.Module) -> dict:
    """Everything about a model that a function of pxp could have changed."""
    state: dict = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        state[f"tensor {name}"] = (tensor.detach().clone(), id(tensor), tensor.requires_grad, tensor.stride())
        grad = tensor.grad
        state[f"grad {name}"] = None if grad is None else (grad.clone(), id(grad))
    for name, module in model.named_modules():
        state[f"module {name}"] = (id(module), module.training, getattr(module, "inplace", None), type(module).forward)
        state[f"own {name}"] = sorted(module.__dict__)
        for key, value in vars(module).items():
            if "hooks" in key and hasattr(value, "items"):
                state[f"{key} {name}"] = [(k, id(v)) for k, v in value.items()]
    return state


def same(before: dict, after: dict) -> bool:
    """Compare two snapshots bit for bit."""

    def equal(a, b) -> bool:
        if isinstance(a, Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, tuple | list):
            return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
        return bool(a == b)

    return before.keys() == after.keys() and all(equal(before[key], after[key]) for key in before)


@pytest.fixture
def untouched():
    """Watch models: afterwards each must be bit for bit what it was."""
    watched: list[tuple[nn.Module, dict]] = []

    def watch(model: nn.Module) -> nn.Module:
        watched.append((model, snapshot(model)))
        return model

    yield watch
    for model, before in watched:
        assert same(before, snapshot(model)), f"{type(model).__name__} was changed"


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected value."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


@pytest.fixture(scope="session")
def data():
    return pxp.load_dataset("fashion-mnist")


@pytest.fixture(scope="session")
def _vgg_once():
    return pxp.load_model("vgg")


@pytest.fixture
def vgg(_vgg_once):
    """The shipped VGG, a fresh copy for each test."""
    return copy.deepcopy(_vgg_once)


@pytest.fixture
def photographs(tmp_path):
    """Imagenette's folders with six small random images per class and part."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in IMAGENETTE_CLASSES:
            folder = tmp_path / "imagenette2-320" / part / name
            folder.mkdir(parents=True)
            for i in range(6):
                Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.JPEG")
    return tmp_path


MODES = {"grad": contextlib.nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}


def only(units: pxp.Components, name: str, index: int) -> pxp.Mask:
    kept = {layer: torch.ones(each.size, dtype=torch.bool) for layer, each in units.items()}
    kept[name][index] = False
    return pxp.Mask(units, kept)


def drawn(units: pxp.Components, rate: float, seed: int = 0) -> pxp.Mask:
    generator = torch.Generator().manual_seed(seed)
    return pxp.Mask(units, {n: torch.rand(layer.size, generator=generator) >= rate for n, layer in units.items()})


def pruned(mask: pxp.Mask) -> set[tuple[str, int]]:
    return {(name, i) for name, kept in mask.items() for i, keep in enumerate(kept.tolist()) if not keep}


def made(values: dict[str, list[float]], signed: dict[str, list[float]] | None = None) -> pxp.Scores:
    """Scores of layers that need no model."""
    layers = [Layer(name, len(v), (name,)) for name, v in values.items()]
    units = Components("filter", layers, Trace(tuple(values), {name: ("",) for name in values}, {}))
    tensors = {name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()}
    negative = {name: torch.tensor(v, dtype=torch.float64) for name, v in (signed or values).items()}
    return pxp.Scores(units, tensors, negative, criterion="by hand", samples=3)


@pytest.fixture
def scores():
    return made({"a": [0.5, 3.0, 0.1], "b": [2.0, 0.2]}, {"a": [-0.5, 3.0, 0.05], "b": [-2.0, 0.2]})
