"""Attentions by their descriptions: with windows and relative position bias, and of one's own."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from conftest import MODES, only, relative
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from vits import POSITIONED, Around, lively, positioned

import pxp
from pxp.network import attentions
from pxp.network.attention import Attention, Described
from pxp.network.attentions import register_attention
from pxp.network.replica import replica
from pxp.sweep import silenced


def without_columns(model: nn.Module, name: str, index: int) -> nn.Module:
    """A replica in which the output projection has zeros for one head."""
    twin = replica(model)
    attention = twin.get_submodule(name)
    weight = attention.projection.weight.clone()
    weight[:, index * attention.head_dim : (index + 1) * attention.head_dim] = 0
    attention.projection.weight = nn.Parameter(weight, requires_grad=False)
    return twin


@pytest.mark.parametrize("name", POSITIONED)
def test_every_head_is_one_that_the_projection_does_not_read(name, untouched):
    model, images, _ = positioned(name)
    untouched(model)
    units = pxp.find_components(model, "head", example=images)
    with torch.no_grad():
        before = model(images)
        assert relative(replica(model)(images), before) < 1e-13
    for layer, each in units.items():
        assert each.size == 3
        for index in range(each.size):
            expected = without_columns(model, layer, index)(images).detach()
            assert relative(expected, before) > 1e-9
            for mode in MODES.values():
                with mode(), pxp.masked(model, only(units, layer, index)):
                    assert relative(model(images).detach(), expected) < 1e-12
                    # and of what is masked, the replica knows
                    assert mode is MODES["inference"] or relative(replica(model)(images).detach(), expected) < 1e-12
    with torch.no_grad():
        assert torch.equal(model(images), before)


@pytest.mark.parametrize("name", POSITIONED)
def test_batches_equal_singles_and_curves_run(name, untouched):
    model, images, targets = positioned(name, 3)
    untouched(model)
    units = pxp.find_components(model, ("head", "neuron"), example=images)
    assert not any("cpb_mlp" in layer for layer in units)  # no signal passes the MLP of the positions
    for criterion in (pxp.LRP("gamma", softmax="zplus"), pxp.Taylor(), pxp.Activation()):
        scores = pxp.attribute(model, (images, targets), units, criterion)
        singly = [pxp.attribute(model, (images[i : i + 1], targets[i : i + 1]), units, criterion) for i in range(3)]
        for layer in units:
            assert relative(scores[layer], sum(one[layer] for one in singly) / 3) < 1e-10
    for kind in ("head", "neuron"):
        part = pxp.attribute(model, (images, targets), units.of_kind(kind), pxp.LRP())
        curve = pxp.pruning_curve(
            model, part, (images, targets), rates=(0, 0.3, 0.9), progress=False, allow_shared=True
        )
        with pxp.masked(model, part.select(0.9)):
            assert curve.runs[0][2] == pxp.accuracy(model, (images, targets))
        with silenced(model, part.select(0.3)) as twin, pxp.masked(model, part.select(0.3)), torch.no_grad():
            assert relative(twin(images), model(images)) < 1e-12


def test_costs_of_windowed_heads_by_hand():
    model, images, _ = positioned("timm's Swin")
    head = next(iter(pxp.find_components(model, "head", example=images).values()))
    tokens, width, channels = 12 * 12, 12, 4
    weights = 4 * channels * width
    assert head.parameters == weights + 3 * channels
    assert head.flops == 2 * tokens * weights + 2 * 2 * tokens * 16 * channels  # each token attends to its window of 16


def test_what_runs_between_swins_stages_goes_with_the_block_before():
    model, images, _ = positioned("torchvision's Swin")
    groups = pxp.depth_groups(model, pxp.find_components(model, "head", example=images).trace)
    expected = {"features.0": "low", "features.1.0": "low", "features.1.1": "middle", "features.2": "middle",
                "features.3": "high", "head": "fc"}  # fmt: skip
    for layer, group in groups.items():
        assert group == next(found for start, found in expected.items() if layer.startswith(start)), layer


@pytest.mark.parametrize("shift", [[0, 0], [1, 2], [0, 1], [3, 0]])
@pytest.mark.parametrize("side", [(4, 4), (8, 12), (7, 9), (3, 10)])
def test_torchvisions_windows(shift, side):
    attention = torchvision.models.swin_transformer.ShiftedWindowAttention(6, [4, 5], shift, 3)
    model = lively(attention)
    x = torch.randn(2, *side, 6, dtype=torch.float64)
    assert relative(replica(model)(x), model(x)) < 1e-13


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: RelativePositionalMultiHeadAttention(6, 2, 4), (2, 3, 4, 6)),
        (lambda: timm.models.metaformer.Attention(6, 2), (2, 5, 6)),
        (lambda: timm.models.swin_transformer.WindowAttention(6, 3, 4, (2, 2), qkv_bias=False), (2, 4, 6)),
        (lambda: timm.models.swin_transformer_v2.WindowAttention(6, (2, 2), 3, qkv_bias=False), (2, 4, 6)),
        (lambda: timm.models.swin_transformer_v2.WindowAttention(6, (2, 2), 3, qkv_bias_separate=True), (2, 4, 6)),
        (lambda: timm.models.beit.Attention(6, 3, attn_head_dim=2), (2, 4, 6)),
        (lambda: timm.models.beit.Attention(6, 3, qkv_bias=True, window_size=(1, 3)), (2, 4, 6)),
    ],
)
def test_variants_have_equals(make, shape):
    model = lively(make())
    x = torch.randn(shape, dtype=torch.float64)
    twin = replica(model)
    assert isinstance(twin, Described) and relative(twin(x), model(x)) < 1e-13


class Fused(nn.Module):
    """Someone's attention, its number of heads under the name of what a replica adds."""

    def __init__(self, width: int = 6, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.scaling = heads, 0.7
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.to_out((self.scaling * q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2))


class Separate(nn.Module):
    """Another one: separate projections, dropouts, parts with the names of an Attention's own, a functional output."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.n_head, self.split = 2, "a string where Attention has a method"
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.attn_drop, self.resid_drop = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        weights = self.attn_drop((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        return self.resid_drop(F.linear(mixed, self.output.weight, self.output.bias)), weights


class First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(attentions, "_KNOWN", dict(attentions._KNOWN))
    register_attention(Fused, qkv="to_qkv", proj="to_out.0", heads="heads", scale="scaling", drop="to_out.1")
    register_attention(
        Separate, q="query", k="key", v="value", proj="output", heads="n_head", drop="resid_drop", pair=True
    )


@pytest.mark.parametrize(("make", "heads"), [(Fused, 3), (lambda: First(Separate()), 2)], ids=["fused", "separate"])
def test_attentions_of_ones_own_can_be_registered(make, heads, registered, untouched):
    model = untouched(lively(Around(make())))
    x, targets = torch.randn(2, 5, 6, dtype=torch.float64), torch.tensor([0, 1])
    state = torch.get_rng_state()
    twin = replica(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert relative(twin(x), model(x)) < 1e-14 and any(isinstance(module, Attention) for module in twin.modules())
    units = pxp.find_components(model, "head", example=x)
    (name,) = units
    assert units.total == heads
    before = model(x)
    for index in range(heads):
        expected = without_columns(model, name, index)(x)
        for mode in MODES.values():
            with mode(), pxp.masked(model, only(units, name, index)):
                assert relative(model(x).detach(), expected.detach()) < 1e-13
        assert relative(expected, before) > 1e-6
    scores = pxp.attribute(model, (x, targets), units, pxp.LRP("gamma"))
    pxp.pruning_curve(model, scores, (x, targets), rates=(0, 0.5), progress=False, allow_shared=True)
    small = pxp.compact(model, scores.select(count=1), example=x)
    with pxp.masked(model, scores.select(count=1)):
        assert relative(small(x).detach(), model(x).detach()) < 1e-13
    assert pxp.find_components(small, "head", example=x).total == heads - 1
    # R = x ⊙ g with AttnLRP's factors
    point = x.clone().requires_grad_()
    y = model.inp(point)
    own = model.inner if heads == 3 else model.inner.inner
    parts = own.to_qkv(y).chunk(3, -1) if heads == 3 else (own.query(y), own.key(y), own.value(y))
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
    for part, factor in ((q, 0.25), (k, 0.25), (v, 0.5)):
        part.register_hook(lambda gradient, factor=factor: gradient * factor)
    mixed = ((0.7 if heads == 3 else 3**-0.5) * torch.einsum("nhqc,nhkc->nhqk", q, k)).softmax(-1) @ v
    projection = own.to_out[0] if heads == 3 else own.output
    logits = model.out(projection(mixed.transpose(1, 2).flatten(2)).mean(1))
    (gradient,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), point)
    found = pxp.heatmap(model, x, targets, pxp.LRP(pxp.Epsilon(1e-14)))
    assert relative(found, (point * gradient).detach()) < 1e-9


def test_a_subclass_of_a_registered_or_known_attention_is_not_its_parent(registered):
    class Other(Fused):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Window(timm.models.swin_transformer.WindowAttention):
        pass

    x = torch.randn(1, 4, 6)
    with pytest.raises(ValueError, match=r"'inner' \(Other, a subclass of .*Fused\) cannot be told apart"):
        pxp.find_components(Around(Other()), "head", example=x)
    message = r"'inner' \(Window, a subclass of timm.models.swin_transformer.WindowAttention\) cannot be told apart"
    with pytest.raises(ValueError, match=message):
        pxp.find_components(Around(Window(6, 3, 2, (2, 2))), "head", example=x)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"qkv": "qkv"}, "Fused was registered with 'qkv', which is no linear layer of it"),
        ({"proj": "to_out"}, "Fused was registered with 'to_out', which is no linear layer of it"),
        ({"heads": "num_heads"}, "Fused was registered with heads='num_heads', which is no number of it"),
        ({"scale": None}, "Fused does not compute what was registered of it"),
        ({"pair": True}, "Fused does not compute what was registered of it"),
    ],
)
def test_a_wrong_description_is_an_error_not_a_wrong_explanation(names, message, registered):
    register_attention(
        Fused, **{"qkv": "to_qkv", "proj": "to_out.0", "heads": "heads", "scale": "scaling", "pair": False, **names}
    )
    with pytest.raises(ValueError, match=message):
        pxp.find_components(Around(Fused()), "head", example=torch.randn(1, 5, 6))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: register_attention(Fused, proj="to_out.0"), ValueError, "either qkv, one projection for all, or q, k"),
        (lambda: register_attention(Fused, proj="a", qkv="b", q="c"), ValueError, "either qkv"),
        (lambda: register_attention(Fused, proj="a", q="b", k="c"), ValueError, "either qkv"),
        (lambda: register_attention(Fused(), proj="a", qkv="b"), TypeError, "a class of modules"),
        (lambda: register_attention(nn.MultiheadAttention, proj="a", qkv="b"), ValueError, "supported as it is"),
        (lambda: register_attention(timm.layers.Attention, proj="a", qkv="b"), ValueError, "supported as it is"),
    ],
)
def test_wrong_registrations(call, error, message, registered):
    with pytest.raises(error, match=message):
        call()


def test_unknown_arguments_of_an_attention_are_refused():
    twin = replica(timm.models.metaformer.Attention(6, 2))
    x = torch.randn(1, 4, 6)
    with pytest.raises(ValueError, match="an attention with 'mask' is not supported"):
        twin(x, mask=torch.zeros(4, 4))
    with pytest.raises(ValueError, match="an attention with 2 arguments is not supported"):
        twin(x, torch.zeros(4, 4))
