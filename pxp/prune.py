"""From scores to a pruned network: rank the components, choose which to keep, silence the others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .attention import silence_heads
from .components import Components, Layer
from .replica import Trace


class _ByLayer(Mapping[str, Tensor]):
    """A 1-D tensor per layer of components, in the order in which the layers run."""

    def __init__(self, units: Components, tensors: Mapping[str, Tensor]) -> None:
        what = type(self).__name__
        if set(tensors) != set(units):
            odd = sorted(set(tensors) ^ set(units))
            raise ValueError(f"{what} and components name different layers: {', '.join(odd)}")
        for name, layer in units.items():
            if tensors[name].shape != (layer.size,):
                raise ValueError(
                    f"{what} of layer {name!r} must have shape ({layer.size},), got {tuple(tensors[name].shape)}"
                )
        self.units = units
        self._tensors = {name: tensors[name] for name in units}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise KeyError(f"no layer {name!r}; there are {', '.join(self._tensors)}")
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Mask(_ByLayer):
    """Which components are kept: one bool tensor per layer, True = kept.

    Parameters
    ----------
    units : Components
    kept : mapping of str to Tensor
        bool, (size,) per layer.

    Raises
    ------
    ValueError
        Layers, sizes or dtypes that do not fit ``units``.
    """

    def __init__(self, units: Components, kept: Mapping[str, Tensor]) -> None:
        super().__init__(units, kept)
        for name, tensor in kept.items():
            if tensor.dtype != torch.bool:
                raise ValueError(f"mask of layer {name!r} must be bool, got {tensor.dtype}")

    @property
    def kept(self) -> int:
        """Number of kept components."""
        return sum(int(tensor.sum()) for tensor in self.values())

    @property
    def rate(self) -> float:
        """Fraction of components that are pruned."""
        return 1 - self.kept / self.units.total

    def save(self, path: str | Path) -> None:
        """Write as safetensors."""
        save_tensors(path, "mask", self.units, {"kept": self})

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            Not a file of this kind, or damaged.
        """
        units, tensors, _ = load_tensors(path, "mask")
        return cls(units, tensors["kept"])

    def __repr__(self) -> str:
        width = max(len("layer"), *(len(name) for name in self))
        rows = [
            f"{self.kept:,} of {self.units.describe()} kept ({self.rate:.1%} pruned)",
            f"  {'layer':<{width}}  kept  of",
        ]
        rows += [f"  {name:<{width}}  {int(kept.sum()):4}  {len(kept)}" for name, kept in self.items()]
        return "\n".join(rows)


class Scores(_ByLayer):
    """The score of every component: ``scores[layer]`` by magnitude, ``scores.signed[layer]`` signed.

    Parameters
    ----------
    units : Components
    magnitude, signed : mapping of str to Tensor
        float, (size,) per layer.
    criterion : str
        What computed them.
    samples : int
        Number of reference samples that were seen (0: none is needed).

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
    ) -> None:
        super().__init__(units, magnitude)
        self.signed: Mapping[str, Tensor] = _ByLayer(units, signed)
        self.criterion = criterion
        self.samples = samples
        broken = [n for n in self if not bool((self[n].isfinite() & self.signed[n].isfinite()).all())]
        if broken:
            raise ValueError(
                f"scores by {criterion or 'this criterion'} are NaN or infinite in layers {', '.join(broken)}; "
                "the numbers overflowed: use float32 or float64, or another rule"
            )

    def select(
        self,
        rate: float | None = None,
        *,
        count: int | None = None,
        flops: float | None = None,
        parameters: float | None = None,
        latency: float | None = None,
        by: str = "magnitude",
        order: str = "least",
        scope: str = "global",
        min_keep: int = 0,
        cost: str | None = None,
        model: nn.Module | None = None,
        example: Tensor | None = None,
    ) -> Mask:
        """Choose the components to prune: give one of ``rate``, ``count`` and the three budgets.

        Parameters
        ----------
        rate : float
            Fraction to prune, in [0, 1]; the number is rounded to the nearest integer.
        count : int
            Number to prune; with ``scope="layer"`` in every layer.
        flops, parameters, latency : float
            A budget: prune as little as it takes until the network that :func:`pxp.compact` makes has at most this
            share of the model's operations, of its parameters, or of its measured seconds.
        by : {"magnitude", "signed"}
            ``"magnitude"``: relevance near zero goes first. ``"signed"``: the most negative goes first.
        order : {"least", "most"}
            Prune the lowest scores first, or (to see what that destroys) the highest.
        scope : {"global", "layer"}
            Rank all components together, or each layer by itself.
        min_keep : int, default 0
            Components that every layer keeps whatever the rate; prevents a dead layer. The rate is then not reached
            where too little is left to prune.
        cost : {"parameters", "flops", "latency"}, optional
            Rank by score per cost. This is how kinds of different size, such as heads and neurons, are pruned together.
            Negative scores are multiplied by the cost instead: of two components that do equal harm, the one that
            costs more goes first. Parameters and operations of a component are the attributes of
            :class:`pxp.components.Layer`, latency is the measured time of its layer divided by the layer's size. With
            ``rate``, as many are pruned as save this share of the whole cost (never more). With a budget, the costs
            are updated as neighbours go: a filter, a neuron or an MLP output costs less by its lost inputs, a neuron
            also by the lost outputs of the layer that reads it. Default: every component counts the same.
        model, example : optional
            For budgets and ``cost="latency"``: the model, by default the one that the components were found in; and a
            batch of its inputs, as for :func:`pxp.compact`.

        Returns
        -------
        Mask
            Masks of growing rates are nested. Ties go to the earlier layer and the lower index.

        Raises
        ------
        ValueError
            A value that is not among the allowed ones; none or several of ``rate``, ``count`` and the budgets;
            ``count`` with ``cost``; a budget per cost with ``scope="layer"``; components that cost nothing; a budget
            that cannot be reached; the model is needed and gone; as :func:`pxp.compact`.
        """
        for name, value, allowed in (
            ("cost", cost, (None, "parameters", "flops", "latency")),
            ("by", by, ("magnitude", "signed")),
            ("order", order, ("least", "most")),
            ("scope", scope, ("global", "layer")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        shares = {"rate": rate, "flops": flops, "parameters": parameters, "latency": latency}
        given = {name: value for name, value in shares.items() if value is not None}
        if len(given) + (count is not None) != 1:
            raise ValueError("give exactly one of rate, count, flops, parameters and latency")
        for quantity, share in given.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{quantity} must be in [0, 1], got {share}")
        if count is not None and cost is not None:
            raise ValueError("count says how many, so a cost has no meaning beside it; give a rate")
        if count is not None and not 0 <= count <= self.units.total:
            raise ValueError(f"count must be between 0 and {self.units.total}, got {count}")
        if min_keep < 0:
            raise ValueError(f"min_keep must not be negative, got {min_keep}")

        scores = self if by == "magnitude" else self.signed
        price = {name: float(getattr(layer, cost or "", 1)) for name, layer in self.units.items()}
        if cost == "latency":
            from .budget import latencies

            price = latencies(self.units.need_model(model), self.units, example)
        if 0 in price.values():
            raise ValueError(f"{cost} of these layers are unknown: {', '.join(n for n, p in price.items() if p == 0)}")
        if "rate" not in given and count is None:
            if cost is not None and scope == "layer":
                raise ValueError('score per cost ranks across layers; use scope="global"')
            from .budget import Budget  # it compacts, and compaction is by masks

            ((quantity, share),) = given.items()
            budget = Budget(self.units.need_model(model), quantity, share, example)
            if cost is not None:
                return budget.per_cost(scores, self.units, price, order, min_keep)
            number = self.units.total if scope == "global" else max(layer.size for layer in self.units.values())
            options: dict[str, Any] = {"by": by, "order": order, "scope": scope, "min_keep": min_keep}
            return budget.along(lambda step: self.select(step / number, **options), number)

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
        extra = {"criterion": self.criterion, "samples": self.samples}
        save_tensors(path, "scores", self.units, {"magnitude": self, "signed": self.signed}, extra)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            Not a file of this kind, or damaged.
        """
        units, tensors, extra = load_tensors(path, "scores")
        return cls(units, tensors["magnitude"], tensors["signed"], **extra)

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


def per_cost(scores: Tensor, price: float | Tensor) -> Tensor:
    """Score per cost; below zero, where a higher cost is a reason more to prune, score times cost."""
    return torch.where(scores < 0, scores * price, scores / price)


def guarded(key: Tensor, number: int) -> Tensor:
    """The last of a layer to be pruned, which a minimum per layer keeps: bool, as ``key``."""
    found = torch.zeros(len(key), dtype=torch.bool)
    found[torch.argsort(key, stable=True)[max(0, len(key) - number) :]] = True
    return found


@contextmanager
def masked(model: nn.Module, mask: Mask) -> Iterator[nn.Module]:
    """Silence the pruned components while the context lasts; weights are never touched.

    A pruned filter emits exactly zero after its BatchNorm, a pruned head gives exactly zero to the output projection
    (torch's fast path included). On exit, also by an exception, the model is what it was.
    Contexts nest: a component is silent if any of the masks prunes it.

    Parameters
    ----------
    model : nn.Module
        The model whose components ``mask`` was made for.
    mask : Mask

    Yields
    ------
    nn.Module
        The same model.

    Raises
    ------
    ValueError
        A mask of another model.

    Examples
    --------
    >>> with pxp.masked(model, mask):  # doctest: +SKIP
    ...     pxp.accuracy(model, data.eval)
    """
    if not isinstance(mask, Mask):
        raise TypeError(f"mask must be a pxp.Mask, got {type(mask).__name__}")
    mask.units.check(model)
    modules = dict(model.named_modules())
    handles = []
    try:
        for name, kept in mask.items():
            layer = mask.units[name]
            if bool(kept.all()):
                continue
            if layer.kind == "head":
                handles += silence_heads(modules[name], kept)
                continue
            for site in layer.site:
                handles.append(modules[site].register_forward_hook(_silence(~kept, layer.kind == "filter")))
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _silence(pruned: Tensor, filters: bool):
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        off = pruned.to(output.device)
        return output.masked_fill(off.reshape(-1, *[1] * (output.ndim - 2)) if filters else off, 0)

    return hook


_GROUPS = {"mask": {"kept"}, "scores": {"magnitude", "signed"}, "compact": {"kept", "state"}}
_EXTRA = {"mask": set(), "scores": {"criterion", "samples"}, "compact": {"model", "example"}}


def save_tensors(
    path: str | Path,
    what: str,
    units: Components,
    groups: Mapping[str, Mapping[str, Tensor]],
    extra: dict | None = None,
) -> None:
    """Write named groups of tensors about some components as safetensors."""
    tensors = {
        f"{group}/{name}": tensor.contiguous().clone()
        for group, by_layer in groups.items()
        for name, tensor in by_layer.items()
    }
    layers = [asdict(layer) for layer in units.values()]
    header = {"what": what, "kind": units.kind, "layers": layers, "trace": asdict(units.trace), "extra": extra or {}}
    save_file(tensors, path, metadata={"pxp": json.dumps(header)})


def load_tensors(path: str | Path, what: str) -> tuple[Components, dict[str, dict[str, Tensor]], dict]:
    """Read what :func:`save_tensors` wrote: components, group → name → tensor, and the rest."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["pxp"])
            if header["what"] != what:
                raise KeyError(f"it holds {header['what']}, not {what}")
            tensors: dict[str, dict[str, Tensor]] = {}
            for key in file.keys():
                group, _, name = key.partition("/")
                tensors.setdefault(group, {})[name] = file.get_tensor(key)
        found = header["trace"]
        structure = Trace(
            tuple(found["order"]),
            {name: tuple(norms) for name, norms in found["norms"].items()},
            found["activations"],
            found["heads"],
            found["positions"],
            tuple(found["overwritten"]),
            {name: tuple(called) for name, called in found.get("functions", {}).items()},
        )
        layers = [Layer(**{**entry, "site": tuple(entry["site"])}) for entry in header["layers"]]
        kind, extra = header["kind"], header["extra"]
        if set(tensors) != _GROUPS[what] or set(extra) != _EXTRA[what]:
            raise KeyError(f"it holds {', '.join([*tensors, *extra])}")
    except (SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no {what} file written by pxp, or it is damaged: {error}") from error
    return Components(kind, layers, structure), tensors, extra
