"""Many masks measured together: the same accuracies, with less work."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from conftest import drawn, network, randomise, same, snapshot
from test_evaluate import NETS
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import pxp
from pxp import sweep
from pxp.sweep import Merger, Sweep

RATES = (0, 0.02, 0.05, 0.1, 0.3, 0.6, 0.9, 1)


@pytest.fixture
def cut_only(monkeypatch):
    """Whatever is masked instead of cut is an error."""

    def refuse(*_):
        raise AssertionError("masked, not cut")

    monkeypatch.setattr(sweep, "silenced", refuse)


def by_hand(model: nn.Module, masks: list[pxp.Mask], data: tuple[Tensor, Tensor], **options) -> list[float]:
    found = []
    for mask in masks:
        with pxp.masked(model, mask):
            found.append(pxp.accuracy(model, data, **options))
    return found


def balanced(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images with the classes that the model gives them, which are not all the same."""
    with torch.no_grad():
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        last.bias -= model(images).mean(0)
        return images, model(images).argmax(1)


@pytest.mark.parametrize("name", NETS)
def test_networks_that_share_values(name, cut_only):
    make, channels, side = NETS[name]
    model = randomise(make()).float()
    data = balanced(model, torch.randn(30, channels, side, side))
    units = pxp.find_components(model, example=data[0])
    scores = pxp.attribute(model, (data[0][:8], data[1][:8]), units, pxp.LRP("zplus"))
    masks = [scores.select(rate) for rate in RATES] + [drawn(units, 0.4, seed) for seed in range(3)]
    expected = by_hand(model, masks, data)
    before = snapshot(model)
    assert Sweep(model, data, batch_size=13).accuracies(masks) == expected
    assert same(before, snapshot(model)) and expected[0] == 1 and len(set(expected)) > 2


@pytest.mark.parametrize("kind", ["head", "neuron", ("head", "neuron", "mlp_output")])
@pytest.mark.parametrize("source", ["shipped", "timm"])
def test_transformers(source, kind, cut_only):
    if source == "shipped":
        model, shape = pxp.load_model("vit"), (60, 1, 28, 28)
    else:
        torch.manual_seed(0)
        options = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 7}
        model, shape = timm.create_model("deit3_small_patch16_224", **options).eval(), (60, 3, 32, 32)
    data = balanced(model, torch.rand(shape))
    scores = pxp.attribute(model, None, pxp.find_components(model, kind), pxp.Random())
    masks = [scores.select(rate) for rate in RATES]
    found = Sweep(model, data).accuracies(masks, None)
    assert found == pytest.approx(by_hand(model, masks, data), abs=1 / 60 + 1e-9)  # one image may lie on the border
    assert found[0] == 1 and len(set(found)) > 1


def test_what_is_equal_is_computed_once(cut_only):
    """Masks that differ in the last layer only: everything before runs once."""
    model, x, _, units = network("vgg", samples=20)
    last = list(units)[-1]
    masks = []
    for index in range(5):
        kept = {name: torch.arange(layer.size) != 1 for name, layer in units.items()}
        kept[last] = torch.arange(units[last].size) != index
        masks.append(pxp.Mask(units, kept))
    merger = Merger()
    blueprint = sweep.Blueprint(model, units, x)
    for mask in masks:
        merger.add(*blueprint.cut(mask))
    merged = merger.network(x)
    convolutions = [part for part in merged.modules() if isinstance(part, nn.Conv2d)]
    assert len(convolutions) == len(units) - 1 + 5
    with torch.no_grad():
        for mask, logits in zip(masks, merged(x), strict=True):
            with pxp.masked(model, mask):
                torch.testing.assert_close(logits, model(x), rtol=1e-9, atol=1e-9)


def test_parts_that_only_look_equal_stay_apart():
    """The same layer with other weights, settings, arguments or options is another one."""
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    pools = [nn.AvgPool1d(1), nn.AvgPool1d(1, padding=0, ceil_mode=True), nn.MaxPool1d(1)]

    def graph(*parts, power=2.0):
        made = fx.Graph()
        value = made.placeholder("x")
        for index in range(len(parts)):
            value = made.call_module(str(index), (value,))
        made.output(made.call_function(torch.pow, (value,), {"exponent": power}))
        return {str(index): part for index, part in enumerate(parts)}, made

    def merged(*graphs):
        merger = Merger()
        for parts, made in graphs:
            merger.add(parts, made)
        return merger.network(torch.zeros(1, 3))

    def calls(network):
        return sum(node.op in ("call_module", "call_function") for node in network.graph.nodes)

    same_weights = nn.Linear(3, 3)
    same_weights.load_state_dict(one.state_dict())
    assert calls(merged(graph(one), graph(same_weights), graph(one))) == 2
    assert calls(merged(graph(one), graph(two))) == 4
    assert calls(merged(graph(one), graph(one, power=3.0))) == 3
    assert calls(merged(*(graph(pool) for pool in pools))) == 6
    assert calls(merged(graph(one, two), graph(two, one))) == 6
    x = torch.rand(2, 3)
    found = merged(graph(one, two), graph(two, one), graph(one, same_weights, power=3.0))(x)
    expected = two(one(x)) ** 2, one(two(x)) ** 2, one(one(x)) ** 3
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("room", [0, 50_000])
def test_no_more_weights_than_there_is_room_for(room, cut_only, monkeypatch):
    model, x, labels, units = network("vgg", samples=20)
    masks = [drawn(units, rate) for rate in (0.1, 0.3, 0.5, 0.7)]
    expected = Sweep(model, (x, labels)).accuracies(masks)
    made = []
    network_of = Merger.network
    monkeypatch.setattr(Merger, "network", lambda merger, images: made.append(merger) or network_of(merger, images))
    monkeypatch.setattr(sweep, "ROOM", room)
    assert Sweep(model, (x, labels)).accuracies(masks) == expected
    assert len(made) == 4 if room == 0 else len(made) > 1


def test_each_mask_once():
    model, x, labels, units = network("vgg", samples=20)
    one, two = drawn(units, 0.3, 0), drawn(units, 0.3, 1)
    done: list[int] = []
    measure = Sweep(model, (x, labels), batch_size=8)
    first = measure.accuracies([one, two, one], done.append)
    assert done == [16, 16, 8] and first[0] == first[2]
    assert measure.accuracies([two, one], done.append) == first[1::-1] and len(done) == 3
    assert measure.accuracies([]) == []


@pytest.mark.parametrize("data", ["dataset", "loader"])
def test_data_of_every_sort(data, cut_only):
    model, x, labels, units = network("vgg", samples=20)
    masks = [drawn(units, rate) for rate in (0, 0.5)]
    given = TensorDataset(x, labels)
    given = DataLoader(given, batch_size=6) if data == "loader" else given
    expected = by_hand(model, masks, (x, labels), classes=[1, 5, 2])
    assert Sweep(model, given, classes=[1, 5, 2], batch_size=6).accuracies(masks) == expected


class Branches(nn.Module):
    """A branch that depends on the values stops the tracing."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(8, 3)

    def forward(self, x):
        x = self.conv(x).relu().mean((2, 3))
        return self.fc(x if x.sum() > 0 else -x)


def test_what_cannot_be_cut_is_masked(caplog):
    torch.manual_seed(0)
    model, images = Branches().eval(), torch.rand(30, 1, 8, 8)
    data = images, model(images).argmax(1)
    units = pxp.find_components(model, example=images[:1])
    masks = [drawn(units, 0.5, seed) for seed in range(3)]
    with pytest.raises(ValueError, match="cannot be traced"):
        pxp.compact(model, masks[0], example=images[:1])
    expected = by_hand(model, masks, data)
    caplog.clear()
    assert Sweep(model, data, batch_size=30).accuracies(masks) == expected
    (said,) = caplog.messages  # once for all masks
    assert said.startswith("Branches cannot be cut, so masks are measured one at a time: Branches cannot be traced")


def test_what_is_random_is_refused():
    class Random(Branches):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.5, training=True))

    torch.manual_seed(0)
    model, images = Random().eval(), torch.rand(30, 1, 8, 8)
    units = pxp.find_components(model, example=images[:1])
    with pytest.raises(ValueError, match="Random gives something else each time"):
        Sweep(model, (images, torch.zeros(30).long())).accuracies([drawn(units, 0.5)])


class ReadsItsWeight(Branches):
    def forward(self, x):
        x = self.conv(x).relu().mean((2, 3)) * self.conv.weight.flatten(1).norm(dim=1).sum() ** 2
        return self.fc(x if x.sum() > 0 else -x)


@pytest.mark.parametrize("make", [Branches, ReadsItsWeight])
def test_weights_that_are_read_and_hooks_behind_a_layer(make):
    """Zeroed rows are not masked filters there; the curve is that of the masked model all the same."""
    torch.manual_seed(0)
    model, images = make().eval(), torch.rand(60, 1, 8, 8)
    if make is Branches:
        shift = 2 * torch.rand(8, 1, 1) - 1
        model.conv.register_forward_hook(lambda module, inputs, output: output + shift)
    data = balanced(model, images)
    units = pxp.find_components(model, example=images[:1])
    masks = [drawn(units, rate) for rate in (0, 0.3, 0.6)]
    expected = by_hand(model, masks, data)
    assert len(set(expected)) > 1
    assert Sweep(model, data).accuracies(masks) == expected


def test_a_misread_structure_is_masked_instead(monkeypatch):
    """What the comparison with the masked model finds wrong is not measured."""
    model, x, labels, units = network("resnet", samples=20)
    masks = [drawn(units, rate) for rate in (0.05, 0.2)]
    expected = by_hand(model, masks, (x, labels))
    cut, cuts = sweep.Blueprint.cut, []

    def wrong(blueprint, mask):
        cuts.append(mask)
        return cut(blueprint, masks[0])

    monkeypatch.setattr(sweep.Blueprint, "cut", wrong)
    assert Sweep(model, (x, labels)).accuracies(masks) == expected and len(cuts) == 2


def test_in_threads():
    """Every thread measures its own masks with the same object; none sees another's."""
    model, x, labels, units = network("vgg", samples=40)
    masks = [drawn(units, 0.1 * (1 + seed % 5), seed) for seed in range(12)]
    expected = by_hand(model, masks, (x, labels))
    before = snapshot(model)
    measure = Sweep(model, (x, labels))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda mask: measure.accuracies([mask])[0], masks))
    assert found == expected and same(before, snapshot(model))


def test_errors_are_those_of_accuracy():
    model, x, labels, units = network("vgg")
    mask = drawn(units, 0.3)
    for classes, message in (
        ([0, 0], "distinct"),
        ([-1], "class -1 does not exist"),
        ([0, 99], "classes reach 99, but the model has"),
    ):
        with pytest.raises(ValueError, match=message):
            Sweep(model, (x, labels), classes=classes).accuracies([mask])
    with pytest.raises(ValueError, match="non-empty batch"):
        Sweep(model, (x[:0], labels[:0])).accuracies([mask])
    other, *_ = network("resnet")
    with pytest.raises(ValueError, match="another model"):
        Sweep(other, (x, labels)).accuracies([mask])
