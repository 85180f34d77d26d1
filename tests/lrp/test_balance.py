"""The structural self-test and the check of the replica: each sees what it is for, and is made once."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from conftest import NETWORKS, network, relative, without_biases
from small import Calls, around, samples
from torch import Tensor, nn
from vits import images_of, two_blocks

import pxp
from pxp.lrp import composites
from pxp.network import check
from pxp.network.layers import KINDS


@pytest.mark.parametrize("name", NETWORKS)
def test_known_networks_pass(name):
    model, x, labels, units = network(name)
    assert pxp.attribute(model, (x, labels), units, pxp.LRP()).samples == len(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model("seresnet18"), lambda: timm.create_model("poolformer_s12"),
        lambda: torchvision.models.convnext_tiny(), lambda: torchvision.models.densenet121(),
        lambda: timm.create_model("skresnet18"),
    ],
)  # fmt: skip
def test_networks_with_constants_of_every_kind_pass(make):
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    heat = pxp.heatmap(model, torch.rand(1, 3, 64, 64), 1)
    assert bool(heat.isfinite().all())


class Shifts(nn.Module):
    """Adds constants in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.shift = nn.Parameter(torch.randn(1, 8, 1, 10)), nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1, -1), x], 2) - 0.3
        x = 1 - x.masked_fill(x > 2, 0.7) + self.shift
        x = nn.functional.pad(x, (1, 1, 0, 0), value=0.4).sigmoid()
        x = x.clone()
        x[:, 0] = 0.25
        return torch.where(self.shift > 0, x, self.shift)


def test_constants_of_functions_count():
    x, labels = samples()
    model = around(Shifts())
    model[1].double()
    assert bool(pxp.heatmap(model, x, labels).isfinite().all())


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(check, "_checked", type(check._checked)())


def calls(monkeypatch, module, name: str) -> list:
    made: list = []
    real = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: made.append(1) or real(*args))
    return made


def test_both_checks_are_made_once_per_state(fresh, monkeypatch):
    import pxp.probe as probe

    balance, copies = calls(monkeypatch, composites, "check_balance"), calls(monkeypatch, probe, "check_replica")
    model, x, labels, units = network("vgg")
    for _ in range(2):
        pxp.attribute(model, (x, labels), units, pxp.LRP())
        pxp.heatmap(model, x, labels, pxp.Taylor())
        pxp.attribute(model, (x, labels), units, pxp.Activation())
    assert len(balance) == len(copies) == 1
    with torch.no_grad():
        model.classifier[0].bias.add_(1)
    pxp.attribute(model, (x, labels), units, pxp.LRP("zplus"))
    assert len(balance) == len(copies) == 2
    with pxp.masked(model, pxp.attribute(model, None, units, pxp.Random()).select(0.3)):
        pxp.attribute(model, (x, labels), units, pxp.LRP())
    assert len(balance) == len(copies) == 3
    model.features[2] = nn.GELU()
    pxp.heatmap(model, x, labels)
    assert len(balance) == len(copies) == 4
    model.classifier[0].weight.data.mul_(2)  # which changes no version
    pxp.heatmap(model, x, labels)
    assert len(balance) == len(copies) == 5


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(1, dtype=x.dtype)


@pytest.mark.parametrize("criterion", [pxp.LRP(), pxp.Taylor(), pxp.Activation()], ids=repr)
def test_a_copy_that_computes_something_else_is_named(criterion):
    x, labels = samples()
    model = nn.Sequential(
        around(nn.ReLU())[:3], Random(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )
    model = model.double().eval()
    units = pxp.find_components(model, example=x)
    for _ in range(2):  # a check that failed is made again
        with pytest.raises(
            ValueError, match=r"computes something else, first at '1' \(Random\)\. Either its outputs are random"
        ):
            pxp.attribute(model, (x, labels), units, criterion)


def doubled_on_the_way_back(x: Tensor) -> Tensor:
    x = x.clone()
    if x.requires_grad:
        x.register_hook(lambda gradient: 2 * gradient)
    return x


def test_what_hides_from_the_table_is_found_by_the_sum():
    x, labels = samples()
    model = around(Calls(doubled_on_the_way_back))
    with pytest.raises(ValueError, match=r"under LRP-0 relevance is not conserved in '1' \(Calls\)"):
        pxp.heatmap(model, x, labels)


def test_what_changes_its_images_is_tested_too():
    x, labels = samples()
    model = around(Calls(doubled_on_the_way_back))
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0].sub_(0.5),))
    with pytest.raises(ValueError, match=r"under LRP-0 relevance is not conserved in '1' \(Calls\)"):
        pxp.heatmap(model, x, labels)


@pytest.mark.parametrize("kind", ["layer normalisation", "activation", "gate"])
def test_a_table_that_is_wrong_is_found(kind, monkeypatch):
    """A normalisation taken for a pooling, a bounded factor for a product: the sum tells."""
    from pxp.network import layers

    wrong = next(one for one in KINDS if one.name == "pooling")
    changed = {key: wrong if value.name == kind else value for key, value in layers._BY_CLASS.items()}
    monkeypatch.setattr(layers, "_BY_CLASS", changed)
    middle = {"layer normalisation": nn.LayerNorm(10), "activation": nn.GELU(), "gate": nn.Sigmoid()}[kind]
    x, labels = samples()
    with pytest.raises(ValueError, match="under LRP-0 relevance is not conserved in '1'"):
        pxp.heatmap(around(middle), x, labels)


def shrinking() -> nn.Module:
    """A linear layer whose hook averages what it gives."""
    layer = nn.Linear(8, 8)
    layer.register_forward_hook(lambda module, inputs, output: output.mean(-1, keepdim=True))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), layer)


class Squeezes(nn.Module):
    """Takes a dimension of a tensor away in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu().flatten(2).mean(2, keepdim=True)
        x.squeeze_(2)
        return x


class Halves(nn.Module):
    """Writes into a layer's bias once it has been added."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)
        shift = self.layer.bias.detach() + 1
        del self.layer.bias
        self.layer.register_buffer("bias", shift)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        self.layer.bias.mul_(0.5)
        return x.relu().mean((2, 3))


@pytest.mark.parametrize("make", [shrinking, lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Squeezes()), Halves])
def test_a_constant_is_what_was_added_then(make):
    """Whatever a hook, or what runs later, makes of shapes and values: the sum is right, and sees what is wrong."""
    torch.manual_seed(0)
    front = make().eval()
    features = front(torch.randn(1, 3, 8, 8)).shape[1]
    images, label = torch.randn(1, 3, 8, 8), torch.tensor([1])
    assert bool(pxp.heatmap(nn.Sequential(front, nn.Linear(features, 4)), images, label).isfinite().all())
    wrong = nn.Sequential(make().eval(), Calls(doubled_on_the_way_back), nn.Linear(features, 4))
    with pytest.raises(ValueError, match=r"under LRP-0 relevance is not conserved in '1' \(Calls\)"):
        pxp.heatmap(wrong, images, label)


def test_what_cannot_be_tried_on_zeros_is_refused():
    layer = nn.Linear(10, 10)

    def fails(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        if not bool(inputs[0].any()):
            raise RuntimeError("nothing to measure")
        return output

    layer.register_forward_hook(fails)
    x, labels = samples()
    with pytest.raises(
        ValueError, match=r"'1' \(Linear\) cannot be explained.*inputs of 0, and that fails: nothing to measure. Let it"
    ):
        pxp.heatmap(around(layer), x, labels)


def test_conservation_by_hand():
    """A linear network without biases passes everything on; a bias absorbs its share."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [0.5, 0.5]]))
        model[0].bias.copy_(torch.tensor([1.0, 0.0]))
        model[2].weight.copy_(torch.tensor([[2.0, 1.0]]))
        model[2].bias.copy_(torch.tensor([3.0]))
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    found = pxp.conservation(model, x, 0, pxp.LRP(pxp.Epsilon(0)))
    # hidden 4 and 1, logit 2·4 + 1 + 3 = 12
    assert found.start == found.arrives["2"] == pytest.approx(12)
    assert found.leaves["2"] == found.arrives["0"] == pytest.approx(9) and found.absorbed["2"] == pytest.approx(3)
    assert found.leaves["0"] == found.input == pytest.approx(7) and found.absorbed["0"] == pytest.approx(2)
    assert repr(found).splitlines()[0] == f"relevance by {pxp.LRP(pxp.Epsilon(0))!r}, which starts with 12"
    assert [row.split()[0] for row in repr(found).splitlines()[1:]] == ["layer", "2", "0", "input"]


@pytest.mark.parametrize("rule", ["epsilon", "gamma"])
@pytest.mark.parametrize("name", ["vgg", "resnet", "mlp"])
def test_conservation_without_biases(name, rule):
    model, x, labels, _units = network(name)
    found = pxp.conservation(without_biases(model), x, labels, pxp.LRP(rule))
    assert found.input == pytest.approx(found.start, rel=1e-3)
    if name != "resnet":  # where everything goes through every layer
        assert all(value == pytest.approx(found.start, rel=1e-3) for value in found.arrives.values())


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("rule", ["flat", "wsquare"])
def test_conservation_with_an_input_rule(rule, inside):
    """What the layer above passes on arrives, once, also where the model normalises its images first."""
    x, labels = samples()
    model = without_biases(nn.Sequential(Calls(lambda x: x * 2) if inside else nn.Identity(), around(nn.ReLU())))
    found = pxp.conservation(model, x, labels, pxp.LRP(pxp.Epsilon(0), input=rule))
    first, second = (name for name in found.arrives if name in ("1.0", "1.2"))
    assert found.arrives[first] == pytest.approx(found.leaves[second]) == pytest.approx(found.start)
    assert found.input == pytest.approx(found.leaves[first])


def test_conservation_begins_with_what_arrives_at_the_logits():
    x, labels = samples()
    model = around(nn.ReLU(), biases=False)
    logits = model(x)
    ones = torch.nn.functional.one_hot(labels, 3)
    expected = {
        "logit": logits[ones.bool()].mean(),
        "one": 1.0,
        "margin": (logits[ones.bool()] - logits.masked_fill(ones.bool(), -torch.inf).amax(1)).mean(),
        "loss": (logits * (ones - logits.softmax(1))).sum(1).mean(),
    }
    for start, value in expected.items():
        found = pxp.conservation(model, x, labels, pxp.LRP(pxp.Epsilon(0), start=start))
        assert found.start == found.arrives["6"] == pytest.approx(float(value)) == pytest.approx(found.input)
        assert pxp.conservation(model, x, labels, pxp.Taylor(start=start)).start == pytest.approx(float(value))


@pytest.mark.parametrize("criterion", [pxp.LRP(path_steps=3), pxp.IntegratedGradients(3)], ids=repr)
def test_conservation_is_of_one_backward_pass(criterion):
    x, labels = samples()
    with pytest.raises(ValueError, match="makes 3 backward passes; conservation is a matter of one"):
        pxp.conservation(around(nn.ReLU()), x, labels, criterion)


def test_conservation_agrees_with_scores_and_heatmaps():
    model = two_blocks()
    x, labels = images_of(model, 3)
    criterion = pxp.LRP("zplus", softmax="cp")
    found = pxp.conservation(model, x, labels, criterion)
    assert found.input == pytest.approx(float(pxp.heatmap(model, x, labels, criterion).sum()) / 3)
    units = pxp.find_components(model, "neuron")
    signed = pxp.attribute(model, (x, labels), units, criterion).signed
    assert all(found.arrives[name] == pytest.approx(float(signed[name].sum()), rel=1e-6) for name in units)
    ax = found.plot()
    assert len(ax.lines[0].get_xdata()) == len(found.arrives) + 2
    assert relative(torch.tensor(ax.lines[0].get_ydata()[-1]), torch.tensor(found.start)) < 1e-6
