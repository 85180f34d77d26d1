"""What a network costs, against counts by hand."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torchvision
from conftest import network
from torch import nn

import pxp
from pxp.cost import QUANTITIES


def test_counts_by_hand(untouched):
    model = untouched(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5)))
    found = pxp.cost(model, torch.rand(4, 2, 6, 6), seconds=0.01)
    assert found.parameters == 3 * 2 * 9 + 3 + 48 * 5 + 5 and found.bytes == 4 * found.parameters
    convolution, linear = 2 * 4 * 3 * 16 * 18, 2 * 4 * 48 * 5
    assert found.layers == {"0": convolution, "3": linear} and found.flops == convolution + linear
    assert found.batch == 4 and found.threads == 1 and found.latency > 0
    # the convolution's output and the ReLU's, 4 × 3 × 4 × 4 floats each, and less than as much again
    assert 4 * 4 * 48 < found.memory < 4 * 4 * 4 * 48
    assert "302 parameters" in repr(found) and "(batch 4, 1 thread)" in repr(found)


def test_a_mask_saves_nothing_and_compaction_does(untouched):
    model, x, _, units = network("resnet")
    untouched(model)
    mask = pxp.attribute(model, None, units, pxp.Random()).select(0.5)
    dense = pxp.cost(model, x, seconds=0.01)
    with pxp.masked(model, mask):
        silenced = pxp.cost(model, x, seconds=0.01)
    small = pxp.cost(pxp.compact(model, mask, example=x), x, seconds=0.01)
    assert silenced.flops == dense.flops and silenced.parameters == dense.parameters
    assert small.flops < 0.5 * dense.flops and small.bytes < 0.5 * dense.bytes and small.memory <= dense.memory
    assert set(small.layers) <= set(dense.layers) and sum(small.layers.values()) == small.flops
    assert sum(dense.layers.values()) == dense.flops
    table = pxp.compare_costs({"dense": dense, "masked": silenced, "compact": small})
    rows = {line[: line.rindex("  ")].split("  ")[0] or line.split()[0]: line.split() for line in table.splitlines()}
    assert rows["dense"] == ["dense", "masked", "compact"]
    assert rows["parameters"][1:] == [f"{dense.parameters:,}"] * 2 + [f"{small.parameters:,}"]
    counted = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line.startswith("  ")}
    for name, flops in dense.layers.items():
        assert counted[name] == [f"{flops / 1e6:.1f}"] * 2 + [f"{small.layers.get(name, 0) / 1e6:.1f}"]
    figure = pxp.plots.costs({"dense": dense, "compact": small})
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights[:4] == [100] * 4 and heights[4] == pytest.approx(100 * small.parameters / dense.parameters)
    assert [bar.get_height() * 1e6 for bar in figure.axes[1].patches[: len(dense.layers)]] == pytest.approx(
        list(dense.layers.values())
    )


class Own(nn.Module):
    """Multiplies by a parameter of its own, between modules; one of them has the name of the class."""

    def __init__(self) -> None:
        super().__init__()
        self.Own, self.matrix, self.inner = (
            nn.Linear(4, 4),
            nn.Parameter(torch.ones(4, 4)),
            nn.Sequential(nn.Linear(4, 3)),
        )

    def forward(self, x):
        return self.inner(self.Own(x) @ self.matrix)


def timm_vit():
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: pxp.load_model("vit"), (1, 28, 28)),
        (lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 24, 48, num_classes=5), (3, 32, 32)),
        (timm_vit, (3, 32, 32)),
        (torchvision.models.convnext_tiny, (3, 32, 32)),
        (torchvision.models.resnet18, (3, 32, 32)),
        (lambda: nn.Conv2d(3, 4, 3), (3, 8, 8)),
        (lambda: nn.Linear(3, 4), (3,)),
        (Own, (4,)),
    ],
    ids=["vit", "torchvision-vit", "timm-vit", "convnext", "resnet", "convolution", "linear", "own"],
)
def test_layers_add_up(make, shape, untouched):
    model = make()
    untouched(model)
    found = pxp.cost(model, torch.rand(2, *shape), seconds=0.001)
    parts = found.by_layer.values()
    assert found.flops == sum(found.layers.values()) > 0 and min(found.layers.values()) > 0
    assert found.parameters == sum(part.parameters for part in parts)
    assert found.bytes == sum(part.bytes for part in parts)
    assert found.memory == max(part.memory for part in parts) > 0
    assert sum(part.latency for part in parts) > 0 and {(part.batch, part.threads) for part in parts} == {(2, 1)}


def test_a_module_counts_without_the_modules_inside_it():
    found = pxp.cost(Own(), torch.rand(2, 4), seconds=0.001)
    assert found.layers == {"": 2 * 2 * 16, "Own": 2 * 2 * 16, "inner.0": 2 * 2 * 12}
    parameters = {name: part.parameters for name, part in found.by_layer.items()}
    assert parameters == {"": 16, "Own": 20, "inner": 0, "inner.0": 15}
    assert pxp.compare_costs({"a": found}).splitlines()[-3].split() == ["(model)", "0.0"]
    linear = nn.Linear(4, 4)  # a module that is used twice has one name
    twice = pxp.cost(nn.Sequential(linear, nn.ReLU(), linear), torch.rand(2, 4), seconds=0.001)
    assert twice.layers == {"0": 2 * 2 * 2 * 16} and twice.by_layer["0"].parameters == 20


def test_memory_and_time_say_where_the_cost_is(monkeypatch):
    """By a clock that goes on in one module only: what a real one shows depends on the machine."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(sys.modules["pxp.cost"], "time", clock)

    class Slow(nn.Module):
        def forward(self, x):
            clock.now += 0.005
            return x.repeat(1, 100).sum(1, keepdim=True) + x

    found = pxp.cost(nn.Sequential(nn.Linear(4, 4), Slow(), nn.Linear(4, 4)), torch.rand(8, 4), seconds=0.001).by_layer
    assert found["1"].latency == pytest.approx(0.005)
    assert max(found[name].latency for name in ("", "0", "2")) == 0
    assert found["1"].memory >= 4 * 8 * 400 > 5 * max(found[name].memory for name in ("", "0", "2"))


@pytest.mark.parametrize("quantity", ["parameters", "bytes", "memory", "latency"])
def test_other_costs_of_layers_are_printed_and_drawn(quantity):
    model = nn.Sequential(nn.Conv2d(1, 2000, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8000, 2))
    found = pxp.cost(model, torch.rand(1, 1, 4, 4), seconds=0.001)
    title, unit, style = QUANTITIES[quantity]
    lines = pxp.compare_costs({"a": found}, layers=quantity).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    shown = dict(line.split() for line in lines[start + 1 :] if line.startswith("  "))
    expected = {name: getattr(part, quantity) / unit for name, part in found.by_layer.items()}
    assert {"0", "3"} <= set(shown)
    assert all(shown[name or "(model)"] == format(value, style) for name, value in expected.items() if value)
    drawn = pxp.plots.costs({"a": found}, layers=quantity).axes[1]
    assert [bar.get_height() for bar in drawn.patches] == pytest.approx([value for value in expected.values() if value])
    assert drawn.get_ylabel() == title


def test_a_share_of_nothing_is_not_drawn():
    nothing, some = (
        pxp.cost(model, torch.rand(2, 3), seconds=0.001) for model in (nn.Sequential(nn.ReLU()), nn.Linear(3, 2))
    )
    assert nothing.parameters == nothing.flops == 0 and nothing.layers == {}
    heights = [bar.get_height() for bar in pxp.plots.costs({"a": nothing, "b": some}).axes[0].patches]
    assert [math.isnan(height) for height in heights] == [True, True, False, False] * 2


def test_only_equal_batches_are_compared():
    model = pxp.load_model("vit")
    one, two = (pxp.cost(model, torch.rand(n, 1, 28, 28), seconds=0.001) for n in (1, 2))
    for named, shown in (({}, r"\[\]"), ({"a": one, "b": two}, r"\[1, 2\]")):
        with pytest.raises(ValueError, match=f"costs of one batch size are comparable, got {shown}"):
            pxp.compare_costs(named)
    for compare in (pxp.compare_costs, pxp.plots.costs):
        with pytest.raises(ValueError, match="layers must be one of 'parameters', .*, got 'time'"):
            compare({"a": one}, layers="time")


def test_the_operations_of_attention_are_counted():
    model = pxp.load_model("vit")
    found = pxp.cost(model, torch.rand(1, 1, 28, 28), seconds=0.01)
    units = pxp.find_components(model, ("head", "neuron"))
    parts = sum(layer.size * layer.flops for layer in units.values())
    rest = 2 * 16 * 49 * 64 + 2 * 64 * 10  # patches and head
    products = 6 * 8 * 2 * 2 * 17 * 17 * 8  # torch's counter may not see inside the fused attention
    assert found.flops in (parts + rest, parts + rest - products)


def test_images_that_do_not_fit():
    with pytest.raises(ValueError, match="does not accept images of shape"):
        pxp.cost(pxp.load_model("vit"), torch.rand(1, 3, 28, 28))
