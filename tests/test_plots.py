"""Figures: what is drawn, not how it looks."""

from __future__ import annotations

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import network

import pxp

ONE = pxp.Curve((0.0, 0.5), ((0.9, 0.5),), "LRP")
THREE = pxp.Curve((0.0, 0.5), ((0.9, 0.4), (0.9, 0.5), (0.9, 0.6)), "Random")


pytestmark = pytest.mark.usefixtures("figures")


def test_curves():
    ax = pxp.plots.curves({"LRP": ONE, "random": THREE}, chance=0.1)
    one, three, chance = ax.lines
    np.testing.assert_allclose(one.get_xdata(), [0, 50])
    np.testing.assert_allclose(one.get_ydata(), [90, 50])
    np.testing.assert_allclose(three.get_ydata(), [90, 50])
    assert list(chance.get_ydata()) == [10, 10]
    assert len(ax.collections) == 1  # a band only where there are several runs
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["LRP (0.70)", "random (0.70)"]
    assert one.get_color() != three.get_color() and one.get_linestyle() != three.get_linestyle()
    assert ax.get_xlabel() and ax.get_ylabel()
    own = plt.figure().subplots()
    assert THREE.plot(ax=own) is own and len(own.lines) == 1


def test_kept_per_layer():
    model, _x, _labels, units = network("vgg")
    scores = pxp.attribute(model, None, units, pxp.Random())
    masks = {"a": scores.select(0.5), "b": scores.select(0.2)}
    ax = pxp.plots.kept_per_layer(masks)
    heights = [bar.get_height() for bar in ax.patches]
    expected = [100 * float(kept.double().mean()) for mask in masks.values() for kept in mask.values()]
    np.testing.assert_allclose(heights, expected)
    assert [label.get_text() for label in ax.get_xticklabels()] == list(units)


def test_scores_per_layer():
    model, x, labels, units = network("vgg")
    scores = pxp.attribute(model, (x, labels), units, pxp.LRP())
    for signed in (False, True):
        ax = pxp.plots.scores_per_layer(scores, signed=signed)
        assert len(ax.collections) == len(units)
        drawn = np.concatenate([np.asarray(points.get_offsets())[:, 1] for points in ax.collections])
        np.testing.assert_allclose(drawn, torch.cat(list((scores.signed if signed else scores).values())))
        assert ax.get_yscale() == ("linear" if signed else "log")


def test_heatmaps_and_grids():
    images = torch.rand(2, 1, 8, 8)
    relevance = torch.randn(2, 1, 8, 8)
    figure = pxp.plots.heatmaps(images, {"ε": relevance, "zero": torch.zeros(2, 1, 8, 8)}, ["one", "two"])
    assert len(figure.axes) == 6
    picture = figure.axes[1].images[0]
    np.testing.assert_allclose(picture.get_array(), relevance[0, 0])
    assert picture.norm.vmin == -picture.norm.vmax < 0  # zero is white
    assert figure.axes[0].get_title() == "one" and figure.axes[1].get_title() == "ε"
    colour = pxp.plots.heatmaps(torch.rand(1, 3, 8, 8), {"sum": torch.ones(1, 3, 8, 8)})
    np.testing.assert_allclose(colour.axes[1].images[0].get_array(), 3)
    grid = pxp.plots.image_grid(torch.rand(5, 1, 8, 8), list("abcde"), columns=3)
    assert len(grid.axes) == 6 and sum(bool(ax.images) for ax in grid.axes) == 5
    assert [ax.get_title() for ax in grid.axes] == ["a", "b", "c", "d", "e", ""]


def test_only_use_style_changes_the_users_settings():
    before = dict(plt.rcParams)
    pxp.plots.curves({"LRP": ONE})
    pxp.plots.image_grid(torch.rand(1, 1, 8, 8))
    assert dict(plt.rcParams) == before
    pxp.plots.use_style()
    assert dict(plt.rcParams) != before


def test_a_figure_of_another_library_gets_the_books_style():
    import optuna

    pxp.plots.use_style()
    before = dict(plt.rcParams)
    study = pxp.load_study("vit-heads-tpe")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        ax = pxp.plots.styled(optuna.visualization.matplotlib.plot_optimization_history, study)
    assert dict(plt.rcParams) == before
    assert ax.get_facecolor() == (1, 1, 1, 1) and not ax.spines["top"].get_visible()
    assert tuple(ax.figure.get_size_inches()) == pxp.plots.STYLE["figure.figsize"]
    assert ax.collections[0].get_offsets()[:, 1].tolist() == [trial.value for trial in study.trials]
