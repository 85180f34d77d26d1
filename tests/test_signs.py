"""Positive means useful for the true class, whatever a criterion starts with."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from conftest import network
from torch import nn
from zennit.composites import EpsilonPlus

import pxp

STARTS = ("logit", "one", "margin", "loss")
SIGNED = {
    **{f"LRP of {start}": pxp.LRP(pxp.Epsilon(0), start=start) for start in STARTS},
    **{f"path of {start}": pxp.LRP(pxp.Epsilon(0), start=start, path_steps=3) for start in STARTS},
    **{f"Taylor of {start}": pxp.Taylor(start) for start in STARTS},
    "Taylor": pxp.Taylor(),
    **{f"gradients of {start}": pxp.IntegratedGradients(3, start=start) for start in STARTS},
    **{f"influence of {start}": pxp.IntegratedGradients(3, influence=True, start=start) for start in STARTS},
    "zennit": EpsilonPlus(),
}


class ForAndAgainst(nn.Module):
    """Filter 0 speaks for class 0 and against the others, filter 1 the other way, filter 2 for nothing."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 1, bias=False)
        self.fc = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.conv.weight.fill_(1.0)
            self.fc.weight.copy_(torch.tensor([[1.0, -0.4, 0.0], [-0.4, 1.0, 0.0], [-0.4, 0.3, 0.0]]))

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


@pytest.mark.parametrize("criterion", SIGNED.values(), ids=SIGNED)
def test_positive_means_useful(criterion):
    model, x = ForAndAgainst().eval(), torch.rand(8, 1, 4, 4)
    units = pxp.find_components(model, example=x)
    for label in (0, 1):
        labels = torch.full((8,), label)
        scores = pxp.attribute(model, (x, labels), units, criterion)
        useful, harmful = scores.signed["conv"][label], scores.signed["conv"][1 - label]
        assert useful > 0 > harmful and abs(float(scores.signed["conv"][2])) < 1e-6
        for order, index in (("least", 1 - label), ("most", label)):
            mask = scores.select(count=1, by="signed", order=order)
            assert mask["conv"].tolist().index(False) == index
        assert scores.has_sign
        without = pxp.prune_gradually(model, (x, labels), units, criterion, 1 / 3, steps=1, by="signed")
        assert without["conv"].tolist().index(False) == 1 - label


def test_pixels_have_the_sign_of_components():
    model, x = ForAndAgainst().eval(), torch.rand(2, 1, 4, 4)
    with torch.no_grad():
        model.fc.weight[:, 1] = 0
    for start in STARTS:
        assert bool((pxp.heatmap(model, x, 0, pxp.Taylor(start)) > 0).all())


@dataclass(frozen=True)
class Count(pxp.Criterion):
    """A user's criterion without a sign."""

    has_sign = False

    def values(self, probe):
        yield {name: torch.arange(1.0, layer.size + 1)[None, None] for name, layer in probe.units.items()}


UNSIGNED = {"random": pxp.Random(), "magnitude": pxp.Magnitude(), "activation": pxp.Activation(), "own": Count()}


@pytest.mark.parametrize("criterion", UNSIGNED.values(), ids=UNSIGNED)
def test_what_has_no_sign_is_not_ranked_by_it(criterion, tmp_path):
    model, x, labels, units = network("vgg", samples=4)
    scores = pxp.attribute(model, (x, labels), units, criterion)
    scores.save(tmp_path / "scores")
    message = "scores by .* have no sign that tells useful from harmful; by='magnitude'"
    for ask in (
        lambda: scores.select(0.5, by="signed"),
        lambda: pxp.Scores.load(tmp_path / "scores").select(0.5, by="signed", scope="layer"),
        lambda: pxp.pruning_curve(model, scores, (x, labels), rates=[0, 0.5], by="signed"),
        lambda: pxp.within_budget(scores, model=model, parameters=0.5, by="signed", example=x),
        lambda: pxp.prune_gradually(model, (x, labels), units, criterion, 0.5, by="signed"),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
    assert scores.select(0.5).rate == pytest.approx(0.5, abs=0.05)
    assert pxp.Scores(units, scores, scores).select(0.5, by="signed")  # a user's own numbers


@pytest.mark.parametrize(
    "make", [
        lambda: pxp.LRP(absolute="never"), lambda: pxp.Taylor(absolute="never"),
        lambda: pxp.LRP("gamma", softmax="cp", absolute="never"),
    ],
)  # fmt: skip
def test_one_spelling(make):
    with pytest.raises(ValueError, match=r"got 'never'; scores\.select\(rate, by='signed'\) ranks with the sign"):
        make()


def test_own_criteria_with_the_old_spelling_are_told():
    model, x, labels, units = network("vgg", samples=4)

    class Old(Count):
        absolute = "never"

    with pytest.raises(ValueError, match=r"absolute must be one of 'token', 'sample', got 'never'; scores\.select"):
        pxp.attribute(model, (x, labels), units, Old())
