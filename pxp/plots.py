"""Figures of the book: one style, colour-blind safe, legible on a phone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .cost import Cost
    from .curve import Curve
    from .masks import Mask
    from .scores import Scores

# Okabe and Ito's palette, which readers with any colour vision can tell apart, darkest first
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)))
MARKERS = "osD^vXP*"

STYLE: dict[Any, Any] = {
    # 12 points are 9 pixels where a phone shows the figure 358 pixels wide
    "figure.figsize": (6.4, 4.0),
    "figure.dpi": 144,  # two pixels for each point
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelsize": 13,
    "axes.titlesize": 13,
    "grid.color": "#dddddd",
    "font.size": 12,
    "legend.frameon": False,
    "legend.fontsize": 12,
    "lines.linewidth": 2.0,
    "savefig.facecolor": "white",
    "figure.constrained_layout.use": True,
}


def use_style() -> None:
    """Set the book's figure style (matplotlib's rcParams) and its colour cycle."""
    import matplotlib.pyplot as plt
    from cycler import cycler

    plt.rcParams.update({**STYLE, "axes.prop_cycle": cycler(color=COLORS)})


def show() -> None:
    """Show the current figure and, folded below it, the numbers that it draws as a table.

    Stands for ``plt.show()`` in a notebook. Of pictures, drawings and large clouds of points there is no table, of long
    lines a few points. What has no label, beside what has one, is taken for a guide to the eye.
    """
    import matplotlib.pyplot as plt

    from .figure_data import Folded, tables

    found = tables(plt.gcf())
    plt.show()
    if found:
        from IPython.display import display

        display(Folded(found))


def style(index: int) -> dict[str, Any]:
    """Colour, line style and marker of the ``index``-th thing in a figure, as keywords of ``ax.plot``.

    Things that a reader cannot tell apart by colour differ in the two others; from the eighth on they repeat.
    """
    at = index % len(COLORS)
    return {"color": COLORS[at], "linestyle": LINES[at], "marker": MARKERS[at], "markersize": 5}


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        return plt.subplots()[1]


def curves(named: Mapping[str, Curve], ax: Axes | None = None, *, chance: float | None = None) -> Axes:
    """Accuracy against pruning rate for several criteria, with 95 % bands where there are enough draws to tell.

    Parameters
    ----------
    named : mapping of str to Curve
        Legend label → curve.
    ax : Axes, optional
        Default: a new figure.
    chance : float, optional
        Draw the accuracy of guessing.

    Returns
    -------
    Axes
    """
    ax = _axes(ax)
    for index, (label, curve) in enumerate(named.items()):
        rates = 100 * np.asarray(curve.rates)
        ax.plot(rates, 100 * curve.accuracy, **style(index), label=f"{label} ({curve.a_pr:.2f})")
        low, high = curve.interval()
        if not np.isnan(low).any():
            ax.fill_between(rates, 100 * low, 100 * high, color=COLORS[index % len(COLORS)], alpha=0.18, linewidth=0)
    if chance is not None:
        ax.axhline(100 * chance, color="#666666", linewidth=1, linestyle=":")
        ax.text(0, 100 * chance + 1, "guessing", color="#555555")
    ax.set(xlabel="pruned components (%)", ylabel="accuracy (%)", ylim=(0, 100))
    ax.legend(title="criterion (A_PR)")
    return ax


def _tilted(names: Sequence[str]) -> dict[str, Any]:
    """Names of layers below an axis: upright where slanted ones would lie upon each other."""
    return {"rotation": 90, "ha": "center"} if len(names) > 12 else {"rotation": 60, "ha": "right"}


def kept_per_layer(named: Mapping[str, Mask], ax: Axes | None = None) -> Axes:
    """Share of components that each mask keeps, layer by layer: look here before believing a curve."""
    if not named:
        raise ValueError("there is no mask to draw")
    ax = _axes(ax)
    width = 0.8 / len(named)
    for index, (label, mask) in enumerate(named.items()):
        shares = [100 * float(kept.double().mean()) for kept in mask.values()]
        where = np.arange(len(shares)) + (index - (len(named) - 1) / 2) * width
        ax.bar(where, shares, width, color=COLORS[index % len(COLORS)], label=label)
    names = list(next(iter(named.values())))
    ax.set_xticks(np.arange(len(names)), names, **_tilted(names))
    ax.set(ylabel="kept components (%)", xlabel="layer, in the order of execution", ylim=(0, 105))
    ax.grid(axis="x", visible=False)
    if len(named) > 1:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=min(3, len(named)))
    return ax


def sensitivity(found: Mapping[str, Curve], ax: Axes | None = None) -> Axes:
    """Accuracy when each layer alone is pruned, see :func:`pxp.sensitivity`: layers downwards, rates across."""
    ax = _axes(ax)
    names, curves = list(found), list(found.values())
    table = 100 * np.stack([curve.accuracy for curve in curves])
    image = ax.pcolormesh(table, cmap="cividis", vmin=0, vmax=100)
    ax.set_yticks(np.arange(len(names)) + 0.5, names)
    ax.invert_yaxis()
    rates = curves[0].rates
    shown = range(0, len(rates), max(1, len(rates) // 5))
    ax.set_xticks([at + 0.5 for at in shown], [f"{100 * rates[at]:.0f}" for at in shown])
    ax.grid(visible=False)
    ax.set(xlabel="pruned components of this layer (%)", ylabel="layer, in the order of execution")
    ax.figure.colorbar(image, ax=ax, label="accuracy (%)")
    return ax


def styled(draw: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Draw with a function that brings a style of its own, and give its figure the book's.

    Parameters
    ----------
    draw : callable
        Such as those of ``optuna.visualization.matplotlib``, which switch matplotlib to another style.
    *args, **kwargs
        For ``draw``.

    Returns
    -------
    Axes or array of Axes
        What ``draw`` returns; matplotlib's own settings are left as they were.
    """
    import matplotlib.pyplot as plt

    with plt.rc_context():
        drawn = draw(*args, **kwargs)
    figure = np.ravel(drawn)[0].figure
    figure.set(facecolor="white", size_inches=STYLE["figure.figsize"], layout_engine="constrained")
    for ax in figure.axes:
        ax.set_facecolor("white")
        ax.grid(visible=True, color=STYLE["grid.color"])
        ax.set_axisbelow(True)
        for side, spine in ax.spines.items():
            spine.set(visible=side in ("left", "bottom"), color="black")
        ax.tick_params(colors="black", labelsize=STYLE["font.size"])
        for text in (ax.xaxis.label, ax.yaxis.label, ax.title):
            text.set(color="black", fontsize=STYLE["axes.labelsize"])
        if ax.get_legend() is not None:
            ax.get_legend().set(frame_on=False, loc="best", bbox_to_anchor=None)
    return drawn


def costs(named: Mapping[str, Cost], layers: str = "flops") -> Figure:
    """Costs side by side: what they are of the first one's, and one of them for every layer.

    Parameters
    ----------
    named : mapping of str to Cost
        Legend label → cost, such as those of the dense, the masked and the compacted network.
    layers : {"flops", "parameters", "bytes", "memory", "latency"}
        What to draw for every layer.

    Returns
    -------
    Figure
        Of what the first network has nothing of, no share is drawn.
    """
    import matplotlib.pyplot as plt

    from .cost import QUANTITIES, per_layer

    parts = {"parameters": "parameters", "FLOPs": "flops", "activations": "memory", "time": "latency"}
    first, rows = next(iter(named.values())), per_layer(named, layers)
    width = 0.8 / len(named)
    with plt.rc_context(STYLE):
        figure, (total, each) = plt.subplots(2, 1, figsize=(6.4, 5.6))
    for index, (label, cost) in enumerate(named.items()):
        shift = (index - (len(named) - 1) / 2) * width
        style = {"width": width, "color": COLORS[index % len(COLORS)]}
        shares = [100 * getattr(cost, part) / (getattr(first, part) or np.nan) for part in parts.values()]
        total.bar(np.arange(len(parts)) + shift, shares, label=label, **style)
        each.bar(np.arange(len(rows)) + shift, [values[index] for values in rows.values()], **style)
    total.set_xticks(np.arange(len(parts)), list(parts))
    total.set_ylabel(f"of {next(iter(named))} (%)")
    each.set_xticks(np.arange(len(rows)), list(rows), **_tilted(list(rows)))
    each.set(ylabel=QUANTITIES[layers][0], xlabel="layer, in the order of execution")
    for ax in (total, each):
        ax.grid(axis="x", visible=False)
    figure.legend(loc="outside upper center", ncols=len(named), frameon=False)
    return figure


def scores_per_layer(scores: Scores, ax: Axes | None = None, *, signed: bool = False) -> Axes:
    """Every component's score as a point, by layer; logarithmic unless ``signed``."""
    ax = _axes(ax)
    values = scores.signed if signed else scores
    generator = np.random.default_rng(0)
    for index, tensor in enumerate(values.values()):
        jitter = index + generator.uniform(-0.3, 0.3, len(tensor))
        ax.scatter(jitter, tensor.numpy(), s=10, alpha=0.6, color=COLORS[0], linewidths=0)
    ax.set_xticks(np.arange(len(values)), list(values), **_tilted(list(values)))
    ax.set(xlabel="layer, in the order of execution", ylabel="mean relevance" if signed else "mean |relevance|")
    if not signed:
        ax.set_yscale("log")
    return ax


def conservation(named: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Relevance that arrives at every layer, from the input to the output; a line per :class:`pxp.Conservation`."""
    ax = _axes(ax)
    for index, (label, found) in enumerate(named.items()):
        values = [found.input, *found.arrives.values(), found.start]
        ax.plot(
            np.arange(len(values)),
            values,
            color=COLORS[index % len(COLORS)],
            linestyle=LINES[index % len(LINES)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            label=label,
        )
    names = ["input", *next(iter(named.values())).arrives, "logit"]
    ax.set_xticks(np.arange(len(names)), names, **_tilted(names))
    ax.set(xlabel="layer, in the order of execution", ylabel="relevance that arrives")
    ax.legend(title="criterion")
    return ax


def heatmaps(
    images: Tensor, relevances: Mapping[str, Tensor], titles: Sequence[str] = (), *, percentile: float = 99.5
) -> Figure:
    """A row per image: the image, then its heatmap by each criterion; red speaks for the class, blue against it.

    Parameters
    ----------
    images : Tensor
        (N, C, H, W), shown in grey or, with three channels, in colour; values are expected in [0, 1].
    relevances : mapping of str to Tensor
        Column title → relevance of the images' shape. Each heatmap has its own symmetric scale.
    titles : sequence of str
        One for each image.
    percentile : float, default 99.5
        Percentile of the absolute relevance at which the colours saturate.

    Returns
    -------
    Figure
    """
    import matplotlib.pyplot as plt

    rows, columns = len(images), 1 + len(relevances)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        width = min(1.75, STYLE["figure.figsize"][0] / columns)
        figure, axes = plt.subplots(rows, columns, figsize=(width * columns, 1.1 * width * rows), squeeze=False)
    for row, image in enumerate(images):
        axes[row, 0].imshow(image.permute(1, 2, 0).squeeze(-1).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
        axes[row, 0].set_title(_wrapped(titles[row] if len(titles) else "image", width), fontsize=12)
        for column, (name, relevance) in enumerate(relevances.items(), start=1):
            pixels = relevance[row].sum(0)
            limit = float(torch.quantile(pixels.abs().flatten().double(), percentile / 100)) or 1.0
            axes[row, column].imshow(pixels.numpy(), cmap="seismic", vmin=-limit, vmax=limit)
            if row == 0:
                axes[row, column].set_title(_wrapped(name, width), fontsize=12)
    for ax in axes.flat:
        ax.set_axis_off()
    return figure


def _wrapped(text: str, inches: float) -> str:
    """A title in lines that fit above a picture of this width."""
    return fill(text, max(6, int(inches * 72 / 6.5)), break_long_words=False)


def image_grid(images: Tensor, titles: Sequence[str] = (), *, columns: int = 5) -> Figure:
    """Images (N, C, H, W) in a grid, each with an optional title."""
    import matplotlib.pyplot as plt

    rows, width = -(-len(images) // columns), STYLE["figure.figsize"][0] / columns
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(rows, columns, figsize=(width * columns, 1.15 * width * rows), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for index, (ax, image) in enumerate(zip(axes.flat, images, strict=False)):
        ax.imshow(image.permute(1, 2, 0).squeeze(-1).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
        if len(titles):
            ax.set_title(_wrapped(titles[index], width), fontsize=12)
    return figure
