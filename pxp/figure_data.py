"""The numbers that a figure draws, as tables: for who cannot see it, or wants to draw it otherwise.

They are read from the figure itself, so that what is drawn and what is listed cannot differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 60  # rows, and cells of a grid for each of ten columns: beyond, a table is no help
THINNED = 11  # points of a line that has more
LISTED = 12  # values of a cloud at one place: of more, their range is told


@dataclass(frozen=True)
class Table:
    """Numbers of one pair of axes.

    Attributes
    ----------
    title : str
    head : list of str
        Names of the columns; the first is that of the rows.
    rows : list of list of str
    """

    title: str
    head: list[str]
    rows: list[list[str]]

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in self.head)
        rows = "".join(
            f'<tr><th scope="row">{escape(first)}</th>'
            + "".join(f"<td>{escape(value)}</td>" for value in rest)
            + "</tr>"
            for first, *rest in self.rows
        )
        caption = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


@dataclass(frozen=True, repr=False)
class Folded:
    """Tables that a page shows when they are asked for."""

    tables: list[Table]

    def __repr__(self) -> str:
        return "The numbers of this figure, folded"

    def _repr_html_(self) -> str:
        inside = "\n".join(table._repr_html_() for table in self.tables)
        return (
            "<details><summary>The numbers of this figure</summary>\n"
            f'<div style="overflow-x: auto" tabindex="0">{inside}</div></details>'
        )


def tables(figure: Figure) -> list[Table]:
    """A table for each pair of axes, and for each grid of numbers; nothing of pictures, drawings and dates."""
    from matplotlib.dates import DateLocator

    found = []
    coloured: list[Any] = [each for ax in figure.axes for each in (*ax.images, *ax.collections)]
    bars = [each.colorbar.ax for each in coloured if each.colorbar is not None]
    for ax in (ax for ax in figure.axes if ax not in bars):
        if any(isinstance(axis.get_major_locator(), DateLocator) for axis in (ax.xaxis, ax.yaxis)):
            continue
        title = _plain(ax.get_title())
        found += [Table(title, *grid) for grid in _grids(ax)]
        series = list(_series(ax))
        named = [one for one in series if one.name]  # the others guide the eye
        if series:
            table = Table(title, *_joined(ax, named or series))
            found += [table] if len(table.rows) <= MOST else []
    return found


@dataclass(frozen=True)
class _Series:
    """What one entry of a legend stands for: points, and the ends of their intervals, if there are any."""

    name: str
    x: np.ndarray
    y: np.ndarray
    ends: Sequence[tuple[float, ...]] = ()


def _series(ax: Axes) -> Iterator[_Series]:
    """What is drawn, in the order in which it was."""
    from matplotlib.collections import PathCollection
    from matplotlib.container import BarContainer, ErrorbarContainer

    inside = {line for each in ax.containers if isinstance(each, ErrorbarContainer) for line in _lines(each)}
    for container in ax.containers:
        if isinstance(container, BarContainer) and container.patches:
            boxes = np.array([(b.get_x(), b.get_y(), b.get_width(), b.get_height()) for b in container.patches])
            x, y = boxes[:, 0] + boxes[:, 2] / 2, boxes[:, 3]
            if container.orientation == "horizontal":
                x, y = boxes[:, 2], boxes[:, 1] + boxes[:, 3] / 2
            yield _Series(_name(container), x, y, _ends(container.errorbar, len(x)))
        elif isinstance(container, ErrorbarContainer) and container.lines[0] is not None:
            x, y = _points(container.lines[0])
            yield _Series(_name(container), x, y, _ends(container, len(x)))
    for line in ax.lines:
        if line not in inside and line.get_transform() == ax.transData:  # one from edge to edge only guides the eye
            x, y = _points(line)
            if len(x) > MOST and line.get_linestyle() != "None":
                x, y = (values[np.linspace(0, len(values) - 1, THINNED).round().astype(int)] for values in (x, y))
            yield _Series(_name(line), x, y, _band(ax, line, x, y))
    for cloud in (each for each in ax.collections if isinstance(each, PathCollection)):
        yield _Series(_name(cloud), *np.ma.filled(np.ma.asarray(cloud.get_offsets()).astype(float), np.nan).T)


def _points(line: Any) -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.asarray(values, dtype=float) for values in (line.get_xdata(orig=False), line.get_ydata(orig=False)))
    return x, y


def _ends(bars: Any, number: int) -> list[tuple[float, ...]]:
    """Of error bars in one direction, if every value has one."""
    if bars is None or bars.has_xerr == bars.has_yerr:
        return []
    drawn = [np.asarray(each) for each in bars.lines[2][0].get_segments() if len(each)]  # of NaN nothing is drawn
    segments = [each[:, 0 if bars.has_xerr else 1] for each in drawn]
    return [(float(each.min()), float(each.max())) for each in segments] if len(segments) == number else []


def _band(ax: Axes, line: Any, x: np.ndarray, y: np.ndarray) -> list[tuple[float, ...]]:
    """Lowest and highest place of the band that a line lies in, if there is one of its colour."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgb

    bands: list[Any] = [each for each in ax.collections if isinstance(each, PolyCollection)]
    for band in bands:
        if any(np.allclose(color[:3], to_rgb(line.get_color())) for color in band.get_facecolor()):
            corners = np.concatenate([path.vertices for path in band.get_paths()])
            sides = [corners[np.isclose(corners[:, 0], place), 1] for place in x]
            ends: list[tuple[float, ...]] = [(float(side.min()), float(side.max())) for side in sides if len(side)]
            slack = 1e-9 * np.ptp(corners[:, 1])  # where a band has no width
            inside = [low - slack <= value <= high + slack for (low, high), value in zip(ends, y, strict=False)]
            if len(ends) == len(x) and all(inside):
                return ends
    return []


def _lines(container: Any) -> list[Any]:
    line, caps, _ = container.lines
    return [line, *caps]


def _name(artist: Any) -> str:
    """As in the legend; empty for what is not in it."""
    label = str(artist.get_label() or "")
    return "" if label.startswith("_") else _plain(label)


def _joined(ax: Axes, series: Sequence[_Series]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a row for each place, a column for each series, in a cell all that it has there."""
    down = _downwards(ax, series)
    axis, other = (ax.yaxis, ax.xaxis) if down else (ax.xaxis, ax.yaxis)
    shape = _shape(
        [v for one in series for v in (*(one.x if down else one.y), *(e for ends in one.ends for e in ends))]
    )
    if len(series) > 2 and all(one.name and len(one.x) == 1 for one in series):  # a point for each name
        across, up = (_label(each) for each in (ax.xaxis, ax.yaxis))
        points = [[one.name, across(one.x[0]), up(one.y[0])] for one in series]
        return ["", _name_of(ax.xaxis, ax), _name_of(ax.yaxis, ax)], points
    label, columns = _label(axis), dict[str, dict[str, list[tuple[float, ...]]]]()
    for one in series:
        column = columns.setdefault(one.name, {})
        places, values = (one.y, one.x) if down else (one.x, one.y)
        for place, value, ends in zip(places, values, one.ends or [()] * len(places), strict=True):
            column.setdefault(label(place), []).append((value, *ends))
    where, what = (_name_of(each, ax) for each in (axis, other))
    rows = {place: [_cell(column.get(place, []), shape) for column in columns.values()] for place in _keys(columns)}
    return [where, *(name or what or "value" for name in columns)], [[place, *cells] for place, cells in rows.items()]


def _name_of(axis: Any, ax: Axes) -> str:
    """What an axis shows: as it says itself, or one that it shares its scale with, or the whole figure."""
    across = axis is ax.xaxis
    kin = (ax.get_shared_x_axes() if across else ax.get_shared_y_axes()).get_siblings(ax)
    names = [getattr(each, axis.axis_name + "axis").get_label_text() for each in (ax, *kin)]
    whole: Any = ax.figure
    names.append(whole.get_supxlabel() if across else whole.get_supylabel())
    return _plain(next(filter(None, names), ""))


def _keys(columns: dict[str, dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(place for column in columns.values() for place in column))


def _downwards(ax: Axes, series: Sequence[_Series]) -> bool:
    """Whether the places are those of the y axis: all points lie at words there, and the x axis has no names."""
    names = [place for place, name in _named(ax.yaxis).items() if _number(name) is None]
    if not names or _named(ax.xaxis):
        return any(getattr(each, "orientation", "") == "horizontal" for each in ax.containers)
    return all(min(abs(place - y) for place in names) < 0.5 for one in series for y in one.y)


def _cell(found: list[tuple[float, ...]], shape: Callable[[float], str]) -> str:
    """All that a series has at one place."""
    if len(found) > LISTED:
        low, middle, high = np.quantile([value for value, *_ in found], (0, 0.5, 1)).tolist()
        return f"{len(found)} from {shape(low)} to {shape(high)}, median {shape(middle)}"
    spans = [f" [{shape(ends[0])}, {shape(ends[1])}]" if ends else "" for _, *ends in found]
    return ", ".join(shape(value) + span for (value, *_), span in zip(found, spans, strict=True))


def _grids(ax: Axes) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Head and rows of what is drawn as coloured cells; pictures, which have too many, are none."""
    from matplotlib.collections import QuadMesh

    for image in (*ax.images, *(each for each in ax.collections if isinstance(each, QuadMesh))):
        values = np.ma.filled(np.ma.asarray(image.get_array()).astype(float), np.nan)
        if values.ndim != 2 or values.size > 10 * MOST or not (_named(ax.xaxis) or _named(ax.yaxis)):
            continue
        half = 0.5 if isinstance(image, QuadMesh) else 0.0
        column, row = _label(ax.xaxis), _label(ax.yaxis)
        shape = _shape(values.ravel().tolist())
        corner = " / ".join(filter(None, (_name_of(ax.yaxis, ax), _name_of(ax.xaxis, ax))))
        head = [corner, *(column(at + half) for at in range(values.shape[1]))]
        yield head, [[row(at + half), *map(shape, each)] for at, each in enumerate(values.tolist())]


def _named(axis: Any) -> dict[float, str]:
    """Place → what stands there, of an axis on which something else stands than the place's own number."""
    from matplotlib.category import StrCategoryLocator
    from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter

    locator, formatter = axis.get_major_locator(), axis.get_major_formatter()
    fixed = isinstance(locator, FixedLocator) and isinstance(formatter, FixedFormatter | FuncFormatter)
    if not (fixed or isinstance(locator, StrCategoryLocator)):
        return {}
    names = {float(place): _plain(str(formatter(place, at))) for at, place in enumerate(locator())}
    return {} if all(name == "" or _number(name) == place for place, name in names.items()) else names


def _label(axis: Any) -> Callable[[float], str]:
    """What stands at a place of an axis; between numbers, the number that belongs there."""
    names = _named(axis)
    numbers = {place: _number(name) for place, name in names.items()}

    def label(x: float) -> str:
        nearest = min(names, key=lambda place: abs(place - x), default=math.inf)
        if abs(nearest - x) < 0.5:
            return names[nearest]
        if names and None not in numbers.values():
            return f"{np.interp(x, list(numbers), list(numbers.values())):.4g}"  # type: ignore[arg-type]
        return f"{x:.4g}"

    return label


def _number(text: str) -> float | None:
    try:
        return float(text.replace("\N{MINUS SIGN}", "-").removesuffix("%"))
    except ValueError:
        return None


def _plain(text: str) -> str:
    """One line, without what only typesets mathematics."""
    for sign, word in (("$", ""), ("_{PR}", "_PR"), ("\\", ""), ("\n", " ")):
        text = text.replace(sign, word)
    return text.strip()


def _shape(values: Sequence[float]) -> Callable[[float], str]:
    """How numbers of a table are written: counts as such, others with three digits of the largest."""
    known = [value for value in values if np.isfinite(value)]
    if all(float(value).is_integer() for value in known):
        return lambda value: f"{value:.0f}" if np.isfinite(value) else "–"
    largest = max(map(abs, known))
    if largest >= 1e6 or largest < 1e-3:
        return lambda value: f"{value:.2e}" if np.isfinite(value) else "–"
    decimals = max(0, 2 - int(np.floor(np.log10(largest))))
    return lambda value: f"{value:.{decimals}f}" if np.isfinite(value) else "–"
