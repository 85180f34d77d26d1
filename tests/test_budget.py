"""Selecting to a budget: the smaller network costs at most what it may, and one component more would be too dear."""

import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import pxp
from pxp.budget import Budget, latencies, weights_left

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
    mask = pxp.within_budget(scores, **{quantity: 0.5})
    assert left(model, mask, quantity) <= 0.5
    fewer = scores.select(count=mask.units.total - mask.kept - 1)
    assert fewer.kept == mask.kept + 1 and left(model, fewer, quantity) > 0.5
    assert all(bool((fewer[layer] | ~mask[layer]).all()) for layer in mask)


def test_options_hold_for_budgets(networks):
    model, scores = networks["resnet"]
    mask = pxp.within_budget(scores, flops=0.4, scope="layer", min_keep=3, order="most", by="signed")
    assert left(model, mask, "flops") <= 0.4 and min(int(kept.sum()) for kept in mask.values()) >= 3
    rates = [float((~kept).double().mean()) for kept in mask.values()]
    assert max(rates) - min(rates) < 0.05
    assert pxp.within_budget(scores, flops=1.0).kept == mask.units.total
    assert left(model, pxp.within_budget(scores, parameters=0.9, model=model), "parameters") <= 0.9


@pytest.mark.parametrize("cost", ["flops", "parameters", "latency"])
def test_score_per_cost_to_a_budget(networks, cost):
    model, scores = networks["vgg"]
    mask = pxp.within_budget(scores, flops=0.5, cost=cost, min_keep=2, **SHAPE)
    assert 0.45 < left(model, mask, "flops") <= 0.5 and min(int(kept.sum()) for kept in mask.values()) >= 2
    assert any(not torch.equal(mask[name], pxp.within_budget(scores, flops=0.5)[name]) for name in mask)


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
    mask = pxp.within_budget(scores, parameters=0.55, cost="parameters", example=example)
    assert target.fits(mask) and mask["0"].sum() < 4
    # with prices as they were at first, 1.0 would go before 1.1
    static = scores.select(0.5, cost="parameters")
    assert int(static["2"].sum()) < 8 and static["0"].sum() == 4
    assert int(mask["2"].sum()) > int(static["2"].sum())


def mlp():
    """Three layers of neurons of equal cost behind the first."""
    torch.manual_seed(0)
    layers = [part for _ in range(4) for part in (nn.Linear(16, 16), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(16, 4)).eval()
    return model, pxp.find_components(model, "neuron")


def keeping(units, **numbers):
    return {
        name: torch.arange(layer.size) < numbers.get(f"of_{name.replace('.', '_')}", layer.size)
        for name, layer in units.items()
    }


def test_weights_of_neurons_go_with_their_inputs_and_their_readers():
    model, units = mlp()
    small = pxp.compact(model, pxp.Mask(units, keeping(units, of_0=4, of_6=8)))
    left = weights_left(model, small, units)
    # 16 inputs and 16 outputs each, the last one 4
    assert left == {"0": 1.0, "2": (4 + 16) / 32, "4": (16 + 8) / 32, "6": 1.0}
    # what is counted on the compacted network itself is the same (a bias more)
    again = pxp.find_components(small, "neuron")
    assert all(again[name].parameters - 1 == left[name] * (units[name].parameters - 1) for name in units)
    # what has no input is constant and costs nothing
    gone = weights_left(model, pxp.compact(model, pxp.Mask(units, keeping(units, of_2=0))), units)
    assert all(0 < share < 1e-6 for share in gone.values())


def test_weights_of_other_components():
    model = pxp.load_model("vgg")
    units = pxp.find_components(model, ("filter", "neuron"))
    kept = {name: torch.arange(layer.size) % 2 == 0 for name, layer in units.items()}
    left = weights_left(model, pxp.compact(model, pxp.Mask(units, kept)), units)
    first, *convolutions = (name for name, layer in units.items() if layer.kind == "filter")
    assert left[first] == 1.0 and {left[name] for name in convolutions} == {0.5}
    # the second one's readers are the ten classes
    assert left["classifier.0"] == 0.5 and left["classifier.3"] == (64 + 10) / (128 + 10)
    model = pxp.load_model("vit")
    units = pxp.find_components(model, ("head", "neuron", "mlp_output"))
    kept = {name: torch.arange(layer.size) % 2 == 0 for name, layer in units.items()}
    left = weights_left(model, pxp.compact(model, pxp.Mask(units, kept)), units)
    # neurons read the residual stream, which stays; what reads them has lost half of its rows
    assert {(units[name].kind, share) for name, share in left.items()} == {
        ("head", 1.0), ("neuron", 0.75), ("mlp_output", 0.5),
    }  # fmt: skip


def test_the_price_of_a_neuron_falls_as_its_neighbours_go():
    _model, units = mlp()  # components do not hold their model
    # the first layer's are of no worth; then those behind it are the cheapest, and of two that are worth the same ...
    values = {name: torch.full((16,), 1.0) for name in units}
    values["0"] = torch.full((16,), 0.01)
    values["0"][:2] = 5.0
    values["2"] = torch.full((16,), 0.9)
    scores = pxp.Scores(units, values, values)
    mask, static = pxp.within_budget(scores, parameters=0.6, cost="parameters"), scores.select(0.45, cost="parameters")
    assert mask["0"].sum() == 2 and mask["2"].all()  # ... the dearer goes first
    assert static["0"].sum() == 2 and not static["2"].all()


@pytest.mark.parametrize("order", ["least", "most"])
def test_harm_is_multiplied_by_the_cost(order):
    """Of filters that do equal harm the dear ones go first, with a rate and with a budget; or, in reverse, last."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten())
    model.append(nn.Linear(4 * 64, 2))
    example = torch.rand(1, 1, 8, 8)
    units = pxp.find_components(model.eval(), example=example)
    assert units["2"].flops == 4 * units["0"].flops
    signed = {name: torch.tensor([-1.0, -1.0, 1.0, 1.0]) for name in units}
    scores = pxp.Scores(units, {name: values.abs() for name, values in signed.items()}, signed)
    total = sum(layer.flops * layer.size for layer in units.values())
    for number, expected in (
        (2, {"least": {"2": {0, 1}}, "most": {"0": {2, 3}}}),
        (4, {"least": {"0": {0, 1}, "2": {0, 1}}, "most": {"0": {2, 3}, "2": {2, 3}}}),
        (6, {"least": {"0": {0, 1}, "2": {0, 1, 2, 3}}, "most": {"0": {0, 1, 2, 3}, "2": {2, 3}}}),
    ):
        wanted = {name: expected[order].get(name, set()) for name in units}
        rate = sum(units[name].flops * len(each) for name, each in wanted.items()) / total
        mask = scores.select(rate, by="signed", order=order, cost="flops")
        assert {name: set(torch.where(~kept)[0].tolist()) for name, kept in mask.items()} == wanted, number
    mask = pxp.within_budget(scores, flops=0.75, by="signed", order=order, cost="flops", example=example)
    assert mask["2"][:2].all() == (order == "most") and mask["0"][2:].all() == (order == "least")


def test_a_cost_that_is_unknown_is_an_error_with_a_budget_too(networks):
    units = networks["vgg"][1].units
    unknown = pxp.Components("filter", [replace(layer, flops=0) for layer in units.values()], units.trace)
    scores = pxp.Scores(unknown, dict(networks["vgg"][1]), dict(networks["vgg"][1]))
    with pytest.raises(ValueError, match=r"flops of these layers are unknown: features\.0"):
        pxp.within_budget(scores, parameters=0.5, cost="flops", model=networks["vgg"][0])


def test_latency(networks, monkeypatch):
    model, scores = networks["vgg"]
    seconds = latencies(model, scores.units, SHAPE["example"])
    assert set(seconds) == set(scores) and min(seconds.values()) > 0
    mask = scores.select(0.5, cost=seconds)
    saved = sum(seconds[name] * int((~kept).sum()) for name, kept in mask.items())
    assert 0 < saved < sum(seconds[name] * len(kept) for name, kept in mask.items())
    assert mask.kept < scores.units.total
    images = torch.rand(32, 1, 28, 28)

    def instead(network, images, at_least):
        """Parameters in place of seconds, which no two runs measure alike; the fastest pass counts."""
        number = sum(parameter.numel() for parameter in network.parameters())
        return [2 * number, number, 3 * number]

    monkeypatch.setattr("pxp.budget.pass_seconds", instead)
    mask, same = pxp.within_budget(scores, latency=0.6, example=images), pxp.within_budget(scores, parameters=0.6)
    assert 0 < mask.kept < mask.units.total and all(torch.equal(mask[name], same[name]) for name in mask)


def test_heads_and_neurons_have_a_latency(networks):
    model, scores = networks["vit"]
    assert min(latencies(model, scores.units).values()) > 0


def test_errors(networks):
    _model, scores = networks["vgg"]
    for given in ({}, {"flops": 0.5, "latency": 0.5}):
        with pytest.raises(ValueError, match="give exactly one of flops, parameters and latency"):
            pxp.within_budget(scores, **given)
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"flops must be in \[0, 1\], got"):
            pxp.within_budget(scores, flops=value)
    with pytest.raises(ValueError, match=r"parameters=0\.001 cannot be reached"):
        pxp.within_budget(scores, parameters=0.001, min_keep=4)
    with pytest.raises(ValueError, match=r"flops=0 cannot be reached"):
        pxp.within_budget(scores, flops=0.0, min_keep=1, cost="flops")
    with pytest.raises(ValueError, match='score per cost ranks across layers; use scope="global"'):
        pxp.within_budget(scores, flops=0.5, cost="flops", scope="layer")
    with pytest.raises(ValueError, match="by must be one of 'magnitude', 'signed', got 'size'"):
        pxp.within_budget(scores, flops=0.5, by="size", cost="flops")
    with pytest.raises(ValueError, match="these components are of another model"):
        pxp.within_budget(scores, flops=0.5, model=networks["vit"][0])
    with pytest.raises(ValueError, match="does not accept images of shape"):
        pxp.within_budget(scores, flops=0.5, example=torch.rand(1, 3, 28, 28))
    with pytest.raises(ValueError, match="these components are of another model"):
        pxp.latencies(networks["vit"][0], scores.units)


@pytest.mark.parametrize("name", ["flops", "parameters", "latency", "model"])
def test_select_names_the_function_for_budgets(networks, name):
    with pytest.raises(
        TypeError, match=rf"not {name}=; a budget is pxp\.within_budget\(scores, model=model, flops=0\.5\)"
    ):
        networks["vgg"][1].select(**{name: 0.5})
    with pytest.raises(TypeError, match="select has no argument 'rates'"):
        networks["vgg"][1].select(rates=0.5)


def test_costs_of_ones_own(networks):
    model, scores = networks["vgg"]
    names = list(scores)
    dear = {name: 1e6 if name == names[2] else 1.0 for name in names}
    mask = scores.select(0.5, cost=dear)  # half of the cost is half of the dear layer
    assert [name for name, kept in mask.items() if not kept.all()] == [names[2]]
    with pytest.raises(ValueError, match="cost and components name different layers: elsewhere"):
        scores.select(0.5, cost={**dear, "elsewhere": 1.0})
    with pytest.raises(ValueError, match=rf"costs of these layers are unknown: {names[0]}"):
        scores.select(0.5, cost={**dear, names[0]: float("nan")})
    with pytest.raises(ValueError, match=r"or a cost per layer, such as pxp\.latencies\(model, units\), got 'latency'"):
        scores.select(0.5, cost="latency")
    curve = pxp.pruning_curve(
        model, scores, (torch.rand(4, 1, 28, 28), torch.arange(4)), rates=[0, 0.5], cost="latency"
    )
    assert curve.settings["cost"] == "latency"


def test_the_model_is_remembered_but_not_held(tmp_path):
    model = pxp.load_model("vgg")
    units = pxp.find_components(model)
    scores = pxp.attribute(model, None, units, pxp.Magnitude())
    assert units.model is model and units.only("features.0").model is model
    assert pickle.loads(pickle.dumps(units)).model is None
    scores.save(tmp_path / "scores.safetensors")
    read = pxp.Scores.load(tmp_path / "scores.safetensors")
    with pytest.raises(ValueError, match="the model that these components were found in is gone; give model="):
        pxp.within_budget(read, flops=0.5)
    assert torch.equal(
        pxp.within_budget(read, flops=0.7, model=model)["features.0"],
        pxp.within_budget(scores, flops=0.7)["features.0"],
    )
    del model
    assert units.model is None
