"""Settings are values: compared, hashed and printed by all that they hold."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import re
import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import zennit.composites as zc
from torch import nn
from zennit.core import Composite
from zennit.rules import Gamma as ZennitGamma
from zennit.torchvision import ResNetCanonizer, VGGCanonizer

import pxp
from pxp.batches import BATCH_SIZE
from pxp.identity import identity

RULES = {
    pxp.Epsilon: {"epsilon": [1e-6, 0.0, 1.00000001e-6, 0.1 + 0.2], "zero_params": [None, "bias"]},
    pxp.Gamma: {"gamma": [None, 0.0, 0.25, 0.12345678901234], "epsilon": [1e-6, 5.0], "zero_params": [None, "bias"]},
    pxp.ZPlus: {"epsilon": [1e-6, 1e-5, 10.0], "zero_params": [None, "bias"]},
    pxp.AlphaBeta: {("alpha", "beta"): [(2, 1), (1, 0), (1.5, 0.5)], "epsilon": [1e-6, 1e-9]},
    pxp.Flat: {"epsilon": [1e-6, 1e-3]},
    pxp.WSquare: {"epsilon": [1e-6, 1e-3], "zero_params": [None, "bias"]},
    pxp.ZBox: {"low": [0.0, -1.0, [[[-2.0]], [[-0.1]]]], "high": [1.0, 3], "epsilon": [1e-6, 1e-3]},
    pxp.AttnLRP: {},
    pxp.CPLRP: {},
    pxp.SoftmaxZPlus: {"epsilon": [1e-9, 1.0, 0.0], "zero_params": [None, "bias"]},
}
CRITERIA = {
    pxp.Taylor: {"start": ["loss", "one"], "absolute": ["token", "sample"]},
    pxp.IntegratedGradients: {"steps": [20, 3], "influence": [False, True], "baseline": [0.0, (0.1, -1.0)]},
    pxp.Activation: {},
    pxp.Magnitude: {"folded": [True, False]},
    pxp.Random: {"seed": [0, 7]},
    pxp.LRP: {
        "rule": ["epsilon", "zplus", pxp.ZPlus(epsilon=0.1), pxp.Gamma(0.1, zero_params="bias")],
        "low": [None, pxp.AlphaBeta(3, 2), pxp.AlphaBeta(3, 2, epsilon=0.5)],
        "input": [None, pxp.ZBox(-1, 2)],
        "softmax": ["cp", pxp.SoftmaxZPlus(epsilon=1.0)],
        ("path_steps", "baseline"): [(1, 0.0), (2, 0.0), (2, (0.5,))],
        "zero_params": [None, "bias"],
        "start": ["logit", "loss"],
    },
}


def made(make, options):
    """One object for each combination of the options."""
    for values in itertools.product(*options.values()):
        given = {}
        for name, value in zip(options, values, strict=True):
            given |= dict(zip(name, value, strict=True)) if isinstance(name, tuple) else {name: value}
        yield make(**given)


@pytest.mark.parametrize("make", [*RULES, *CRITERIA], ids=lambda make: make.__name__)
def test_all_values_count_and_the_text_gives_them_back(make):
    options = {**RULES, **CRITERIA}[make]
    names = {name: getattr(pxp, name) for name in pxp.__all__}  # from pxp import *
    first, second = list(made(make, options)), list(made(make, options))
    for index, one in enumerate(first):
        assert one == second[index] and hash(one) == hash(second[index]) and repr(one) == repr(second[index])
        assert eval(repr(one), dict(names)) == one == copy.deepcopy(one)
        assert identity(one) == identity(second[index])
    assert len(set(first)) == len({repr(one) for one in first}) == len({identity(one) for one in first}) == len(first)
    assert first[0] != "text" and first[0] != pxp.Scores


def test_numbers_of_any_kind_are_one_number():
    kinds = (np.float32, np.float64, torch.tensor, float)
    for make in (pxp.Epsilon, pxp.Gamma, lambda value: pxp.ZPlus(epsilon=value), lambda value: pxp.ZBox(value, 3)):
        assert len({make(kind(0.5)) for kind in kinds}) == len({repr(make(kind(0.5))) for kind in kinds}) == 1
    assert pxp.Gamma(1) == pxp.Gamma(True) and repr(pxp.Gamma(1)) == repr(pxp.Gamma(1.0)) == "Gamma(1)"
    assert pxp.Epsilon(0) == pxp.Epsilon(-0.0) and repr(pxp.Epsilon(-0.0)) == "Epsilon(0)"
    counts = (np.int64(3), np.uint8(3), 3)
    for make in (pxp.Random, pxp.IntegratedGradients, lambda steps: pxp.LRP(path_steps=steps)):
        assert len({repr(make(count)) for count in counts}) == 1 == len({identity(make(count)) for count in counts})
    bounds = torch.tensor([-2.0, 0.5]).reshape(1, 2, 1, 1)
    assert pxp.ZBox(bounds, 1) == pxp.ZBox(bounds.tolist(), 1.0) == pxp.ZBox(bounds.numpy(), 1)
    for given in ("bias", ["bias"], ("bias", "bias")):
        assert repr(pxp.LRP(zero_params=given)) == "LRP('epsilon', zero_params='bias')"
        assert hash(pxp.SoftmaxZPlus(zero_params=given)) == hash(pxp.SoftmaxZPlus(zero_params="bias"))


@pytest.mark.parametrize(
    "make", [
        lambda: pxp.Epsilon(torch.inf), lambda: pxp.ZBox(0, torch.inf), lambda: pxp.ZBox([0, torch.nan], 1),
        lambda: pxp.AlphaBeta(torch.inf, torch.inf), lambda: pxp.Random(None), lambda: pxp.Random(0.5),
        lambda: pxp.IntegratedGradients(2.5), lambda: pxp.LRP(path_steps=1.5),
        lambda: pxp.SoftmaxZPlus(epsilon=torch.nan),
    ],
)  # fmt: skip
def test_numbers_that_have_no_value(make):
    with pytest.raises(ValueError, match="finite|whole number|alpha − beta"):
        make()


class Powered(pxp.Gamma):
    """A user's rule, which keeps all that it is given."""

    def __init__(self, gamma=None, power=2, *, table=None):
        super().__init__(gamma)
        self.power, self.table = power, table


class Forgetful(pxp.ZPlus):
    """A user's rule, which keeps nothing under the names that it is given."""

    def __init__(self, power):
        super().__init__()
        self.strength = power


def test_rules_of_users():
    assert Powered(0.1) == Powered(0.1, 2) != Powered(0.1, 3) and Powered(0.1) != pxp.Gamma(0.1)
    assert [repr(Powered(0.1, 3)), repr(Powered(power=3))] == ["Powered(0.1, 3)", "Powered(power=3)"]
    tables = [torch.zeros(2000), torch.zeros(2000).index_fill_(0, torch.tensor([1000]), 1)]
    assert repr(tables[0]) == repr(tables[1])  # which is why it is not asked
    assert Powered(table=tables[0]) != Powered(table=tables[1]) == Powered(table=tables[1].clone())
    assert Forgetful(2) == Forgetful(2) != Forgetful(3) and "object at" in repr(Forgetful(2))
    assert len({Forgetful(2), Forgetful(2), Forgetful(3)}) == 2
    assert Forgetful(len) == Forgetful(len) != Forgetful(max)
    own = Forgetful(x for x in ())  # nothing tells what a generator will give
    assert own == own != Forgetful(x for x in ()) and identity(own) is None and len({own}) == 1


ZENNIT = {
    "box": [
        lambda: zc.EpsilonGammaBox(0.0, 1.0), lambda: zc.EpsilonGammaBox(0.0, 1.0, gamma=0.3),
        lambda: zc.EpsilonGammaBox(0.0, 2.0), lambda: zc.EpsilonGammaBox(0.0, 1.0, stabilizer=1e-3),
        lambda: zc.EpsilonGammaBox(0.0, 1.0, zero_params=["bias"]),
    ],
    "plus": [
        zc.EpsilonPlus, lambda: zc.EpsilonPlus(epsilon=1e-3), zc.EpsilonPlusFlat, zc.EpsilonAlpha2Beta1,
        lambda: zc.EpsilonPlus(canonizers=[VGGCanonizer()]), lambda: zc.EpsilonPlus(canonizers=[ResNetCanonizer()]),
    ],
    "by name": [
        lambda: zc.NameMapComposite([(["a"], ZennitGamma(0.1))]),
        lambda: zc.NameMapComposite([(["b"], ZennitGamma(0.1))]),
        lambda: zc.NameMapComposite([(["a"], ZennitGamma(0.2))]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("makes", ZENNIT.values(), ids=ZENNIT)
def test_composites_of_zennit_by_their_rules(makes):
    marks = [identity(make()) for make in makes]
    assert None not in marks and len(set(marks)) == len(makes) and marks == [identity(make()) for make in makes]
    used = makes[0]()
    with used.context(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())) as network:
        network(torch.rand(1, 1, 4, 4, requires_grad=True)).sum().backward()
        assert identity(used) == marks[0]
    assert identity(used) == marks[0]


def test_the_same_in_another_process():
    text = "import zennit.composites as zc, pxp; from pxp.identity import identity; "
    text += "print(identity(zc.EpsilonGammaBox(0., 1.)), identity(pxp.LRP(pxp.ZPlus(epsilon=0.1))))"
    found = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout.strip()
    assert found == f"{identity(zc.EpsilonGammaBox(0.0, 1.0))} {identity(pxp.LRP(pxp.ZPlus(epsilon=0.1)))}"


@dataclass(frozen=True)
class Hidden:
    shown: int = 0
    hidden: float = field(default=0.0, repr=False, compare=False)


def enclosing(number):
    return lambda value: value * number


def test_what_differs_is_told_apart():
    pairs = [
        (Hidden(hidden=1.0), Hidden(hidden=2.0)), (enclosing(1), enclosing(2)),
        (functools.partial(max, 1), functools.partial(max, 2)),
        (torch.zeros(3), torch.zeros(3).double()), (torch.zeros(2, 3), torch.zeros(3, 2)), ({"a": 1}, {"a": 2}),
        (np.zeros(3), np.ones(3)), ([1, [2]], [[1], 2]), (("a", "b"), ("ab",)), ({1, 2}, {1, 3}), (nn.ReLU, nn.GELU),
        (torch.zeros(2).bfloat16(), torch.ones(2).bfloat16()), (Composite(), zc.LayerMapComposite([])), (1, True),
    ]  # fmt: skip
    for one, other in pairs:
        assert identity(one) == identity(copy.deepcopy(one)) != identity(other), (one, other)
        assert None not in (identity(one), identity(other))


def test_what_cannot_be_told():
    class Local:
        pass

    typed = type(lambda: 1)((lambda value: value).__code__, {}, "typed")
    typed.__module__ = "__main__"  # a function of a notebook
    for value in (Local(), (x for x in ()), typed, {"deep": [typed]}, np.array([object()])):
        assert identity(value) is None


def test_one_batch_size_for_all():
    asking = [getattr(pxp, name) for name in pxp.__all__ if callable(getattr(pxp, name))]
    defaults = {each.__name__: inspect.signature(each).parameters.get("batch_size") for each in asking}
    found = {name: given.default for name, given in defaults.items() if given is not None}
    assert {"accuracy", "attribute", "finetune", "heatmap", "prune_gradually", "pruning_curve", "tune"} <= set(found)
    assert set(found.values()) == {BATCH_SIZE}
    for name in found:
        assert re.search(rf"batch_size : int, default (?!{BATCH_SIZE}\b)", getattr(pxp, name).__doc__) is None
