"""Rules side by side on a network of six numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..attribute import heatmap
from ..criteria import Criterion
from ..lrp.composites import LRP
from ..lrp.rules import AlphaBeta, Epsilon, Gamma, ZPlus
from .explorer import Explorer, rounded

# Chapter 2's network and input, without biases
START: dict[str, Any] = {
    "x": [2.0, 1.0],
    "first": [[1.0, 1.0], [2.0, -3.0]],
    "bias": [0.0, 0.0],
    "second": [2.0, -3.0],
    "last": 0.0,
    "gamma": 1.0,
    "epsilon": 0.5,
    "alpha": 2.0,
}


def rule_explorer(network: nn.Sequential | None = None, x: Tensor | None = None) -> Explorer:
    """Weights, biases and inputs of a small network as sliders, and what five rules make of them.

    Parameters
    ----------
    network : nn.Sequential, optional
        ``Linear(2, 2)``, ``ReLU``, ``Linear(2, 1)``, with or without biases; its weights are where the sliders start.
        Default: chapter 2's.
    x : Tensor, optional
        Its input, (2,). Default: (2, 1).

    Returns
    -------
    Explorer
        The rules are LRP-0, ε, γ, αβ with β = α − 1, and z⁺.

    Raises
    ------
    ValueError
        A network of another form, or an input of another shape.
    """
    start = dict(START)
    if network is not None:
        start |= _weights(network)
    if x is not None:
        if tuple(x.shape) != (2,):
            raise ValueError(f"x must have shape (2,), got {tuple(x.shape)}")
        start["x"] = x.double().tolist()
    start = rounded(start)

    def still() -> None:
        import matplotlib.pyplot as plt

        ax = plt.subplots(figsize=(6.4, 3.6))[1]
        rules = answer(start)["rules"]
        for i in range(2):
            places = [number + 0.36 * i - 0.18 for number in range(len(rules))]
            values = [rule["inputs"][i] for rule in rules]
            ax.bar(places, values, 0.34, label=f"input {i + 1}", hatch=("", "//")[i], edgecolor="white")
        ax.axhline(0, color="black", linewidth=1)
        ax.set_xticks(range(len(rules)), [rule["rule"] for rule in rules])
        ax.set(xlabel="rule", ylabel="relevance (units of the output)")
        ax.legend()

    return Explorer("rules", "Rules on six numbers", {"start": start}, answer, still, 1100)


def _weights(network: nn.Module) -> dict[str, Any]:
    layers: list[Any] = list(network.children())
    shapes = [tuple(layer.weight.shape) for layer in layers if isinstance(layer, nn.Linear)]
    if len(layers) != 3 or shapes != [(2, 2), (1, 2)] or not isinstance(layers[1], nn.ReLU):
        raise ValueError(f"network must be Sequential(Linear(2, 2), ReLU, Linear(2, 1)), got {network!r:.200}")
    first, _, second = layers
    return {
        "first": first.weight.tolist(),
        "bias": [0.0, 0.0] if first.bias is None else first.bias.tolist(),
        "second": second.weight[0].tolist(),
        "last": 0.0 if second.bias is None else float(second.bias.detach()),
    }


def answer(state: dict[str, Any]) -> dict[str, Any]:
    """What ``compute`` of rules.js gives, by :func:`pxp.heatmap`; see there."""
    first, second = nn.Linear(2, 2).double(), nn.Linear(2, 1).double()
    with torch.no_grad():
        for parameter, values in (
            (first.weight, state["first"]),
            (first.bias, state["bias"]),
            (second.weight, [state["second"]]),
            (second.bias, [state["last"]]),
        ):
            parameter.copy_(torch.tensor(values, dtype=torch.float64))
    network, x = nn.Sequential(first, nn.ReLU(), second), torch.tensor([state["x"]], dtype=torch.float64)
    with torch.no_grad():
        hidden = network[:2](x)
        output = float(second(hidden))
    criteria: dict[str, Criterion] = {
        "LRP-0": LRP(Epsilon(0)),
        "ε": LRP(Epsilon(state["epsilon"])),
        "γ": LRP(Gamma(state["gamma"])),
        "αβ": LRP(AlphaBeta(state["alpha"], state["alpha"] - 1)),
        "z⁺": LRP(ZPlus()),
    }
    rules = [
        {
            "rule": name,
            "middle": heatmap(second, hidden, 0, criterion)[0].tolist(),
            "inputs": heatmap(network, x, 0, criterion)[0].tolist(),
        }
        for name, criterion in criteria.items()
    ]
    return rounded({"hidden": hidden[0].tolist(), "output": output, "rules": rules})
