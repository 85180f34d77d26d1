"""The numbers in a figure: those that were drawn, under the names that stand there."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

import pxp
from pxp.figure_data import Folded, tables

pytestmark = pytest.mark.usefixtures("figures")


def drawn(draw, **labels):
    """The only table of a figure with one pair of axes."""
    figure, ax = plt.subplots()
    draw(ax)
    ax.set(**labels)
    (table,) = tables(figure)
    return table


def test_lines_side_by_side():
    def draw(ax):
        ax.plot([0, 10], [0.912, 0.8], label="LRP-$\\epsilon$")
        ax.plot([0, 20], [0.9, 0.25], label="two\nlines")
        ax.axhline(0.1, label="guessing")
        ax.axvline(3)

    table = drawn(draw, xlabel="pruned (%)", ylabel="$A_{PR}$", title="VGG")
    assert table.title == "VGG"
    assert table.head == ["pruned (%)", "LRP-epsilon", "two lines"]
    assert table.rows == [["0", "0.912", "0.900"], ["10", "0.800", ""], ["20", "", "0.250"]]


def test_one_line_without_a_name():
    table = drawn(lambda ax: ax.plot([1, 2], [3, 4]), xlabel="epoch", ylabel="loss")
    assert (table.head, table.rows) == (["epoch", "loss"], [["1", "3"], ["2", "4"]])
    assert drawn(lambda ax: ax.plot([1, 2], [3, 4])).head == ["", "value"]


def test_what_an_axis_is_called_elsewhere():
    figure, axes = plt.subplots(2, 2, sharex=True, sharey=True)
    for ax in axes.flat:
        ax.plot([0, 1], [1, 2])
    axes[1, 0].set_xlabel("rate")
    axes[1, 1].set_xlabel("rate")
    axes[0, 0].set_ylabel("accuracy")
    assert [table.head for table in tables(figure)] == [["rate", "accuracy"]] * 4
    figure, axes = plt.subplots(1, 2)
    for ax in axes:
        ax.plot([0, 1], [1, 2])
    figure.supxlabel("neurons")
    assert [table.head for table in tables(figure)] == [["neurons", "value"]] * 2


def test_names_on_the_axis():
    table = drawn(lambda ax: ax.plot(["first", "second"], [0.5, 0.25], label="a"))
    assert table.rows == [["first", "0.500"], ["second", "0.250"]]

    def beside(ax):
        ax.set_xticks([0, 1], ["conv 1", "conv 2"])
        ax.plot([0.1, 1.1], [5, 6], label="a")

    assert drawn(beside).rows == [["conv 1", "5"], ["conv 2", "6"]]

    def numbered(ax):
        ax.set_xticks([0.5, 1.5], [10, 20])
        ax.plot([0.5, 1.5], [5, 6], label="a")

    assert [row[0] for row in drawn(numbered).rows] == ["10", "20"]

    def half_numbered(ax):
        ax.set_xticks([0.5, 2.5], ["10", "30"])
        ax.plot([0.5, 1.5, 2.5], [5, 6, 7], label="a")

    assert [row[0] for row in drawn(half_numbered).rows] == ["10", "20", "30"]

    def as_they_are(ax):
        ax.set_xticks([10, 20], [10, 20])
        ax.plot([10, 12, 20], [5, 6, 7], label="a")

    assert [row[0] for row in drawn(as_they_are).rows] == ["10", "12", "20"]


def test_downwards():
    def draw(ax):
        ax.plot([0.3, 0.4], [0, 1.1], "o", label="as cut")
        ax.set_yticks([0, 1], ["VGG", "ResNet"])

    table = drawn(draw, xlabel="accuracy", ylabel="network")
    assert table.head == ["network", "as cut"]
    assert table.rows == [["VGG", "0.300"], ["ResNet", "0.400"]]

    def cloud(ax):
        ax.scatter([0.3, 0.2, 0.4], [0, 0, 1])
        ax.set_yticks([0, 1], ["VGG", "ResNet"])

    assert drawn(cloud).rows == [["VGG", "0.300, 0.200"], ["ResNet", "0.400"]]

    def upright(ax):
        ax.plot([10, 20], [0.3, 0.9])
        ax.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])

    assert drawn(upright).rows == [["10", "0.300"], ["20", "0.900"]]


@pytest.mark.parametrize("across", [False, True])
def test_bars(across):
    def draw(ax):
        (ax.barh if across else ax.bar)(["a", "b"], [10, 20], label="one")
        (ax.barh if across else ax.bar)([0.2, 1.2], [1, 2], label="other")

    assert drawn(draw).rows == [["a", "10", "1"], ["b", "20", "2"]]


@pytest.mark.parametrize("across", [False, True])
def test_bars_with_intervals(across):
    def draw(ax):
        ends = [[1, 2], [3, 1]]
        if across:
            ax.barh(["a", "b"], [10, 20], xerr=ends, label="one")
        else:
            ax.bar(["a", "b"], [10, 20], yerr=ends, label="one")

    assert drawn(draw).rows == [["a", "10 [9, 13]"], ["b", "20 [18, 21]"]]


@pytest.mark.parametrize("across", [False, True])
def test_intervals_of_points(across):
    def draw(ax):
        ends = [[0.1, 0.2], [0.3, 0.1]]
        if across:
            ax.errorbar([0.5, 0.6], [0, 1], xerr=ends, fmt="o", capsize=3, label="a")
            ax.set_yticks([0, 1], ["x", "y"])
        else:
            ax.errorbar([0, 1], [0.5, 0.6], yerr=ends, fmt="o", capsize=3, label="a")
            ax.set_xticks([0, 1], ["x", "y"])

    table = drawn(draw)
    assert table.head[1:] == ["a"]
    assert table.rows == [["x", "0.500 [0.400, 0.800]"], ["y", "0.600 [0.400, 0.700]"]]


def test_intervals_of_bands():
    first = pxp.Curve((0.0, 0.5), ((0.9, 0.4), (0.9, 0.5), (0.9, 0.6)), "Random")
    second = pxp.Curve((0.0, 0.5), ((0.8, 0.2), (0.8, 0.3), (0.8, 0.4)), "Random")
    figure, ax = plt.subplots()
    pxp.plots.curves({"a": first, "b": second}, ax)
    (table,) = tables(figure)
    for column, curve in enumerate((first, second), start=1):
        low, high = (100 * ends[1] for ends in curve.interval())
        assert table.rows[1][column] == f"{100 * curve.accuracy[1]:.1f} [{low:.1f}, {high:.1f}]"


def test_error_bars_that_do_not_tell_one_interval_each():
    both = drawn(lambda ax: ax.errorbar([1, 2], [3, 4], xerr=1, yerr=1, label="a"))
    none = drawn(lambda ax: ax.errorbar([1, 2], [3, 4], label="a"))
    some = drawn(lambda ax: ax.errorbar([1, 2], [3, 4], yerr=1, errorevery=2, label="a"))
    assert both.rows == none.rows == some.rows == [["1", "3"], ["2", "4"]]
    unknown = drawn(lambda ax: ax.errorbar([1, 2], [3, np.nan], yerr=1, label="a"))
    assert [row[1][0] for row in unknown.rows] == ["3", "–"]


def test_empty_axes_and_dates_have_none():
    figure, axes = plt.subplots(3)
    axes[0].bar([], [], label="a")
    axes[1].plot([], [], label="a")
    axes[2].plot(np.array(["2024-01-05", "2024-02-05"], dtype="datetime64"), [1, 2], label="a")
    assert [table.rows for table in tables(figure)] in ([], [[]])


def test_bands_of_one_colour_belong_to_their_lines():
    def draw(ax):
        for label, height in (("low", 0.2), ("high", 0.8)):
            ax.plot([0, 1], [height, height], color="red", label=label)
            ax.fill_between([0, 1], height - 0.1, height + 0.05, color="red", alpha=0.2)
        ax.plot([0, 1], [0.5, 0.5], color="red", label="none")

    row = ["0.200 [0.100, 0.250]", "0.800 [0.700, 0.850]", "0.500"]
    assert drawn(draw).rows == [["0", *row], ["1", *row]]


def test_a_cloud_is_listed_by_place():
    def draw(ax):
        ax.set_xticks([0, 1], ["a", "b"])
        ax.scatter([0.1, -0.2, 1.1], [1, 2, 3])
        ax.scatter([1.3], [4])

    assert drawn(draw).rows == [["a", "1, 2"], ["b", "3, 4"]]
    table = drawn(lambda ax: ax.scatter(["a"] * 21, range(21)))
    assert table.rows == [["a", "21 from 0 to 20, median 10"]]


def test_what_only_guides_the_eye_is_left_out():
    def draw(ax):
        ax.plot([0, 1], [1, 2], label="a")
        ax.plot([0, 1], [0, 3], ":")

    assert drawn(draw, xlabel="x").head == ["x", "a"]


def test_long_lines_are_thinned():
    table = drawn(lambda ax: ax.plot(np.arange(1001), np.arange(1001) ** 2, label="a"))
    assert [row[0] for row in table.rows] == [str(100 * place) for place in range(10)] + ["1000"]
    assert table.rows[3] == ["300", "90000"]


def test_points_with_names():
    def draw(ax):
        for name, x, y in (("a", 0.1234567, 2), ("b", 0.5, 3.25), ("c", 0.5, 4)):
            ax.plot(x, y, "o", label=name)

    def with_intervals(ax):
        for place in range(3):
            ax.errorbar(0.5, place, xerr=0.1, fmt="o")
        ax.set_yticks(range(3), ["x", "y", "z"])

    assert drawn(with_intervals, xlabel="gain").rows == [[name, "0.500 [0.400, 0.600]"] for name in "xyz"]
    table = drawn(draw, xlabel="cost", ylabel="gain")
    assert table.head == ["", "cost", "gain"]
    assert table.rows == [["a", "0.1235", "2"], ["b", "0.5", "3.25"], ["c", "0.5", "4"]]


def test_grids():
    def draw(ax):
        image = ax.imshow([[0.1, 0.2], [0.3, np.nan]])
        ax.set_xticks([0, 1], ["p", "q"])
        ax.set_yticks([0, 1], ["r", "s"])
        ax.figure.colorbar(image, ax=ax, label="accuracy")

    table = drawn(draw, xlabel="which", ylabel="where")
    assert table.head == ["where / which", "p", "q"]
    assert table.rows == [["r", "0.100", "0.200"], ["s", "0.300", "–"]]

    def mesh(ax):
        ax.pcolormesh([[10, 20]])
        ax.set_yticks([0.5], ["layer"])

    assert drawn(mesh).rows == [["layer", "10", "20"]]


def test_pictures_and_drawings_have_none():
    figure, axes = plt.subplots(3)
    axes[0].imshow(np.zeros((28, 28)))
    axes[1].add_patch(plt.Rectangle((0, 0), 1, 1))
    axes[2].scatter(*np.random.default_rng(0).random((2, 300)))
    assert tables(figure) == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((1200, 3), ["1200", "3"]),
        ((123.4, 5), ["123", "5"]),
        ((0.01234, 0.002), ["0.0123", "0.0020"]),
        ((2.5e-7, 1e-6), ["2.50e-07", "1.00e-06"]),
        ((-3e7 - 0.5, 1), ["-3.00e+07", "1.00e+00"]),
        ((0.5, float("nan")), ["0.500", "–"]),
        ((float("nan"), float("nan")), ["–", "–"]),
    ],
)
def test_digits(values, expected):
    assert [row[1] for row in drawn(lambda ax: ax.plot([0, 1], values)).rows] == expected


def test_folded():
    table = drawn(lambda ax: ax.plot([0], [1], label="<a & b>"), title="x < y")
    page = Folded([table])._repr_html_()
    assert page.startswith("<details><summary>The numbers of this figure</summary>") and page.endswith("</details>")
    assert "&lt;a &amp; b&gt;" in page and "<caption>x &lt; y</caption>" in page
    assert '<th scope="row">0</th><td>1</td>' in page
    assert "folded" in repr(Folded([table]))


def test_show(capsys):
    _, ax = plt.subplots()
    ax.plot([0, 1], [1, 2])
    pxp.plots.show()
    assert "The numbers of this figure" in capsys.readouterr().out
    plt.close("all")
    plt.subplots()
    pxp.plots.show()
    assert capsys.readouterr().out == ""


def test_text_is_legible_on_a_phone():
    """A phone shows a figure 358 pixels wide; nine of them are the least that can be read."""
    width = pxp.plots.STYLE["figure.figsize"][0] * 72
    sizes = [
        value
        for key, value in pxp.plots.STYLE.items()
        if key.endswith(("size", "fontsize")) and key != "figure.figsize"
    ]
    assert min(sizes) * 358 / width >= 9
