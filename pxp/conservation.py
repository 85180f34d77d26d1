"""Conservation: what relevance arrives at each layer, what constants absorb, and whether nothing else is lost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from zennit.core import Composite

from .attribute import EPSILON, as_criterion
from .criteria import Criterion
from .input_probe import InputProbe
from .lrp.balance import boundaries
from .network.trace import Trace, trace_model
from .probe import explained


class _Begun(InputProbe):
    """Notes what relevance every backward pass begins with."""

    def __init__(self, model: nn.Module, structure: Trace, both: tuple[Tensor, Tensor], carried: bool) -> None:
        super().__init__(model, structure, both, len(both[0]))
        self.begun: list[float] = []
        self._carried = carried

    def logits(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = super().logits(images, labels)
        if not logits.requires_grad:
            return logits
        seen, values = logits.view_as(logits), logits.detach()
        seen.register_hook(lambda flow: self.begun.append(float((flow if self._carried else flow * values).sum())))
        return seen


@dataclass(frozen=True, repr=False)
class Conservation:
    """Relevance that arrives at each layer, mean over samples.

    Attributes
    ----------
    start : float
        What arrives at the logits: by default the target's logit.
    arrives, leaves : dict of str to float
        Layer → relevance that arrives at its output, and what it passes on to its input.
    input : float
        Relevance that arrives at the input.
    criterion : str
    """

    start: float
    arrives: dict[str, float]
    leaves: dict[str, float]
    input: float
    criterion: str = ""

    @property
    def absorbed(self) -> dict[str, float]:
        """What each layer keeps: the share of its bias, and of the rule's stabiliser."""
        return {name: self.arrives[name] - self.leaves[name] for name in self.arrives}

    def plot(self, ax=None):
        """Draw what arrives at each layer; see :func:`pxp.plots.conservation`."""
        from . import plots

        return plots.conservation({self.criterion: self}, ax)

    def __repr__(self) -> str:
        width = max(len("layer"), len("input"), *(len(name) for name in self.arrives))
        rows = [
            f"relevance by {self.criterion}, which starts with {self.start:.4g}",
            f"  {'layer':<{width}}  {'arrives':>10}  {'passed on':>10}  {'absorbed':>10}",
        ]
        rows += [
            f"  {name:<{width}}  {self.arrives[name]:10.4g}  {self.leaves[name]:10.4g}  {self.absorbed[name]:10.4g}"
            for name in reversed(self.arrives)
        ]
        return "\n".join([*rows, f"  {'input':<{width}}  {self.input:10.4g}"])


def conservation(
    model: nn.Module, images: Tensor, targets: Tensor | int, criterion: Criterion | Composite = EPSILON
) -> Conservation:
    """How much relevance arrives at every layer, and how much the layer's constants absorb.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    images, targets, criterion
        As for :func:`pxp.heatmap`.

    Returns
    -------
    Conservation
        Prints as a table, the output first. What a layer passes on and the next one below does not get went another
        way: a residual branch, a sum with a constant.

    Raises
    ------
    ValueError
        The criterion makes several backward passes, as along a path: what is conserved is so in each of them alone.
    ValueError, TypeError
        As :func:`pxp.heatmap`.
    """
    asked = as_criterion(criterion)
    with torch.inference_mode(False), torch.enable_grad():
        both = explained(model, images, targets)
        structure = trace_model(model, both[0])
        carried = isinstance(criterion, Composite)
        probe = _Begun(model, structure, both, carried)
        layers = {name: probe.twin.get_submodule(name) for name in structure.order}
        with boundaries(layers, carried) as sums:
            (found,) = asked.values(probe)
    number = len(both[0])
    if len(probe.begun) != 1:
        raise ValueError(
            f"{criterion!r} makes {len(probe.begun)} backward passes; conservation is a matter of one. Look at a "
            "criterion that makes one, such as pxp.LRP with path_steps=1"
        )
    return Conservation(
        probe.begun[0] / number,
        {name: sums[name][1] / number for name in layers},
        {name: sums[name][0] / number for name in layers},
        float(found["input"].sum()) / number,
        type(criterion).__name__ if isinstance(criterion, Composite) else repr(criterion),
    )
