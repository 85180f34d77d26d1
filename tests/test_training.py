"""The recipe of the shipped networks."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from pxp.data import Split
from pxp.models import load_model
from recipes import training as recipe
from recipes.training import train


@pytest.fixture
def tiny(data):
    images, labels = data.tune
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:256]
    return Split(images[order], labels[order]), Split(data.eval.images[:100], data.eval.labels[:100])


@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
def test_an_interrupted_run_goes_on_bit_for_bit(tiny, tmp_path, monkeypatch):
    def go(where: str) -> tuple[dict, bytes]:
        (tmp_path / where).mkdir(exist_ok=True)
        card = train("vgg", epochs=1, seed=3, run_folder=tmp_path / where, asset_folder=tmp_path / where, data=tiny)
        return card, (tmp_path / where / "vgg.safetensors").read_bytes()

    card, blob = go("whole")
    assert card["sha256"] == hashlib.sha256(blob).hexdigest() and card["epochs"] == 3
    assert json.loads((tmp_path / "whole" / "vgg.json").read_text()) == card
    assert load_model("vgg", folder=tmp_path / "whole")(torch.zeros(1, 1, 28, 28)).shape == (1, 10)

    calls, measure, stop_after = [], recipe._test_accuracy, 1

    def interrupt(model, test):
        calls.append(1)
        if len(calls) > stop_after:  # in the middle of the next epoch, before its state is saved
            raise KeyboardInterrupt
        return measure(model, test)

    monkeypatch.setattr(recipe, "_test_accuracy", interrupt)
    with pytest.raises(KeyboardInterrupt):
        go("stopped")
    assert not (tmp_path / "stopped" / "vgg.safetensors").exists()
    monkeypatch.setattr(recipe, "_test_accuracy", measure)
    torch.manual_seed(99)
    torch.rand(5)
    again, same_blob = go("stopped")
    assert again == card and same_blob == blob


@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
def test_a_state_of_another_run_is_refused(tiny, tmp_path):
    small = Split(tiny[0].images[:128], tiny[0].labels[:128]), tiny[1]
    train("vgg", epochs=1, seed=0, run_folder=tmp_path, asset_folder=tmp_path, data=small)
    with pytest.raises(ValueError, match=r"is of a run with epochs=1, seed=0, not epochs=1, seed=1; delete it"):
        train("vgg", epochs=1, seed=1, run_folder=tmp_path, asset_folder=tmp_path, data=small)
    with pytest.raises(ValueError, match="unknown network 'lenet'; available: 'vgg', 'resnet', 'vit'"):
        train("lenet")
