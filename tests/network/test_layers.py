"""The table of layers: what is known, what is refused by name, and what a user adds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from by_hand import close
from conftest import relative
from small import Calls, around, samples
from torch import Tensor, nn
from torch.nn import functional as F

import pxp
from pxp.network import attentions, layers
from pxp.network.layers import kind_of, kind_of_function


@pytest.fixture
def table(monkeypatch):
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(layers, "_BY_CLASS", dict(layers._BY_CLASS))
    monkeypatch.setattr(attentions, "_KNOWN", dict(attentions._KNOWN))


class Subclass(nn.GELU):
    pass


class Overridden(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def test_a_class_is_known_until_it_computes_something_else():
    assert kind_of(nn.GELU()).name == kind_of(Subclass()).name == "activation"
    assert kind_of(Overridden()) is None and kind_of(nn.Sequential()) is None
    patched = nn.GELU()
    patched.forward = torch.exp
    assert kind_of(patched) is None
    assert kind_of_function(torch.Tensor.add_).name == kind_of_function(torch.add).name == "sum"
    assert kind_of_function(torch.linalg.solve) is None


PAIRS = {
    "tanh": (torch.tanh, nn.Tanh()),
    "a method": (lambda x: x.sigmoid(), nn.Sigmoid()),
    "softplus": (F.softplus, nn.Softplus()),
    "softsign": (F.softsign, nn.Softsign()),
    "hardtanh": (F.hardtanh, nn.Hardtanh()),
    "relu6": (F.relu6, nn.ReLU6()),
    "elu": (F.elu, nn.ELU()),
    "in place by an option": (lambda x: F.silu(x, inplace=True), nn.SiLU()),
    "in place by position": (lambda x: F.hardswish(x, True), nn.Hardswish()),
    "gelu": (lambda x: F.gelu(x, approximate="tanh"), nn.GELU(approximate="tanh")),
    "log sigmoid": (F.logsigmoid, nn.LogSigmoid()),
    "by keyword": (lambda x: F.elu(input=x), nn.ELU()),
    "a normalisation by keyword": (
        lambda x: F.layer_norm(input=x, normalized_shape=(10,)),
        nn.LayerNorm(10, elementwise_affine=False),
    ),
    "others by keyword": (
        lambda x: F.silu(F.dropout(input=torch.add(input=x, other=x), training=False) / 2),
        nn.SiLU(),
    ),
    "an einsum of one": (lambda x: torch.einsum("nchw->nhcw", x.transpose(1, 2)), nn.Identity()),
    "mish written out": (lambda x: x * torch.tanh(F.softplus(x)), nn.Mish()),
    "silu written out": (lambda x: x * torch.sigmoid(x), nn.SiLU()),
    "hard swish written out": (lambda x: x * (F.relu6(x + 3) / 6), nn.Hardswish()),
    "layer norm": (lambda x: F.layer_norm(x, (8, 10, 10)), nn.LayerNorm((8, 10, 10), elementwise_affine=False)),
    "group norm": (lambda x: F.group_norm(x, 2, eps=0.1), nn.GroupNorm(2, 8, eps=0.1, affine=False)),
    "instance norm": (F.instance_norm, nn.InstanceNorm2d(8)),
    "rms norm": (lambda x: F.rms_norm(x, (10,)), nn.RMSNorm(10, elementwise_affine=False)),
    "glu": (lambda x: F.glu(torch.cat([x, x], 1), 1), nn.SiLU()),
    "a slope": (lambda x: F.leaky_relu(x, 0.3), nn.LeakyReLU(0.3)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("rule", ["epsilon", "zplus"])
def test_a_function_is_explained_as_its_module(name, rule, untouched):
    function, module = PAIRS[name]
    x, labels = samples()
    one, other = untouched(around(Calls(function))), around(module)
    assert relative(one(x), other(x)) < 1e-9
    assert relative(pxp.heatmap(one, x, labels, pxp.LRP(rule)), pxp.heatmap(other, x, labels, pxp.LRP(rule))) < 1e-9
    units = pxp.find_components(one, example=x)
    assert close(
        pxp.attribute(one, (x, labels), units, pxp.LRP(rule)),
        pxp.attribute(other, (x, labels), units, pxp.LRP(rule)),
        1e-9,
    )


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (torch.exp, "computes exp"),
        (lambda x: torch.clamp(x, min=x.mean(1, keepdim=True)), "computes clamp by what depends on the input"),
        (lambda x: x.clip(max=x.flip(1)), "computes clip by what depends on the input"),
        (
            lambda x: (x[:, None] * _drawn(8, 8)[:, :, None, None]).sum(2),
            "computes mul of each value with several of weights of its own",
        ),
        (
            lambda x: (x[:, :, None] / _drawn(1, 8, 8, 1, 1)).mean(1),
            r"computes \w+ of each value with several of weights of its own",
        ),
        (lambda x: x / x.std(), "computes quotient, std"),
        (lambda x: x / x.norm(dim=1, keepdim=True), "computes norm, quotient"),
        (lambda x: 1 / (1 + x * x), "computes quotient"),
        (lambda x: x**3, "computes pow by 3"),
        (lambda x: torch.pow(1.5, x), "computes pow by what depends on the input"),
        (lambda x: x.abs() ** x, "computes pow by what depends on the input"),
        (lambda x: x.abs() ** _drawn(10).abs(), "computes pow by a tensor"),
        (lambda x: torch.einsum("nchw,nchw,w->nchw", x, x, _drawn(10)), "computes einsum of 3 tensors"),
        (lambda x: (1 + x.square()).sqrt(), "computes sqrt"),
        (lambda x: x + x.detach(), "computes detach"),
        (lambda x: F.conv2d(x, _drawn(8, 8, 1, 1)), "computes conv2d with weights of its own"),
        (lambda x: F.linear(x, _drawn(10, 10)), "computes linear with weights of its own"),
        (lambda x: x @ _drawn(10, 10), "computes matmul with weights of its own"),
        (lambda x: torch.einsum("bchw,wv->bchv", x, _drawn(10, 10)), "computes einsum with weights of its own"),
        (lambda x: F.local_response_norm(x, 2), "computes local_response_norm"),
        (lambda x: x.tanh_(), "computes tanh_, in place"),
        (lambda x: F.hardsigmoid(x).mul_(x), "computes mul_ that overwrites a gate"),
        (lambda x: torch.fft.fft(x).real, "computes fft_fft"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_named(function, message):
    x, labels = samples()
    model = around(Calls(function))
    with pytest.raises(ValueError, match=rf"'1' \(Calls\) {message}, for which there is no LRP rule; let it call"):
        pxp.heatmap(model, x, labels)
    # what needs no rule takes it as it is
    assert pxp.heatmap(model, x, labels, pxp.Taylor()).shape == x.shape


class Named(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(input=x)


@pytest.mark.parametrize("inner", [nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), nn.Tanh(), nn.Conv2d(8, 8, 1)])
def test_a_module_whose_rule_sees_the_input_is_called_by_position(inner):
    x, labels = samples()
    with pytest.raises(TypeError, match=r"layer '1.inner' is called by keyword; rules see positional inputs"):
        pxp.heatmap(around(Named(inner)), x, labels)


@pytest.mark.parametrize("inner", [nn.AvgPool2d(3), nn.Dropout(), nn.Identity()])
def test_another_module_is_called_as_one_likes(inner):
    x, labels = samples()
    assert relative(pxp.heatmap(around(Named(inner)), x, labels), pxp.heatmap(around(inner), x, labels)) < 1e-12


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.sigmoid((x / x.std()).exp().mean((2, 3), keepdim=True)),
        lambda x: x * torch.softmax(x.flatten(2) @ x.flatten(2).mT, -1).mean(1).tanh()[:, :, None, None],
        lambda x: x + 0 * (x.exp().argmax(1, keepdim=True) > 3),
    ],
)
def test_what_only_gates_needs_no_rule(function):
    x, labels = samples()
    model = around(Calls(function), biases=False)
    total = pxp.heatmap(model, x, labels, pxp.LRP(pxp.Epsilon(0))).sum((1, 2, 3))
    assert relative(total, model(x).gather(1, labels[:, None])[:, 0]) < 1e-9


class OwnGate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1 / (1 + (-x).exp())


class OwnActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(1 + x.exp())


class OwnNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_groups, self.eps = 1, 1e-3
        self.weight, self.bias = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean((1, 2, 3), keepdim=True)
        scale = (centred.square().mean((1, 2, 3), keepdim=True) + self.eps).rsqrt()
        return centred * scale * self.weight[:, None, None] + self.bias[:, None, None]


class OwnSame(nn.Conv2d):
    """A "same" convolution that pads by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


def as_group_norm(own: OwnNorm) -> nn.Module:
    norm = nn.GroupNorm(1, 8, eps=own.eps).double()
    norm.load_state_dict(own.state_dict())
    return norm


def as_padded(own: OwnSame) -> nn.Module:
    conv = nn.Conv2d(8, 8, 3, padding=1).double()
    conv.load_state_dict(own.state_dict())
    return conv


OWN = {
    "gate": (OwnGate, "gate", lambda own: nn.Sigmoid()),
    "activation": (OwnActivation, nn.GELU, lambda own: nn.Softplus()),
    "normalisation": (OwnNorm, nn.GroupNorm, as_group_norm),
    "convolution": (lambda: OwnSame(8, 8, 3), nn.Conv2d, as_padded),
}


@pytest.mark.parametrize("name", OWN)
def test_what_a_user_registers(name, table, untouched):
    make, like, known = OWN[name]
    x, labels = samples()
    own = around(make())
    own[1].double()
    if name != "convolution":  # which is found to be one
        with pytest.raises(ValueError, match=r"'1' \(Own\w+\) computes .*, for which there is no LRP rule"):
            pxp.heatmap(own, x, labels)
    assert pxp.register_layer(type(own[1]), like=like).passes == kind_of(own[1]).passes
    other = around(nn.Identity())
    other.load_state_dict({key: value for key, value in own.state_dict().items() if not key.startswith("1.")})
    other[1] = known(own[1])
    for rule in ("epsilon", "gamma", "zplus"):
        found = pxp.heatmap(untouched(own), x, labels, pxp.LRP(rule))
        assert relative(found, pxp.heatmap(other, x, labels, pxp.LRP(rule))) < 1e-9


def test_a_layer_with_a_rule_is_one_of_torchs(table):
    class Own(nn.Module):
        pass

    for like in (nn.Conv2d, nn.Linear, "transposed convolution"):
        with pytest.raises(TypeError, match=r"Own is no subclass of Conv1d, .*Linear, so no rule can read its weight"):
            pxp.register_layer(Own, like=like)


@pytest.mark.parametrize("wrong", [nn.ReLU, nn.Identity])
def test_what_is_registered_is_not_believed(wrong, table):
    x, labels = samples()
    model = around(OwnActivation())
    pxp.register_layer(OwnActivation, like=wrong)
    with pytest.raises(ValueError, match=r"under LRP-0 relevance is not conserved in '1' \(OwnActivation\)"):
        pxp.heatmap(model, x, labels)


def mixed(x: Tensor, *_) -> Tensor:
    return x.flip(-1)


def scaled_by_sample(x: Tensor) -> Tensor:
    return x / (1 + x.abs().amax((1, 2, 3), keepdim=True))


@pytest.mark.parametrize("function", [mixed, scaled_by_sample, lambda x: torch.cumsum(x, 1)])
def test_an_activation_looks_at_one_place_at_a_time(function, table):
    """x · (f(x) / x) conserves relevance whatever f is."""

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    pxp.register_layer(Own, like=nn.GELU)
    x, labels = samples()
    with pytest.raises(ValueError, match=r"'1' \(Own\) is no activation: what it gives in one place depends on others"):
        pxp.heatmap(around(Own()), x, labels)


def test_what_is_registered_anew_is_checked_anew(table):
    class Softplus(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(1 + torch.exp(x))

    x, labels = samples()
    model = around(Softplus())
    pxp.register_layer(Softplus, like=nn.Softplus)
    pxp.heatmap(model, x, labels)
    pxp.register_layer(Softplus, like=nn.ReLU)
    with pytest.raises(ValueError, match=r"not conserved in '1' \(Softplus\)"):
        pxp.heatmap(model, x, labels)


def test_what_cannot_be_registered(table):
    with pytest.raises(ValueError, match=r"nothing is known of 'gait'; give a known class or one of 'convolution', "):
        pxp.register_layer(OwnGate, like="gait")
    with pytest.raises(ValueError, match="nothing is known of <class .*OwnNorm'>"):
        pxp.register_layer(OwnGate, like=OwnNorm)
    with pytest.raises(TypeError, match="a layer is a subclass of torch.nn.Module"):
        pxp.register_layer(OwnGate(), like="gate")


PAGE = Path(__file__).resolve().parents[2] / "book" / "own-layer.md"


def test_the_page_about_ones_own_layer_runs(table, capsys):
    names: dict = {}
    text = PAGE.read_text(encoding="utf8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 6 and names["heat"].shape == names["images"].shape
    said = capsys.readouterr().out.split()
    shown = " ".join(re.findall(r"```text\n(.*?)```", text, re.DOTALL)).split()
    assert len(said) == len(shown)
    for found, expected in zip(said, shown, strict=True):
        assert found == expected or float(found) == pytest.approx(float(expected), rel=0.01)
    assert names["small"].attention.num_heads == 2
