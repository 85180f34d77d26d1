"""Each layer alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pxp


def test_each_layer_is_pruned_alone(untouched):
    model, data = untouched(pxp.load_model("vgg")), pxp.load_dataset()
    units = pxp.find_components(model)
    refs = [pxp.reference_samples(data.reference, per_class=2, seed=seed) for seed in range(2)]
    scores = pxp.attribute_draws(model, refs, units, pxp.Taylor())
    images = pxp.reference_samples(data.tune, per_class=3)
    found = pxp.sensitivity(model, scores, images, rates=(0, 0.5, 1), by="signed", order="most")
    assert list(found) == list(units) and len(found) == 7
    for name in ("features.0", "features.17"):
        for run, one in enumerate(scores):
            for column, rate in enumerate((0, 0.5, 1)):
                order = one.signed[name].argsort(descending=True, stable=True)
                kept = dict(pxp.Mask.all(units))
                kept[name] = torch.ones(units[name].size, dtype=torch.bool)
                kept[name][order[: round(rate * len(order))]] = False
                with pxp.masked(model, pxp.Mask(units, kept)):
                    assert found[name].runs[run][column] == pxp.accuracy(model, images)
    curve = found["features.0"]
    assert len(set(curve.draws)) == 2 and curve.images == 30 and curve.settings["scope"] == "one layer"
    rows = repr(found).splitlines()
    assert len(rows) == 9 and rows[2].split()[:3] == ["features.0", "16", f"{curve.a_pr:.3f}"]
    axes = found.plot()
    drawn = axes.collections[0].get_array().reshape(7, 3)
    np.testing.assert_allclose(drawn[0], 100 * curve.accuracy)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(units)


def test_what_has_no_sensitivity():
    model, data = pxp.load_model("vgg"), pxp.load_dataset()
    with pytest.raises(ValueError, match="sensitivity needs at least one Scores"):
        pxp.sensitivity(model, [], data.tune)
