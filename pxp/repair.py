"""Repair: what pruning breaks, mended in closed form, without labels and without gradients.

Pruning in one shot changes what every later layer reads. Some images, whose labels nobody needs, tell how much: the
outputs that a layer gave before are the targets of what it gives now. Layer by layer, in the order of execution, and
each on what the repaired layers before it deliver, that is a least-squares problem with one solution.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .bars import bar
from .batches import BATCH_SIZE, Data, checked, whole
from .compaction.compact import Blueprint, finished
from .compaction.cut import is_ordinary
from .compaction.nodes import run_node
from .criteria import as_count
from .masks import Mask, masked
from .network.attention import Attention
from .network.layers import CONVOLUTIONS, LAYERS, LINEAR, TRANSPOSED, for_weight, is_batch_norm
from .network.replica import evaluating, replica
from .network.silence import reader_of, without_heads

METHODS = ("mean", "statistics", "least_squares")
RIDGE = 0.1  # of the mean square of a layer's inputs: how much weights are drawn towards the old ones
LEAST = 1e-6  # the same of the mean square not taken from the mean
ROOM = 2**25  # values of patches that are in memory at once


def repair(
    model: nn.Module,
    mask: Mask,
    images: Tensor | Data,
    method: str = "statistics",
    *,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> fx.GraphModule:
    """Build the network that is physically smaller, as :func:`pxp.compact`, and mend what the cut broke.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    mask : Mask
        What to keep.
    images : Tensor or data
        (images, ...) as the model takes them; of data that has labels they are not looked at. Of the reference split:
        never those that tune or report. All of them, at two depths of the network, are in memory at once.
    method : {"statistics", "mean", "least_squares"}, default "statistics"
        ``"statistics"``: BatchNorm's means and variances anew, in one forward pass of the masked network. Needs
        BatchNorm, and images like those that the network was trained on.
        ``"mean"``: every layer that reads pruned outputs gets the bias with which its mean output is what it was.
        Layers without a bias stay as they are.
        ``"least_squares"``: every layer that reads pruned outputs gets the weights, drawn towards the old ones
        (``RIDGE``), with which its kept outputs are closest to what they were: convolutions and linear layers, of a
        transformer what reads the pruned neurons or heads (queries, keys and values stay). A layer that runs several
        times, transposed convolutions and layers that compute their weights stay as they are.
    batch_size : int, default 64
    progress : bool, default True
        Show a bar when it takes longer than five seconds.

    Returns
    -------
    torch.fx.GraphModule
        As :func:`pxp.compact`.

    Raises
    ------
    ValueError
        An unknown method; no images, or such as :func:`pxp.attribute` would refuse; ``"statistics"`` of a network
        without BatchNorm; a mask that cannot be written into the weights; as :func:`pxp.compact`.

    References
    ----------
    He, Zhang, Sun 2017, "Channel pruning for accelerating very deep neural networks" (arXiv:1707.06168), equation 4,
    refits one layer at a time; Luo, Wu, Lin 2017, "ThiNet" (arXiv:1707.06342), equation 7, scales its channels; CORP
    (arXiv:2602.05243) does it for transformers. The bias is Nagel et al.'s 2019 (arXiv:1906.04721, section 4.2).
    """
    check_method(method)
    if not isinstance(mask, Mask):
        raise TypeError(f"mask must be a pxp.Mask, got {type(mask).__name__}")
    batch_size = as_count("batch_size", batch_size)
    given = _only_images(images)
    reference = next((p for p in model.parameters() if p.is_floating_point()), given)
    parts = list(given.to(reference).tensor_split(math.ceil(len(given) / batch_size)))  # of nearly equal size
    with torch.inference_mode(False), torch.no_grad():
        if method == "statistics":
            mended = _with_statistics(model, mask, parts, progress)
            blueprint = Blueprint(mended, mask.units, given)
            return finished(model, blueprint, mask, blueprint.network(mask))
        blueprint = Blueprint(model, mask.units, given)
        twin = _Refit(blueprint, mask, parts, method == "least_squares", progress).run()
        return finished(model, blueprint, mask, blueprint.network(mask, twin), twin)


def as_repair(given: object) -> tuple[str, Tensor] | None:
    """How networks are repaired before they are measured, (method, images), see :func:`repair`; None: not at all.

    Raises
    ------
    ValueError, TypeError
        No pair; an unknown method; no such images.
    """
    if given is None:
        return None
    if not isinstance(given, tuple | list) or len(given) != 2 or not isinstance(given[0], str):
        raise TypeError(f"repair must be a pair (method, images), such as ('statistics', images), got {given!r:.80}")
    method, images = given
    check_method(method)
    return method, _only_images(images)


def _only_images(given: Any) -> Tensor:
    images = given if isinstance(given, Tensor) else whole(given)[0]
    return checked(images, torch.zeros(len(images), dtype=torch.long))[0]


def check_method(method: object) -> None:
    """Raise ValueError unless ``method`` is one of those that there are."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")


def _with_statistics(model: nn.Module, mask: Mask, parts: Sequence[Tensor], progress: bool) -> nn.Module:
    """A replica whose BatchNorms have the statistics of the masked network on these images."""
    mask.units.check(model)
    twin = replica(model)
    norms: list[Any] = [
        m for m in twin.modules() if is_batch_norm(m) and getattr(m, "num_batches_tracked", None) is not None
    ]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no BatchNorm with statistics; use method='least_squares'")
    for norm in norms:
        norm.running_mean, norm.running_var = norm.running_mean.clone(), norm.running_var.clone()
        norm.num_batches_tracked = torch.zeros_like(norm.num_batches_tracked)
        norm.momentum = None  # the mean over all batches
    twin.eval()
    with masked(twin, mask):
        for norm in norms:
            norm.training = True
        try:
            for part in bar(parts, show=progress, desc="repair", unit="batch"):
                twin(part.clone())
        except ValueError as error:  # a single value has no variance
            raise ValueError(
                f"{sum(map(len, parts))} images are too few for BatchNorm's statistics: {error}"
            ) from error
    return twin.eval()


class _Refit:
    """Runs the whole and the pruned network side by side, operation by operation, over all images.

    Parameters
    ----------
    blueprint : Blueprint
        Of the whole network.
    mask : Mask
    parts : sequence of Tensor
        The images, in batches.
    weights : bool
        Refit weights and bias; else the bias alone.
    progress : bool

    Attributes
    ----------
    twin : nn.Module
        The pruned network; the mask is written into its weights.
    """

    def __init__(
        self, blueprint: Blueprint, mask: Mask, parts: Sequence[Tensor], weights: bool, progress: bool
    ) -> None:
        self.graph, self.parts, self.weights, self.progress = blueprint.graph, parts, weights, progress
        self.whole, self.twin, self.mask = blueprint.twin, replica(blueprint.twin), mask
        self.modules = dict(self.twin.named_modules())
        self.kept: dict[str, Tensor] = {}  # layer → its kept outputs
        self.read: dict[str, Tensor] = {}  # layer that reads heads or hidden units of its own module → those kept
        for name, kept in mask.items():
            if not bool(kept.all()):
                self._silence(name, kept)
        self.calls = Counter(str(node.target) for node in self.graph.nodes if node.op == "call_module")

    def _silence(self, name: str, kept: Tensor) -> None:
        """Write the mask of one layer into the weights."""
        module: Any = self.modules[name]
        reader = self._reader(module)
        if reader is not None:
            inner = self.modules[reader]
            inner.weight = nn.Parameter(without_heads(inner.weight, kept), requires_grad=False)
            self.read[reader] = kept.to(inner.weight.device).repeat_interleave(inner.weight.shape[1] // len(kept))
            return
        if isinstance(module, TRANSPOSED):
            raise ValueError(f"{name!r} is a transposed convolution, of which compaction cannot take anything away")
        if not is_ordinary(module) or not all(self._keeps_zero(site, module) for site in self.mask.units[name].site):
            raise ValueError(f"{name!r} ({type(module).__name__}) cannot be repaired: no weight holds its mask")
        keep = kept.to(module.weight.device)
        module.weight = nn.Parameter(module.weight * for_weight(module, keep), requires_grad=False)
        if module.bias is not None:
            module.bias = nn.Parameter(module.bias * keep, requires_grad=False)
        self.kept[name] = keep

    def _keeps_zero(self, site: str, layer: Any) -> bool:
        """Whether what lies between a layer and the place where it is masked turns zero into zero."""
        between = self.modules[site]
        if between is layer:
            return True
        zeros = layer.weight.new_zeros(1, len(layer.weight), *[1] * (layer.weight.ndim - 2))
        return not bool(between(zeros).any())

    def _reader(self, module: nn.Module) -> str | None:
        inner = reader_of(module)
        return None if inner is None else next(name for name, other in self.modules.items() if other is inner)

    def run(self) -> nn.Module:
        """Refit what reads pruned outputs, in the order of execution; the twin."""
        # for each batch, what every operation of the whole network gives, and of the pruned one
        expected: list[dict[fx.Node, Any]] = [{} for _ in self.parts]
        found: list[dict[fx.Node, Any]] = [{} for _ in self.parts]
        last = {source: node for node in self.graph.nodes for source in node.all_input_nodes}
        pruned: set[fx.Node] = set()  # tensors of which the mask has taken something
        with evaluating(self.whole), evaluating(self.twin):
            for node in bar(list(self.graph.nodes), show=self.progress, desc="repair", unit="operation"):
                reads = any(source in pruned for source in node.all_input_nodes)
                layer = self._refitted(node, reads)
                with _noted(self.whole, layer) as targets, _noted(self.twin, layer) as seen:
                    self._run(node, self.whole, expected)
                    self._run(node, self.twin, found)
                if layer is not None:
                    wanted = [output for _, output in targets]
                    other = self._summand(node, found[0])
                    if other is not None:  # what the other summand lacks
                        wanted = [w + (a[other] - b[other]) for w, a, b in zip(wanted, expected, found, strict=True)]
                    self._fit(layer, wanted, seen)
                    self._run(node, self.twin, found)
                if self._prunes(node, reads):
                    pruned.add(node)
                for source in [source for source in node.all_input_nodes if last[source] is node]:
                    for values in (*expected, *found):
                        del values[source]
        return self.twin

    def _run(self, node: fx.Node, root: nn.Module, values: list[dict[fx.Node, Any]]) -> None:
        for known, part in zip(values, self.parts, strict=True):
            known[node] = run_node(node, root, known, part)

    def _refitted(self, node: fx.Node, reads: bool) -> str | None:
        """The layer that is refitted where this operation runs, if any."""
        name = str(node.target)
        if node.op != "call_module" or self.calls[name] > 1:
            return None
        reader = self._reader(self.modules[name])
        layer = name if reader is None and reads else reader if reader in self.read else None
        if layer is None:
            return None
        module: Any = self.modules[layer]
        flat = isinstance(module, LINEAR) or (isinstance(module, CONVOLUTIONS) and module.weight.ndim in (3, 4))
        return layer if flat and is_ordinary(module) else None

    def _summand(self, node: fx.Node, found: dict[fx.Node, Any]) -> fx.Node | None:
        """What is added to the output of an operation, if that is known by now."""
        shape = node.meta.get("shape")  # an attention may give a tuple, with what it computes first
        while len(node.users) == 1:
            user = next(iter(node.users))
            if user.op == "call_function" and user.target in (operator.add, torch.add):
                other = next((source for source in user.all_input_nodes if source is not node), None)
                plain = other in found and not user.kwargs and len(user.args) == 2
                same = plain and other is not None and other.meta.get("shape") == shape == user.meta.get("shape")
                return other if same and shape is not None else None
            first = shape is None and user.target is operator.getitem and user.args[1] == 0
            if not (first or (user.meta.get("same") and user.meta.get("shape") == shape)):
                return None
            node, shape = user, user.meta.get("shape")
        return None

    def _prunes(self, node: fx.Node, reads: bool) -> bool:
        """Whether something is missing in what an operation gives: its own outputs, or what it read and passes on."""
        name = str(node.target) if node.op == "call_module" else ""
        return name in self.kept or (reads and not isinstance(self.modules.get(name), (*LAYERS, Attention)))

    def _fit(self, name: str, targets: list[Tensor], seen: list[tuple[Tensor, Tensor]]) -> None:
        """Give a layer the weights with which it is closest to what it gave in the whole network."""
        layer: Any = self.modules[name]
        rows, columns = self.kept.get(name), self.read.get(name)
        inputs = [x for x, _ in seen]
        if columns is not None:  # pruned heads and hidden units are still computed, but not read
            inputs = [x * (columns if isinstance(layer, LINEAR) else columns.view(-1, 1, 1)) for x in inputs]
        over = tuple(range(inputs[0].ndim - 1)) if isinstance(layer, LINEAR) else (0, *range(2, inputs[0].ndim))
        live = torch.stack([x.amax(over).logical_or(x.amin(over)) for x in inputs]).any(0)
        equations = _Equations(layer, self.weights, live)
        for x, target, (_, output) in zip(inputs, targets, seen, strict=True):
            equations.add(x, target - output)
        weight, bias = equations.solve()
        if rows is not None:  # what is pruned stays so
            weight, bias = weight * for_weight(layer, rows), bias * rows
        layer.weight = nn.Parameter((layer.weight + weight).to(layer.weight), requires_grad=False)
        if layer.bias is not None:
            layer.bias = nn.Parameter((layer.bias + bias).to(layer.bias), requires_grad=False)


@contextmanager
def _noted(root: nn.Module, layer: str | None) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What a layer takes and gives, call by call."""
    calls: list[tuple[Tensor, Tensor]] = []
    if layer is None:
        yield calls
        return
    module = root.get_submodule(layer)
    handle = module.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
    try:
        yield calls
    finally:
        handle.remove()


class _Equations:
    """The normal equations of a layer's change: (XᵀX + λ) ΔW = XᵀR, for what its outputs lack, R.

    λ is ``RIDGE`` times the mean of XᵀX's diagonal. A layer with a bias also changes it, and X and R are taken from
    their means. Inputs that are pruned are columns of zeros: their weights stay as they are, and they are left out.
    Sums are in float64, of products in float32 or better, block by block; of inputs from which the first block's mean
    is taken, so that little cancels.

    Parameters
    ----------
    layer : linear layer or convolution
    weights : bool
        Else the bias alone is looked for.
    live : Tensor
        bool, the inputs, or channels, that are not zero everywhere. With groups, and where none is left, all count.
    """

    def __init__(self, layer: Any, weights: bool, live: Tensor) -> None:
        self.layer, self.weights = layer, weights
        self.groups = getattr(layer, "groups", 1)
        self.live = live if self.groups == 1 and bool(live.any()) else torch.ones_like(live)
        self.inputs = layer.weight[0].numel()
        outputs, inputs = len(layer.weight) // self.groups, int(self._columns().sum())
        zeros = layer.weight.new_zeros
        self.number = 0
        self.pilot: Tensor | None = None  # (groups, 1, inputs)
        self.x, self.r = (zeros(self.groups, size, dtype=torch.float64) for size in (inputs, outputs))
        self.xx = zeros(self.groups, inputs, inputs, dtype=torch.float64) if weights else None
        self.xr = zeros(self.groups, inputs, outputs, dtype=torch.float64) if weights else None

    def _columns(self) -> Tensor:
        """bool, (inputs,): which weights of an output are looked for."""
        return self.live.repeat_interleave(self.inputs * self.groups // len(self.live))[: self.inputs]

    def add(self, x: Tensor, lack: Tensor) -> None:
        """Count these inputs, and what the outputs lack."""
        linear = isinstance(self.layer, LINEAR)
        lack = lack.flatten(0, -2) if linear else lack.flatten(2)
        rows = len(lack) if linear else len(lack) * lack.shape[2]
        each = max(1, ROOM // (self.groups * self.inputs * max(1, rows // len(lack))))
        x = x.flatten(0, -2) if linear else x
        x = x if bool(self.live.all()) else x[:, self.live]
        for patches, rest in zip(x.split(each), lack.split(each), strict=True):
            self._add(self._patches(patches), self._by_group(rest))

    def _add(self, x: Tensor, r: Tensor) -> None:
        """(groups, rows, inputs) and (groups, rows, outputs)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x, r = x.to(wide), r.to(wide)
        if self.pilot is None:
            self.pilot = x.mean(1, keepdim=True) if self.layer.bias is not None else torch.zeros_like(x[:, :1])
        x = x - self.pilot
        self.number += x.shape[1]
        self.r += r.sum(1, dtype=torch.float64)
        if self.xx is not None and self.xr is not None:
            self.x += x.sum(1, dtype=torch.float64)
            self.xx += x.transpose(1, 2) @ x
            self.xr += x.transpose(1, 2) @ r

    def _patches(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, LINEAR):
            return x[None]
        layer = self.layer
        sizes = [layer.kernel_size, layer.dilation, layer.stride]
        edges, mode = layer._reversed_padding_repeated_twice, layer.padding_mode
        x = F.pad(x, edges, mode="constant" if mode == "zeros" else mode)
        if x.ndim == 3:  # (N, channels, length) as an image of one row
            x, sizes = x[:, :, None], [(1, *size) for size in sizes]
        kernel, dilation, stride = sizes
        return self._by_group(F.unfold(x, kernel, dilation, 0, stride))

    def _by_group(self, values: Tensor) -> Tensor:
        """(rows, columns) or (N, channels, places) → (groups, rows, columns of each group)."""
        if isinstance(self.layer, LINEAR):
            return values[None]
        return values.unflatten(1, (self.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)

    def solve(self) -> tuple[Tensor, Tensor]:
        """The change of the weight and of the bias."""
        weight, shift = torch.zeros_like(self.layer.weight, dtype=torch.float64), self.r / self.number
        if self.xx is not None and self.xr is not None and self.pilot is not None:
            xx, xr, pilot = self.xx, self.xr, self.pilot[:, 0].double()
            if self.layer.bias is not None:
                xx = xx - self.x[:, :, None] * self.x[:, None] / self.number
                xr = xr - self.x[:, :, None] * shift[:, None]
            diagonal = xx.diagonal(dim1=1, dim2=2)
            # inputs that do not vary say nothing, and rounding shall not speak for them
            square = (self.number * pilot.square().sum(1) + diagonal.sum(1)) / self.inputs
            ridge = torch.maximum(RIDGE * diagonal.sum(1) / self.inputs, LEAST * square)
            ridge = ridge.clamp(min=torch.finfo(torch.float64).tiny)
            made = _solved(xx + torch.diag_embed(ridge[:, None].expand_as(diagonal)), xr)
            full = made.new_zeros(self.groups, self.inputs, made.shape[2])
            full[:, self._columns()] = made
            weight = full.transpose(1, 2).reshape(self.layer.weight.shape)
            shift = shift - ((self.x / self.number + pilot)[:, None] @ made)[:, 0]
        return weight, shift.flatten()


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """The solution, of half the work where rounding leaves the matrix positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.linalg.solve(matrix, right) if bool(failed.any()) else torch.cholesky_solve(right, factor)
