"""Where or which: a criterion, its shuffled control and chance, as cut and repaired."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import plots
from ..comparisons import compare
from ..curve import Curve, load_curves
from .explorer import Explorer, rounded

TASKS = ("vgg", "resnet", "vit-heads", "vit-neurons")
LINES = ("LRP", "LRP, shuffled", "random")
OTHERS = ("Taylor", "activation", "magnitude", "Fisher")
SCOPES = ("global", "layer")
NAMES = {
    "vgg": "VGG, filters",
    "resnet": "ResNet, filters",
    "vit-heads": "ViT, heads",
    "vit-neurons": "ViT, neurons",
    "global": "over all layers",
    "layer": "within each layer",
    "none": "none, as cut",
    "mean": "means",
    "statistics": "BatchNorm statistics",
    "least_squares": "least squares",
}


def control_explorer(curves: Mapping[str, Mapping[str, Curve]] | None = None) -> Explorer:
    """Accuracy against rate for LRP, its shuffled control and chance; what it adds to know where, and to know which.

    Parameters
    ----------
    curves : mapping of str to mapping of str to Curve, optional
        Name of a network → curves by ``"<criterion>, <repair>, <scope>"``, as ``pxp.load_curves("repair-vgg")`` has
        them: ``LRP``, ``LRP, shuffled`` and ``random`` for each repair and scope that shall be shown, Taylor,
        activation, magnitude and Fisher beside them as far as they are there. Default: those of the book.

    Returns
    -------
    Explorer

    Raises
    ------
    ValueError
        A network without the three curves of any repair and scope.
    """
    if curves is None:
        curves = {task: load_curves(f"repair-{task}") for task in TASKS}
    tasks = {name: _sections(name, rows) for name, rows in curves.items()}
    first = next(iter(tasks))
    scope = next(iter(tasks[first]))
    repair = next(iter(tasks[first][scope]))
    rates = tasks[first][scope][repair]["rates"]
    rate = 0.4 if 0.4 in rates else rates[len(rates) // 2]
    start = {"task": first, "scope": scope, "repair": repair, "rate": rate, "other": ""}
    names = {name: NAMES.get(name, name) for name in (*curves, *NAMES)}
    data = {"start": start, "tasks": tasks, "others": list(OTHERS), "names": names}

    def answer(state: dict[str, Any]) -> dict[str, Any]:
        """What ``compute`` of control.js gives, from the curves themselves."""
        rows = {name: curves[state["task"]][f"{name}, {state['repair']}, {state['scope']}"] for name in LINES}
        other = curves[state["task"]].get(f"{state['other']}, {state['repair']}, {state['scope']}")
        gaps = _gaps(*(rows[name].at(state["rate"]) for name in LINES))
        if other is not None:
            rows[state["other"]] = other
        lines = [{"name": name, **_line(curve)} for name, curve in rows.items()]
        return {"rates": list(rows["LRP"].rates), "lines": rounded(lines), **gaps}

    def still() -> None:
        plots.curves({name: curves[first][f"{name}, {repair}, {scope}"] for name in LINES})

    return Explorer("control", "Where or which", data, answer, still, 980)


def _sections(name: str, rows: Mapping[str, Curve]) -> dict[str, Any]:
    """Scope → repair → what is shown of it."""
    found: dict[str, Any] = {scope: {} for scope in SCOPES}
    for scope in SCOPES:
        for repair in ("none", "mean", "statistics", "least_squares"):
            curves = {line: rows.get(f"{line}, {repair}, {scope}") for line in (*LINES, *OTHERS)}
            three = [curves[line] for line in LINES]
            if any(curve is None for curve in three):
                continue
            rates = list(three[0].rates)  # type: ignore[union-attr]
            gaps = [_gaps(*(curve.at(rate) for curve in three)) for rate in rates]  # type: ignore[union-attr]
            found[scope][repair] = {
                "rates": rates,
                "lines": rounded({line: _line(curve) for line, curve in curves.items() if curve is not None}),
                "gaps": {key: [gap[key] for gap in gaps] for key in ("where", "which")},
            }
    if not all(found.values()):
        raise ValueError(
            f"{name!r} needs curves named '<criterion>, <repair>, <scope>' for {', '.join(LINES)} in both scopes"
        )
    return found


def _line(curve: Curve) -> dict[str, list[float]]:
    low, high = curve.interval()
    return {"mean": curve.accuracy.tolist(), "low": low.tolist(), "high": high.tolist()}


def _gaps(lrp: Curve, control: Curve, chance: Curve) -> dict[str, list[float]]:
    """What it adds to know how many of each layer (the control over chance), and which (LRP over the control)."""
    both = {"where": compare(control, chance), "which": compare(lrp, control)}
    return {name: rounded([gap.difference, gap.low, gap.high]) for name, gap in both.items()}
