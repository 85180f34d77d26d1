"""Small verbs that every chapter needs."""

from __future__ import annotations

import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import network

import pxp
from pxp.bars import bar


def test_draws_are_scored_one_by_one(untouched):
    model, x, labels, units = network("vgg", samples=6)
    untouched(model)
    draws = [(x[:3], labels[:3]), (x[3:], labels[3:])]
    found = pxp.attribute_draws(model, (draw for draw in draws), units, pxp.LRP("gamma"))
    for scores, draw in zip(found, draws, strict=True):
        alone = pxp.attribute(model, draw, units, pxp.LRP("gamma"))
        assert all(torch.equal(scores.signed[name], alone.signed[name]) for name in units)
    assert len(pxp.pruning_curve(model, found, (x, labels), rates=[0, 0.5], allow_shared=True).runs) == 2
    # chance is drawn anew, as with seeds 3, 4, ...
    random = pxp.attribute_draws(model, draws, units, pxp.Random(3))
    for scores, seed in zip(random, (3, 4), strict=True):
        alone = pxp.attribute(model, None, units, pxp.Random(seed))
        assert all(torch.equal(scores[name], alone[name]) for name in units)


def test_draws_that_are_none():
    model, x, labels, units = network("vgg", samples=4)
    with pytest.raises(TypeError, match="put it into a list"):
        pxp.attribute_draws(model, (x, labels), units, pxp.LRP())
    with pytest.raises(ValueError, match="no draw"):
        pxp.attribute_draws(model, [], units, pxp.LRP())
    with pytest.raises(ValueError, match=r"draw 1: labels reach 70"):
        pxp.attribute_draws(model, [(x, labels), (x, torch.full_like(labels, 70))], units, pxp.LRP())


def test_masks_combine():
    model, _, _, units = network("vgg")
    one, other = (pxp.attribute(model, None, units, pxp.Random(seed)).select(0.5) for seed in (0, 1))
    both, either = one & other, one | other
    for name in units:
        assert torch.equal(both[name], one[name] & other[name]) and torch.equal(either[name], one[name] | other[name])
        assert torch.equal((~one)[name], ~one[name])
    assert both.kept + either.kept == one.kept + other.kept and both.kept < one.kept < either.kept
    everything = pxp.Mask.all(units)
    assert everything.rate == 0 and (one & everything).kept == one.kept and (one | ~one).kept == units.total


def test_masks_of_other_components_do_not_combine():
    first, second = (pxp.Mask.all(network(name)[3]) for name in ("vgg", "resnet"))
    with pytest.raises(ValueError, match="of other components: "):
        first & second
    with pytest.raises(TypeError):
        first | {"features.0": torch.ones(8, dtype=torch.bool)}


def test_progress_is_silenced_once(monkeypatch):
    monkeypatch.setattr("pxp.bars._shown", True)
    assert not bar(range(3), show=True).disable and bar(range(3), show=False).disable
    pxp.progress(False)
    assert bar(range(3), show=True).disable
    pxp.progress(True)
    assert not bar(total=3, show=True).disable
    with pytest.raises(TypeError, match="True or False, got 'no'"):
        pxp.progress("no")


@pytest.mark.parametrize(("value", "shown"), [("0", False), ("off", False), ("1", True)])
def test_the_environment_silences_it(value, shown):
    code = "import pxp.bars; print(pxp.bars._shown)"
    found = subprocess.run([sys.executable, "-c", code], env={"PXP_PROGRESS": value}, capture_output=True, text=True)
    assert found.stdout.strip() == str(shown)


def test_styles_differ_in_more_than_colour():
    styles = [pxp.plots.style(index) for index in range(8)]
    for part in ("color", "linestyle", "marker"):
        assert len({str(style[part]) for style in styles}) == 8
    assert pxp.plots.style(8) == styles[0]
    (line,) = plt.plot([0, 1], [1, 0], **pxp.plots.style(1))
    assert line.get_color() == pxp.plots.COLORS[1] and line.get_marker() == "s"
    plt.close("all")


@pytest.mark.parametrize("there", [True, False])
def test_the_device(there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert pxp.device() == torch.device("cuda" if there else "cpu")
