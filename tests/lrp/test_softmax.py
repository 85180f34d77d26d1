"""The rules of attention, against the same written out by hand in the classical form R_i = Σ_j …

Nothing in the oracle uses autograd, and it distributes relevance itself, not gradients.
"""

from __future__ import annotations

import pytest
import torch
from conftest import relative
from oracle import Oracle, softmax
from torch import Tensor, nn
from torch.nn import functional as F
from vits import images_of, two_blocks

import pxp
from pxp.lrp.softmax import AttentionRule, make_softmax_rule
from pxp.network.attention import Attention

SOFTMAX = {
    "attnlrp": "attnlrp",
    "cp": "cp",
    "zplus": "zplus",
    "zplus without bias": pxp.SoftmaxZPlus(zero_params="bias"),
}


@pytest.mark.parametrize("attention", SOFTMAX)
@pytest.mark.parametrize("rule", ["epsilon", "gamma", "zplus", "alpha2beta1"])
def test_relevance_is_that_of_the_explicit_rules(rule, attention, untouched):
    model = untouched(two_blocks())
    images, targets = images_of(model, 3)
    criterion = pxp.LRP(rule, softmax=SOFTMAX[attention])
    oracles = [Oracle(model, image) for image in images]
    assert relative(torch.stack([oracle.logits for oracle in oracles]), model(images)) < 1e-12
    found = [o.explain(int(t), rule, attention) for o, t in zip(oracles, targets, strict=True)]
    pixels = pxp.heatmap(model, images, targets, criterion)
    assert relative(pixels, torch.stack([one["pixels"] for one in found])) < 1e-10
    units = pxp.find_components(model, ("head", "neuron", "mlp_output"))
    assert len(units) == 6 and units.total == 2 * (3 + 10 + 12)
    scores = pxp.attribute(model, (images, targets), units, criterion)
    per_sample = pxp.attribute(
        model, (images, targets), units, pxp.LRP(rule, softmax=SOFTMAX[attention], absolute="sample")
    )
    for name in units:
        expected = torch.stack([one[name] for one in found])  # samples, tokens, components
        assert relative(scores.signed[name], expected.sum(1).mean(0)) < 1e-10
        assert relative(scores[name], expected.abs().sum(1).mean(0)) < 1e-10
        assert relative(per_sample[name], expected.sum(1).abs().mean(0)) < 1e-10


@pytest.mark.parametrize(("rule", "attention"), [("epsilon", "attnlrp"), ("gamma", "cp"), ("alpha2beta1", "zplus")])
def test_relevance_of_the_shipped_vit_is_that_of_the_explicit_rules(rule, attention, untouched):
    model = untouched(pxp.load_model("vit").double())
    images, targets = pxp.load_dataset("fashion-mnist").eval[0][:2].double(), torch.tensor([9, 3])
    found = [Oracle(model, i).explain(int(t), rule, attention) for i, t in zip(images, targets, strict=True)]
    criterion = pxp.LRP(rule, softmax=attention)
    pixels = pxp.heatmap(model, images, targets, criterion)
    assert relative(pixels, torch.stack([one["pixels"] for one in found])) < 1e-8
    units = pxp.find_components(model, ("head", "neuron", "mlp_output"))
    assert len(units) == 18
    scores = pxp.attribute(model, (images, targets), units, criterion)
    for name in units:
        expected = torch.stack([one[name] for one in found])
        assert relative(scores[name], expected.abs().sum(1).mean(0)) < 1e-8


def test_a_heads_score_is_twice_its_softmax_relevance_over_keys():
    model = two_blocks()
    images, targets = images_of(model)
    scores = pxp.attribute(model, (images, targets), pxp.find_components(model, "head"), pxp.LRP("gamma"))
    found = [Oracle(model, i).explain(int(t), "gamma", "attnlrp") for i, t in zip(images, targets, strict=True)]
    for index, name in enumerate(scores):
        per_query = torch.stack([one[f"encoder.layers.encoder_layer_{index} weights"].sum(-1) for one in found])
        assert relative(scores[name], 2 * per_query.abs().sum(-1).mean(0)) < 1e-10


def test_conservation_under_cp_without_biases():
    model = two_blocks(biases=False)
    images, targets = images_of(model, 4)
    logits = model(images).gather(1, targets[:, None])[:, 0].detach()
    none = pxp.Epsilon(1e-14)
    kept = pxp.heatmap(model, images, targets, pxp.LRP(none, softmax="cp")).sum((1, 2, 3))
    assert relative(kept, logits) < 1e-8
    lost = pxp.heatmap(model, images, targets, pxp.LRP(none)).sum((1, 2, 3))
    assert relative(lost, logits) > 1e-2  # AttnLRP's expansion has a constant term


def one_attention(rule: AttentionRule, q: Tensor, k: Tensor, v: Tensor) -> Attention:
    return rule.attend(q, k, v, None, False)


@pytest.mark.parametrize("zero_params", [None, "bias"])
@pytest.mark.parametrize("tokens", [2, 5])
def test_softmax_zplus_is_the_direct_rule(zero_params, tokens):
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(2, 3, tokens, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = one_attention(pxp.SoftmaxZPlus(zero_params=zero_params), q, k, v)
    start = torch.randn_like(out)
    of_q = q * torch.autograd.grad(out, q, start / out)[0]
    with torch.no_grad():
        logits = q @ k.transpose(-2, -1) / 2
        of_weights = logits.softmax(-1) * ((start / out) @ v.transpose(-2, -1)) / 2
        of_logits = softmax("zplus" if zero_params is None else "zplus without bias", logits, of_weights)
        expected = 0.5 * q * ((of_logits / logits) @ k) / 2
    assert relative(of_q.detach(), expected) < 1e-7  # where nothing is positive, rounding is divided by ε = 1e-9


def test_softmax_rules_give_the_softmax_itself_and_survive_masks():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.zeros(4, 4, dtype=torch.float64).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), -torch.inf)
    for name in ("attnlrp", "cp", "zplus"):
        rule = make_softmax_rule(name)
        for given, causal in ((mask, False), (mask == 0, False), (None, True)):
            out = rule.attend(q, k, v, given, causal)
            assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), atol=1e-14)
            assert all(
                bool(g.isfinite().all())
                for g in torch.autograd.grad(out.sum(), (q, k, v), allow_unused=True)
                if g is not None
            )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pxp.LRP(softmax="attn"), ValueError, "unknown softmax rule 'attn'; allowed: 'attnlrp', 'cp', 'zplus'"),
        (lambda: pxp.LRP(softmax=3), TypeError, "a softmax rule is a name or a rule"),
        (lambda: pxp.SoftmaxZPlus(zero_params="weight"), ValueError, "zero_params may only name 'bias'"),
        (lambda: pxp.SoftmaxZPlus(epsilon=-1), ValueError, "epsilon must be finite and not negative, got -1"),
        (
            lambda: pxp.LRP(absolute="head"),
            ValueError,
            "absolute must be one of 'token', 'sample', got 'head'",
        ),
        (
            lambda: pxp.Taylor(absolute="head"),
            ValueError,
            "absolute must be one of 'token', 'sample', got 'head'",
        ),
        (lambda: pxp.AttnLRP().register(nn.Linear(2, 2)), TypeError, "a rule for the attention of a replica"),
    ],
)
def test_wrong_rules(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_repr_of_the_rules():
    assert repr(pxp.LRP("gamma", softmax="cp", absolute="sample")) == "LRP('gamma', softmax='cp', absolute='sample')"
    assert [repr(make_softmax_rule(name)) for name in ("attnlrp", "cp", "zplus")] == [
        "AttnLRP()", "CPLRP()", "SoftmaxZPlus()",
    ]  # fmt: skip
    assert repr(pxp.SoftmaxZPlus(zero_params="bias")) == "SoftmaxZPlus(zero_params='bias')"
