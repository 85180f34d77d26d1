"""Criteria besides relevance, by hand; ablation, against masking one component after the other."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from conftest import randomise
from test_repair import Gated, Residual
from torch import Tensor, nn
from torch.nn import functional as F
from vits import lively

import pxp
from pxp.ablation import Suffixes, ways
from pxp.probe import Probe
from pxp.rivals import columns

X, LABELS = torch.rand(9, 3, 8, 8, dtype=torch.float64), torch.arange(9) % 5


def small() -> nn.Module:
    return randomise(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5),
        )
    )  # fmt: skip


def vit() -> nn.Module:
    options = {"img_size": 8, "patch_size": 4, "num_classes": 5, "depth": 2}
    return lively(timm.create_model("vit_tiny_patch16_224", **options)).double().eval()


class Shared(nn.Module):
    """A layer that runs twice, and another input of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.conv(x).relu()
        return self.head((x + self.conv(x).relu()).mean((2, 3)))


class Branching(nn.Module):
    """Cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        return self.head(x.mean((2, 3))) if bool((x >= 0).all()) else x


NETS = {
    "convolutions": (small, "filter"),
    "residual": (lambda: randomise(Residual()), "filter"),
    "shared": (lambda: randomise(Shared()), "filter"),
    "gated": (lambda: randomise(Gated()), "neuron"),
    "heads": (vit, "head"),
    "neurons": (vit, "neuron"),
    "not traced": (lambda: randomise(Branching()), "filter"),
}


def scored(model: nn.Module, criterion: pxp.Criterion, kind: str = "filter", **options) -> pxp.Scores:
    units = pxp.find_components(model, kind, example=X[:1])
    return pxp.attribute(model, (X, LABELS), units, criterion, **options)


@pytest.mark.parametrize("name", NETS)
def test_ablation_is_masking_one_after_the_other(name, untouched):
    make, kind = NETS[name]
    model = untouched(make())
    units = pxp.find_components(model, kind, example=X[:1])
    scores = pxp.attribute(model, (X, LABELS), units, pxp.Ablation(), batch_size=4)
    with torch.no_grad():
        before = F.cross_entropy(model(X), LABELS, reduction="none")
        generator = torch.Generator().manual_seed(0)
        for layer, size in ((n, e.size) for n, e in units.items()):
            for index in torch.randperm(size, generator=generator)[:4].tolist():
                kept = dict(pxp.Mask.all(units))
                kept[layer] = torch.arange(size) != index
                with pxp.masked(model, pxp.Mask(units, kept)):
                    rise = F.cross_entropy(model(X), LABELS, reduction="none") - before
                assert scores.signed[layer][index] == pytest.approx(float(rise.mean()), abs=1e-12)
                assert scores[layer][index] == pytest.approx(float(rise.abs().mean()), abs=1e-12)
    assert scores.has_sign and scores.samples == 9 and scores.references


def test_ablation_computes_what_depends_on_the_component_alone():
    model = small()
    units = pxp.find_components(model, example=X[:1])
    without = ways(model, units, X)
    assert isinstance(without, Suffixes)
    calls: dict[str, int] = {}
    for name in ("0", "4", "7"):
        without.twin.get_submodule(name).register_forward_hook(
            lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1})
        )
    assert len(list(without(X))) == 10
    assert calls == {"0": 1, "4": 1 + 6, "7": 1 + 6 + 4}


def test_ablation_of_a_softmax_is_refused():
    model = nn.Sequential(*small(), nn.Softmax(1)).eval()
    with pytest.raises(ValueError, match="Sequential ends in a softmax or a sigmoid"):
        scored(model, pxp.Ablation())


@pytest.mark.parametrize("batch_size", [2, 64])
def test_fisher_by_finite_differences(batch_size):
    model = small()
    scores = scored(model, pxp.Fisher(), batch_size=batch_size)
    step = 1e-5

    def losses(layer: str, index: int, gate: float) -> Tensor:
        scaled = copy.deepcopy(model)
        site = scaled[1 if layer == "0" else 4]
        gates = torch.ones(6 if layer == "0" else 4, 1, 1, dtype=torch.float64)
        gates[index] = gate
        site.register_forward_hook(lambda _, inputs, output: output * gates)
        with torch.no_grad():
            return F.cross_entropy(scaled(X), LABELS, reduction="none")

    for layer, index in (("0", 0), ("0", 5), ("4", 2)):
        slope = (losses(layer, index, 1 + step) - losses(layer, index, 1 - step)) / (2 * step)
        assert scores[layer][index] == pytest.approx(float(slope.square().mean()), rel=1e-6)
    assert not scores.has_sign


@pytest.mark.parametrize("batch_size", [2, 64])
def test_variance_by_hand(batch_size):
    model = small()
    scores = scored(model, pxp.Variance(), batch_size=batch_size)
    with torch.no_grad():
        first, second = model[:3](X), model[:6](X)
    torch.testing.assert_close(scores["0"], first.transpose(0, 1).flatten(1).var(1, correction=0))
    torch.testing.assert_close(scores["4"], second.transpose(0, 1).flatten(1).var(1, correction=0))
    assert scores.samples == 9 and len(scores.references) == 9
    model = vit()
    heads, neurons = (scored(model, pxp.Variance(), kind, batch_size=batch_size) for kind in ("head", "neuron"))
    seen = {}
    block = model.blocks[1]
    block.attn.proj.register_forward_pre_hook(lambda _, inputs: seen.update(heads=inputs[0]))
    block.mlp.fc2.register_forward_pre_hook(lambda _, inputs: seen.update(neurons=inputs[0]))
    block.attn.fused_attn = False
    with torch.no_grad():
        model(X)
    each = seen["heads"].flatten(0, 1).var(0, correction=0)
    torch.testing.assert_close(heads["blocks.1.attn"], each.view(3, -1).sum(1))
    torch.testing.assert_close(neurons["blocks.1.mlp.fc1"], seen["neurons"].flatten(0, 1).var(0, correction=0))


class LowRank(nn.Linear):
    """A layer that has others inside, as adapters do."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__(features, outputs)
        self.down, self.up = nn.Linear(features, 2, bias=False), nn.Linear(2, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


def test_weighted_activation_sees_what_a_layer_does_besides():
    """A hook behind it, a layer inside it: the scores are those of the same network written without."""
    plain = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Linear(192, 5)))
    hooked = copy.deepcopy(plain)
    with torch.no_grad():
        hooked[0].weight.copy_(plain[0].weight.flip(0))
        hooked[0].bias.copy_(plain[0].bias.flip(0))
    hooked[0].register_forward_hook(lambda module, inputs, output: output.flip(1))
    found, expected = (scored(model, pxp.WeightedActivation()) for model in (hooked, plain))
    torch.testing.assert_close(dict(found), dict(expected))

    adapted = randomise(nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), LowRank(6, 5)))
    units = pxp.find_components(adapted, "neuron", example=X[:1])
    found = columns(Probe(adapted, units.trace, units, (X, LABELS)), X[:2])
    both = adapted[3].weight.square().sum(0) + adapted[3].down.weight.square().sum(0)
    torch.testing.assert_close(found["1"], both.detach())


def test_weighted_activation_under_a_mask():
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Linear(192, 5)))
    units = pxp.find_components(model, "filter", example=X)
    kept = dict(pxp.Mask.all(units))
    kept["0"] = torch.tensor([True, False, True, True])
    whole = scored(model, pxp.WeightedActivation())["0"]
    with pxp.masked(model, pxp.Mask(units, kept)):
        masked = scored(model, pxp.WeightedActivation())["0"]
    torch.testing.assert_close(masked, whole * kept["0"])


def test_weighted_activation_by_hand():
    model = small()
    scores = scored(model, pxp.WeightedActivation(), batch_size=4)
    with torch.no_grad():
        first, second = model[:3](X), model[:6](X)
    norm = first.square().mean((0, 2, 3)) * model[4].weight.square().sum((0, 2, 3))
    torch.testing.assert_close(scores["0"], norm.sqrt())
    by_place = model[7].weight.square().sum(0).view(4, 4).sum(1)  # flattened: four places of each filter
    torch.testing.assert_close(scores["4"], (second.square().mean((0, 2, 3)) * by_place).sqrt())
    assert scores.samples == 9 and not scores.has_sign


def test_columns_that_read_a_channel():
    model = randomise(Residual())
    units = pxp.find_components(model, example=X[:1])
    with torch.no_grad():
        found = columns(Probe(model, units.trace, units, (X, LABELS)), X[:2])
        scale = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()  # of the merged BatchNorm
        weights = model.second.weight * scale[:, None, None, None], model.short.weight
        norms = [weight.square().flatten(2).sum((0, 2)) for weight in weights]
        torch.testing.assert_close(found["first"], norms[0] + norms[1])  # both read it
        head = model.head.weight.square().sum(0)
        torch.testing.assert_close(found["second"], head)
        torch.testing.assert_close(found["short"], head)
    model = vit()
    units = pxp.find_components(model, "neuron", example=X[:1])
    found = columns(Probe(model, units.trace, units, (X, LABELS)), X[:2])
    torch.testing.assert_close(found["blocks.0.mlp.fc1"], model.blocks[0].mlp.fc2.weight.square().sum(0).detach())
    units = pxp.find_components(model, "head", example=X[:1])
    found = columns(Probe(model, units.trace, units, (X, LABELS)), X[:2])
    torch.testing.assert_close(found["blocks.0.attn"], model.blocks[0].attn.proj.weight.square().sum(0).detach())


def test_columns_of_grouped_and_joined_channels():
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.both, self.head = nn.Conv2d(8, 6, 3, groups=2), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            both = torch.cat([self.two(x).relu(), F.avg_pool2d(self.one(x), 1)], 1)
            return self.head(self.both(both).amax((2, 3)))

    model = randomise(Joined())
    units = pxp.find_components(model, example=X[:1])
    found = columns(Probe(model, units.trace, units, (X, LABELS)), X[:2])
    norms = model.both.weight.detach().square().view(2, 3, 4, 9).sum((1, 3))
    torch.testing.assert_close(found["two"], norms[0])
    torch.testing.assert_close(found["one"], norms[1])
    torch.testing.assert_close(found["both"], model.head.weight.detach().square().sum(0))


def test_mixed_channels_have_no_columns():
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 5)))
    with pytest.raises(ValueError, match=r"between '0' \(filters\) and '3', which reads it, channels are mixed"):
        scored(model, pxp.WeightedActivation())


def test_geometric_median_by_hand():
    model = small()
    scores = scored(model, pxp.GeometricMedian(folded=False))
    weight = model[0].weight.detach().flatten(1)
    expected = torch.stack([(weight - row).norm(dim=1).sum() / 5 for row in weight])
    torch.testing.assert_close(scores["0"], expected)
    assert scores.samples == 0 and scores.draw == ""
    scale = model[1].weight / (model[1].running_var + model[1].eps).sqrt()
    weight = (model[0].weight * scale[:, None, None, None]).detach().flatten(1)
    expected = torch.stack([(weight - row).norm(dim=1).sum() / 5 for row in weight])
    torch.testing.assert_close(scored(model, pxp.GeometricMedian())["0"], expected)


@pytest.mark.parametrize(
    "criterion",
    [pxp.Ablation(), pxp.Fisher(), pxp.Variance(), pxp.WeightedActivation(), pxp.GeometricMedian(folded=False)],
)
def test_rivals_are_values(criterion):
    names = vars(pxp)
    assert eval(repr(criterion), dict(names)) == criterion and hash(criterion) == hash(copy.copy(criterion))


class Between(nn.Module):
    """Something between two convolutions."""

    def __init__(self, how, channels: int = 7, read: int = 7) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Conv2d(3, channels, 3), nn.Conv2d(read, 5, 1), how

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.how(self.a(x))).mean((2, 3))


@pytest.mark.parametrize(
    ("how", "channels", "read"),
    [
        (lambda z: z.relu().mean(1, keepdim=True), 7, 1),
        (lambda z: sum(z.chunk(2, 1)).relu(), 8, 4),
        (lambda z: z.relu().unflatten(1, (3, 3)).mean(2), 9, 3),
        (lambda z: z.relu() + z.relu().roll(2, 1), 8, 8),
        (lambda z: F.layer_norm(z.movedim(1, -1), (7,)).movedim(-1, 1), 7, 7),
    ],
    ids=["mean", "sum of halves", "means of three", "shifted", "norm"],
)
def test_any_mixture_of_channels_is_refused(how, channels, read):
    with pytest.raises(ValueError, match=r"between 'a' \(filters\) and 'b', which reads it, channels are mixed"):
        scored(randomise(Between(how, channels, read)), pxp.WeightedActivation())


@pytest.mark.parametrize(
    "how",
    [
        nn.Hardtanh(),
        lambda z: z.clamp(0, 1),
        nn.Threshold(3.0, 0.0),
        lambda z: F.relu(
            F.batch_norm(z, torch.full((7,), 3.0).double(), torch.ones(7).double(), -torch.ones(7).double())
        ),
        lambda z: F.relu(-z),
        lambda z: z[:, [3, 2, 1, 0, 6, 5, 4]].sigmoid(),
    ],
    ids=["hardtanh", "clamp", "threshold", "a norm that turns round", "negative", "permuted"],
)
def test_a_layer_that_is_read_is_read_whatever_lies_between(how):
    model = randomise(Between(how))
    units = pxp.find_components(model, example=X[:1]).only("a")
    found = columns(Probe(model, units.trace, units, (X, LABELS)), X[:2])["a"]
    norms = model.b.weight.detach().square().sum((0, 2, 3))
    # where a channel alone is large, there it is read
    moved = how(torch.diag(torch.full((7,), 9.0))[:, :, None, None].double()).flatten(1)
    still = how(torch.zeros(7, 7, 1, 1).double()).flatten(1)
    low = how(torch.diag(torch.full((7,), -9.0))[:, :, None, None].double()).flatten(1)
    where = ((moved - still).abs() + (low - still).abs()).argmax(1)
    torch.testing.assert_close(found, norms[where])


def test_a_transposed_convolution_in_groups_has_columns():
    model = randomise(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 2, 2, groups=2), nn.Flatten(), nn.Linear(864, 5))
    )
    units = pxp.find_components(model, example=X[:1])
    found = columns(Probe(model, units.trace, units, (X, LABELS)), X[:2])
    torch.testing.assert_close(found["0"], model[1].weight.detach().square().flatten(1).sum(1))
    torch.testing.assert_close(found["1"], model[3].weight.detach().square().sum(0).view(6, -1).sum(1))


def test_ablation_where_tracing_misses_something():
    class View(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.h = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            z = self.a(x).relu()
            z.flatten(2).add_(1.0)
            return self.h(self.b(z).mean((2, 3)))

    model = randomise(View())
    units = pxp.find_components(model, example=X[:1])
    scores = pxp.attribute(model, (X, LABELS), units, pxp.Ablation())
    with torch.no_grad():
        before = F.cross_entropy(model(X), LABELS, reduction="none")
        kept = dict(pxp.Mask.all(units)) | {"a": torch.arange(6) != 0}
        with pxp.masked(model, pxp.Mask(units, kept)):
            rise = F.cross_entropy(model(X), LABELS, reduction="none") - before
    assert scores.signed["a"][0] == pytest.approx(float(rise.mean()), abs=1e-12)


def test_ablation_of_log_probabilities_is_that_of_logits():
    plain, logs = small(), nn.Sequential(*small(), nn.LogSoftmax(1)).eval()
    one, other = (scored(model, pxp.Ablation()) for model in (plain, logs))
    assert all((one.signed[name] - other.signed[name]).abs().max() < 1e-12 for name in one)
