"""How much each layer alone can lose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .bars import bar
from .batches import BATCH_SIZE, Data
from .curve import Curve
from .masks import Mask
from .rates import RATES, as_rates
from .scores import Scores, several_scores
from .sweep import Sweep


class Sensitivity(Mapping[str, Curve]):
    """Layer → the curve when that layer alone is pruned; prints as a table, ``plot()`` draws it.

    Parameters
    ----------
    curves : mapping of str to Curve
    sizes : mapping of str to int
        How many components each layer has.
    """

    def __init__(self, curves: Mapping[str, Curve], sizes: Mapping[str, int]) -> None:
        self._curves, self.sizes = dict(curves), dict(sizes)

    def __getitem__(self, layer: str) -> Curve:
        return self._curves[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._curves)

    def __len__(self) -> int:
        return len(self._curves)

    def plot(self, ax: Any = None) -> Any:
        """Draw accuracy by layer and rate; see :func:`pxp.plots.sensitivity`."""
        from . import plots

        return plots.sensitivity(self, ax=ax)

    def __repr__(self) -> str:
        width = max(len("layer"), *(len(name) for name in self))
        any_curve = next(iter(self.values()))
        rows = [
            f"accuracy when one layer alone is pruned, by {any_curve.criterion or 'these scores'}",
            f"  {'layer':<{width}}  size   A_PR  Top-PR  at {any_curve.rates[-1]:.0%}",
        ]
        for name, curve in self.items():
            last = curve.accuracy[-1]
            rows.append(f"  {name:<{width}}  {self.sizes[name]:4}  {curve.a_pr:.3f}  {curve.top_pr():6.0%}  {last:.3f}")
        return "\n".join(rows)


def sensitivity(
    model: nn.Module,
    scores: Scores | Sequence[Scores],
    data: Data,
    *,
    rates: Iterable[float] = RATES,
    classes: Sequence[int] | None = None,
    by: str = "magnitude",
    order: str = "least",
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> Sensitivity:
    """Prune each layer alone, at every rate, and measure the accuracy (Li et al. 2017, arXiv:1608.08710, figure 2).

    What a global ranking takes from where is a choice between layers; this shows what each of them stands. Together
    they stand less: losses add up.

    Parameters
    ----------
    model : nn.Module
    scores : Scores or sequence of Scores
        Several, one per draw, give the curves their intervals.
    data : (images, labels), DataLoader or Dataset
        To choose rates by it, not those to report on.
    rates, classes, batch_size, progress
        As for :func:`pxp.pruning_curve`.
    by, order
        As for :meth:`pxp.Scores.select`.

    Returns
    -------
    Sensitivity

    Raises
    ------
    ValueError
        No scores or no rates; as :meth:`Scores.select` and :func:`pxp.accuracy`.
    """
    several = several_scores(scores, "sensitivity")
    rates = as_rates(rates)
    if not rates:
        raise ValueError("sensitivity needs at least one rate")
    units = several[0].units
    whole = {name: torch.ones(layer.size, dtype=torch.bool) for name, layer in units.items()}
    masks = []
    for one in several:
        by_layer = [one.select(rate, by=by, order=order, scope="layer") for rate in rates]
        masks += [Mask(units, whole | {name: mask[name]}) for name in units for mask in by_layer]
    sweep = Sweep(model, data, classes=classes, batch_size=batch_size)
    with bar(show=progress, desc="prune", unit="image", unit_scale=True) as ahead:
        right = sweep.hits(masks, ahead.update).numpy()
    table = right.reshape(len(several), len(units), len(rates), -1)
    about: dict = {"criterion": several[0].criterion, "settings": {"by": by, "order": order, "scope": "one layer"}}
    about["draws"] = tuple(one.draw for one in several)
    curves = {name: sweep.curve(rates, table[:, index], **about) for index, name in enumerate(units)}
    return Sensitivity(curves, {name: layer.size for name, layer in units.items()})
