"""Every bad input gives an error that says what is wrong, and changes nothing."""

from __future__ import annotations

import math
import re

import pytest
import torch
from conftest import network, same, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import pxp


@pytest.fixture
def ready():
    """Model, images, labels, units; checked afterwards to be as they were."""
    model, x, labels, units = network("vgg")
    before, kept = snapshot(model), (x.clone(), labels.clone())
    yield model, x, labels, units
    assert same(before, snapshot(model))
    assert torch.equal(x, kept[0]) and torch.equal(labels, kept[1])
    assert torch.is_grad_enabled()


def _with(x: torch.Tensor, value: float) -> torch.Tensor:
    x = x.clone()
    x[1, 0, 3, 3] = value
    return x


REFS = {
    "no sample": (lambda x, y: (x[:0], y[:0]), ValueError, r"images must be a non-empty batch .* got shape \(0, 1, 28, 28\)"),
    "empty loader": (lambda x, y: DataLoader(TensorDataset(x[:0], y[:0])), ValueError, "the reference set is empty"),
    "no batch axis": (lambda x, y: (x[0], y[:1]), ValueError, r"does not accept images of shape \(1, 28, 28\)"),
    "scalar": (lambda x, y: (x[0, 0, 0], y.repeat(10)[:28]), ValueError, r"non-empty batch .* got shape \(28,\)"),
    "three channels": (lambda x, y: (x.repeat(1, 3, 1, 1), y), ValueError, r"does not accept images of shape \([13], 3, 28, 28\)"),
    "too small": (lambda x, y: (x[..., :4, :4], y), ValueError, r"does not accept images of shape \([13], 1, 4, 4\)"),
    "integers": (lambda x, y: ((255 * x).to(torch.uint8), y), ValueError, r"must be a floating-point tensor, got torch\.uint8"),
    "complex": (lambda x, y: (x.to(torch.complex64), y), ValueError, r"must be a floating-point tensor, got torch\.complex64"),
    "NaN": (lambda x, y: (_with(x, math.nan), y), ValueError, "images contain NaN or infinite values"),
    "infinite": (lambda x, y: (_with(x, -math.inf), y), ValueError, "images contain NaN or infinite values"),
    "negative label": (lambda x, y: (x, torch.tensor([0, -1, 2])), ValueError, "labels must be class indices from 0, got -1"),
    "label too high": (lambda x, y: (x, torch.tensor([0, 10, 2])), ValueError, r"labels reach 10, but the model has 10 classes \(0 to 9\)"),
    "float labels": (lambda x, y: (x, y.float()), ValueError, r"1-D tensor of class indices, got torch\.float32"),
    "one-hot labels": (lambda x, y: (x, torch.eye(10).long()[y]), ValueError, r"1-D tensor of class indices, got torch\.int64 of shape \(3, 10\)"),
    "too few labels": (lambda x, y: (x, y[:2]), ValueError, "got 3 images but 2 labels"),
    "too many labels": (lambda x, y: (x[:2], y), ValueError, "got 2 images but 3 labels"),
    "nothing": (lambda x, y: None, TypeError, r"expected \(images, labels\), a Dataset or a DataLoader, got NoneType"),
    "images alone": (lambda x, y: x, TypeError, r"expected \(images, labels\), a Dataset or a DataLoader, got Tensor"),
    "three things": (lambda x, y: (x, y, y), TypeError, r"expected \(images, labels\)"),
}  # fmt: skip


@pytest.mark.parametrize("criterion", [pxp.LRP("gamma"), pxp.Taylor(), pxp.IntegratedGradients(2)], ids=repr)
@pytest.mark.parametrize("case", REFS)
def test_references(ready, case, criterion):
    model, x, labels, units = ready
    make, error, message = REFS[case]
    with pytest.raises(error, match=message):
        pxp.attribute(model, make(x, labels), units, criterion)


@pytest.mark.parametrize(
    "case", [c for c in REFS if c not in ("empty loader", "nothing", "images alone", "three things")]
)
def test_heatmap_inputs(ready, case):
    model, x, labels, _ = ready
    make, error, message = REFS[case]
    with pytest.raises(error, match=message):
        pxp.heatmap(model, *make(x, labels), pxp.LRP())


@pytest.mark.parametrize("criterion", [pxp.Activation(), pxp.Random(), pxp.Magnitude()], ids=repr)
def test_what_explains_no_input(ready, criterion):
    model, x, labels, _ = ready
    with pytest.raises(TypeError, match="does not explain inputs; use LRP, Taylor, IntegratedGradients"):
        pxp.heatmap(model, x, labels, criterion)
    for wrong in ("epsilon", None):
        with pytest.raises(TypeError, match="criterion must be a pxp.LRP, Taylor, IntegratedGradients, .*, got "):
            pxp.heatmap(model, x, labels, wrong)


@pytest.mark.parametrize("criterion", ["epsilon", None, pxp.LRP, pxp.Epsilon()], ids=repr)
def test_what_is_no_criterion(ready, criterion):
    model, x, labels, units = ready
    with pytest.raises(TypeError, match=r"criterion must be a pxp\.LRP, Taylor, .* got"):
        pxp.attribute(model, (x, labels), units, criterion)


@pytest.mark.parametrize("units", [None, ["features.0"], {"features.0": 16}])
def test_what_are_no_components(ready, units):
    model, x, labels, _ = ready
    with pytest.raises(TypeError, match=r"units must come from pxp\.find_components, got"):
        pxp.attribute(model, (x, labels), units, pxp.LRP())


def test_components_of_another_model(ready):
    model, x, labels, _units = ready
    resnet, _, _, others = network("resnet")
    scores = pxp.attribute(resnet, None, others, pxp.Random())
    message = "these components are of another model: this one has no module 'conv1'"
    with pytest.raises(ValueError, match=message):
        pxp.attribute(model, (x, labels), others, pxp.LRP())
    with pytest.raises(ValueError, match=message), pxp.masked(model, scores.select(0.5)):
        raise AssertionError
    with pytest.raises(ValueError, match=message):
        pxp.pruning_curve(model, scores, (x, labels))
    wider = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten(), nn.Linear(20, 2))
    narrow = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    mask = pxp.attribute(wider, None, pxp.find_components(wider, example=torch.zeros(1, 1, 4, 4)), pxp.Random())
    with (
        pytest.raises(ValueError, match="of another model: layer '0' has 4 outputs here, not 5"),
        pxp.masked(narrow, mask.select(0.5)),
    ):
        raise AssertionError


def test_what_is_no_mask(ready):
    model, _, _, units = ready
    with pytest.raises(TypeError, match=r"mask must be a pxp\.Mask, got dict"), pxp.masked(model, {}):
        raise AssertionError
    full = {name: torch.ones(layer.size, dtype=torch.bool) for name, layer in units.items()}
    with pytest.raises(ValueError, match=r"mask of layer 'features\.3' must be bool, got torch\.float32"):
        pxp.Mask(units, full | {"features.3": torch.ones(16)})
    with pytest.raises(ValueError, match=r"Mask of layer 'features\.3' must have shape \(16,\), got \(15,\)"):
        pxp.Mask(units, full | {"features.3": torch.ones(15, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"Mask and components name different layers: extra"):
        pxp.Mask(units, full | {"extra": torch.ones(16, dtype=torch.bool)})
    full.pop("features.0")
    with pytest.raises(ValueError, match=r"Mask and components name different layers: features\.0"):
        pxp.Mask(units, full)


def test_layer_names_that_do_not_exist(ready):
    model, _, _, units = ready
    scores = pxp.attribute(model, None, units, pxp.Random())
    for call in (lambda: units["features.1"], lambda: units.only("features.1"), lambda: units.without("features.1")):
        with pytest.raises(KeyError, match=r"no filter layer 'features\.1'; there are features\.0, features\.3"):
            call()
    for what in (scores, scores.signed, scores.select(0.5)):
        with pytest.raises(KeyError, match=r"no layer 'features\.1'; there are features\.0"):
            what["features.1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": -0.01}, r"rate must be in \[0, 1\], got -0.01"),
        ({"rate": 1.01}, r"rate must be in \[0, 1\], got 1.01"),
        ({"rate": math.nan}, r"rate must be in \[0, 1\], got nan"),
        ({"count": -1}, "count must be between 0 and 416, got -1"),
        ({"count": 417}, "count must be between 0 and 416, got 417"),
        ({}, "give exactly one of rate and count"),
        ({"rate": 0.5, "count": 3}, "give exactly one of rate and count"),
        ({"rate": 0.5, "by": "abs"}, "by must be one of 'magnitude', 'signed', got 'abs'"),
        ({"rate": 0.5, "order": "first"}, "order must be one of 'least', 'most', got 'first'"),
        ({"rate": 0.5, "scope": "block"}, "scope must be one of 'global', 'layer', got 'block'"),
        ({"rate": 0.5, "min_keep": -1}, "min_keep must not be negative, got -1"),
    ],
)
def test_selection(ready, options, message):
    model, x, labels, units = ready
    scores = pxp.attribute(model, None, units, pxp.Random())
    with pytest.raises(ValueError, match=message):
        scores.select(**options)
    if "rate" in options and "count" not in options:
        rest = {key: value for key, value in options.items() if key != "rate"}
        with pytest.raises(ValueError, match=message):
            pxp.pruning_curve(model, scores, (x, labels), rates=(0, options["rate"]), **rest)


def test_curves_without_anything(ready):
    model, x, labels, units = ready
    scores = pxp.attribute(model, None, units, pxp.Random())
    for bad, rates, message in (([], (0, 0.5), "one Scores"), (scores, (), "one rate")):
        with pytest.raises(ValueError, match=f"a pruning curve needs at least {message}"):
            pxp.pruning_curve(model, bad, (x, labels), rates=rates)
    for odd, name in ((scores.select(0.5), "Mask"), ([scores, 3], "int")):
        for verb in (pxp.pruning_curve, pxp.sensitivity):
            with pytest.raises(TypeError, match=rf"needs pxp\.Scores, one or several, got {name}"):
                verb(model, odd, (x, labels))


def test_what_is_no_component_or_none(ready):
    model, x, labels, units = ready
    for odd, error, message in ((None, TypeError, "units must come from"), (units.only(), ValueError, "no components")):
        with pytest.raises(error, match=message):
            pxp.attribute(model, (x, labels), odd, pxp.LRP())
        with pytest.raises(error, match=message):
            pxp.prune_gradually(model, (x, labels), odd, pxp.LRP(), 0.5, steps=2)
    with pytest.raises(TypeError, match=r"Mask of layer '.*' must be a tensor, got list"):
        pxp.Mask(units, {name: [True] * layer.size for name, layer in units.items()})
    with pytest.raises(ValueError, match="no mask to draw"):
        pxp.plots.kept_per_layer({})


def test_an_answer_that_is_not_a_number_is_wrong(ready):
    _, x, labels, _ = ready
    broken = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(x[0].numel(), 3)).to(x.dtype)
    broken[1].weight.data.fill_(torch.nan)
    assert pxp.accuracy(broken, (x, labels)) == 0


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], r"classes must be distinct class indices, got \[\]"),
        ([1, 1], r"classes must be distinct class indices, got \[1, 1\]"),
        ([0, -1], "class -1 does not exist"),
        ([0, 10], r"classes reach 10, but the model has 10 classes \(0 to 9\)"),
        ([7, 8], r"no sample to evaluate of classes \[7, 8\]"),
    ],
)
def test_classes(ready, classes, message):
    model, x, labels, _ = ready
    with pytest.raises(ValueError, match=message):
        pxp.accuracy(model, (x, labels), classes=classes)


def test_accuracy_of_bad_data(ready):
    model, x, labels, _ = ready
    with pytest.raises(ValueError, match="there is no sample to evaluate"):
        pxp.accuracy(model, DataLoader(TensorDataset(x[:0], labels[:0])))


RULES = {
    "unknown rule": (lambda: pxp.LRP("epsilonn"), ValueError, "unknown rule 'epsilonn'; allowed: 'epsilon', 'gamma', 'zplus', 'alpha2beta1'"),
    "unknown rule of a group": (lambda: pxp.LRP(high="z+"), ValueError, "unknown rule 'z\\+'; allowed"),
    "unknown input rule": (lambda: pxp.LRP(input="box"), ValueError, "unknown rule 'box'"),
    "class instead of object": (lambda: pxp.LRP(pxp.Gamma), TypeError, r"a rule is a name or a pxp rule such as pxp\.Gamma\(0\.25\), got"),
    "number": (lambda: pxp.LRP(low=0.25), TypeError, "a rule is a name or a pxp rule"),
    "unknown start": (lambda: pxp.LRP(start="softmax"), ValueError, "unknown start 'softmax'; allowed: 'logit', 'one', 'margin', 'loss'"),
    "unknown start of Taylor": (lambda: pxp.Taylor(start="x"), ValueError, "unknown start 'x'"),
    "unknown start of IG": (lambda: pxp.IntegratedGradients(start="x"), ValueError, "unknown start 'x'"),
    "no step": (lambda: pxp.LRP(path_steps=0), ValueError, "path_steps must be a whole number of at least 1, got 0"),
    "no IG step": (lambda: pxp.IntegratedGradients(0), ValueError, "steps must be a whole number of at least 1, got 0"),
    "unknown parameter": (lambda: pxp.LRP(zero_params="weight"), ValueError, "zero_params may only name 'bias', got 'weight'"),
    "unknown parameters": (lambda: pxp.ZPlus(zero_params=["bias", "w"]), ValueError, "zero_params may only name 'bias'"),
    "negative gamma": (lambda: pxp.Gamma(-0.1), ValueError, "gamma must be finite and not negative, got -0.1"),
    "NaN gamma": (lambda: pxp.Gamma(math.nan), ValueError, "gamma must be finite and not negative, got nan"),
    "negative epsilon": (lambda: pxp.Epsilon(-1e-6), ValueError, "epsilon must be finite and not negative, got -1e-06"),
    "negative stabiliser": (lambda: pxp.Gamma(0.1, epsilon=-1), ValueError, "epsilon must be finite and not negative, got -1"),
    "NaN epsilon": (lambda: pxp.Epsilon(math.nan), ValueError, "epsilon must be finite and not negative, got nan"),
    "alpha - beta": (lambda: pxp.AlphaBeta(2, 2), ValueError, "alpha − beta = 1, got alpha=2, beta=2"),
    "negative beta": (lambda: pxp.AlphaBeta(0.5, -0.5), ValueError, "must be ≥ 0 with alpha − beta = 1, got alpha=0.5"),
    "no baseline": (
        lambda: pxp.IntegratedGradients(baseline=None), TypeError,
        "baseline must be a number or a tuple with one for each channel, got None",
    ),
    "baseline of another type": (
        lambda: pxp.LRP(path_steps=2, baseline=[0.0, 1.0, 2.0]), TypeError,
        r"baseline must be a number or a tuple with one for each channel, got \[0\.0, 1\.0, 2\.0\]",
    ),
    "baseline of truths": (lambda: pxp.IntegratedGradients(baseline=(True, 0.5)), TypeError, r"got \(True, 0\.5\)"),
    "baseline of no number": (
        lambda: pxp.IntegratedGradients(baseline=(0.5, math.nan)), ValueError,
        r"baseline must be a finite number .*, got \(0\.5, nan\)",
    ),
    "empty baseline": (lambda: pxp.IntegratedGradients(baseline=()), ValueError, r"baseline must be .*, got \(\)"),
    "baseline without a path": (
        lambda: pxp.LRP(baseline=-2), ValueError,
        "a baseline begins a path, got baseline=-2.0 with path_steps=1",
    ),
    "box": (lambda: pxp.ZBox(1, 0), ValueError, "low not exceed high, got low=1, high=0"),
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
def test_rules_and_criteria(case):
    make, error, message = RULES[case]
    with pytest.raises(error, match=message):
        make()


def test_zero_params_with_a_rule_object():
    from pxp.lrp.rules import make_rule

    with pytest.raises(
        ValueError, match=r"give zero_params='bias' to the rule itself: Gamma\(\.\.\., zero_params='bias'\)"
    ):
        make_rule(pxp.Gamma(0.1), "bias")


def test_rules_are_for_layers_with_weights():
    with pytest.raises(TypeError, match=r"ZPlus is a rule for linear and convolutional layers, not ReLU"):
        pxp.ZPlus().register(nn.ReLU())


def test_images_of_another_size_than_a_transformers():
    """torchvision asserts its size; every function says it as a ValueError."""
    model = pxp.load_model("vit")
    units, before = pxp.find_components(model, "head"), snapshot(model)
    images, labels = torch.randn(2, 1, 32, 32), torch.tensor([0, 1])
    message = r"the model does not accept images of shape \([12], 1, 32, 32\).*Wrong image height"
    for criterion in (pxp.LRP(), pxp.Taylor(), pxp.IntegratedGradients(2)):
        with pytest.raises(ValueError, match=message):
            pxp.attribute(model, (images, labels), units, criterion)
    with pytest.raises(ValueError, match=message):
        pxp.heatmap(model, images, labels)
    with pytest.raises(ValueError, match=message):
        pxp.find_components(model, "head", example=images)
    assert same(before, snapshot(model))


def test_kinds():
    linear = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    for wrong in (3, None, nn.Linear):
        with pytest.raises(TypeError, match="kind must be a string or a sequence of them, got"):
            pxp.find_components(linear, wrong)
    with pytest.raises(ValueError, match="unknown kind 3; allowed"):
        pxp.find_components(linear, [3])
    with pytest.raises(ValueError, match=r"no components of kind 'filter' .*; it has 1 neuron layers"):
        pxp.find_components(linear, "filter")
    convolution = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"Sequential has no components of kind 'neuron' .*; it has 1 filter layers"):
        pxp.find_components(convolution, "neuron")
    with pytest.raises(ValueError, match="it has none of any kind"):
        pxp.find_components(nn.Sequential(nn.Linear(4, 2)), "filter")
    with pytest.raises(ValueError, match="unknown kind 'channel'; allowed: 'filter', 'neuron'"):
        pxp.find_components(linear, "channel")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        pxp.find_components("vgg")
    with pytest.raises(ValueError, match="could not guess an input of Identity"):
        pxp.find_components(nn.Identity())


class Returns(nn.Module):
    """A network with another output than (batch, classes)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.how = nn.Conv2d(1, 4, 3), how

    def forward(self, x):
        z = self.conv(x)
        return {"map": z, "tuple": (z.mean((2, 3)), z), "dict": {"logits": z}, "vector": z.mean((1, 2, 3))}[self.how]


@pytest.mark.parametrize(
    ("how", "found"),
    [("map", r"\([12], 4, 4, 4\)"), ("tuple", "tuple"), ("dict", r"\([12], 4, 4, 4\)"), ("vector", r"\([12],\)")],
)
def test_outputs_that_are_no_logits(how, found):
    model, data = Returns(how), (torch.randn(2, 1, 6, 6), torch.tensor([0, 1]))
    units = pxp.find_components(model, example=data[0])
    before, message = snapshot(model), rf"the model's output must be logits of shape \(batch, classes\), got {found}"
    with pytest.raises(ValueError, match=message):
        pxp.attribute(model, data, units, pxp.LRP())
    with pytest.raises(ValueError, match=message):
        pxp.heatmap(model, *data)
    with pytest.raises(ValueError, match=message):
        pxp.accuracy(model, data)
    assert same(before, snapshot(model))


def test_scores_that_overflow_name_their_layers():
    model, x, labels, units = network("vgg")
    with torch.no_grad():
        model.features[10].weight *= 1e200
        model.features[11].weight *= 1e200
    before = snapshot(model)
    with pytest.raises(
        ValueError,
        match=r"scores by LRP\('epsilon'\) are NaN or infinite in layers .*features\.\d+.*; the numbers overflowed",
    ):
        pxp.attribute(model, (x, labels), units, pxp.LRP())
    assert same(before, snapshot(model))
    values = {name: torch.zeros(layer.size) for name, layer in units.items()}
    broken = values | {"features.7": torch.full((48,), math.inf), "features.14": torch.full((96,), math.nan)}
    with pytest.raises(ValueError, match=r"in layers features\.7, features\.14; the numbers overflowed"):
        pxp.Scores(units, values, broken)
    with pytest.raises(ValueError, match="signed scores and components name different layers"):
        pxp.Scores(units, values, {"features.0": torch.zeros(16)})


def deep(layers: int, weight: float = 1.0) -> nn.Module:
    """Biases as large as what the weights make of the image, so that without them some denominators are almost 0."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for _ in range(layers):
        model.extend([nn.Conv2d(4, 4, 3, padding=1), nn.SiLU()])
    model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)])
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Conv2d):
                layer.weight.normal_(0, weight / 6)
                layer.bias.normal_()
    return model.eval()


@pytest.mark.parametrize("rule", ["gamma", "epsilon"])
def test_relevance_that_overflows_for_want_of_biases(rule, untouched):
    model, data = untouched(deep(60)), (torch.randn(2, 4, 12, 12), torch.tensor([0, 1]))
    units = pxp.find_components(model, example=data[0])
    choices = {
        "by name": pxp.LRP(rule, zero_params="bias"),
        "an object": pxp.LRP({"gamma": pxp.Gamma, "epsilon": pxp.Epsilon}[rule](zero_params="bias")),
    }
    message = r"overflows, .* first at '{}', and with biases in the denominators it does not.*Leave zero_params out"
    for lrp in choices.values():
        # in the layers between the output and this one it is large, in those below it is lost
        with pytest.raises(ValueError, match=re.escape(repr(lrp)) + " " + message.format(r"\d+")) as error:
            pxp.attribute(model, data, units, lrp)
        layer = re.search(r"first at '(\d+)'", str(error.value)).group(1)
        above = pxp.attribute(model, data, units.only(*[n for n in units if int(n) > int(layer)]), lrp)
        sizes = [float(above[n].max()) for n in above]
        assert sizes[0] > 1e6 * sizes[-1]
        with pytest.raises(ValueError, match=message.format("input")):
            pxp.heatmap(model, *data, lrp)
    assert pxp.attribute(model, data, units, pxp.LRP(rule)).samples == 2


def test_other_reasons_to_overflow_are_not_blamed_on_biases():
    model, data = deep(12, weight=1e5), (torch.randn(2, 4, 12, 12), torch.tensor([0, 1]))
    units = pxp.find_components(model, example=data[0])
    for lrp in (pxp.LRP("gamma", zero_params="bias"), pxp.LRP("gamma")):
        with pytest.raises(ValueError, match=r"scores by LRP\(.*\) are NaN or infinite .* the numbers overflowed"):
            pxp.attribute(model, data, units, lrp)
        with pytest.raises(ValueError, match=r"the heatmap by LRP\(.*\) is NaN or infinite; the numbers overflowed"):
            pxp.heatmap(model, *data, lrp)


class TooLarge(nn.Module):
    """No memory from a certain number of images on, said as the GPU says it or as the CPU does."""

    def __init__(self, error: Exception, images: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)
        self.error, self.images = error, images

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) >= self.images:
            raise self.error
        return self.fc(self.conv(x).relu().mean((2, 3)))


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"),
    ],
    ids=["cuda", "cpu", "mps"],
)
def test_no_memory_is_not_a_wrong_shape(error):
    x, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    model = TooLarge(error, 3).eval()
    units = pxp.find_components(model, example=x)
    with pytest.raises(
        torch.cuda.OutOfMemoryError, match="no memory for 4 images at a time; give a smaller batch_size"
    ):
        pxp.attribute(model, (x, labels), units, pxp.LRP())
    assert pxp.attribute(model, (x, labels), units, pxp.LRP(), batch_size=2).samples == 4
    with pytest.raises(torch.cuda.OutOfMemoryError, match="give a smaller batch_size"):
        pxp.heatmap(model, x, labels)
    model.images = 1
    for example in (x, None):
        with pytest.raises(RuntimeError, match="memory") as caught:
            pxp.find_components(model, example=example)
        assert type(caught.value) is type(error) and str(caught.value) == str(error)


class NoGradient(nn.Module):
    """A part runs without gradients: by reentrant checkpointing, or because it is frozen."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU())
        self.fc, self.way = nn.Linear(6, 3), way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == "no_grad":
            with torch.no_grad():
                x = self.body(x)
        else:
            x = checkpoint(self.body, x, use_reentrant=self.way == "reentrant")
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("criterion", [pxp.LRP(), pxp.LRP("gamma"), pxp.Taylor(), pxp.IntegratedGradients(2)], ids=repr)
@pytest.mark.parametrize("way", ["reentrant", "no_grad"])
def test_a_part_without_gradients_is_named(way, criterion):
    model = NoGradient(way).eval()
    x, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    units = pxp.find_components(model, example=x)
    message = r"'body\.0' runs without gradients, .*use_reentrant=False.*no_grad"
    with pytest.raises(ValueError, match=message):
        pxp.attribute(model, (x, labels), units, criterion)
    with pytest.raises(ValueError, match=message):
        pxp.heatmap(model, x, labels, criterion)
    assert torch.is_grad_enabled()
    # activations need none, and the other kind of checkpoint is right
    assert bool((pxp.attribute(model, (x, labels), units, pxp.Activation())["body.0"] != 0).any())
    model.way = "not reentrant"
    plain = nn.Sequential(*model.body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.fc).eval()
    torch.testing.assert_close(pxp.heatmap(model, x, labels, criterion), pxp.heatmap(plain, x, labels, criterion))


def test_parameters_without_values_are_named():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    x, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    units = pxp.find_components(model, example=x)
    for part in (model, model[3]):
        part.to("meta")
        for call in (
            lambda: pxp.heatmap(model, x, labels),
            lambda: pxp.attribute(model, (x, labels), units, pxp.LRP()),
            lambda: pxp.attribute(model, None, units, pxp.Magnitude()),
            lambda: pxp.accuracy(model, (x, labels)),
        ):
            with pytest.raises(ValueError, match=r"parameter '[03]\.weight' is on the meta device.*load its weights"):
                call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
def test_a_model_on_two_devices():
    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.fc = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)
            self.device = "cpu"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.two(self.one(x).relu().to(self.device)).relu().mean((2, 3)))

    model = Spread().double().eval()
    x, labels = torch.rand(4, 1, 8, 8).double(), torch.tensor([0, 1, 2, 0])
    units = pxp.find_components(model, example=x)
    expected = pxp.attribute(model, (x, labels), units, pxp.LRP("zplus"))
    model.two.cuda(), model.fc.cuda()
    model.device = "cuda"
    found = pxp.attribute(model, (x, labels), units, pxp.LRP("zplus"))
    for name in units:
        torch.testing.assert_close(found.signed[name], expected.signed[name])
    with pxp.masked(model, found.select(0.5)):
        assert 0 <= pxp.accuracy(model, (x, labels)) <= 1
