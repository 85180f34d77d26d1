"""Search spaces: what a search for the best composite may vary."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..lrp.composites import GROUPS, LRP
from ..lrp.rules import PARAMETERS
from ..lrp.softmax import SOFTMAX_RULES
from ..network.attention import is_head_layer
from ..scores import check_ways

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

PAPER_RULES = ("epsilon", "alpha2beta1", "gamma", "zplus")
SELECTION = ("by", "order", "scope", "min_keep", "cost")


class SearchSpace(Mapping[str, "BaseDistribution"]):
    """What a search may vary: parameter → Optuna distribution. Printing it shows the space and its size.

    Parameters
    ----------
    choices : mapping
        Arguments of :class:`pxp.LRP`, or of :meth:`pxp.Scores.select` (``by``, ``order``, ``scope``, ``min_keep``,
        ``cost``), each with a list of values or an Optuna distribution.
    when : mapping, optional
        Parameter → (other parameter, value): it exists only where the other one has this value. In any order.

    Raises
    ------
    ValueError
        An empty space; a parameter without values, or with a wrong one; a condition of or on a parameter that is not in
        the space, on a value that the other one never has, or in a circle.
    TypeError
        A parameter that neither takes.
    """

    def __init__(self, choices: Mapping[str, Any], when: Mapping[str, tuple[str, Any]] | None = None) -> None:
        from optuna.distributions import BaseDistribution, CategoricalDistribution

        self._distributions: dict[str, BaseDistribution] = {}
        self.when = dict(when or {})
        for name, given in choices.items():
            if not isinstance(given, BaseDistribution):
                if not isinstance(given, list | tuple) or not given:
                    raise ValueError(f"{name!r} needs a list of values or an Optuna distribution, got {given!r}")
                given = CategoricalDistribution(given)
            self._distributions[name] = given
        if not self._distributions:
            raise ValueError("the search space is empty")
        self._order = self._by_condition()
        for settings in self._corners():
            check_ways(split_setting(settings)[1])  # a wrong name or value is an error here, not in every trial

    def _by_condition(self) -> list[str]:
        """The parameters, each behind the one that it depends on."""
        for name, (other, value) in self.when.items():
            for each in (name, other):
                if each not in self:
                    raise ValueError(f"when names {each!r}, which is not in the space; there are {', '.join(self)}")
            choices, low = getattr(self[other], "choices", None), getattr(self[other], "low", None)
            if not (low <= value <= self[other].high if choices is None else value in choices):  # type: ignore
                raise ValueError(f"{name!r} is to exist when {other!r} is {value!r}, which it never is: {self[other]}")
        order: list[str] = []
        while len(order) < len(self):
            found = [n for n in self if n not in order and (n not in self.when or self.when[n][0] in order)]
            if not found:
                raise ValueError(f"conditions in a circle: {', '.join(n for n in self if n not in order)}")
            order.append(found[0])
        return order

    def _corners(self) -> Iterator[dict[str, Any]]:
        """Every value by itself, with the rule that a parameter of a rule belongs to, or the path of a baseline."""
        rules = {parameter: rule for rule, parameter in PARAMETERS.items()}
        for name, distribution in self.items():
            group, _, parameter = name.partition("_")
            others: dict[str, Any] = {group: rules[parameter]} if group in GROUPS and parameter in rules else {}
            if name == "baseline":  # which only a path has
                others["path_steps"] = 2
            for value in getattr(distribution, "choices", None) or (getattr(distribution, "low", None),):
                yield {**others, name: value}

    def __getitem__(self, name: str) -> BaseDistribution:
        return self._distributions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._distributions)

    def __len__(self) -> int:
        return len(self._distributions)

    def __or__(self, more: Mapping[str, Any]) -> SearchSpace:
        """This space with further or other parameters."""
        return SearchSpace({**self, **more}, {**self.when, **getattr(more, "when", {})})

    @property
    def size(self) -> float:
        """Number of settings; infinite if a parameter is continuous."""
        grid = self.grid()
        return math.inf if grid is None else math.prod(len(values) for values in grid.values())

    def grid(self) -> dict[str, list[Any]] | None:
        """Parameter → values, if every parameter has finitely many and depends on no other."""
        choices = {name: getattr(distribution, "choices", None) for name, distribution in self.items()}
        if self.when or any(values is None for values in choices.values()):
            return None
        return {name: list(values) for name, values in choices.items() if values is not None}

    def __call__(self, trial: optuna.Trial) -> dict[str, Any]:
        """Let ``trial`` choose a setting."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        setting: dict[str, Any] = {}
        for name in self._order:
            distribution = self[name]
            other, value = self.when.get(name, (None, None))
            if other is not None and (other not in setting or setting[other] != value):
                continue
            if isinstance(distribution, CategoricalDistribution):
                setting[name] = trial.suggest_categorical(name, distribution.choices)
            else:
                suggest = trial.suggest_float if isinstance(distribution, FloatDistribution) else trial.suggest_int
                low, high, step = distribution.low, distribution.high, distribution.step  # type: ignore[attr-defined]
                setting[name] = suggest(name, low, high, step=step, log=distribution.log)  # type: ignore
        return setting

    def __repr__(self) -> str:
        size = "infinitely many" if self.size == math.inf else f"{self.size:,}"
        width = max(map(len, self))
        rows = [f"{size} settings"]
        for name, distribution in self.items():
            choices = getattr(distribution, "choices", None)
            low, high = getattr(distribution, "low", 0), getattr(distribution, "high", 0)
            scale = " (log)" if getattr(distribution, "log", False) else ""
            what = ", ".join(map(str, choices)) if choices else f"{low:g} … {high:g}{scale}"
            other = self.when.get(name)
            rows.append(f"  {name:<{width}}  {what}" + (f", if {other[0]} is {other[1]}" if other else ""))
        return "\n".join(rows)


def search_space(model: nn.Module, kind: str = "paper") -> SearchSpace:
    """The settings of LRP to search for one model.

    Parameters
    ----------
    model : nn.Module
        A model with attention gets the softmax rules as well.
    kind : {"paper", "extended"}
        ``"paper"``: one of ε, α2β1, γ, z⁺ for each depth group, absolute or signed relevance, the softmax rule: 512
        settings for a CNN, 1,536 for a transformer (Hatefi et al. 2024, as the method is reported). ``"extended"``:
        besides, the rules' own parameters (log-uniform γ and ε, α), biases in or out of each group's denominators, the
        start, averaging over a path (at its cost), and of a transformer absolute values per token or sample.

    Returns
    -------
    SearchSpace
        Add a guard against dead layers with ``space | {"min_keep": [0, 4]}``.

    Raises
    ------
    ValueError
        Unknown kind.
    """
    from optuna.distributions import FloatDistribution

    if kind not in ("paper", "extended"):
        raise ValueError(f"unknown search space {kind!r}; allowed: 'paper', 'extended', a dict, or a callable")
    transformer = any(is_head_layer(module) for module in model.modules())
    choices: dict[str, Any] = {group: PAPER_RULES for group in GROUPS}
    choices["by"] = ["magnitude", "signed"]
    if transformer:
        choices["softmax"] = [*SOFTMAX_RULES]
    if kind == "paper":
        return SearchSpace(choices)
    when = {}
    for group in GROUPS:
        for rule, low, high, log in (("epsilon", 1e-6, 1.0, True), ("gamma", 0.01, 10.0, True)):
            choices[f"{group}_{rule}"] = FloatDistribution(low, high, log=log)
            when[f"{group}_{rule}"] = (group, rule)
        choices[f"{group}_alpha"] = FloatDistribution(1, 4)
        when[f"{group}_alpha"] = (group, "alpha2beta1")
        choices[f"{group}_zero_params"] = [None, "bias"]
    if transformer:
        choices["absolute"] = ["token", "sample"]
    return SearchSpace({**choices, "start": ["logit", "margin", "loss"], "path_steps": [1, 2, 4]}, when)


def split_setting(setting: Mapping[str, Any]) -> tuple[LRP, dict[str, Any]]:
    """Turn a setting into the criterion and the options of :meth:`pxp.Scores.select` that it names."""
    options = {name: value for name, value in setting.items() if name in SELECTION}
    return LRP(**{name: value for name, value in setting.items() if name not in SELECTION}), options


def renewed(setting: Mapping[str, Any], sample: bool = True) -> dict[str, Any]:
    """A setting of format 1 in today's words: ``absolute="never"`` was ``by="signed"``, with a loss of the other sign.

    ``sample``: whether ``absolute`` stays, since it was ``"sample"`` elsewhere in the search.
    """
    found: dict[str, Any] = {}
    for name, value in setting.items():
        if name != "absolute":
            found[name] = value
            continue
        found["by"] = "signed" if value == "never" else "magnitude"
        if sample:
            found["absolute"] = "token" if value == "never" else value
    if found.get("by") == "signed" and setting.get("start") == "loss":
        found["order"] = "most"
    return found


def as_criterion(chosen: Any) -> tuple[Any, dict[str, Any]]:
    """What a space gives for a trial: a setting, a criterion, or a criterion with options of ``select``."""
    if isinstance(chosen, Mapping):
        return split_setting(chosen)
    return chosen if isinstance(chosen, tuple) else (chosen, {})
