"""Scoring again while pruning, and fine-tuning."""

from __future__ import annotations

import pytest
import torch
from conftest import network, snapshot
from torch.nn import functional as F

import pxp


def test_one_step_is_one_shot(untouched):
    model, x, labels, units = network("vgg", samples=6)
    untouched(model)
    scores = pxp.attribute(model, (x, labels), units, pxp.LRP())
    for by in ("magnitude", "signed"):
        mask = pxp.prune_gradually(model, (x, labels), units, pxp.LRP(), 0.4, steps=1, by=by)
        expected = scores.select(0.4, by=by)
        assert all(torch.equal(mask[name], expected[name]) for name in units)


@pytest.mark.parametrize(
    "criterion", [pxp.LRP("gamma"), pxp.Taylor(), pxp.Activation(), pxp.Random(3), pxp.Magnitude()]
)
def test_steps_are_nested_and_see_the_pruned_network(criterion, untouched):
    model, x, labels, units = network("resnet", samples=4)
    untouched(model)
    half = pxp.prune_gradually(model, (x, labels), units, criterion, 0.2, steps=1)
    both = pxp.prune_gradually(model, (x, labels), units, criterion, 0.4, steps=2)
    assert all(bool((half[name] | ~both[name]).all()) for name in units)
    assert both.kept == units.total - round(0.4 * units.total)
    once = pxp.attribute(model, (x, labels), units, criterion).select(0.4)
    looks = not isinstance(criterion, pxp.Random | pxp.Magnitude)
    assert looks == any(not torch.equal(both[name], once[name]) for name in units)


def test_min_keep_holds_in_every_step():
    model, x, labels, units = network("vgg", samples=3)
    mask = pxp.prune_gradually(model, (x, labels), units, pxp.LRP("gamma"), 0.9, steps=3, min_keep=4)
    assert min(int(kept.sum()) for kept in mask.values()) >= 4


def task():
    """A compact network and images that it can learn."""
    model, _, _, units = network("vgg")
    model = model.float()
    small = pxp.compact(model, pxp.attribute(model, None, units, pxp.Random()).select(0.5))
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    images = torch.rand(60, 1, 28, 28) + labels[:, None, None, None]
    return model, small, images, labels


def loss(model, images, labels) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(images), labels))


def test_finetuning_learns_and_leaves_its_arguments(untouched):
    model, small, images, labels = task()
    model.train()
    untouched(model)
    before = snapshot(small)
    trained = pxp.finetune(small, (images, labels), epochs=6, batch_size=20)
    again = pxp.finetune(small, (images, labels), epochs=6, batch_size=20)
    assert loss(trained, images, labels) < 0.5 * loss(small, images, labels) and not trained.training
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))
    after = snapshot(small)
    assert all(torch.equal(before[key][0], after[key][0]) for key in before if key.startswith("tensor"))
    taught = pxp.finetune(small, (images, labels), epochs=2, batch_size=20, teacher=model)
    assert any(not torch.equal(a, b) for a, b in zip(taught.parameters(), trained.parameters(), strict=True))


def test_a_teacher_is_imitated():
    model, small, images, labels = task()
    goal = model.eval()(images).detach()

    def distance(student):
        with torch.no_grad():
            return float(
                F.kl_div(student(images).log_softmax(1), goal.log_softmax(1), log_target=True, reduction="batchmean")
            )

    wrong = (labels + 1) % 3
    alone, taught = (
        pxp.finetune(small, (images, wrong), epochs=6, batch_size=20, teacher=teacher) for teacher in (None, model)
    )
    assert distance(taught) < distance(alone)


class Stop(Exception):
    pass


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    _, small, images, labels = task()
    options = {"epochs": 3, "batch_size": 20, "state": tmp_path / "state.pt"}
    whole = pxp.finetune(small, (images, labels), epochs=3, batch_size=20)
    original, calls = torch.save, []

    def save(*arguments):
        original(*arguments)
        calls.append(1)
        if len(calls) == 2:
            raise Stop

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(Stop):
        pxp.finetune(small, (images, labels), **options)
    resumed = pxp.finetune(small, (images, labels), **options)
    assert len(calls) == 3
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(ValueError, match="the state of another run"):
        pxp.finetune(small, (images, labels), **{**options, "epochs": 4})


def test_errors():
    model, x, labels, units = network("vgg")
    for options, message in (
        ({"steps": 0}, "steps must be at least 1"),
        ({"rate": 1.2}, r"rate must be in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            pxp.prune_gradually(model, (x, labels), units, pxp.LRP(), **{"rate": 0.5, **options})
    for name in ("epochs", "lr", "temperature", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            pxp.finetune(model, (x, labels), **{name: 0})
