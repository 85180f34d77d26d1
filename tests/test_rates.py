"""Rates and fractions: from whatever holds numbers, and 95 is not 95 %."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import network

import pxp
from pxp.rates import as_rates, fraction

WANTED = (0.0, 0.2, 0.4, 0.6, 0.8)
SOURCES = {
    "list": lambda: [0, 0.2, 0.4, 0.6, 0.8],
    "linspace": lambda: np.linspace(0, 0.8, 5),
    "linspace of float32": lambda: np.linspace(0, 0.8, 5, dtype=np.float32),
    "arange of float16": lambda: np.arange(5, dtype=np.float16) / np.float16(5),
    "tensor": lambda: torch.linspace(0, 0.8, 5),
    "tensor of double with a gradient": lambda: torch.linspace(0, 0.8, 5, dtype=torch.float64, requires_grad=True),
    "generator": lambda: (step / 5 for step in range(5)),
    "map": lambda: map(lambda step: Fraction(step, 5), range(5)),
    "keys": lambda: dict.fromkeys(WANTED, "any"),
    "list of 0-d arrays and tensors": lambda: [0, np.array(0.2), torch.tensor(0.4), np.float32(0.6), np.float64(0.8)],
}


@pytest.mark.parametrize("source", SOURCES)
def test_rates_from_anything(source, tmp_path):
    model, x, labels, units = network("grouped", samples=6)
    scores = pxp.attribute(model, None, units, pxp.Random())
    found = as_rates(SOURCES[source]())
    assert found == pytest.approx(WANTED, abs=1e-15) and {type(rate) for rate in found} == {float}
    curve = pxp.pruning_curve(model, scores, (x, labels), rates=SOURCES[source](), progress=False)
    assert curve.rates == found and curve.runs == pxp.Curve(SOURCES[source](), curve.runs).runs
    curve.save(tmp_path / "curve.json")
    pxp.save_curves({"LRP": curve}, tmp_path / "curves.json")
    assert pxp.Curve.load(tmp_path / "curve.json") == pxp.load_curves(tmp_path / "curves.json")["LRP"] == curve
    again = pxp.pruning_curve(model, [scores] * 2, (x, labels), rates=WANTED, progress=False)
    assert pxp.compare(curve, again).difference == 0  # a billionth more or less is the same rate
    given = (x[:3], labels[:3]), units, (x[3:], labels[3:]), 1
    study = pxp.tune(model, *given, space={"low": ["epsilon"]}, rates=SOURCES[source](), progress=False)
    assert study.user_attrs["pxp"]["rates"] == list(found)
    pxp.save_study(study, tmp_path / "study.json")
    assert json.loads((tmp_path / "study.json").read_text())["attrs"]["pxp"]["rates"] == list(found)


@pytest.mark.parametrize(
    ("rates", "error", "message"),
    [
        ([0.5, 0, 0.8], ValueError, "rates must grow, got 0 after 0.5"),
        (np.array([0, 0.8, 0.4]), ValueError, "rates must grow, got 0.4 after 0.8"),
        (torch.tensor([0.1, 0.1]), ValueError, "rates must grow, got 0.1 after 0.1"),
        ((r for r in (0, 1, 1)), ValueError, "rates must grow, got 1 after 1"),
        ([0, 30], ValueError, r"rate must be in \[0, 1\], got 30; 30 % is 0.3"),
        (range(0, 100, 10), ValueError, r"rate must be in \[0, 1\], got 10; 10 % is 0.1"),
        (torch.linspace(-0.2, 0.8, 3), ValueError, r"rate must be in \[0, 1\], got -0.2"),
        ([0, np.nan], ValueError, r"rate must be in \[0, 1\], got nan"),
        ([0, np.inf], ValueError, r"rate must be in \[0, 1\], got inf"),
        (0.5, TypeError, r"rates must be several numbers in \[0, 1\], such as .*, got 0.5"),
        (torch.tensor(0.5), TypeError, r"rates must be several numbers"),
        ("0.5", TypeError, r"rate must be a number in \[0, 1\], got '0'"),
        ([0, "0.5"], TypeError, r"rate must be a number in \[0, 1\], got '0.5'"),
        ([[0, 0.5]], TypeError, r"rate must be a number in \[0, 1\], got \[0, 0.5\]"),
        (torch.rand(2, 3), TypeError, r"rate must be a number in \[0, 1\], got tensor"),
        ([False, True], TypeError, r"rate must be a number in \[0, 1\], got False"),
        ([], ValueError, "at least one|needs one accuracy"),
        (np.array([]), ValueError, "at least one|needs one accuracy"),
    ],
)
def test_rates_that_are_none(rates, error, message):
    model, x, labels, units = network("grouped", samples=6)
    scores = pxp.attribute(model, None, units, pxp.Random())
    given = list(rates) if hasattr(rates, "__next__") else rates
    for call in (
        lambda: pxp.pruning_curve(model, scores, (x, labels), rates=given, progress=False),
        lambda: pxp.tune(model, (x[:3], labels[:3]), units, (x[3:], labels[3:]), 1, rates=given, progress=False),
        lambda: pxp.Curve(given, ((0.5, 0.4, 0.3),)),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("value", "hint"), [(95, "; 95 % is 0.95"), (1.05, "; 1.05 % is 0.0105"), (-1, ""), (math.nan, "")]
)
def test_fractions_are_no_percentages(value, hint):
    model, x, labels, units = network("grouped", samples=6)
    scores = pxp.attribute(model, None, units, pxp.Random())
    curve = pxp.Curve((0, 0.5), ((1, 0.5), (0.9, 0.4)))
    one = pxp.Curve((0, 0.5), ((1, 0.5),))
    for name, call in {
        "share": lambda: curve.top_pr(value),
        "level": lambda: curve.interval(value),
        "level ": lambda: one.a_pr_interval(value),
        "rate": lambda: scores.select(value),
        "rate ": lambda: pxp.prune_gradually(model, (x, labels), units, pxp.Taylor(), value, progress=False),
        "flops": lambda: pxp.within_budget(scores, model=model, flops=value),
        "parameters": lambda: pxp.within_budget(scores, model=model, parameters=np.float32(value)),
        "accuracy": lambda: pxp.Curve((0, 0.5), ((0.9, value),)),
    }.items():
        with pytest.raises(ValueError, match=rf"{name.strip()} must be in \[0, 1\], got {value:g}{hint}$"):
            call()


def test_numbers_of_other_kinds():
    for value in (0.3, np.float32(0.3), np.float64(0.3), np.array(0.3), torch.tensor(0.3), Fraction(3, 10)):
        assert fraction("rate", value) == 0.3
    assert fraction("rate", torch.tensor(0.25, dtype=torch.bfloat16)) == 0.25
    assert [fraction("rate", value) for value in (0, 1, np.int64(1), torch.tensor(1))] == [0, 1, 1, 1]
    for value in (True, np.bool_(True), "0.3", None, 0.3j, [0.3]):
        with pytest.raises(TypeError, match=r"share must be a number in \[0, 1\], got "):
            fraction("share", value)


def test_whole_numbers():
    model, _, _, units = network("grouped", samples=6)
    scores = pxp.attribute(model, None, units, pxp.Random())
    assert scores.select(count=np.int64(3)).kept == units.total - 3
    for options in ({"count": 3.5}, {"count": "3"}, {"rate": 0.5, "min_keep": 1.5}):
        with pytest.raises(TypeError, match="must be a whole number, got"):
            scores.select(**options)


def test_files_of_what_is_no_curve(tmp_path):
    path = tmp_path / "curve.json"
    pxp.Curve((0, 0.5), ((0.9, 0.4),)).save(path)
    good = json.loads(path.read_text())
    for wrong, message in (
        ({"rates": [0.5, 0.0]}, "rates must grow"),
        ({"rates": [0, 50]}, "50 % is 0.5"),
        ({"runs": [[90, 40]]}, "accuracy must be in"),
        ({"runs": [["a", "b"]]}, "accuracy must be a number"),
    ):
        path.write_text(json.dumps(good | wrong))
        with pytest.raises(ValueError, match=rf"curve\.json is no curve written by pxp: .*{message}"):
            pxp.Curve.load(path)
