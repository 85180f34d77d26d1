"""A softmax under three rules and a LayerNorm under two, on a few numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..attribute import heatmap
from ..criteria import Taylor
from ..lrp.composites import LRP
from ..lrp.rules import Epsilon
from ..lrp.softmax import CPLRP, AttentionRule, AttnLRP, SoftmaxZPlus
from .explorer import Explorer, rounded

READOUT = [2.0, 0.0, 1.0, -1.0, -1.0, 5.0]
RULES: dict[str, AttentionRule] = {"AttnLRP": AttnLRP(), "CP-LRP": CPLRP(), "z⁺": SoftmaxZPlus()}


def softmax_explorer(
    logits: Tensor | None = None, values: Tensor | None = None, entering: Tensor | None = None
) -> Explorer:
    """Logits and values of one attention row, and what enters a LayerNorm, as sliders.

    Parameters
    ----------
    logits, values : Tensor, optional
        (keys,) each. Default: chapter 7's, with the weights 0.6, 0.3 and 0.1.
    entering : Tensor, optional
        (6,). Default: chapter 7's, of mean 1 and standard deviation 2.

    Returns
    -------
    Explorer

    Raises
    ------
    ValueError
        Logits and values of different or other shapes; other than six numbers that enter the LayerNorm.
    """
    x = torch.tensor([3, 1.5, 0.5]).double().log() if logits is None else logits.double()
    v = torch.tensor([3.0, -2, 8]).double() if values is None else values.double()
    y = torch.tensor([4.0, -2, 2, 2, -1, 1]).double() if entering is None else entering.double()
    if x.ndim != 1 or x.shape != v.shape or not len(x):
        raise ValueError(f"logits and values must have one shape (keys,), got {tuple(x.shape)} and {tuple(v.shape)}")
    if tuple(y.shape) != (6,):
        raise ValueError(f"entering must have shape (6,), got {tuple(y.shape)}")
    start = rounded({"x": x.tolist(), "v": v.tolist(), "y": y.tolist()})

    def still() -> None:
        import matplotlib.pyplot as plt

        axes = plt.subplots(1, 2, figsize=(6.4, 3.8), sharey=True)[1]
        for index, found in enumerate(answer(start)["softmax"]["rules"]):
            for ax, part in zip(axes, ("logits", "values"), strict=True):
                places = [key + 0.27 * (index - 1) for key in range(len(x))]
                ax.bar(places, found[part], 0.25, label=found["rule"], hatch=("", "..", "xx")[index], edgecolor="white")
        for ax, part in zip(axes, ("logits", "values"), strict=True):
            ax.axhline(0, color="black", linewidth=1)
            ax.set_xticks(range(len(x)), [f"key {key + 1}" for key in range(len(x))])
            ax.set_title(part)
        axes[0].set_ylabel("relevance")
        axes[0].legend()

    data = {"start": start, "readout": READOUT}
    return Explorer("softmax", "A softmax and a LayerNorm, rule by rule", data, answer, still, 1150)


def answer(state: dict[str, Any]) -> dict[str, Any]:
    """What ``compute`` of softmax.js gives, by the rules of :mod:`pxp.lrp.softmax` and by :func:`pxp.heatmap`."""
    x, v, y = (torch.tensor(state[name], dtype=torch.float64) for name in ("x", "v", "y"))
    weights = x.softmax(0)
    rules = []
    for name, rule in RULES.items():
        # one query of one channel, 1: the keys are the logits, and both have half of their relevance
        q = torch.ones(1, 1, 1, 1).double()
        k, u = (t.reshape(1, 1, -1, 1).clone().requires_grad_() for t in (x, v))
        flows = torch.autograd.grad(rule.attend(q, k, u, None, False).sum(), (k, u), materialize_grads=True)
        key, value = ((t * g).detach().flatten() for t, g in zip((k, u), flows, strict=True))
        rules.append({"rule": name, "logits": (2 * key).tolist(), "values": value.tolist()})
    linear = nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([READOUT]))
    net = nn.Sequential(nn.LayerNorm(6, eps=1e-12, elementwise_affine=False), linear).double()
    with torch.no_grad():
        output = float(net(y[None]))
    free, held = (heatmap(net, y[None], 0, c)[0].tolist() for c in (Taylor(start="logit"), LRP(Epsilon(0))))
    return rounded(
        {
            "softmax": {"weights": weights.tolist(), "output": float(weights @ v), "rules": rules},
            "norm": {"output": output, "free": free, "held": held},
        }
    )
