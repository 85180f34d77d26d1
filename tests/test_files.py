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
from pxp.files import FORMAT


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


# --- formats ----------------------------------------------------------------------------------------------------------


def rewritten(path, change):
    """A file of tensors with another header."""
    with safe_open(path, framework="pt") as file:
        header, tensors = json.loads(file.metadata()["pxp"]), {key: file.get_tensor(key) for key in file.keys()}
    change(header)
    save_file(tensors, path, metadata={"pxp": json.dumps(header)})


def first_format(criterion):
    """A header as 0.1 wrote it."""

    def change(header):
        del header["format"]
        header["extra"] = {"criterion": criterion, "samples": 3}

    return change


OLD = {  # what 0.1 wrote → criterion; sign; whether magnitudes were the signed scores; has_sign
    "LRP('gamma', absolute='sample')": ("LRP('gamma', absolute='sample')", 1, False, True),
    "Taylor(start='loss', absolute='token')": ("Taylor(start='loss', absolute='token')", -1, False, True),
    "LRP('zplus', start='loss', softmax='cp')": ("LRP('zplus', start='loss', softmax='cp')", -1, False, True),
    "LRP('zplus', absolute='never')": ("LRP('zplus'), by='signed'", 1, True, True),
    "Taylor(start='loss', absolute='never')": ("Taylor(start='loss'), by='signed'", -1, True, True),
    "IntegratedGradients(steps=2, influence=False, start='loss')": (
        "IntegratedGradients(steps=2, influence=False, start='loss')", -1, False, True,
    ),
    "Random(seed=3)": ("Random(seed=3)", 1, False, False),
    "Magnitude(folded=True)": ("Magnitude(folded=True)", 1, False, False),
    "Activation()": ("Activation()", 1, False, False),
    "EpsilonPlus": ("EpsilonPlus", 1, False, True),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new"), OLD.items(), ids=OLD)
def test_scores_of_the_first_format_have_their_meaning(old, new, tmp_path):
    _, _, _, units = network("vgg")
    generator = torch.Generator().manual_seed(0)
    signed = {name: torch.randn(layer.size, generator=generator) for name, layer in units.items()}
    text, sign, kept, has_sign = new
    written = signed if kept else {name: values.abs() + 1 for name, values in signed.items()}
    pxp.Scores(units, written, signed).save(tmp_path / "scores")
    rewritten(tmp_path / "scores", first_format(old))
    scores = pxp.Scores.load(tmp_path / "scores")
    assert (scores.criterion, scores.samples, scores.has_sign) == (text, 3, has_sign)
    for name in units:
        assert torch.equal(scores.signed[name], sign * signed[name])
        assert torch.equal(scores[name], sign * signed[name] if kept else written[name])
    scores.save(tmp_path / "again")  # once is enough
    again = pxp.Scores.load(tmp_path / "again")
    assert again.criterion == text and all(torch.equal(again.signed[n], scores.signed[n]) for n in units)


def test_masks_of_the_first_format_and_files_of_a_later_one(scores, tmp_path):
    mask = scores.select(0.4)
    mask.save(tmp_path / "mask")
    rewritten(tmp_path / "mask", lambda header: header.pop("format"))
    assert pruned(pxp.Mask.load(tmp_path / "mask")) == pruned(mask)
    scores.save(tmp_path / "scores")
    for kind, name in ((pxp.Mask, "mask"), (pxp.Scores, "scores")):
        rewritten(tmp_path / name, lambda header: header.update({"format": FORMAT + 1, "what": "of another kind"}))
        with pytest.raises(ValueError, match=f"{name} has format 3, which a newer pxp wrote; this one reads up to 2"):
            kind.load(tmp_path / name)


def old_curve(criterion, **settings):
    return {"rates": [0, 0.5], "runs": [[0.9, 0.4]], "criterion": criterion, "settings": settings}


OLD_CURVES = {
    "plain": (old_curve("LRP('gamma')", by="magnitude"), "LRP('gamma')", {"by": "magnitude"}),
    "never": (old_curve("LRP('gamma', absolute='never')", by="magnitude"), "LRP('gamma')", {"by": "signed"}),
    "a loss, signed": (
        old_curve("Taylor(start='loss', absolute='token')", by="signed", order="least"),
        "Taylor(start='loss', absolute='token')", {"by": "signed", "order": "most"},
    ),
    "a loss, never": (
        old_curve("LRP('zplus', start='loss', absolute='never')", by="magnitude", order="most"),
        "LRP('zplus', start='loss')", {"by": "signed", "order": "least"},
    ),
    "a loss, by magnitude": (
        old_curve("LRP('zplus', start='loss')", by="magnitude"), "LRP('zplus', start='loss')", {"by": "magnitude"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("entries", "criterion", "settings"), OLD_CURVES.values(), ids=OLD_CURVES)
def test_curves_of_the_first_format_and_of_a_later_one(entries, criterion, settings, tmp_path):
    (tmp_path / "one").write_text(json.dumps(entries))
    (tmp_path / "many").write_text(json.dumps({"name": entries}))
    for found in (pxp.Curve.load(tmp_path / "one"), pxp.load_curves(tmp_path / "many")["name"]):
        assert (found.criterion, found.settings, found.runs) == (criterion, settings, ((0.9, 0.4),))
        found.save(tmp_path / "again")
        pxp.save_curves({"name": found}, tmp_path / "all")
        assert pxp.Curve.load(tmp_path / "again") == pxp.load_curves(tmp_path / "all")["name"] == found
    newer = {**entries, "format": FORMAT + 1}
    (tmp_path / "one").write_text(json.dumps(newer))
    (tmp_path / "many").write_text(json.dumps({"name": newer}))
    for load, name in ((pxp.Curve.load, "one"), (pxp.load_curves, "many")):
        with pytest.raises(ValueError, match=f"{name} has format 3, which a newer pxp wrote"):
            load(tmp_path / name)
