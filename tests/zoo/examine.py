"""What of the package works on one network, each step against the model itself."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

import pxp
from pxp.network.components import KINDS

from .networks import Entry, build

RULES = ("epsilon", "zplus", "gamma")
EXACT = pxp.LRP(pxp.Epsilon(0), softmax="cp")
RATE = 0.3
CLOSE = 1e-4  # of the largest logit: a compacted network and the masked one
CONSERVED = 1e-3  # of the logit
STEPS = ("find", "explain", "mask", "compact")


@dataclass
class Row:
    """What was found of one network.

    Attributes
    ----------
    network : str
    parameters : int
    kinds : dict
        Kind → number of components.
    stops : dict
        Step (``"find"``, ``"explain"``, ``"mask"``, ``"compact"``) → the error with which the package refuses it.
    wrong : list of str
        Checks that fail, and errors that are none of the package's.
    oracle : str
        What relevance was compared with: ``"gradient × input"``, ``"logit"`` (of the network without constants), or
        ``"self-test"`` alone.
    compact : float
        The largest distance between a compacted network's and the masked model's outputs, in their largest.
    seconds : float
    """

    network: str
    parameters: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    stops: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    oracle: str = ""
    compact: float = 0.0
    seconds: float = 0.0

    @property
    def status(self) -> str:
        return "wrong" if self.wrong else "refused" if self.stops else "complete"

    def as_dict(self) -> dict:
        return asdict(self)


def examine(entry: Entry) -> Row:
    """Find, explain, mask and compact one network."""
    row = Row(str(entry))
    begin = time.perf_counter()
    model, images, labels = build(entry)
    row.parameters = sum(p.numel() for p in model.parameters())
    before = _state(model)
    with _refusals(row, "find"):
        units = _every_kind(model, images, row)
        _explained(model, images, labels, units, row)
    if not _same(before, _state(model)):
        row.wrong.append("the model was changed")
    row.seconds = time.perf_counter() - begin
    return row


@contextmanager
def _refusals(row: Row, step: str) -> Iterator[None]:
    """An error by which the package refuses a network is noted; any other is a mistake of the package's."""
    try:
        yield
    except (ValueError, TypeError) as error:
        row.stops.setdefault(step, str(error).partition("\n")[0])
    except Exception as error:
        row.wrong.append(f"{step}: {type(error).__name__}: {str(error)[:200]}")


def _every_kind(model: nn.Module, images: Tensor, row: Row) -> dict[str, pxp.Components]:
    found = {}
    for kind in KINDS:
        try:
            found[kind] = pxp.find_components(model, kind, example=images[:1])
        except ValueError as error:
            if "has no components of kind" not in str(error):
                row.stops.setdefault("find", str(error).partition("\n")[0])
    row.kinds = {kind: units.total for kind, units in found.items()}
    return found


def _explained(model: nn.Module, images: Tensor, labels: Tensor, kinds: dict[str, pxp.Components], row: Row) -> None:
    scores: dict[str, pxp.Scores] = {}
    with _refusals(row, "explain"):
        for kind, units in kinds.items():
            for rule in RULES if kind in ("filter", "neuron") else RULES[:1]:
                scores[kind] = pxp.attribute(model, (images, labels), units, pxp.LRP(rule), progress=False)
                if not any(bool(values.any()) for values in scores[kind].values()):
                    row.wrong.append(f"LRP({rule!r}) gives every {kind} 0")
        row.oracle = _conserved(model, images, labels, row)
    with torch.no_grad():
        whole = model(images)
    for kind, ranked in scores.items():
        mask = ranked.select(RATE)
        with _refusals(row, "mask"), torch.no_grad():
            with pxp.masked(model, ranked.select(RATE, order="most")):
                if torch.equal(model(images), whole):
                    row.wrong.append(f"a mask of the most relevant {kind}s changes nothing")
            with pxp.masked(model, mask):
                pruned = model(images)
            with _refusals(row, "compact"):
                small = pxp.compact(model, mask, example=images)
                distance = float((small(images) - pruned).abs().max() / pruned.abs().max())
                row.compact = max(row.compact, distance)
                if not distance < CLOSE:
                    row.wrong.append(f"compacted {kind}s differ from the masked ones by {distance:.1g}")


def _conserved(model: nn.Module, images: Tensor, labels: Tensor, row: Row) -> str:
    """LRP-0 against gradient × input where that is the same, else against the logit of the network without constants."""
    found = pxp.heatmap(model, images, labels, EXACT)
    point = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(point).gather(1, labels[:, None]).sum(), point)
    expected = (images * gradient).detach()
    if float((found - expected).norm() / expected.norm()) < CONSERVED:
        return "gradient × input"
    forgetful = copy.deepcopy(model).train().eval()  # timm's LeViT keeps its biases until it trains again
    bare, images = without_constants(forgetful).double(), images.double()  # it may vanish or grow
    with torch.no_grad():
        logits = bare(images).gather(1, labels[:, None])[:, 0]
        if bool(bare(torch.zeros_like(images)).any()):
            return "self-test"
    sums = pxp.heatmap(bare, images, labels, EXACT).flatten(1).sum(1)
    if float(((sums - logits).abs() / logits.abs()).max()) > CONSERVED:
        row.wrong.append(f"relevance {sums.tolist()} for logits {logits.tolist()} without constants")
    return "logit"


@torch.no_grad()
def without_constants(model: nn.Module) -> nn.Module:
    """Without what a network adds to its signal, as far as names tell: f(0) = 0 shows that nothing is left."""
    added = ("bias", "beta", "offset", "token", "pos_embed", "position_embedding", "pos_embedding", "running_mean")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        own = name.rpartition(".")[2]
        if any(word in own for word in added) and "table" not in own and "attention_biases" not in name:
            tensor.zero_()
    return model


def _state(model: nn.Module) -> tuple:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def _same(before: tuple, after: tuple) -> bool:
    tensors = zip(before[0].values(), after[0].values(), strict=True)
    return before[1] == after[1] and all(torch.equal(a, b) for a, b in tensors)
