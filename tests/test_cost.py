"""What a network costs, against counts by hand."""

from __future__ import annotations

import pytest
import torch
from conftest import network
from torch import nn

import pxp


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


def test_only_equal_batches_are_compared():
    model = pxp.load_model("vit")
    one, two = (pxp.cost(model, torch.rand(n, 1, 28, 28), seconds=0.001) for n in (1, 2))
    for named, shown in (({}, r"\[\]"), ({"a": one, "b": two}, r"\[1, 2\]")):
        with pytest.raises(ValueError, match=f"costs of one batch size are comparable, got {shown}"):
            pxp.compare_costs(named)


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
