"""Scores: what attribution gives, and how the components to prune are chosen by it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .criteria import as_count
from .files import load_tensors, renewed, save_tensors
from .masks import ByLayer, Mask
from .network.components import Components
from .rates import fraction

SEED = re.compile(r"\bseed=(\d+)")  # in the text of a criterion


class Scores(ByLayer):
    """The score of every component: ``scores[layer]`` by magnitude, ``scores.signed[layer]`` signed.

    Positive signed scores mean useful for the true class, whatever the criterion starts with.

    Parameters
    ----------
    units : Components
    magnitude, signed : mapping of str to Tensor
        float, (size,) per layer.
    criterion : str
        What computed them.
    samples : int
        Number of reference samples that were seen (0: none is needed).
    has_sign : bool, default True
        Whether ``signed`` tells useful from harmful; if not, :meth:`select` refuses ``by="signed"``.
    references, tuned_on : collection of str
        Fingerprints of these samples, and of the images that the criterion was tuned on (if it is
        :func:`pxp.winner`'s): :func:`pxp.pruning_curve` does not report on them. Unknown (empty) in files of pxp 0.1.

    Raises
    ------
    ValueError
        Layers or sizes that do not fit ``units``; NaN or infinite scores (the layers are named).
    """

    def __init__(
        self,
        units: Components,
        magnitude: Mapping[str, Tensor],
        signed: Mapping[str, Tensor],
        *,
        criterion: str = "",
        samples: int = 0,
        has_sign: bool = True,
        references: Collection[str] = (),
        tuned_on: Collection[str] = (),
    ) -> None:
        super().__init__(units, magnitude)
        self.signed: Mapping[str, Tensor] = ByLayer(units, signed, "signed scores")
        self.criterion = criterion
        self.samples = samples
        self.has_sign = has_sign
        self.references, self.tuned_on = frozenset(references), frozenset(tuned_on)
        broken = [n for n in self if not bool((self[n].isfinite() & self.signed[n].isfinite()).all())]
        if broken:
            raise ValueError(
                f"scores by {criterion or 'this criterion'} are NaN or infinite in layers {', '.join(broken)}; "
                "the numbers overflowed: use float32 or float64, or another rule"
            )

    @property
    def draw(self) -> str:
        """What this ranking owes to chance: a hash of its references, and the seeds that its criterion names.

        ``""`` where chance has no part, as in the magnitude of weights. Rankings with the same references can be
        compared in pairs, see :func:`pxp.compare`.
        """
        marks = " ".join(sorted(self.references)).encode()
        seen = hashlib.blake2b(marks, digest_size=6).hexdigest() if marks else "unknown" if self.samples else ""
        return "|".join([seen, *SEED.findall(self.criterion)])

    def shuffled(self, seed: int = 0) -> Scores:
        """The control: the same scores, but each layer's permuted among its components.

        What is selected by them prunes, under the same settings, exactly as many components of each layer, but others.
        So it tells how much of a criterion's success is *where* it prunes and how much is *which* components (compare
        the random tickets of Su et al. 2020, arXiv:2009.11094, and the sanity checks of Frankle et al. 2021,
        arXiv:2009.08576).

        Parameters
        ----------
        seed : int, default 0

        Returns
        -------
        Scores

        Raises
        ------
        ValueError
            A seed that is no whole number.
        """
        generator = torch.Generator().manual_seed(as_count("seed", seed, least=0))
        order = {name: torch.randperm(len(values), generator=generator) for name, values in self.items()}
        return self._reordered(order, f"{self.criterion}, shuffled(seed={int(seed)})")

    def arranged_by(self, other: Scores) -> Scores:
        """Where by these scores, which by others: each layer's scores, handed out in the order of ``other``.

        What is selected by them (by magnitude) prunes as many components of each layer as these scores do, and within
        a layer those that ``other`` would prune first; where equal scores lie on both sides of the cut, it has no say.
        So criteria can be compared for *which* components they choose where the layers lose the same, and for *where*
        they prune when the choice within layers is the same. With a random ``other`` it is :meth:`shuffled`.

        Parameters
        ----------
        other : Scores
            Of the same components.

        Returns
        -------
        Scores
            Without a sign: the order of ``other`` is that of its magnitudes.

        Raises
        ------
        ValueError
            Scores of other components.
        TypeError
            Something else than scores.
        """
        if not isinstance(other, Scores):
            raise TypeError(f"other must be pxp.Scores, got {type(other).__name__}")
        self.need_same_components(other, "these scores")
        order = {}
        for name, values in self.items():  # of both rankings the component of the same place
            place, rank = values.argsort(stable=True), other[name].argsort(stable=True).argsort()
            order[name] = place[rank.to(place.device)]
        return self._reordered(order, f"{self.criterion}, arranged by {other.criterion}", other)

    def _reordered(self, order: Mapping[str, Tensor], criterion: str, other: Scores | None = None) -> Scores:
        """In each layer these scores for other components; ``order`` says whose, and ``other``, if any, has chosen."""
        seen = (self,) if other is None else (self, other)
        return Scores(
            self.units,
            {name: values[order[name]] for name, values in self.items()},
            {name: values[order[name]] for name, values in self.signed.items()},
            criterion=criterion,
            samples=max(one.samples for one in seen),
            has_sign=self.has_sign and other is None,
            references=frozenset().union(*(one.references for one in seen)),
            tuned_on=frozenset().union(*(one.tuned_on for one in seen)),
        )

    def select(
        self,
        rate: float | None = None,
        *,
        count: int | None = None,
        by: str = "magnitude",
        order: str = "least",
        scope: str = "global",
        min_keep: int = 0,
        cost: str | Mapping[str, float] | None = None,
        **unknown: Any,
    ) -> Mask:
        """Choose the components to prune: give either ``rate`` or ``count``.

        To prune until the network costs no more than it may, see :func:`pxp.within_budget`.

        Parameters
        ----------
        rate : float
            Fraction to prune, in [0, 1]; the number is rounded to the nearest integer.
        count : int
            Number to prune; with ``scope="layer"`` in every layer.
        by : {"magnitude", "signed"}
            ``"magnitude"``: relevance near zero goes first. ``"signed"``: the most negative goes first, which speaks
            most against the true class.
        order : {"least", "most"}
            Prune the lowest scores first, or (to see what that destroys) the highest.
        scope : {"global", "layer"}
            Rank all components together, or each layer by itself.
        min_keep : int, default 0
            Components that every layer keeps whatever the rate; prevents a dead layer. The rate is then not reached
            where too little is left to prune.
        cost : {"parameters", "flops"} or mapping of str to float, optional
            Rank by score per cost, and let ``rate`` be the share of the whole cost that is saved (never more). This is
            how kinds of different size, such as heads and neurons, are pruned together. Negative scores are multiplied
            by the cost instead: of two components that do equal harm, the one that costs more goes first. Parameters
            and operations of a component are attributes of :class:`pxp.network.components.Layer`; a mapping gives the
            cost of one component of each layer, such as the seconds of :func:`pxp.latencies`. Default: every component
            counts the same.

        Returns
        -------
        Mask
            Masks of growing rates are nested. Ties go to the earlier layer and the lower index.

        Raises
        ------
        ValueError
            A value that is not among the allowed ones; ``by="signed"`` of scores that have no sign; none or both of
            ``rate`` and ``count``; ``count`` with ``cost``; components that cost nothing; a cost that names other
            layers.
        TypeError
            A budget, which is another function's.
        """
        if unknown:
            name = next(iter(unknown))
            if name in ("flops", "parameters", "latency", "model", "example"):
                raise TypeError(
                    f"select knows rates and counts, not {name}=; a budget is pxp.within_budget(scores, model=model, "
                    "flops=0.5), also with parameters= or latency="
                )
            raise TypeError(f"select has no argument {name!r}")
        check_ways({"by": by, "order": order, "scope": scope})
        if by == "signed" and not self.has_sign:
            raise ValueError(f"scores by {self.criterion} have no sign that tells useful from harmful; by='magnitude'")
        if (rate is None) == (count is None):
            raise ValueError("give exactly one of rate and count")
        rate = None if rate is None else fraction("rate", rate)
        for name, number in (("count", count), ("min_keep", min_keep)):
            if number is not None and not isinstance(number, Integral):
                raise TypeError(f"{name} must be a whole number, got {number!r}")
        if count is not None and cost is not None:
            raise ValueError("count says how many, so a cost has no meaning beside it; give a rate")
        if count is not None and not 0 <= count <= self.units.total:
            raise ValueError(f"count must be between 0 and {self.units.total}, got {count}")
        if min_keep < 0:
            raise ValueError(f"min_keep must not be negative, got {min_keep}")

        price = prices_of(self.units, cost)
        scores = self if by == "magnitude" else self.signed
        keys = {name: per_cost(values, price[name]) for name, values in scores.items()}
        keys = {name: values if order == "least" else -values for name, values in keys.items()}
        groups = [list(keys)] if scope == "global" else [[name] for name in keys]
        kept: dict[str, Tensor] = {}
        for names in groups:
            key = torch.cat([keys[name] for name in names])
            prices = torch.cat([torch.full((len(keys[name]),), price[name], dtype=torch.float64) for name in names])
            number = len(key)
            if min_keep:
                stays = torch.cat([guarded(keys[name], min_keep) for name in names])
                key = key.masked_fill(stays, torch.inf)
                number = int((~stays).sum())
            queue = torch.argsort(key, stable=True)
            if cost is None:
                number = min(number, round(rate * len(key)) if rate is not None else count or 0)
            elif rate is not None:
                limit = rate * float(prices.sum()) * (1 + 1e-12)
                number = min(number, int((prices[queue].cumsum(0) <= limit).sum()))
            keep = torch.ones(len(key), dtype=torch.bool)
            keep[queue[:number]] = False
            kept |= dict(zip(names, keep.split([len(keys[name]) for name in names]), strict=True))
        return Mask(self.units, kept)

    def save(self, path: str | Path) -> None:
        """Write as safetensors."""
        extra = {"criterion": self.criterion, "samples": self.samples, "has_sign": self.has_sign}
        extra |= {"references": sorted(self.references), "tuned_on": sorted(self.tuned_on)}
        save_tensors(path, "scores", self.units, {"magnitude": self, "signed": self.signed}, extra)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what :meth:`save` wrote.

        Of what 0.1 and 0.2 wrote, scores that were started with a loss get today's sign. Where ``absolute="never"``
        kept the sign, both ways of ranking are the signed one, and the criterion's text says so.

        Raises
        ------
        ValueError
            Not a file of this kind, damaged, or written by a newer pxp.
        """
        units, tensors, extra = load_tensors(path, "scores")
        magnitude, signed = tensors["magnitude"], tensors["signed"]
        if "has_sign" not in extra:
            text, kept, turned = renewed(extra["criterion"])
            signed = {name: -values for name, values in signed.items()} if turned else signed
            magnitude = signed if kept else magnitude
            extra |= {"criterion": f"{text}, by='signed'" if kept else text}
            extra |= {"has_sign": not text.startswith(("Activation(", "Magnitude(", "Random("))}
        return cls(units, magnitude, signed, **extra)

    def __repr__(self) -> str:
        width = max(len("layer"), *(len(name) for name in self))
        source = f"{self.samples} reference samples" if self.samples else "no reference samples"
        rows = [
            f"{self.units.describe()} scored by {self.criterion}, {source}",
            f"  {'layer':<{width}}  size  {'median':>9}  {'largest':>9}  negative",
        ]
        for name, values in self.items():
            negative = float((self.signed[name] < 0).double().mean())
            rows.append(
                f"  {name:<{width}}  {len(values):4}  {values.median():9.3g}  {values.max():9.3g}  {negative:8.0%}"
            )
        return "\n".join(rows)


def several_scores(scores: Any, what: str) -> list[Scores]:
    """One ranking or several, as a list.

    Raises
    ------
    ValueError
        None.
    TypeError
        Something else.
    """
    several: list[Any] = [scores] if isinstance(scores, Scores | Mask) else list(scores)
    odd = next((one for one in several if not isinstance(one, Scores)), None)
    if odd is not None:
        raise TypeError(f"{what} needs pxp.Scores, one or several, got {type(odd).__name__}")
    if not several:
        raise ValueError(f"{what} needs at least one Scores")
    return several


WAYS = {"by": ("magnitude", "signed"), "order": ("least", "most"), "scope": ("global", "layer")}


def check_ways(options: Mapping[str, Any]) -> None:
    """Raise ValueError if one of the options of :meth:`Scores.select` is none of those that there are."""
    for name, allowed in WAYS.items():
        if name in options and options[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {options[name]!r}")


def prices_of(units: Components, cost: str | Mapping[str, float] | None) -> dict[str, float]:
    """What one component of each layer costs."""
    if isinstance(cost, Mapping):
        if set(cost) != set(units):
            raise ValueError(f"cost and components name different layers: {', '.join(sorted(set(cost) ^ set(units)))}")
        found = {name: float(cost[name]) for name in units}
    elif cost in (None, "parameters", "flops"):
        found = {name: float(getattr(layer, cost or "", 1)) for name, layer in units.items()}
    else:
        raise ValueError(
            "cost must be one of None, 'parameters', 'flops' or a cost per layer, such as pxp.latencies(model, units), "
            f"got {cost!r}"
        )
    unknown = [name for name, price in found.items() if not price > 0]
    if unknown:
        raise ValueError(
            f"{cost if isinstance(cost, str) else 'costs'} of these layers are unknown: {', '.join(unknown)}"
        )
    return found


def per_cost(scores: Tensor, price: float | Tensor) -> Tensor:
    """Score per cost; below zero, where a higher cost is a reason more to prune, score times cost."""
    return torch.where(scores < 0, scores * price, scores / price)


def guarded(key: Tensor, number: int) -> Tensor:
    """The last of a layer to be pruned, which a minimum per layer keeps: bool, as ``key``."""
    found = torch.zeros(len(key), dtype=torch.bool)
    found[torch.argsort(key, stable=True)[max(0, len(key) - number) :]] = True
    return found
