"""Rules for the input behind a normalisation inside the model: right, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import relative, same, snapshot
from small import Calls
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import Normalize

import pxp
from pxp.network.trace import trace_model

MEAN, STD = (
    torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
)
RULES = ["flat", "wsquare", pxp.ZBox(-2.5, 3.5), pxp.ZBox(-MEAN / STD, (1 - MEAN) / STD)]


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", MEAN.clone())
        self.register_buffer("std", STD.clone())

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Inline(nn.Module):
    """What timm's and many detectors' networks do at the top of their forward pass."""

    def __init__(self, cnn: nn.Sequential) -> None:
        super().__init__()
        self.cnn = cnn

    def forward(self, x: Tensor) -> Tensor:
        return self.cnn(x.sub(MEAN.to(x)).div(STD.to(x)))


def batch_norm() -> nn.Module:
    norm = nn.BatchNorm2d(3, eps=0).double().eval()
    norm.running_mean.copy_(MEAN.flatten())
    norm.running_var.copy_(STD.flatten() ** 2)
    return norm


def affine() -> nn.Module:
    """A normalisation that is a weight and a bias, as of Hugging Face's ``rescale`` and ``normalize`` in one."""
    return Calls(lambda x: x * (1 / STD).to(x) - (MEAN / STD).to(x))


MODELS = {
    "buffers": lambda cnn: nn.Sequential(Buffers(), cnn),
    "inline": Inline,
    "BatchNorm": lambda cnn: nn.Sequential(batch_norm(), cnn),
    "affine": lambda cnn: nn.Sequential(affine(), cnn),
    "torchvision": lambda cnn: nn.Sequential(Normalize(MEAN.flatten(), STD.flatten()), cnn),
}


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.SiLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)).double().eval()


def samples() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    images = torch.rand(4, 3, 12, 12, dtype=torch.float64)
    images[:, :, :3] = 0  # black
    images[:, :, 5, 5] = MEAN[:, :, 0, 0] + 1e-9  # x ⊙ g would divide by almost 0
    images[:, :, 6, 6] = MEAN[:, :, 0, 0]
    return images, torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("rule", RULES, ids=["flat", "wsquare", "box", "box by channel"])
@pytest.mark.parametrize("name", MODELS)
def test_a_normalisation_inside_is_as_one_outside(name, rule, untouched):
    body, (images, labels) = cnn(), samples()
    model = untouched(MODELS[name](body).eval())
    lrp = pxp.LRP("gamma", input=rule)
    expected = pxp.heatmap(body, (images - MEAN) / STD, labels, lrp)
    found = pxp.heatmap(model, images, labels, lrp)
    assert relative(found, expected) < 1e-10
    assert bool((found[:, :, :3] != 0).any()) and bool((found[:, :, 6, 6] != 0).any())
    assert relative(pxp.heatmap(model, images, labels, lrp, batch_size=1), expected) < 1e-10
    single = pxp.heatmap(copy.deepcopy(model).float(), images.float(), labels, lrp)
    assert single.dtype == torch.float32 and relative(single.double(), expected) < 1e-2


def test_a_path_begins_at_the_same_black_inside_and_outside():
    body, (images, labels) = cnn(), samples()
    black = tuple((-MEAN / STD).flatten().tolist())
    for rule in RULES:
        inside = pxp.heatmap(nn.Sequential(Buffers(), body), images, labels, pxp.LRP("gamma", input=rule, path_steps=3))
        lrp = pxp.LRP("gamma", input=rule, path_steps=3, baseline=black)
        assert relative(inside, pxp.heatmap(body, (images - MEAN) / STD, labels, lrp)) < 1e-10
    inside = pxp.heatmap(nn.Sequential(Buffers(), body), images, labels, pxp.IntegratedGradients(5))
    outside = pxp.heatmap(body, (images - MEAN) / STD, labels, pxp.IntegratedGradients(5, baseline=black))
    assert relative(inside, outside) < 1e-10


def test_the_composite_alone_and_conservation_read_at_the_same_place():
    body, (images, labels) = cnn(), samples()
    model, lrp = nn.Sequential(Buffers(), body), pxp.LRP("zplus", input="flat")
    expected = pxp.heatmap(model, images, labels, lrp)
    assert lrp.composite(model, trace_model(model, images)).input_layer == "1.0"
    assert pxp.LRP("zplus", input="gamma").composite(model, trace_model(model, images)).input_layer is None
    assert (
        relative(pxp.heatmap(model, images, labels, lrp.composite(model, trace_model(model, images))), expected) < 1e-12
    )
    found = pxp.conservation(model, images, labels, lrp)
    outside = pxp.conservation(body, (images - MEAN) / STD, labels, lrp)
    assert found.input == pytest.approx(float(expected.sum()) / 4) == pytest.approx(outside.input)
    assert found.leaves["1.0"] == pytest.approx(found.input)


def test_functions_behind_the_first_layer_are_still_followed():
    """Gates and activations that no module computes have rules too, which need to know where a signal comes from."""

    class Gated(nn.Module):
        def __init__(self, normalise: nn.Module) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.normalise, self.stem, self.gate = normalise, nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1)
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.stem(self.normalise(x)))
            x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
            return self.fc((x / (1 + 0.1)).mean((2, 3))).softmax(1)

    images, labels = samples()
    model, body = Gated(Buffers()).double().eval(), Gated(nn.Identity()).double().eval()
    for rule in RULES:
        lrp = pxp.LRP("epsilon", input=rule)
        expected = pxp.heatmap(body, (images - MEAN) / STD, labels, lrp)
        assert relative(pxp.heatmap(model, images, labels, lrp), expected) < 1e-10


def test_an_mlp_flattens_what_it_has_normalised():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(432, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    images, labels = samples()
    for rule in ("flat", "wsquare", pxp.ZBox(-2.5, 3.5)):
        expected = pxp.heatmap(body, (images - MEAN) / STD, labels, pxp.LRP(input=rule))
        assert (
            relative(pxp.heatmap(nn.Sequential(Buffers(), body), images, labels, pxp.LRP(input=rule)), expected) < 1e-10
        )


def test_values_that_are_only_moved_are_read_at_the_images():
    """Flipped channels, patches, padding: no value is changed, so x ⊙ g is right wherever the image is read."""
    body, (images, labels) = cnn(), samples()
    flipped = pxp.heatmap(nn.Sequential(Calls(lambda x: x[:, [2, 1, 0]]), body), images, labels, pxp.LRP(input="flat"))
    assert (
        relative(flipped, pxp.heatmap(body, images[:, [2, 1, 0]], labels, pxp.LRP(input="flat"))[:, [2, 1, 0]]) < 1e-10
    )
    larger = pxp.heatmap(nn.Sequential(nn.ZeroPad2d(2), body), images, labels, pxp.LRP(input="flat"))
    padded = pxp.heatmap(body, F.pad(images, (2, 2, 2, 2)), labels, pxp.LRP(input="flat"))
    assert relative(larger, padded[:, :, 2:-2, 2:-2]) < 1e-10


class Twice(nn.Module):
    """What is read besides the first layer, or by it again."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.first, self.other, self.fc = (
            how,
            nn.Conv2d(3, 3, 3, padding=1),
            nn.Conv2d(3, 3, 1),
            nn.Linear(3, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        z = (x - MEAN) / STD
        y = self.first(z).relu()
        match self.how:
            case "again":
                y = self.first(y)
            case "skip":
                y = y + z
            case "branch":
                y = y + self.other(x)
        return self.fc(y.mean((2, 3)))


REFUSED = {
    "padded": (
        lambda: nn.Sequential(Buffers(), nn.ZeroPad2d(1), cnn()),
        r"'2\.0' .* of images of shape \(3, 12, 12\) it reads \(3, 14, 14\)",
    ),
    "resized": (lambda: nn.Sequential(nn.Upsample(size=10, mode="bilinear"), cnn()), r"it reads \(3, 10, 10\)"),
    "smoothed": (lambda: nn.Sequential(nn.AvgPool2d(3, 1, 1), cnn()), "depends on other pixels"),
    "by its own mean": (lambda: nn.Sequential(nn.InstanceNorm2d(3), cnn()), "depends on other pixels"),
    "by all channels": (lambda: nn.Sequential(nn.GroupNorm(1, 3), cnn()), "depends on other pixels"),
    "channels turned round": (
        lambda: nn.Sequential(Buffers(), Calls(lambda x: x[:, [2, 1, 0]]), cnn()), "depends on other pixels"
    ),
    "again": (lambda: Twice("again"), "'first' .* it runs 2 times"),
    "skip": (lambda: Twice("skip"), "'first' .* other layers read the images too"),
    "branch": (lambda: Twice("branch"), "'first' .* other layers read the images too"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_pixels_is_refused(name):
    make, message = REFUSED[name]
    model, (images, labels) = make().double().eval(), samples()
    before = snapshot(model)
    for rule in RULES:
        with pytest.raises(ValueError, match=f"the input rule of layer .*{message}.* change the images outside"):
            pxp.heatmap(model, images, labels, pxp.LRP(input=rule))
    assert pxp.heatmap(model, images, labels, pxp.LRP()).shape == images.shape
    assert same(before, snapshot(model))


def test_a_hook_that_normalises_is_refused():
    body, (images, labels) = cnn(), samples()
    body[0].register_forward_pre_hook(lambda module, inputs: ((inputs[0] - MEAN) / STD,))
    with pytest.raises(ValueError, match="layer '0' .* a hook changes what it reads"):
        pxp.heatmap(body, images, labels, pxp.LRP(input="flat"))
