"""Repair without labels, against closed forms by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from conftest import drawn, randomise
from timm.layers import SwiGLU
from torch import Tensor, nn
from torch.nn import functional as F
from vits import lively

import pxp
from pxp.repair import METHODS, RIDGE

X = torch.rand(40, 3, 12, 12, dtype=torch.float64)


def convolutional(**options) -> nn.Module:
    return randomise(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, **options), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5),
        )
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.short, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.head((self.norm(self.second(x)) + self.short(x)).relu().mean((2, 3)))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mlp, self.head = nn.Conv2d(3, 8, 4, 4), SwiGLU(8, 12), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.first(x).flatten(2).transpose(1, 2)
        return self.head((tokens + self.mlp(tokens)).mean(1))


NETS = {
    "convolutional": (lambda: convolutional(stride=2, padding=1), "filter"),
    "dilated": (lambda: convolutional(dilation=2, padding=(2, 0)), "filter"),
    "grouped": (lambda: convolutional(groups=4), "filter"),
    "padded by reflection": (lambda: convolutional(padding=1, padding_mode="reflect"), "filter"),
    "padded to the same": (lambda: convolutional(padding="same"), "filter"),
    "residual": (lambda: randomise(Residual()), "filter"),
    "gated": (lambda: randomise(Gated()), "neuron"),
    "neurons": (
        lambda: lively(timm.create_model("vit_tiny_patch16_224", img_size=12, patch_size=4, num_classes=5, depth=2)),
        "neuron",
    ),
    "heads": (
        lambda: lively(timm.create_model("vit_tiny_patch16_224", img_size=12, patch_size=4, num_classes=5, depth=2)),
        "head",
    ),
}


def network(name: str) -> tuple[nn.Module, pxp.Mask]:
    make, kind = NETS[name]
    model = make().double().eval()
    units = pxp.find_components(model, kind, example=X[:1])
    return model, drawn(units, 0.4)


def lack(model: nn.Module, small: nn.Module, x: Tensor = X) -> float:
    with torch.no_grad():
        return float((model(x) - small(x)).square().mean())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_nothing_pruned_is_nothing_repaired(name, method, untouched):
    model = untouched(network(name)[0])
    units = pxp.find_components(model, NETS[name][1], example=X[:1])
    has_norm = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    if method == "statistics":
        if not has_norm:
            with pytest.raises(ValueError, match="no BatchNorm with statistics; use method='least_squares'"):
                pxp.repair(model, pxp.Mask.all(units), X, method)
        return  # statistics on these images are others than those of training
    small = pxp.repair(model, pxp.Mask.all(units), X, method)
    assert lack(model, small) < 1e-24


@pytest.mark.parametrize("name", NETS)
def test_outputs_come_closer_to_what_they_were(name, untouched):
    model, mask = network(name)
    untouched(model)
    cut, mended = pxp.compact(model, mask, example=X[:1]), pxp.repair(model, mask, X, "least_squares", batch_size=7)
    again = pxp.repair(model, mask, X, "least_squares", batch_size=40)
    assert lack(model, mended) < 0.8 * lack(model, cut)
    assert lack(mended, again) < 1e-18  # however the images are dealt out
    assert lack(model, mended, X.flip(0)[:9]) < lack(model, cut, X.flip(0)[:9])
    sizes = [sum(p.numel() for p in net.parameters()) for net in (cut, mended)]
    assert sizes[0] == sizes[1] and [n for n, _ in cut.named_parameters()] == [n for n, _ in mended.named_parameters()]


def test_a_linear_layer_by_hand():
    model = randomise(nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 4)))
    x = torch.rand(50, 3, 4, 4, dtype=torch.float64)
    units = pxp.find_components(model, "neuron", example=x)
    kept = torch.tensor([True, False, True, True, False, True])
    small = pxp.repair(model, pxp.Mask(units, {"1": kept}), x, "least_squares")
    with torch.no_grad():
        hidden, wanted = model[:3](x)[:, kept].numpy(), model(x).numpy()
    old, bias = model[3].weight.detach().numpy()[:, kept.numpy()], model[3].bias.detach().numpy()
    # minimise |wanted − h W − b|² + λ |W − old|² over W and b: as rows of one system
    centred = hidden - hidden.mean(0)
    full = model[:3](x).detach().numpy()
    mean_square = np.mean(np.where(kept.numpy(), ((full - full.mean(0)) ** 2).sum(0), 0))  # pruned inputs are zeros
    penalty = np.sqrt(RIDGE * mean_square)
    rest = wanted - hidden @ old.T - bias
    rows = np.vstack([centred, penalty * np.eye(4)])
    change, *_ = np.linalg.lstsq(rows, np.vstack([rest - rest.mean(0), np.zeros((4, 4))]), rcond=None)
    shift = rest.mean(0) - hidden.mean(0) @ change
    np.testing.assert_allclose(small.get_submodule("3").weight.detach().numpy(), old + change.T, atol=1e-10)
    np.testing.assert_allclose(small.get_submodule("3").bias.detach().numpy(), bias + shift, atol=1e-10)


@pytest.mark.parametrize("name", ["convolutional", "dilated", "grouped", "padded by reflection", "padded to the same"])
def test_a_convolution_by_hand(name):
    """The normal equations of the second convolution, by automatic differentiation instead of patches."""
    model = network(name)[0]
    units = pxp.find_components(model, example=X[:1])
    kept = {"0": torch.tensor([True, False, True, True, True, False, True, True]), "3": torch.ones(8, dtype=torch.bool)}
    small = pxp.repair(model, pxp.Mask(units, kept), X, "least_squares")
    with torch.no_grad():
        before = model[:3](X)
        wanted = model[3](before)
        x = before * kept["0"][:, None, None]
    layer = model[3]
    unknown = torch.zeros(layer.weight.numel() + 8, dtype=torch.float64)

    def output(change: Tensor) -> Tensor:
        weight, bias = change[:-8].view_as(layer.weight), change[-8:]
        parameters = {"weight": layer.weight.detach() + weight, "bias": layer.bias.detach() + bias}
        return torch.func.functional_call(layer, parameters, (x,))

    jacobian = torch.func.jacfwd(output)(unknown).flatten(0, -2)  # the model is linear in what is looked for
    rest = (wanted - output(unknown)).flatten()
    gram = jacobian.T @ jacobian
    # the ridge of every group: RIDGE times the mean variance of its inputs, over the places of one output
    places = wanted[:, 0].numel()
    per_output = layer.weight[0].numel()
    first = gram[: layer.weight.numel(), : layer.weight.numel()]
    sums = (jacobian[:, : layer.weight.numel()].T @ jacobian[:, -8:]).sum(1)
    variance = (first.diagonal() - sums**2 / places).view(layer.groups, -1, per_output)
    ridge = RIDGE * variance[:, 0].mean(1)
    penalty = torch.cat([ridge.repeat_interleave(layer.weight.numel() // layer.groups), torch.zeros(8)])
    change = torch.linalg.solve(gram + torch.diag(penalty), jacobian.T @ rest)
    expected = nn.Sequential(nn.ReLU(), *model[5:])
    with torch.no_grad():
        torch.testing.assert_close(small.get_submodule("3").bias, layer.bias + change[-8:], rtol=0, atol=1e-8)
        first_head = expected(output(change))
    # the linear layer reads what is whole again, so it stays as it is
    torch.testing.assert_close(small(X), first_head, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["convolutional", "residual", "gated", "neurons", "heads"])
def test_the_mean_is_what_it_was(name):
    model, mask = network(name)
    small = pxp.repair(model, mask, X, "mean")
    layers = {n: m for n, m in small.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    for n, layer in layers.items():
        assert layer.weight.abs().sum() > 0, n
    cut = pxp.compact(model, mask, example=X[:1])
    with torch.no_grad():
        weights = [(a, b) for a, b in zip(cut.parameters(), small.parameters(), strict=True) if a.ndim > 1]
        assert all(torch.equal(a, b) for a, b in weights)  # biases only
    if name == "convolutional":  # the last layer reads what the second convolution has lost
        difference = (model(X) - small(X)).mean(0)
        assert difference.abs().max() < 1e-12


@pytest.mark.parametrize("method", ["mean", "least_squares"])
def test_a_layer_of_which_nothing_is_left_is_made_up_for(method):
    model = convolutional()
    units = pxp.find_components(model, example=X[:1])
    gone = next(iter(units))
    mask = pxp.Mask(units, dict(pxp.Mask.all(units)) | {gone: torch.zeros(units[gone].size, dtype=torch.bool)})
    small = pxp.repair(model, mask, X, method, progress=False)
    assert lack(model, small) < lack(model, pxp.compact(model, mask, example=X[:1]))


def test_statistics_are_those_of_the_masked_network():
    model = randomise(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5),
        )
    )  # fmt: skip
    units = pxp.find_components(model, example=X[:1])
    kept = {"0": torch.arange(8) % 3 > 0, "3": torch.arange(8) % 4 > 0}
    small = pxp.repair(model, pxp.Mask(units, kept), X, "statistics")

    def normalised(raw: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        mean, variance = raw.mean((0, 2, 3)), raw.var((0, 2, 3))  # torch keeps the unbiased one
        x = (raw - mean[:, None, None]) / (variance[:, None, None] + norm.eps).sqrt()
        return x * norm.weight[:, None, None] + norm.bias[:, None, None]

    with torch.no_grad():
        x = normalised(model[0](X), model[1]).relu() * kept["0"][:, None, None]
        # while the statistics are taken, the layers before give what the batch's own, biased, variance makes of it
        seen = F.batch_norm(model[0](X), None, None, model[1].weight, model[1].bias, training=True, eps=model[1].eps)
        seen = model[3](seen.relu() * kept["0"][:, None, None])
        mean, variance, norm = seen.mean((0, 2, 3)), seen.var((0, 2, 3)), model[4]
        x = (model[3](x) - mean[:, None, None]) / (variance[:, None, None] + norm.eps).sqrt()
        x = x * norm.weight[:, None, None] + norm.bias[:, None, None]
        expected = model[5:](x.relu() * kept["3"][:, None, None])
    torch.testing.assert_close(small(X), expected, rtol=1e-9, atol=1e-9)


def test_labels_are_not_looked_at():
    model, mask = network("convolutional")
    pair = (X, torch.randint(0, 5, (40,)))
    for given in (pair, torch.utils.data.TensorDataset(*pair)):
        for method in METHODS:
            assert lack(pxp.repair(model, mask, X, method), pxp.repair(model, mask, given, method)) == 0


def test_what_cannot_be_repaired_is_refused(untouched):
    model, mask = network("convolutional")
    untouched(model)
    with pytest.raises(ValueError, match="method must be one of 'mean', 'statistics', 'least_squares', got 'most'"):
        pxp.repair(model, mask, X, "most")
    with pytest.raises(ValueError, match="non-empty batch"):
        pxp.repair(model, mask, X[:0])
    with pytest.raises(ValueError, match="NaN"):
        pxp.repair(model, mask, X * torch.nan)
    with pytest.raises(TypeError, match=r"mask must be a pxp\.Mask, got dict"):
        pxp.repair(model, dict(mask), X)


@pytest.mark.parametrize(
    ("name", "kind", "rate"), [("vgg", "filter", 0.4), ("vit", "head", 0.75), ("vit", "neuron", 0.95)]
)
def test_shipped_networks_are_better_repaired(name, kind, rate, tmp_path):
    model, data = pxp.load_model(name), pxp.load_dataset()
    units = pxp.find_components(model, kind)
    refs = pxp.reference_samples(data.reference, per_class=5)
    images, labels = pxp.reference_samples(data.reference, per_class=15, seed=1)
    mask = pxp.attribute(model, refs, units, pxp.LRP("epsilon")).select(rate)
    cut, mended = pxp.compact(model, mask), pxp.repair(model, mask, images, "least_squares")
    unseen = pxp.reference_samples(data.tune, per_class=20)
    for given in ((images, labels), unseen):  # never worse on its own images, and better on others
        assert pxp.accuracy(mended, given) > pxp.accuracy(cut, given) + 0.03
    pxp.save_compact(mended, tmp_path / "mended.safetensors")
    again = pxp.load_compact(tmp_path / "mended.safetensors")
    assert torch.equal(again(images), mended(images))
    assert all(parameter.requires_grad for parameter in mended.parameters())


def test_curves_of_repaired_networks(untouched):
    model, data = untouched(pxp.load_model("vgg")), pxp.load_dataset()
    units = pxp.find_components(model)
    scores = pxp.attribute(model, pxp.reference_samples(data.reference, per_class=2), units, pxp.Taylor())
    unseen = pxp.reference_samples(data.eval, per_class=5)
    images = pxp.reference_samples(data.reference, per_class=5)[0]
    curve = pxp.pruning_curve(model, scores, unseen, rates=(0, 0.3, 0.5), repair=("statistics", images))
    for rate, found in zip(curve.rates, curve.runs[0], strict=True):
        assert found == pxp.accuracy(pxp.repair(model, scores.select(rate), images, "statistics"), unseen)
    assert curve.settings["repair"] == "statistics, 50 images" and curve.images == 50
    with pytest.raises(ValueError, match="50 of these 50 images were used for the repair"):
        pxp.pruning_curve(model, scores, unseen, repair=("mean", unseen))
    with pytest.raises(TypeError, match=r"repair must be a pair \(method, images\)"):
        pxp.pruning_curve(model, scores, unseen, repair="mean")
    with pytest.raises(ValueError, match="method must be one of"):
        pxp.pruning_curve(model, scores, unseen, repair=("worst", images))


def test_tuning_of_repaired_networks():
    model, data = pxp.load_model("vgg"), pxp.load_dataset()
    units = pxp.find_components(model)
    refs = pxp.reference_samples(data.reference, per_class=1)
    images = pxp.reference_samples(data.reference, per_class=3)[0]
    unseen = pxp.reference_samples(data.tune, per_class=5)
    options = {"rates": (0.3, 0.5), "progress": False, "repair": ("statistics", images)}
    study = pxp.tune(model, refs, units, unseen, 1, space={"low": ["epsilon"]}, **options)
    criterion, ways = pxp.winner(study)
    scores = pxp.attribute(model, refs, units, criterion)
    curve = pxp.pruning_curve(
        model, scores, unseen, rates=(0.3, 0.5), repair=options["repair"], allow_shared=True, **ways
    )
    assert study.best_value == pytest.approx(curve.a_pr)
    with pytest.raises(ValueError, match="used for the repair"):
        pxp.tune(model, refs, units, unseen, 1, **options | {"repair": ("mean", unseen)})


def test_what_pruned_outputs_become_behind_an_activation_is_read():
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.first(x)).sigmoid().mean((2, 3)))

    model = randomise(Shifted())  # sigmoid(0) = ½, which compaction moves into a bias
    mask = drawn(pxp.find_components(model, example=X[:1]), 0.5)
    cut, mended = pxp.compact(model, mask, example=X[:1]), pxp.repair(model, mask, X, "least_squares")
    assert lack(model, mended) < 0.1 * lack(model, cut)


class Summed(nn.Module):
    """A layer whose output is not simply added to another."""

    def __init__(self, how) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        mean = x.mean((2, 3))
        return self.how(self.last(mean), x, mean)


@pytest.mark.parametrize("method", ["mean", "least_squares"])
@pytest.mark.parametrize(
    "how",
    [
        lambda y, x, mean: torch.add(y, mean, alpha=-3.0),
        lambda y, x, mean: torch.add(mean, y, alpha=-0.5),
        lambda y, x, mean: y[:, [7, 6, 5, 4, 3, 2, 1, 0]] + mean,
        lambda y, x, mean: y[:, :1] + mean,
        lambda y, x, mean: (y[:, :, None, None] + x).mean((2, 3)),
    ],
    ids=["alpha", "alpha of the layer", "permuted", "part", "broadcast"],
)
def test_a_sum_that_is_none_is_not_compensated(how, method):
    model = randomise(Summed(how))
    units = pxp.find_components(model, example=X[:1])
    for images in (X, X[:8]):
        mask = drawn(units, 0.4)
        mended = pxp.repair(model, mask, images, method)
        cut = pxp.compact(model, mask, example=X[:1])
        assert lack(model, mended, images) <= lack(model, cut, images)
        # the layer alone, whose output nobody adds to anything
        with torch.no_grad():
            kept = (model.first(images).relu() * mask["first"][:, None, None]).mean((2, 3))
            last = mended.get_submodule("last")
            given = kept if last.in_features == 8 else kept[:, mask["first"]]
            rest = model.last(model.first(images).relu().mean((2, 3))) - last(given)
        assert rest.mean(0).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_that_hardly_vary_do_not_become_noise(dtype):
    model = randomise(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)))
    model[0].weight.data.mul_(0.01)
    model[0].bias.data.add_(4)
    x = torch.rand(500, 16, dtype=torch.float64)
    units = pxp.find_components(model, "neuron", example=x[:1])
    mask = pxp.Mask(units, {"0": torch.arange(16) % 3 > 0})
    exact = pxp.repair(model, mask, x, "least_squares").get_submodule("2").weight
    found = pxp.repair(copy.deepcopy(model).to(dtype), mask, x.to(dtype), "least_squares").get_submodule("2").weight
    assert bool(found.isfinite().all()) and found.abs().max() < 2 * model[2].weight.abs().max()
    if dtype == torch.float32:
        assert (found - exact).abs().max() < 1e-2 * exact.abs().max()


def test_an_input_that_never_varies_keeps_its_weights():
    model = randomise(
        nn.Sequential(
            nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(),
            nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )
    )  # fmt: skip
    model[2].weight.data[0] = 0
    model[2].bias.data[0] = 1.7
    x = torch.rand(60, 2, 9, 9, dtype=torch.float64)
    units = pxp.find_components(model, example=x[:1])
    kept = {name: torch.arange(layer.size) != 3 for name, layer in units.items()}
    for model_, x_ in ((model, x), (copy.deepcopy(model).float(), x.float())):
        small = pxp.repair(model_, pxp.Mask(units, kept), x_, "least_squares")
        assert all(bool(p.isfinite().all()) and float(p.abs().max()) < 10 for p in small.parameters())


class OwnNorm(nn.Module):
    """A BatchNorm that counts by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.momentum, self.eps = 0.1, 1e-5

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            self.num_batches_tracked += 1
            share = self.momentum or 1 / float(self.num_batches_tracked)
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
            self.running_mean.mul_(1 - share).add_(share * mean)
            self.running_var.mul_(1 - share).add_(share * var)
        scale = self.weight / (var + self.eps).sqrt()
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


def test_statistics_of_a_norm_of_ones_own():
    def net(norm) -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3), norm(8), nn.ReLU(), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(512, 5)).double().eval()

    torchs, own = net(nn.BatchNorm2d), net(OwnNorm)
    found = []
    for model in (torchs, own):
        mask = drawn(pxp.find_components(model, example=X[:1]), 0.4)
        found.append(pxp.repair(model, mask, X, "statistics"))
    assert lack(*found) < 1e-8 and lack(pxp.compact(own, mask, example=X[:1]), found[1]) > 1e-4


def test_arguments_that_make_no_batches(untouched):
    model, mask = network("convolutional")
    untouched(model)
    for wrong in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"batch_size must be a whole number of at least 1, got {wrong}"):
            pxp.repair(model, mask, X, batch_size=wrong)
    flat = randomise(nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)))
    one = torch.rand(1, 3, 4, 4, dtype=torch.float64)
    units = pxp.find_components(flat, "neuron", example=one)
    with pytest.raises(ValueError, match="1 images are too few for BatchNorm's statistics"):
        pxp.repair(flat, drawn(units, 0.5), one, "statistics")


def test_a_transposed_convolution_is_named():
    model = randomise(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten(2)
        )
    )
    model.append(nn.AdaptiveAvgPool1d(1)).append(nn.Flatten())
    mask = drawn(pxp.find_components(model, example=X[:1]), 0.4)
    try:
        cut = pxp.compact(model, mask, example=X[:1])
    except ValueError as error:
        with pytest.raises(ValueError, match="'2'"):
            pxp.repair(model, mask, X, "least_squares")
        assert "'2'" in str(error)
    else:
        assert lack(model, pxp.repair(model, mask, X, "least_squares")) <= lack(model, cut)


def test_a_forward_pass_that_keeps_a_shape():
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 5)
            self.about = {"shape": None}

        def forward(self, x: Tensor) -> Tensor:
            self.seen, self.about["shape"] = x.shape, x.shape
            return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))

    model = randomise(Keeps())
    mask = drawn(pxp.find_components(model, example=X[:1]), 0.4)
    cut = pxp.compact(model, mask, example=X[:1])
    for method in ("mean", "least_squares"):
        assert lack(model, pxp.repair(model, mask, X, method)) < lack(model, cut)
