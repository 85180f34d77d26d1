"""What was seen is not reported on: references, tuning images, and what the shipped networks were trained on."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import network
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

import pxp
from pxp.batches import fingerprints
from pxp.models import trained_on

FEW = {"rates": (0, 0.5), "progress": False}


@pytest.fixture
def ready():
    """A small network that ships with nothing, its components, references, and other images."""
    model, x, _, units = network("grouped", samples=60)
    model, x = model.float(), x.float()
    labels = model(x).argmax(1).detach()
    return model, units, (x[:10], labels[:10]), (x[10:], labels[10:])


def joined(*sets):
    return tuple(torch.cat(parts) for parts in zip(*sets, strict=True))


def some(data, *places):
    return data[0][list(places)], data[1][list(places)]


@pytest.mark.parametrize(
    "wrap", [tuple, lambda d: TensorDataset(*d), lambda d: DataLoader(TensorDataset(*d), 7, shuffle=True)]
)
def test_references_are_not_reported_on(ready, wrap):
    model, units, refs, data = ready
    scores = pxp.attribute(model, refs, units, pxp.Taylor())
    pxp.pruning_curve(model, scores, wrap(data), **FEW)
    for number, seen in ((10, refs), (1, joined(data, some(refs, 3))), (2, joined(some(data, 0), some(refs, 1, 9)))):
        with pytest.raises(ValueError, match=rf"^{number} of these {len(seen[1])} images were used as references;"):
            pxp.pruning_curve(model, scores, wrap(seen), **FEW)
        pxp.pruning_curve(model, scores, wrap(seen), allow_shared=True, **FEW)


def test_every_draw_counts(ready):
    model, units, refs, data = ready
    draws = pxp.attribute_draws(model, [refs, *(some(data, i, i + 1) for i in range(8))], units, pxp.Activation())
    with pytest.raises(ValueError, match="^[12] of these 2 images were used as references"):
        pxp.pruning_curve(model, draws, some(data, 7, 8), **FEW)
    pxp.pruning_curve(model, draws[:-1], some(data, 20, 30), **FEW)


def test_what_reads_no_references_has_seen_none(ready):
    model, units, refs, _ = ready
    for criterion in (pxp.Random(), pxp.Magnitude()):
        scores = pxp.attribute(model, refs, units, criterion)
        assert not scores.references and pxp.pruning_curve(model, scores, refs, **FEW).rates == (0, 0.5)


def test_references_of_other_classes_are_not_measured(ready):
    model, units, _, data = ready
    labels = torch.arange(50) % 2
    scores = pxp.attribute(model, some((data[0], labels), 1, 3), units, pxp.Taylor())
    pxp.pruning_curve(model, scores, (data[0], labels), classes=[0], **FEW)
    for classes in ([1], [1, 0], None):
        with pytest.raises(ValueError, match="^2 of these (25|50) images"):
            pxp.pruning_curve(model, scores, (data[0], labels), classes=classes, **FEW)


def test_references_are_known_by_what_was_given(ready):
    """In another precision than the network's, several times, and by criteria that read them again."""
    model, units, refs, _ = ready
    marks = set(fingerprints(refs[0]))
    for criterion in (pxp.LRP("epsilon"), pxp.IntegratedGradients(2), pxp.Taylor()):
        for given in (refs, (refs[0].double(), refs[1])):
            assert pxp.attribute(model, given, units, criterion, batch_size=3).references == marks
        assert pxp.attribute(model.bfloat16(), refs, units, pxp.Activation()).references == marks
        model.float()


def test_files_keep_what_was_seen(ready, tmp_path):
    model, units, refs, data = ready
    scores = pxp.attribute(model, refs, units, pxp.Taylor())
    scores = pxp.Scores(units, scores, scores.signed, references=scores.references, tuned_on=fingerprints(data[0][:20]))
    scores.save(tmp_path / "scores")
    again = pxp.Scores.load(tmp_path / "scores")
    assert again.references == scores.references and again.tuned_on == scores.tuned_on and len(again.tuned_on) == 20
    for seen, purpose in ((refs, "as references"), (some(data, 5, 40), "for tuning")):
        with pytest.raises(ValueError, match=purpose):
            pxp.pruning_curve(model, again, seen, **FEW)


@pytest.mark.parametrize("missing", [("references", "tuned_on"), ("tuned_on",)])
def test_files_from_before_can_be_read(ready, tmp_path, missing):
    model, units, refs, _ = ready
    pxp.attribute(model, refs, units, pxp.Taylor()).save(tmp_path / "scores")
    with safe_open(tmp_path / "scores", framework="pt") as file:
        header = json.loads(file.metadata()["pxp"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    for name in missing:
        del header["extra"][name]
    save_file(tensors, tmp_path / "scores", metadata={"pxp": json.dumps(header)})
    scores = pxp.Scores.load(tmp_path / "scores")
    assert scores.tuned_on == set() and len(scores.references) == (0 if "references" in missing else 10)
    assert scores.samples == 10


def test_the_winner_is_not_measured_where_it_was_chosen(ready):
    model, units, refs, data = ready
    tuning, rest = some(data, *range(20)), some(data, *range(20, 50))
    study = pxp.tune(model, refs, units, tuning, 2, space={"low": ["epsilon", "zplus"]}, **FEW)
    criterion, options = pxp.winner(study)
    assert criterion == pxp.LRP(**study.best_params) or repr(criterion) == repr(pxp.LRP(**study.best_params))
    scores = pxp.attribute(model, refs, units, criterion)
    for seen in (tuning, joined(rest, some(tuning, 4)), some(tuning, 2)):
        with pytest.raises(ValueError, match=r"images were used for tuning; .*or say allow_shared=True"):
            pxp.pruning_curve(model, scores, seen, **FEW, **options)
        with pytest.raises(ValueError, match="images were used for tuning"):
            pxp.tuned_curve(study, model, refs, units, seen)
        pxp.tuned_curve(study, model, refs, units, seen, allow_shared=True)
    with pytest.raises(ValueError, match="30 of these 30 images were used as references"):
        pxp.tuned_curve(study, model, rest, units, rest)
    assert (
        pxp.tuned_curve(study, model, refs, units, rest).runs
        == pxp.pruning_curve(model, scores, rest, **FEW, **options).runs
    )


@pytest.mark.parametrize("name", ["vgg", "resnet", "vit"])
def test_training_images_of_the_shipped_networks(name, data):
    model = pxp.load_model(name)
    units = pxp.find_components(model, "neuron" if name != "resnet" else "filter")
    scores = pxp.attribute(model, None, units, pxp.Random())
    trained, fresh = pxp.reference_samples(data.reference, 2), pxp.reference_samples(data.eval, 2)
    assert trained_on(model) >= set(fingerprints(data.reference.images))
    for clean in (fresh, pxp.reference_samples(data.tune, 2)):
        pxp.pruning_curve(model, scores, clean, rates=[0], progress=False)
    for seen in (trained, joined(fresh, some(trained, 0))):
        with pytest.raises(ValueError, match="images were used to train this network"):
            pxp.pruning_curve(model, scores, seen, rates=[0], progress=False)
    pxp.pruning_curve(model, scores, trained, rates=[0], allow_shared=True, progress=False)


def test_other_networks_have_not_seen_them(data):
    model = pxp.models.VGG().eval()
    scores = pxp.attribute(model, None, pxp.find_components(model), pxp.Random())
    pxp.pruning_curve(model, scores, pxp.reference_samples(data.reference, 1), rates=[0], progress=False)


def test_large_images_are_told_apart():
    images = torch.rand(1, 3, 224, 224).repeat(3, 1, 1, 1)
    images[1, 1] += 0.1
    images[2] = images[2].flip(-1)
    assert len(set(fingerprints(images))) == 3 and fingerprints(images[:1].clone()) == fingerprints(images)[:1]
