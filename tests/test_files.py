"""Files of masks, scores and components."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import network, pruned
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vits import images_of, two_blocks

import pxp


def test_files_keep_heads(tmp_path):
    model = two_blocks()
    units = pxp.find_components(model, ("head", "neuron"))
    scores = pxp.attribute(model, images_of(model), units, pxp.LRP())
    scores.save(tmp_path / "scores.safetensors")
    loaded = pxp.Scores.load(tmp_path / "scores.safetensors")
    assert loaded.units.kind == "head+neuron" and dict(loaded.units) == dict(units)
    assert loaded.units.trace == units.trace
    mask = loaded.select(0.5, cost="parameters")
    mask.save(tmp_path / "mask.safetensors")
    again = pxp.Mask.load(tmp_path / "mask.safetensors")
    with pxp.masked(model, again), torch.no_grad():
        found = model(images_of(model)[0])
    with pxp.masked(model, mask), torch.no_grad():
        assert torch.equal(found, model(images_of(model)[0]))


def test_files_from_before_functions_were_noted_can_be_read(tmp_path):
    model = two_blocks()
    pxp.attribute(model, None, pxp.find_components(model, "head"), pxp.Random()).save(tmp_path / "scores")
    with safe_open(tmp_path / "scores", framework="pt") as file:
        header = json.loads(file.metadata()["pxp"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    del header["trace"]["functions"]
    save_file(tensors, tmp_path / "scores", metadata={"pxp": json.dumps(header)})
    assert pxp.Scores.load(tmp_path / "scores").units.trace == pxp.find_components(model, "head").trace


def test_scores_and_masks_survive_a_file(tmp_path):
    model, x, labels, units = network("resnet")
    scores = pxp.attribute(model, (x, labels), units, pxp.LRP("zplus"))
    scores.save(tmp_path / "scores.safetensors")
    again = pxp.Scores.load(tmp_path / "scores.safetensors")
    assert list(again) == list(scores) and again.criterion == scores.criterion and again.samples == scores.samples
    assert all(torch.equal(again[n], scores[n]) and torch.equal(again.signed[n], scores.signed[n]) for n in scores)
    assert dict(again.units) == dict(units) and again.units.trace == units.trace and repr(again) == repr(scores)
    mask = scores.select(0.3)
    mask.save(tmp_path / "mask.safetensors")
    loaded = pxp.Mask.load(tmp_path / "mask.safetensors")
    assert pruned(loaded) == pruned(mask) == pruned(again.select(0.3)) and repr(loaded) == repr(mask)
    with pxp.masked(model, mask):
        expected = model(x)
    with pxp.masked(model, loaded):
        assert torch.equal(model(x), expected)
    assert torch.equal(
        torch.cat(list(pxp.attribute(model, (x, labels), loaded.units, pxp.LRP("zplus")).values())),
        torch.cat(list(scores.values())),
    )


def _rewrite(path, change):
    """The same file with a changed header or other tensors; still a well-formed safetensors file."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["pxp"])
    tensors = load_file(path)
    change(header, tensors)
    save_file(tensors, path, metadata={"pxp": json.dumps(header)})


TAMPERED = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "header overwritten": lambda path: path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no tensors at all"),
    "other library's": lambda path: save_file({"a": torch.zeros(2)}, path),
    "no JSON": lambda path: save_file({"a": torch.zeros(2)}, path, metadata={"pxp": "{"}),
    "a layer missing": lambda path: _rewrite(path, lambda h, t: t.pop("magnitude/a")),
    "a group missing": lambda path: _rewrite(path, lambda h, t: [t.pop(k) for k in list(t) if "signed" in k]),
    "another size": lambda path: _rewrite(path, lambda h, t: t.update({"signed/b": torch.zeros(7)})),
    "no trace": lambda path: _rewrite(path, lambda h, t: h.pop("trace")),
    "layer entry": lambda path: _rewrite(path, lambda h, t: h["layers"][0].pop("size")),
    "NaN": lambda path: _rewrite(path, lambda h, t: t["magnitude/a"].fill_(torch.nan)),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_tampered_scores_are_refused(how, scores, tmp_path):
    path = tmp_path / "scores.safetensors"
    scores.save(path)
    TAMPERED[how](path)
    with pytest.raises(ValueError, match=r"scores\.safetensors|[Ss]cores|layer"):
        pxp.Scores.load(path)


def test_files_of_another_kind_are_refused(scores, tmp_path):
    scores.save(tmp_path / "s")
    scores.select(0.2).save(tmp_path / "m")
    with pytest.raises(ValueError, match=r"holds scores, not (a )?mask"):
        pxp.Mask.load(tmp_path / "s")
    with pytest.raises(ValueError, match=r"holds (a )?mask, not scores"):
        pxp.Scores.load(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere"):
        pxp.Scores.load(tmp_path / "nowhere")
