"""The search: spaces, trials, storages, workers that are really killed, and what keeps its result honest."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import optuna
import pytest
import torch
from conftest import network
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState
from zennit.composites import EpsilonGammaBox
from zennit.core import Composite, Hook

import pxp
from pxp import sweep
from pxp.__main__ import main
from pxp.files import FORMAT
from pxp.search.space import SearchSpace
from pxp.search.tune import Objective, open_storage

tune_module = import_module("pxp.search.tune")
RATES = (0, 0.3, 0.6)
FEW = {"low": ["epsilon", "zplus"], "middle": ["epsilon", "gamma"], "by": ["magnitude", "signed"]}


@pytest.fixture
def ready():
    """A small network, references and tuning images with the network's own labels."""
    model, x, _, units = network("grouped", samples=40)
    model = model.float()
    x = x.float()
    with torch.no_grad():
        model.fc.bias -= model(x).mean(0)  # else it sees one class everywhere
        labels = model(x).argmax(1)
    return model, (x[:8], labels[:8]), units, (x[8:], labels[8:])


def search(ready, n_trials=6, **options):
    model, refs, units, data = ready
    return pxp.tune(model, refs, units, data, n_trials, rates=RATES, progress=False, **{"space": FEW, **options})


# --- spaces -------------------------------------------------------------------------------------------------------


def test_the_papers_spaces():
    cnn, vit = pxp.search_space(pxp.load_model("vgg")), pxp.search_space(pxp.load_model("vit"))
    assert cnn.size == 4**4 * 2 == 512 and vit.size == 4**4 * 2 * 3 == 1536
    assert list(cnn) == ["low", "middle", "high", "fc", "by"] and "softmax" in vit
    assert repr(cnn).splitlines()[:2] == ["512 settings", "  low     epsilon, alpha2beta1, gamma, zplus"]
    for choices in cnn.grid().values():
        assert len(choices) in (2, 4)


def test_the_extended_space_reaches_every_parameter():
    space = pxp.search_space(pxp.load_model("vit"), "extended")
    assert space.size == math.inf and space.grid() is None
    assert "low_gamma           0.01 … 10 (log), if low is gamma" in repr(space)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(60):
        setting = space(study.ask())
        assert setting.pop("by") in ("magnitude", "signed")
        pxp.LRP(**setting)  # every setting is one
        for group in ("low", "middle", "high", "fc"):
            own = {name.removeprefix(f"{group}_") for name in setting if name.startswith(f"{group}_")}
            parameter = {"epsilon": "epsilon", "gamma": "gamma", "alpha2beta1": "alpha"}.get(setting[group])
            assert own == {"zero_params", *([parameter] if parameter else [])}
        seen |= set(setting)
    assert {*seen, "by"} == set(space)


def test_spaces_of_ones_own():
    space = SearchSpace({"low": ["gamma"], "low_gamma": FloatDistribution(0.1, 1), "min_keep": IntDistribution(0, 4)})
    setting = space(optuna.trial.FixedTrial({"low": "gamma", "low_gamma": 0.5, "min_keep": 3}))
    assert setting == {"low": "gamma", "low_gamma": 0.5, "min_keep": 3}
    wider = pxp.search_space(pxp.load_model("vgg")) | {"min_keep": [0, 4]}
    assert wider.size == 1024 and "min_keep" in wider and len(wider) == 6
    paths = SearchSpace({"path_steps": [2, 4], "baseline": [0.0, -2.0]})
    assert paths(optuna.trial.FixedTrial({"path_steps": 4, "baseline": -2.0})) == {"path_steps": 4, "baseline": -2.0}


@pytest.mark.parametrize(
    ("space", "error", "message"),
    [
        ("papers", ValueError, "unknown search space 'papers'; allowed: 'paper', 'extended'"),
        ({}, ValueError, "the search space is empty"),
        ({"low": "epsilon"}, ValueError, "'low' needs a list of values or an Optuna distribution, got 'epsilon'"),
        ({"low": ["epsilon", "gama"]}, ValueError, "unknown rule 'gama'"),
        ({"lower": ["epsilon"]}, TypeError, "LRP has no parameter 'lower'"),
        ({"absolute": ["always"]}, ValueError, "absolute must be one of"),
        (
            {"absolute": ["token", "never"]},
            ValueError,
            r"absolute must be one of .*scores\.select\(rate, by='signed'\)",
        ),
        ({"by": ["magnitude", "sign"]}, ValueError, "by must be one of 'magnitude', 'signed', got 'sign'"),
        ({"order": ["lowest"]}, ValueError, "order must be one of 'least', 'most', got 'lowest'"),
        ({"path_steps": [2], "baseline": [math.inf]}, ValueError, "baseline must be a finite number"),
    ],
)
def test_wrong_spaces_are_errors_before_any_trial(ready, space, error, message):
    with pytest.raises(error, match=message):
        search(ready, space=space)


def test_conditions_hold_in_any_order():
    choices = {"low_gamma": FloatDistribution(0.1, 1), "low": ["gamma", "zplus"], "min_keep": [2], "by": ["signed"]}
    when = {"low_gamma": ("low", "gamma"), "low": ("min_keep", 2), "by": ("low_gamma", 0.5)}
    expected = {"low": "gamma", "low_gamma": 0.5, "min_keep": 2, "by": "signed"}
    for names in itertools.permutations(choices):
        space = SearchSpace({name: choices[name] for name in names}, when)
        assert space(optuna.trial.FixedTrial(expected)) == expected
        assert space(optuna.trial.FixedTrial({"low": "zplus", "min_keep": 2})) == {"low": "zplus", "min_keep": 2}
    wider = SearchSpace({"high": ["zplus"]}) | SearchSpace(
        {"low": ["zplus"], "fc": ["gamma"]}, {"fc": ("low", "zplus")}
    )
    assert wider.when == {"fc": ("low", "zplus")}


@pytest.mark.parametrize(
    ("when", "message"), [
        ({"low_gamma": ("lwo", "gamma")}, "when names 'lwo', which is not in the space; there are low, low_gamma, fc"),
        ({"low_gama": ("low", "gamma")}, "when names 'low_gama', which is not in the space"),
        ({"low_gamma": ("low", "gama")}, "'low_gamma' is to exist when 'low' is 'gama', which it never is"),
        ({"fc": ("low_gamma", 3.0)}, "'fc' is to exist when 'low_gamma' is 3.0, which it never is"),
        ({"fc": ("low", "gamma"), "low": ("fc", "zplus")}, "conditions in a circle: low, fc"),
        ({"fc": ("fc", "zplus")}, "conditions in a circle: fc"),
    ],
)  # fmt: skip
def test_wrong_conditions(when, message):
    with pytest.raises(ValueError, match=message):
        SearchSpace({"low": ["gamma", "zplus"], "low_gamma": FloatDistribution(0.1, 1), "fc": ["zplus"]}, when)


def test_parameters_of_rules_by_name():
    lrp = pxp.LRP(low="gamma", low_gamma=0.1, high="alpha2beta1", high_alpha=3, fc_zero_params="bias")
    assert repr(lrp) == repr(pxp.LRP(low=pxp.Gamma(0.1), high=pxp.AlphaBeta(3, 2), fc=pxp.Epsilon(zero_params="bias")))
    for wrong, error, message in (
        (
            {"low_gamma": 1},
            ValueError,
            "the rule 'epsilon' has no parameter 'gamma'; it has 'epsilon' and 'zero_params'",
        ),
        ({"low": "zplus", "low_epsilon": 1}, ValueError, "the rule 'zplus' has no parameter 'epsilon'"),
        (
            {"low": pxp.Gamma(1), "low_gamma": 1},
            ValueError,
            r"give gamma=1 to the rule itself: Gamma\(\.\.\., gamma=1\)",
        ),
        ({"lower_gamma": 1}, TypeError, "LRP has no parameter 'lower_gamma'"),
    ):
        with pytest.raises(error, match=message):
            pxp.LRP(**wrong)


# --- trials -------------------------------------------------------------------------------------------------------


def test_the_winner_is_what_its_trial_measured(ready, untouched):
    model, refs, units, data = ready
    untouched(model)
    study = search(ready, 8, sampler="grid")
    assert len(study.trials) == 8 and {t.state for t in study.trials} == {TrialState.COMPLETE}
    for trial in study.trials:
        criterion, options = pxp.winner(study, trial=trial.number)
        scores = pxp.attribute(model, refs, units, criterion)
        curve = pxp.pruning_curve(model, scores, data, rates=RATES, allow_shared=True, **options)
        assert trial.user_attrs["curve"] == list(curve.runs[0]) and trial.value == pytest.approx(curve.a_pr)
        assert set(trial.user_attrs["seconds"]) == {"attribution", "sweep"}
    assert study.best_value == max(t.value for t in study.trials)
    best = dict(study.best_params)
    assert pxp.winner(study)[1] == {"min_keep": 0, "scope": "global", "by": best["by"]}
    with pytest.raises(
        TypeError, match=r"LRP has no parameter 'by'; options of Scores\.select .* pxp\.winner\(study\)"
    ):
        pxp.LRP(**best)
    del best["by"]
    assert pxp.winner(study)[0] == pxp.LRP(**best)
    assert len({t.value for t in study.trials}) > 1


def test_a_seed_repeats_a_study(ready):
    runs = [search(ready, 12, space="extended", seed=seed, sampler="tpe") for seed in (3, 3, 4)]
    first, again, other = ([(t.params, t.values) for t in study.trials] for study in runs)
    assert first == again and first != other


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_samplers(ready, sampler):
    study = search(ready, 14, sampler=sampler)
    assert len(study.trials) == 14 and type(study.sampler).__name__.lower().startswith(sampler)


def test_nothing_is_computed_twice(ready, monkeypatch):
    calls = {"attribute": 0, "accuracy": 0}
    attribute, add = tune_module.attribute, sweep.Merger.add

    def count(original, counted):
        def counting(*args, **options):
            calls[counted] += 1
            return original(*args, **options)

        return counting

    monkeypatch.setattr(tune_module, "attribute", count(attribute, "attribute"))
    monkeypatch.setattr(sweep.Merger, "add", count(add, "accuracy"))
    study = search(ready, 9, space={"by": ["magnitude", "signed"]}, sampler="random")
    # one attribution gives both, one more tries the arguments; the unpruned network is measured once
    assert calls == {"attribute": 2, "accuracy": 5}
    first = {t.params["by"]: t for t in reversed(study.trials) if "same_as" not in t.user_attrs}
    repeated = [t for t in study.trials if "same_as" in t.user_attrs]
    assert len(first) == 2 and len(repeated) == 7
    for trial in repeated:
        twin = study.trials[trial.user_attrs["same_as"]]
        assert trial.params == twin.params and trial.value == twin.value
        assert trial.user_attrs["curve"] == twin.user_attrs["curve"]
        assert trial.intermediate_values == twin.intermediate_values


class AfterTwoRates(optuna.pruners.BasePruner):
    def prune(self, study, trial):
        return trial.number > 0 and trial.last_step == 1


def test_pruners_see_the_growing_curve(ready):
    study = search(ready, 4, pruner=AfterTwoRates(), space={"by": ["magnitude", "signed"]}, sampler="random")
    whole, *stopped = study.trials
    assert whole.state == TrialState.COMPLETE
    areas = [sum(whole.user_attrs["curve"][: i + 1]) / 3 for i in range(3)]
    assert list(whole.intermediate_values.values()) == pytest.approx(areas) and areas[-1] == pytest.approx(whole.value)
    others = [t for t in stopped if t.params != whole.params]
    assert others and all(t.state == TrialState.PRUNED and len(t.user_attrs["curve"]) == 2 for t in others)


def test_the_median_pruner_stops_what_falls_behind(ready):
    """Rates go up and accuracy down, so a mean of the curve so far would never be below its own first value."""
    pruner = optuna.pruners.MedianPruner(n_startup_trials=2)
    study = search(ready, 8, space={**FEW, "fc": ["epsilon", "zplus"]}, pruner=pruner, sampler="grid")
    stopped = [t for t in study.trials if t.state == TrialState.PRUNED]
    assert stopped and len(stopped) < 7
    for trial in stopped:
        step = trial.last_step
        others = [t.intermediate_values[step] for t in study.trials[: trial.number] if t.state == TrialState.COMPLETE]
        assert trial.intermediate_values[step] < sorted(others)[len(others) // 2]


class Gives(Hook):
    """A rule that sends back one value only."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def copy(self):
        return self

    def register(self, module):
        return module.register_full_backward_hook(lambda m, given, flow: tuple(g * 0 + self.value for g in given))


def broken(value: float):
    """A composite that zeroes or destroys all relevance at the last layer."""
    return Composite(module_map=lambda ctx, name, module: Gives(value) if name == "fc" else None)


def test_a_setting_without_a_ranking_fails_alone(ready):
    criteria = {"nan": broken(math.nan), "equal": broken(0.0), "fine": pxp.LRP()}

    def space(trial):
        return criteria[trial.suggest_categorical("which", list(criteria))]

    study = search(ready, 8, space=space, sampler="random")
    states = {t.params["which"]: (t.state, t.user_attrs.get("reason", "")) for t in study.trials}
    assert states["fine"] == (TrialState.COMPLETE, "")
    assert states["nan"][0] == TrialState.FAIL and "NaN or infinite in layers" in states["nan"][1]
    assert states["equal"] == (TrialState.FAIL, "all scores are equal, so they rank nothing")
    assert len(study.trials) == 8
    criterion, _ = pxp.winner(study, space=space)
    assert criterion == criteria["fine"] and not hasattr(criteria["fine"], "tuned_on")


def test_a_space_may_give_any_criterion_and_options(ready):
    model, refs, units, data = ready

    def space(trial):
        criterion = {"taylor": pxp.Taylor(), "lrp": pxp.LRP("zplus")}[trial.suggest_categorical("c", ["taylor", "lrp"])]
        return criterion, {"min_keep": trial.suggest_int("keep", 0, 2)}

    study = search(ready, 6, space=space)
    criterion, options = pxp.winner(study, space=space)
    scores = pxp.attribute(model, refs, units, criterion)
    assert pxp.pruning_curve(model, scores, data, rates=RATES, **options, allow_shared=True).a_pr == pytest.approx(
        study.best_value
    )


def test_min_keep_guards_every_trial(ready):
    guarded = search(ready, 4, sampler="random", min_keep=5)
    free = search(ready, 4, sampler="random")
    assert [t.params for t in guarded.trials] == [t.params for t in free.trials]
    assert [t.value for t in guarded.trials] != [t.value for t in free.trials]
    assert pxp.winner(guarded)[1]["min_keep"] == 5


# --- objectives ---------------------------------------------------------------------------------------------------


def test_accuracy_at_one_rate(ready):
    model, refs, units, data = ready
    study = search(ready, 4, objective="accuracy@0.45", sampler="random")
    for trial in study.trials:
        criterion, options = pxp.winner(study, trial=trial.number)
        mask = pxp.attribute(model, refs, units, criterion).select(0.45, **options)
        with pxp.masked(model, mask):
            assert trial.value == pytest.approx(pxp.accuracy(model, data))


def test_a_front_of_accuracy_and_cost(ready):
    model, refs, units, data = ready
    study = search(ready, 8, objective=["a_pr", "flops@0.2", "parameters@0.2"], sampler="grid")
    for trial in study.trials:
        criterion, options = pxp.winner(study, trial=trial.number)
        scores = pxp.attribute(model, refs, units, criterion)
        curve = pxp.pruning_curve(model, scores, data, rates=RATES, allow_shared=True, **options)
        best = max(rate for rate, a in zip(RATES, curve.accuracy, strict=True) if a >= 0.2 * curve.accuracy[0])
        mask = scores.select(best, **options)
        for value, price in zip(trial.values[1:], ("flops", "parameters"), strict=True):
            total = sum(getattr(layer, price) * layer.size for layer in units.values())
            saved = sum(getattr(units[n], price) * int((~keep).sum()) for n, keep in mask.items())
            assert value == pytest.approx(saved / total)
    front = {t.number for t in study.best_trials}
    dominated = {
        a.number
        for a in study.trials
        for b in study.trials
        if all(y >= x for x, y in zip(a.values, b.values, strict=True)) and a.values != b.values
    }
    assert front == {t.number for t in study.trials} - dominated
    with pytest.raises(ValueError, match="with several objectives there is no single winner; give trial="):
        pxp.winner(study)
    one = study.best_trials[0]
    assert pxp.winner(study, trial=one.number)[0] == pxp.LRP(low=one.params["low"], middle=one.params["middle"])


def test_a_front_of_accuracy_and_latency(ready, monkeypatch):
    """With parameters in place of seconds, which no two runs measure alike."""
    model, refs, units, data = ready
    asked = []

    def instead(budget, network):
        asked.append((budget.quantity, budget.images.shape))
        return sum(parameter.numel() for parameter in network.parameters())

    monkeypatch.setattr("pxp.budget.Budget.measured", instead)
    study = search(ready, 3, objective=["a_pr", "latency@0.2"], sampler="random")
    for trial in study.trials:
        curve = trial.user_attrs["curve"]
        best = max(rate for rate, a in zip(RATES, curve, strict=True) if a >= 0.2 * curve[0])
        criterion, options = pxp.winner(study, trial=trial.number)
        mask = pxp.attribute(model, refs, units, criterion).select(best, **options)
        small = pxp.compact(model, mask, example=data[0])
        left = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
        assert trial.values[1] == pytest.approx(1 - left) and trial.values[1] > 0
    assert set(asked) == {("latency", data[0].shape)}
    monkeypatch.undo()
    seconds = search(ready, 1, objective="latency@0.2").best_value
    assert seconds < 1  # what is left of the time is above 0; how much, depends on the machine


@pytest.mark.parametrize("text", ["accuracy", "apr", "a_pr@0.5", "accuracy@2", "flops@x", "latency", ""])
def test_unknown_objectives(text):
    with pytest.raises(ValueError, match="unknown objective"):
        Objective.parse(text)


# --- honesty ------------------------------------------------------------------------------------------------------


def test_reported_curves_take_other_images(ready):
    model, refs, units, data = ready
    study = search(ready, 3)
    for seen in (
        data,
        torch.utils.data.TensorDataset(*data),
        torch.utils.data.DataLoader(list(zip(*data, strict=True))),
    ):
        with pytest.raises(ValueError, match="32 of these 32 images were used for tuning"):
            pxp.tuned_curve(study, model, refs, units, seen)
    fresh = torch.randn(30, *data[0].shape[1:])
    labels = model(fresh).argmax(1).detach()
    with pytest.raises(ValueError, match="2 of these 32 images"):
        pxp.tuned_curve(study, model, refs, units, (torch.cat([fresh, data[0][:2]]), torch.cat([labels, data[1][:2]])))
    curve = pxp.tuned_curve(study, model, [refs, refs], units, (fresh, labels))
    criterion, options = pxp.winner(study)
    scores = pxp.attribute(model, refs, units, criterion)
    assert curve.runs == pxp.pruning_curve(model, [scores] * 2, (fresh, labels), rates=RATES, **options).runs


def test_references_are_not_tuning_images(ready):
    model, refs, units, data = ready
    for some in ((data[0][:3], data[1][:3]), (torch.cat([refs[0], data[0][:1]]), torch.cat([refs[1], data[1][:1]]))):
        with pytest.raises(ValueError, match="[13] reference images are also tuning images"):
            pxp.tune(model, some, units, data, 2)
    with pytest.raises(ValueError, match="8 reference images are also tuning images; draw the two from different"):
        pxp.tune(model, refs, units, (torch.cat([refs[0], data[0]]), torch.cat([refs[1], data[1]])), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "bayes"}, "unknown sampler 'bayes'; allowed: 'tpe', 'gp', 'random', 'grid'"),
        ({"sampler": "grid", "space": "extended"}, "a grid needs a space of finitely many values"),
        ({"storage": "study.db"}, r"storage must be a database URL such as 'sqlite:///study.db' or a \*\.journal file"),
        ({"objective": []}, "at least one objective"),
        ({"classes": [0, -1]}, "class -1 does not exist"),
    ],
)
def test_wrong_arguments(ready, options, message, untouched):
    untouched(ready[0])
    with pytest.raises(ValueError, match=message):
        search(ready, 2, **options)


def test_wrong_data_are_errors_before_any_trial(ready):
    model, refs, units, data = ready
    for wrong, message in (
        ((refs[0][:0], refs[1][:0]), "must be a non-empty batch"),
        ((refs[0] * torch.nan, refs[1]), "NaN"),
        ((refs[0], refs[1] + 50), "labels reach"),
    ):
        with pytest.raises(ValueError, match=message):
            pxp.tune(model, wrong, units, data, 2)
    with pytest.raises(ValueError, match="of another model"):
        pxp.tune(pxp.load_model("vgg"), refs, units, data, 2)


def test_nothing_global_changes(ready, untouched):
    untouched(ready[0])
    level, state = optuna.logging.get_verbosity(), torch.get_rng_state()
    search(ready, 3)
    assert optuna.logging.get_verbosity() == level and torch.equal(torch.get_rng_state(), state)


# --- storages and workers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_studies_resume(ready, tmp_path, kind):
    storage = str(tmp_path / "s.journal") if kind == "journal" else f"sqlite:///{tmp_path / 's.db'}"
    options = {"storage": storage, "study_name": "s"}
    assert len(search(ready, 3, **options).trials) == 3
    study = search(ready, 5, **options)
    assert len(study.trials) == 5 and len(search(ready, 5, **options).trials) == 5
    with pytest.raises(ValueError, match="study 's' exists with other objective; use another study_name"):
        search(ready, 6, objective="accuracy@0.3", **options)
    model, refs, units, data = ready
    with pytest.raises(ValueError, match="exists with other images"):
        search((model, refs, units, (data[0] + 1, data[1])), 6, **options)


def test_a_grid_resumes_and_is_enumerated_once(ready, tmp_path):
    options = {"storage": str(tmp_path / "s.journal"), "study_name": "s", "sampler": "grid"}
    search(ready, 3, **options)
    for _ in range(2):  # the second call finds nothing left to do
        study = search(ready, None, **options)
    settings = [json.dumps(t.params, sort_keys=True) for t in study.trials]
    assert len(settings) == len(set(settings)) == 8


def test_a_grid_runs_to_its_end_and_others_take_100_trials(ready, monkeypatch):
    assert len(search(ready, None, sampler="grid").trials) == 8
    own = optuna.samplers.GridSampler({"low": ["epsilon", "zplus"]})
    assert len(search(ready, None, sampler=own, space={"low": ["epsilon", "zplus"]}).trials) == 2
    monkeypatch.setattr(tune_module._Trials, "__call__", lambda self, trial: float(len(self.space(trial))))
    assert len(search(ready, None).trials) == 100


OFFERED = {
    "one more": ({"low": ["epsilon", "gamma"]}, {"low": ["epsilon", "gamma", "zplus"]}),
    "one less": ({"by": ["magnitude", "signed"]}, {"by": ["signed"]}),
    "another kind": ({"min_keep": IntDistribution(0, 4)}, {"min_keep": [0, 4]}),
    "a function": (
        lambda trial: pxp.LRP(trial.suggest_categorical("rule", ["zplus"])),
        lambda trial: pxp.LRP(trial.suggest_categorical("rule", ["gamma"])),
    ),
}


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
@pytest.mark.parametrize(("first", "then"), OFFERED.values(), ids=OFFERED)
def test_a_study_keeps_its_choices(ready, tmp_path, first, then, kind):
    options = {"study_name": "s", "storage": tmp_path / "s.journal"}  # a path is as good as its text
    if kind == "sqlite":
        options["storage"] = f"sqlite:///{tmp_path}/s.db"
    search(ready, 1, space=first, **options)
    with pytest.raises(
        ValueError, match="study 's' has searched '.*' in .*; a study keeps its choices, so use another"
    ):
        search(ready, 3, space=then, **options)
    study = search(ready, 2, space=first, **options)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 2


@pytest.mark.parametrize(
    "space", [
        {"low": [pxp.Gamma(0.1), pxp.ZPlus()]}, {"softmax": [pxp.CPLRP()]}, {"input": [pxp.ZBox(0, 1)]},
        lambda trial: pxp.LRP(trial.suggest_categorical("rule", [pxp.Gamma(0.1)])),
    ],
)  # fmt: skip
def test_choices_that_cannot_be_stored(ready, tmp_path, space):
    for storage in (tmp_path / "s.journal", f"sqlite:///{tmp_path}/s.db"):
        with pytest.raises(ValueError, match="a stored study holds texts, numbers and None, not "):
            search(ready, 2, space=space, storage=storage, study_name="s")
    assert list(tmp_path.iterdir()) == []
    study = search(ready, 2, space=space, sampler="random")  # in memory they can be
    assert {t.state for t in study.trials} == {TrialState.COMPLETE}
    with pytest.raises(ValueError, match="a file holds texts, numbers and None, not "):
        pxp.save_study(study, tmp_path / "s.json")
    assert list(tmp_path.iterdir()) == []


def test_threads(ready):
    study = search(ready, 6, n_jobs=2, sampler="random")
    model, refs, units, data = ready
    assert len(study.trials) >= 6
    for trial in study.trials:
        criterion, options = pxp.winner(study, trial=trial.number)
        scores = pxp.attribute(model, refs, units, criterion)
        assert trial.value == pytest.approx(
            pxp.pruning_curve(model, scores, data, rates=RATES, allow_shared=True, **options).a_pr
        )


def worker(storage: str, trials: int, *more: str, quiet: bool = True) -> subprocess.Popen:
    command = [sys.executable, "-m", "pxp", "tune", "--storage", storage, "--study", "s", "--trials", str(trials),
               "--per-class", "1", "--tune-per-class", "5", *more]  # fmt: skip
    pipe = subprocess.DEVNULL if quiet else subprocess.PIPE
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment)


def trials_of(storage: str) -> list[optuna.trial.FrozenTrial]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.load_study(study_name="s", storage=open_storage(storage)).trials


def wait_for(condition, seconds: float = 120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.3)
    raise AssertionError("timed out")


def begun(storage: str, number: int):
    def check():
        try:
            trials = trials_of(storage)
        except Exception:
            return None
        done = sum(t.state.is_finished() for t in trials)
        return trials if done >= number and any(t.state == TrialState.RUNNING for t in trials) else None

    return check


def test_a_killed_worker_loses_at_most_its_running_trial(tmp_path):
    storage = str(tmp_path / "s.journal")
    process = worker(storage, 500)
    try:
        before = wait_for(begun(storage, 2))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    after = trials_of(storage)
    finished = [t for t in after if t.state == TrialState.COMPLETE]
    assert len(finished) >= sum(t.state == TrialState.COMPLETE for t in before) >= 2
    assert sum(t.state == TrialState.RUNNING for t in after) <= 1
    target = len(finished) + 2
    second = worker(storage, target)
    assert second.wait(timeout=180) == 0
    again = trials_of(storage)
    assert [t.values for t in again[: len(after)] if t.state == TrialState.COMPLETE] == [t.values for t in finished]
    assert sum(t.state == TrialState.COMPLETE for t in again) == target


def heartbeat(url: str) -> optuna.storages.RDBStorage:
    retry = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=3)
    return optuna.storages.RDBStorage(url, heartbeat_interval=1, grace_period=2, heartbeat_stale_trial_callback=retry)


DYING = """
import os, signal, sys, time
sys.path[:0] = {tests!r}
import pxp, optuna, test_tune, torch
from conftest import network
model, x, _, units = network("grouped", samples=40)
model, x = model.float(), x.float()
with torch.no_grad():
    model.fc.bias -= model(x).mean(0)
    labels = model(x).argmax(1)
def space(trial):
    low = trial.suggest_categorical("low", ["epsilon", "zplus"])
    if trial.number == 2:
        time.sleep(3)  # until a first heartbeat is written
        os.kill(os.getpid(), signal.SIGKILL)
    return pxp.LRP(low)
pxp.tune(model, (x[:8], labels[:8]), units, (x[8:], labels[8:]), 5, space=space, rates=test_tune.RATES,
         storage=test_tune.heartbeat({url!r}), study_name="s", sampler="random", progress=False)
"""


def a_lost_trial_is_tried_again(url: str, ready) -> None:
    program = DYING.format(tests=[str(folder) for folder in Path(__file__).parents[:2]], url=url)
    died = subprocess.run([sys.executable, "-W", "ignore", "-c", program], timeout=180)
    assert died.returncode == -signal.SIGKILL

    def space(trial):
        return pxp.LRP(trial.suggest_categorical("low", ["epsilon", "zplus"]))

    time.sleep(4)  # the grace period
    study = search(ready, 5, space=space, storage=heartbeat(url), study_name="s", sampler="random")
    states = [t.state for t in study.trials]
    assert states[2] == TrialState.FAIL and "reason" not in study.trials[2].user_attrs
    retried = [t for t in study.trials if t.system_attrs.get("failed_trial") == 2]
    assert len(retried) == 1 and retried[0].state == TrialState.COMPLETE
    assert retried[0].params == study.trials[2].params
    assert sum(state == TrialState.COMPLETE for state in states) >= 5


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_heartbeat_finds_the_lost_trial(ready, tmp_path):
    a_lost_trial_is_tried_again(f"sqlite:///{tmp_path / 's.db'}", ready)


def two_workers(storage: str) -> None:
    processes = [worker(storage, 8, "--sampler", "random", quiet=False) for _ in range(2)]
    output = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], output
    trials = trials_of(storage)
    finished = [t for t in trials if t.state == TrialState.COMPLETE]
    assert 8 <= len(finished) <= 9 and len(trials) == len(finished)
    assert len({t.user_attrs["worker"] for t in finished}) == 2
    assert all("of 8" in text or "of 9" in text for text in output)


@pytest.mark.parametrize("kind", ["journal", pytest.param("sqlite", marks=pytest.mark.weekly)])
def test_two_processes_work_on_one_study(tmp_path, kind):
    two_workers(str(tmp_path / "s.journal") if kind == "journal" else f"sqlite:///{tmp_path / 's.db'}")


def postgres_binaries() -> Path | None:
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((f for f in folders if (f / "initdb").exists() and (f / "postgres").exists()), None)


@contextmanager
def postgres(folder: Path):
    """A server of our own on loopback, as an unprivileged user, gone afterwards."""
    import socket

    binaries = postgres_binaries()
    assert binaries is not None
    user = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
    data = folder / "pg"
    data.mkdir()
    if user:
        shutil.chown(data, "postgres", "postgres")
        for parent in (folder, *folder.parents):
            if parent.owner() == "root" and parent != Path("/") and parent.stat().st_mode & 0o005 != 0o005:
                parent.chmod(parent.stat().st_mode | 0o005)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    subprocess.run(
        [binaries / "initdb", "-D", data, "-U", "pxp", "-A", "trust", "-N"], check=True, stdout=subprocess.DEVNULL,
        cwd="/", **user,
    )  # fmt: skip
    server = subprocess.Popen(
        [binaries / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", ""],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", **user,
    )  # fmt: skip
    try:
        url = f"postgresql+psycopg://pxp@127.0.0.1:{port}/postgres"

        def answers():
            import psycopg

            try:
                psycopg.connect(f"host=127.0.0.1 port={port} user=pxp dbname=postgres").close()
                return True
            except psycopg.OperationalError:
                return False

        wait_for(answers, 30)
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=30)


@pytest.mark.weekly
@pytest.mark.skipif(postgres_binaries() is None, reason="no PostgreSQL server is installed")
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_postgresql(ready, tmp_path):
    pytest.importorskip("psycopg", reason="no PostgreSQL driver is installed")
    with postgres(tmp_path) as url:
        two_workers(url)
        optuna.delete_study(study_name="s", storage=url)
        a_lost_trial_is_tried_again(url, ready)


# --- the command and files ------------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    arguments = ["tune", "--storage", str(tmp_path / "s.journal"), "--study", "heads", "--model", "vit", "--trials", "3",
                 "--per-class", "1", "--tune-per-class", "2", "--objective", "a_pr", "parameters@0.9", "--min-keep", "1",
                 "--save", str(tmp_path / "s.json")]  # fmt: skip
    main(arguments)
    out = capsys.readouterr().out
    study = pxp.load_study(tmp_path / "s.json")
    assert len(study.trials) == 3 and out.count("of 3:") == len(study.best_trials) and "'min_keep': 1" in out
    assert study.user_attrs["pxp"]["units"] == "48 heads" and "softmax" in study.trials[0].params
    with pytest.raises(SystemExit):
        main(["tune", "--study", "s"])


def test_files(ready, tmp_path):
    study = search(ready, 6, pruner=AfterTwoRates(), space="extended")
    pxp.save_study(study, tmp_path / "s.json")
    loaded = pxp.load_study(tmp_path / "s.json")
    assert [(t.params, t.values, t.state) for t in loaded.trials] == [
        (t.params, t.values, t.state) for t in study.trials
    ]
    for one, other in zip(loaded.trials, study.trials, strict=True):
        assert one.intermediate_values == pytest.approx(other.intermediate_values)
        assert one.distributions == other.distributions
    assert loaded.user_attrs == study.user_attrs and loaded.study_name == study.study_name
    assert loaded.best_params == study.best_params
    text = (tmp_path / "s.json").read_text()
    assert "worker" not in text and "seconds" not in text


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"trials": [{}]}'])
def test_damaged_files(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match=r"s\.json is no study written by pxp"):
        pxp.load_study(tmp_path / "s.json")


def old_study(path, content):
    """A file as 0.1 wrote it."""
    choices = {"low": ["epsilon", "zplus"], "start": ["logit", "loss"], **content["choices"]}
    known = {name: {"name": "CategoricalDistribution", "attributes": {"choices": c}} for name, c in choices.items()}
    trials = [
        {"state": "COMPLETE", "params": {"low": "zplus", **params}, "values": [value], "attrs": {"setting": "old"}}
        for params, value in content["trials"]
    ]
    about = {"objective": ["a_pr"], "rates": [0, 0.5], "selection": {"min_keep": 1, "scope": "layer"}}
    path.write_text(json.dumps({
        "name": "s", "directions": ["maximize"], "attrs": {"pxp": about}, "distributions": known, "trials": trials,
    }))  # fmt: skip


def test_old_studies_have_their_meaning(tmp_path):
    trials = [
        ({"start": "logit", "absolute": "never"}, 0.7), ({"start": "loss", "absolute": "never"}, 0.1),
        ({"start": "loss", "absolute": "token"}, 0.2),
    ]  # fmt: skip
    old_study(tmp_path / "s", {"choices": {"absolute": ["token", "never"]}, "trials": trials})
    study = pxp.load_study(tmp_path / "s")
    fixed = {"min_keep": 1, "scope": "layer"}
    assert [pxp.winner(study, trial=number) for number in range(3)] == [
        (pxp.LRP(low="zplus"), {"by": "signed", **fixed}),
        # the most negative went first, which today is the most useful
        (pxp.LRP(low="zplus", start="loss"), {"by": "signed", "order": "most", **fixed}),
        (pxp.LRP(low="zplus", start="loss"), {"by": "magnitude", **fixed}),
    ]
    assert study.best_params == {"low": "zplus", "start": "logit", "by": "signed"}
    assert "('by', 'signed')" in study.best_trial.user_attrs["setting"]
    assert study.best_trial.distributions["by"].choices == ("magnitude", "signed")
    pxp.save_study(study, tmp_path / "again")
    assert [t.params for t in pxp.load_study(tmp_path / "again").trials] == [t.params for t in study.trials]

    three = [({"absolute": value, "start": "logit"}, 0.1) for value in ("token", "sample", "never")]
    old_study(tmp_path / "s", {"choices": {"absolute": ["token", "sample", "never"]}, "trials": three})
    found = [(t.params["by"], t.params["absolute"]) for t in pxp.load_study(tmp_path / "s").trials]
    assert found == [("magnitude", "token"), ("magnitude", "sample"), ("signed", "token")]

    # a function's parameters are its own
    own = {"choices": {"absolute": ["never", 1], "own": [1]}, "trials": [({"absolute": 1, "own": 1}, 1)]}
    old_study(tmp_path / "s", own)
    assert pxp.load_study(tmp_path / "s").best_params == {"low": "zplus", "absolute": 1, "own": 1}


def test_an_old_study_that_still_runs_has_a_winner():
    study = optuna.create_study(direction="maximize")
    old = {"low": "zplus", "start": "loss", "absolute": "never"}
    choices = {name: optuna.distributions.CategoricalDistribution([value]) for name, value in old.items()}
    study.add_trial(optuna.trial.create_trial(params=old, distributions=choices, value=1.0))
    expected = {"by": "signed", "order": "most"}
    assert pxp.winner(study) == (pxp.LRP(low="zplus", start="loss"), expected)


@pytest.mark.parametrize("name", ["vgg-grid", "vgg-extended", "resnet-extended", "vit-heads-tpe", "vit-neurons-tpe"])
def test_shipped_studies_are_in_todays_words(name):
    study = pxp.load_study(name)
    for trial in study.trials:
        criterion, options = pxp.winner(study, trial=trial.number)
        assert "never" not in trial.params.values() and options["by"] == trial.params["by"]
        assert trial.user_attrs["setting"] == repr((criterion, sorted(options.items())))
    assert len({trial.params["by"] for trial in study.trials}) == 2


def test_newer_studies_say_so(ready, tmp_path):
    study = search(ready, 1)
    pxp.save_study(study, tmp_path / "s.json")
    content = json.loads((tmp_path / "s.json").read_text())
    (tmp_path / "s.json").write_text(json.dumps({**content, "format": FORMAT + 1, "trials": "of another kind"}))
    with pytest.raises(
        ValueError, match=r"s\.json has format 3, which a newer pxp wrote; this one reads up to 2: upgrade"
    ):
        pxp.load_study(tmp_path / "s.json")
    stored = {"storage": tmp_path / "s.journal", "study_name": "s"}
    study = search(ready, 1, **stored)
    study.set_user_attr("pxp", {**study.user_attrs["pxp"], "format": FORMAT + 1})
    with pytest.raises(ValueError, match="study 's' has format 3, which a newer pxp wrote"):
        search(ready, 2, **stored)


def test_missing_files(ready):
    with pytest.raises(FileNotFoundError, match="no file nothing and nothing shipped of this name; shipped studies: "):
        pxp.load_study("nothing")
    with pytest.raises(ValueError, match="no study made by pxp"):
        pxp.tuned_curve(optuna.create_study(), *ready)


# --- identity -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fading(pxp.Criterion):
    """A user's criterion whose text leaves out what it depends on."""

    power: float = field(default=1.0, repr=False)

    def values(self, probe):
        for images, labels in probe.batches():
            yield {name: value**self.power for name, value in probe.relevance(images, labels, start="one").items()}


def silenced(low):
    """A composite that is told from another by nothing: it asks a function that a user wrote in a notebook."""

    def of_a_notebook(ctx, name, module):
        return None

    of_a_notebook.__module__ = "__main__"
    return Composite(module_map=of_a_notebook)


ALIKE = {
    "stabilisers": lambda e: pxp.LRP(pxp.ZPlus(epsilon=e)),
    "digits": lambda e: pxp.LRP(pxp.Gamma(0.1 + e * 1e-9)),
    "softmax": lambda e: pxp.LRP(softmax=pxp.SoftmaxZPlus(epsilon=e)),
    "hidden": Fading,
    "composites of zennit": lambda e: EpsilonGammaBox(0.0, 1.0, gamma=e),
    "functions": silenced,
}


@pytest.mark.parametrize("make", ALIKE.values(), ids=ALIKE)
def test_settings_that_look_alike_are_not_the_same(ready, make):
    run = tune_module._Trials(
        *ready, space=lambda trial: make(trial.suggest_categorical("e", [0.5, 2.0, 0.5000001])),
        objectives=[Objective("a_pr")], rates=RATES, fixed={}, classes=None, batch_size=8, mended=None,
    )  # fmt: skip
    measured = []
    run.scores = lambda criterion: measured.append(criterion) or pxp.attribute(ready[0], None, ready[2], pxp.Random())
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler())
    for value in (0.5, 2.0, 0.5000001, 0.5):  # the last one again
        study.enqueue_trial({"e": value})
    study.optimize(run, n_trials=4)
    again = study.trials[3].user_attrs.get("same_as")
    assert (len(measured), again) == ((4, None) if make is silenced else (3, 0))


def test_scores_are_those_of_their_own_criterion(ready):
    model, refs, units, data = ready
    study = search(
        ready, 3, space=lambda trial: pxp.LRP(pxp.ZPlus(epsilon=trial.suggest_float("e", 1e-3, 1e3, log=True)))
    )
    for trial in study.trials:
        scores = pxp.attribute(model, refs, units, pxp.LRP(pxp.ZPlus(epsilon=trial.params["e"])))
        assert trial.value == pytest.approx(pxp.pruning_curve(model, scores, data, rates=RATES).a_pr)
    assert len({trial.user_attrs["setting"] for trial in study.trials}) == 3


def test_a_stored_study_is_of_one_network_and_one_draw(ready, tmp_path):
    model, refs, units, data = ready
    stored = {"storage": str(tmp_path / "s.journal"), "study_name": "s"}
    search(ready, 1, **stored)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.fc.bias += 0.01
    for other, what in (
        ((changed, refs, units, data), "network"),
        ((model, (refs[0][:7], refs[1][:7]), units, data), "references"),
        ((model, (refs[0], refs[1].roll(1)), units, data), "references"),
        ((model, refs, units.without(next(iter(units))), data), "units, components"),
    ):
        with pytest.raises(ValueError, match=f"study 's' exists with other {what}; use another"):
            search(other, 2, **stored)
    shuffled = torch.arange(7, -1, -1)
    units = pxp.find_components(model, example=data[0])  # found anew they are the same
    assert len(search((model, (refs[0][shuffled], refs[1][shuffled]), units, data), 2, **stored).trials) == 2
