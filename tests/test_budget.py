"""Selecting to a budget: the smaller network costs at most what it may, and one component more would be too dear."""

import pickle

import pytest
import torch
from torch import nn

import pxp
from pxp.budget import Budget, latencies

SHAPE = {"example": torch.rand(2, 1, 28, 28)}


@pytest.fixture(scope="module")
def networks():
    data = pxp.load_dataset()
    refs = pxp.reference_samples(data.reference, per_class=1)
    found = {}
    for name, kind in (("vgg", "filter"), ("resnet", "filter"), ("vit", ("head", "neuron"))):
        model = pxp.load_model(name)
        units = pxp.find_components(model, kind)
        found[name] = model, pxp.attribute(model, refs, units, pxp.LRP(), progress=False)
    return found


def left(model, mask, quantity):
    """Share of the cost that is left, counted by pxp.cost."""
    dense, small = (pxp.cost(net, SHAPE["example"], seconds=0.001) for net in (model, pxp.compact(model, mask)))
    return getattr(small, quantity) / getattr(dense, quantity)


@pytest.mark.parametrize("quantity", ["flops", "parameters"])
@pytest.mark.parametrize("name", ["vgg", "resnet", "vit"])
def test_a_budget_prunes_no_more_than_it_takes(networks, name, quantity):
    model, scores = networks[name]
    mask = scores.select(**{quantity: 0.5})
    assert left(model, mask, quantity) <= 0.5
    fewer = scores.select(count=mask.units.total - mask.kept - 1)
    assert fewer.kept == mask.kept + 1 and left(model, fewer, quantity) > 0.5
    assert all(bool((fewer[layer] | ~mask[layer]).all()) for layer in mask)


def test_options_hold_for_budgets(networks):
    model, scores = networks["resnet"]
    mask = scores.select(flops=0.4, scope="layer", min_keep=3, order="most", by="signed")
    assert left(model, mask, "flops") <= 0.4 and min(int(kept.sum()) for kept in mask.values()) >= 3
    rates = [float((~kept).double().mean()) for kept in mask.values()]
    assert max(rates) - min(rates) < 0.05
    assert scores.select(flops=1.0).kept == mask.units.total
    assert left(model, scores.select(parameters=0.9, model=model), "parameters") <= 0.9


@pytest.mark.parametrize("cost", ["flops", "parameters", "latency"])
def test_score_per_cost_to_a_budget(networks, cost):
    model, scores = networks["vgg"]
    mask = scores.select(flops=0.5, cost=cost, min_keep=2, **SHAPE)
    assert 0.45 < left(model, mask, "flops") <= 0.5 and min(int(kept.sum()) for kept in mask.values()) >= 2
    assert any(not torch.equal(mask[name], scores.select(flops=0.5)[name]) for name in mask)


def test_cost_per_filter_falls_as_its_inputs_go():
    """Two layers of equal cost; the second one's filters get cheap once half of the first one's are gone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    example = torch.rand(1, 8, 9, 9)
    model(example)
    units = pxp.find_components(model.eval(), example=example)
    # the first layer's four worst are of no worth; the others and the second layer's are nearly alike
    values = {"0": torch.tensor([0, 0, 0, 0, 1.1, 1.1, 1.1, 1.1]), "2": torch.ones(8)}
    scores = pxp.Scores(units, values, values)
    target = Budget(model, "parameters", 0.55, example)
    mask = scores.select(parameters=0.55, cost="parameters", example=example)
    assert target.fits(mask) and mask["0"].sum() < 4
    # with prices as they were at first, 1.0 would go before 1.1
    static = scores.select(0.5, cost="parameters")
    assert int(static["2"].sum()) < 8 and static["0"].sum() == 4
    assert int(mask["2"].sum()) > int(static["2"].sum())


def test_latency(networks):
    model, scores = networks["vgg"]
    seconds = latencies(model, scores.units, SHAPE["example"])
    assert set(seconds) == set(scores) and all(0 < value < 1 for value in seconds.values())
    mask = scores.select(0.5, cost="latency", **SHAPE)
    saved = sum(seconds[name] * int((~kept).sum()) for name, kept in mask.items())
    assert 0 < saved < sum(seconds[name] * len(kept) for name, kept in mask.items())
    assert mask.kept < scores.units.total
    images = torch.rand(32, 1, 28, 28)
    mask = scores.select(latency=0.6, example=images)
    assert 0.1 < left(model, mask, "flops") < 1


def test_heads_and_neurons_have_a_latency(networks):
    model, scores = networks["vit"]
    assert min(latencies(model, scores.units).values()) > 0


def test_errors(networks):
    scores = networks["vgg"][1]
    for given in ({}, {"rate": 0.5, "flops": 0.5}, {"flops": 0.5, "latency": 0.5}, {"count": 3, "parameters": 0.1}):
        with pytest.raises(ValueError, match="give exactly one of rate, count, flops, parameters and latency"):
            scores.select(**given)
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"flops must be in \[0, 1\], got"):
            scores.select(flops=value)
    with pytest.raises(ValueError, match=r"parameters=0\.001 cannot be reached"):
        scores.select(parameters=0.001, min_keep=4)
    with pytest.raises(ValueError, match=r"flops=0 cannot be reached"):
        scores.select(flops=0.0, min_keep=1, cost="flops")
    with pytest.raises(ValueError, match='score per cost ranks across layers; use scope="global"'):
        scores.select(flops=0.5, cost="flops", scope="layer")
    with pytest.raises(ValueError, match="these components are of another model"):
        scores.select(flops=0.5, model=networks["vit"][0])
    with pytest.raises(ValueError, match="does not accept images of shape"):
        scores.select(flops=0.5, example=torch.rand(1, 3, 28, 28))


def test_the_model_is_remembered_but_not_held(tmp_path):
    model = pxp.load_model("vgg")
    units = pxp.find_components(model)
    scores = pxp.attribute(model, None, units, pxp.Magnitude())
    assert units.model is model and units.only("features.0").model is model
    assert pickle.loads(pickle.dumps(units)).model is None
    scores.save(tmp_path / "scores.safetensors")
    read = pxp.Scores.load(tmp_path / "scores.safetensors")
    with pytest.raises(ValueError, match="the model that these components were found in is gone; give model="):
        read.select(flops=0.5)
    assert torch.equal(read.select(flops=0.7, model=model)["features.0"], scores.select(flops=0.7)["features.0"])
    del model
    assert units.model is None
