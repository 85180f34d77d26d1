"""How compaction follows every tensor through a traced network; :func:`pxp.compact` is the way in.

Each tensor has *live* channels and, for every other channel, the constant that it has everywhere (zero where it was
pruned). A layer then computes its kept outputs from its live inputs; what the constants contribute moves into its bias.
Where two tensors with different live channels are added, as on a residual stream, the smaller one is added at its
places. What is not known gets the whole tensor, so the result is always exact.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..masks import Mask
from ..network.attention import Attention
from ..network.gated import is_gated, last_layer
from ..network.layers import (
    AVERAGES,
    BATCH_NORMS,
    CONVOLUTIONS,
    ELEMENTWISE,
    FLATTEN,
    LAYERS,
    LINEAR,
    PAD,
    POOLS,
    SCALES,
    TRANSPOSED,
    Identity,
    is_elementwise,
    qualified,
)
from .channels import Affine, Constant, Expand, Join, Select
from .cut import check_heads, check_units, cut_layer, entries, fewer_heads, fewer_units, is_layer, is_ordinary
from .graph import Shape, place
from .nodes import last_part

# operations that give parts of a tensor, each a range of one of its dimensions
PARTS = {
    "chunk", "unsafe_chunk", "split", "unsafe_split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit",
    "narrow",
}  # fmt: skip


@dataclass
class _Flow:
    """A tensor of the new graph and what is known of it.

    Attributes
    ----------
    node : fx.Node or None
        Its live channels; None if there are none.
    dim : int
        The channel dimension.
    live : Tensor
        int64, increasing: which channels of the original tensor these are.
    rest : Tensor
        (channels,): the constant that every other channel has; 0 at the live ones.
    zero : Tensor
        bool, (channels,): which constants are 0 whatever the weights are; decides the structure of the new network.
    shape : Shape
        Of the original tensor.
    """

    node: fx.Node | None
    dim: int
    live: Tensor
    rest: Tensor
    zero: Tensor
    shape: Shape

    @property
    def whole(self) -> bool:
        return len(self.live) == len(self.rest)

    def constants(self) -> Tensor:
        """Which channels are constant and not known to be zero."""
        return (~self.zero).index_fill(0, self.live, False)


@dataclass
class _Sizes:
    """The shape of a tensor of which perhaps only the live channels exist."""

    of: _Flow


class Compactor:
    """Walks through the old graph and writes the new one."""

    def __init__(self, twin: nn.Module, graph: fx.Graph, mask: Mask) -> None:
        self.twin, self.old, self.mask = twin, graph, mask
        self.modules = dict(twin.named_modules())
        self.called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
        self.new = fx.Graph()
        self.root: dict[str, Any] = {}
        self.input: fx.Node | None = None
        self.flows: dict[fx.Node, Any] = {}
        self.readers: dict[fx.Node, int] = {}  # new node → how many old nodes read what it stands for
        self.passing: set[fx.Node] = set()  # nodes of the new graph that compute each channel from the one before
        self.layers: dict[str, bool] = {}  # name → whether its weight can be cut
        self.device = next((p.device for p in twin.parameters()), torch.device("cpu"))
        self.last = {  # gated MLPs that are one operation, and their last layers
            name: next(f"{name}.{own}" for own, part in module.named_children() if part is last_layer(module))
            for name, module in self.modules.items()
            if name in self.called and is_gated(module)
        }
        self.sites: dict[str, list[str]] = {}
        for name, kept in mask.items():
            layer = mask.units[name]
            if layer.kind != "head" and name not in self.last and not bool(kept.all()):
                for site in layer.site:
                    self.sites.setdefault(last_part(site, self.modules), []).append(name)

    def run(self) -> tuple[dict[str, Any], fx.Graph]:
        """The new network's parts, module or tensor, under the names that its graph calls them by; and the graph."""
        heads = {
            name: [name] for name, kept in self.mask.items() if self.mask.units[name].kind == "head" and not kept.all()
        }
        for site, names in (self.sites | heads).items():
            if site not in self.called and site not in self.last.values():
                module = self.modules[site]
                around = next((name for name in self.called if site.startswith(f"{name}.")), "")
                why = (
                    f"lies inside {around!r} ({type(self.modules[around]).__name__}), which is traced as one operation"
                )
                if isinstance(module, LAYERS) and not is_layer(module):
                    why = f"({type(module).__name__}) computes with more than its weight"
                raise ValueError(f"{names[0]!r} {why}, so it cannot be cut")
        for node in self.old.nodes:
            try:
                self.flows[node] = self._node(node)
            except Exception as error:
                raise ValueError(f"{error}{place(node)}") from error
            for made in reversed(self.new.nodes):
                if made.meta.get("at") is not None:
                    break
                made.meta["at"] = node.meta.get("at", (None, ""))
        return self.root, self.new

    # --- writing ------------------------------------------------------------------------------------------------------

    def put(self, name: str, part: nn.Module | Tensor) -> str:
        """Add a part to the new network, under this name if that is free; the name that it has."""
        free, number = name, 1
        while self.root.get(free, part) is not part:
            number += 1
            free = f"{name}_{number}"
        self.root[free] = part
        return free

    def call(self, name: str, module: nn.Module, *arguments: Any) -> fx.Node:
        """Add a module to the new network and call it."""
        return self.new.call_module(self.put(name, module), arguments)

    def full(self, node: fx.Node, old: fx.Node, dim: int) -> _Flow:
        shape = _shape(old)
        live = torch.arange(shape[dim][0], device=self.device)
        rest = torch.zeros(len(live), dtype=old.meta["dtype"], device=self.device)
        return _Flow(node, dim, live, rest, rest == 0, shape)

    def _by(self, dim: int, given: Any, old: Any) -> _Flow:
        """An argument by its channels in this dimension."""
        if isinstance(given, _Flow) and given.dim == dim:
            return given
        return self.full(self.value(given), old, dim)

    def value(self, given: Any) -> Any:
        """The whole tensor behind an argument."""
        if isinstance(given, _Sizes):
            return tuple(self._size(given.of, dim) for dim in range(len(given.of.shape)))
        if not isinstance(given, _Flow):
            return given
        if given.node is None:
            module: nn.Module = Constant(given.rest, given.shape, given.dim)
            given.node = self.call("constant", module, self.input)
        elif not given.whole:
            given.node = self.call("expand", Expand(given.live, given.rest, given.dim), given.node)
        given.live, given.rest = torch.arange(len(given.rest), device=given.live.device), torch.zeros_like(given.rest)
        given.zero = given.rest == 0
        return given.node

    def shaped(self, flow: _Flow, live: Tensor) -> fx.Node | None:
        """A flow's value with exactly the channels ``live``, which contain all of its own live ones."""
        if len(live) == len(flow.live):
            return flow.node
        if flow.node is None:
            whole = self.value(flow)
            return self.call("select", Select(live, flow.dim), whole)
        where = torch.searchsorted(live, flow.live)
        return self.call("expand", Expand(where, flow.rest[live], flow.dim), flow.node)

    def narrow(self, flow: _Flow, keep: Tensor) -> _Flow:
        """Only the channels ``keep`` (a bool over all channels) stay live; the others become constant 0."""
        inside = keep[flow.live]
        rest, zero = torch.where(keep, flow.rest, 0), flow.zero | ~keep
        if bool(inside.all()):
            return _Flow(flow.node, flow.dim, flow.live, rest, zero, flow.shape)
        live = flow.live[inside]
        if not len(live):
            return _Flow(None, flow.dim, live, rest, zero, flow.shape)
        assert flow.node is not None
        if self._cut(flow.node, inside):
            return _Flow(flow.node, flow.dim, live, rest, zero, flow.shape)
        groups = self._cut_groups(flow.node, inside)
        if groups is not None:
            return _Flow(flow.node, flow.dim, flow.live[groups], rest, zero, flow.shape)
        index = inside.nonzero().flatten()
        return _Flow(self.call("select", Select(index, flow.dim), flow.node), flow.dim, live, rest, zero, flow.shape)

    def _is_read(self, node: fx.Node) -> bool:
        """Whether anything else takes or will take the channels of a node of the new graph."""
        return any(not _asks_sizes(user) for user in node.users) or self.readers.get(node, 1) > 1

    def _cut(self, node: fx.Node, inside: Tensor) -> bool:
        """Take outputs away from the layer that computes ``node``, if nobody else reads it."""
        if self._is_read(node):
            return False
        module = self.root.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, LINEAR) or (isinstance(module, CONVOLUTIONS) and module.groups == 1):
            self.root[str(node.target)] = cut_layer(module, module.weight[inside], entries(module.bias, inside))
            return True
        source = node.args[0] if node.args else None
        if node in self.passing and isinstance(source, fx.Node):
            del source.users[node]  # for the moment nobody reads it
            cut = self._cut(source, inside)
            source.users[node] = None
            return cut
        return False

    def _cut_groups(self, node: fx.Node, inside: Tensor) -> Tensor | None:
        """Zero single outputs of a grouped convolution and take away whole groups; which outputs are left (bool)."""
        module = self.root.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, CONVOLUTIONS) or module.groups == 1:
            return None
        if self._is_read(node):
            return None
        each = module.out_channels // module.groups
        groups = inside.view(-1, each).any(1)
        outputs = groups.repeat_interleave(each)
        keep = inside.view(-1, *[1] * (module.weight.ndim - 1))
        weight, bias = torch.where(keep, module.weight, 0), None
        if module.bias is not None:
            bias = torch.where(inside, module.bias, 0)[outputs]
        self.root[str(node.target)] = cut_layer(module, weight[outputs], bias, groups=int(groups.sum()))
        if not bool(groups.all()):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            index = groups.repeat_interleave(module.in_channels // module.groups)
            del source.users[node]
            if not self._cut(source, index):
                source.users[node] = None
                with self.new.inserting_before(node):
                    source = self.call("select", Select(index.nonzero().flatten(), 1), source)
                node.args = (source,)
            else:
                source.users[node] = None
        return outputs

    # --- reading ------------------------------------------------------------------------------------------------------

    def _node(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            copied = self.new.node_copy(node)
            self.input = copied if self.input is None else self.input
            return copied
        if node.op == "get_attr":
            return self._tensor(node, str(node.target))
        arguments: Any = fx.map_arg(node.args, self.flows.__getitem__)
        options: Any = fx.map_arg(node.kwargs, self.flows.__getitem__)
        if node.op == "output":
            return self.new.output(fx.node.map_aggregate(arguments[0], self.value))
        if node.op == "call_module":
            result = self._module(node, self.modules[str(node.target)], arguments, options)
            for name in self.sites.get(str(node.target), []):
                result = self.narrow(self._as_flow(result, node), self.mask[name].to(self.device))
        else:
            result = self._function(node, arguments, options)
        for part in result if isinstance(result, tuple) else (result,):
            if isinstance(part, _Flow) and part.node is not None:
                self._count(node, part.node, isinstance(result, tuple))
        return result

    def _count(self, node: fx.Node, made: fx.Node, several: bool) -> None:
        """Note how many operations will read a node of the new graph.

        If it was there before, ``node`` gives it on under another name, so those that read ``node`` read it in its
        stead. Who will read which of several parts is not known yet.
        """
        users = sum(not _asks_sizes(user) for user in node.users)
        before = self.readers.get(made)
        if before is not None:
            users = before if several else before + users - (node.target is not operator.getitem)
        self.readers[made] = users

    def _tensor(self, node: fx.Node, name: str) -> fx.Node:
        """A parameter or buffer that the model reads itself."""
        found = attrgetter(name)(self.twin)
        if all(user.target is getattr and user.args[1] in ("device", "dtype") for user in node.users):
            found = found.new_empty(0)
        if any(name.startswith(f"{called}.") for called in self.called):
            name = name.replace(".", "_")  # the layer that it is of may be cut
        return self.new.create_node("get_attr", self.put(name, found))

    def _as_flow(self, result: Any, node: fx.Node) -> _Flow:
        if isinstance(result, _Flow):
            return result
        last = isinstance(self.modules.get(str(node.target)), LINEAR)
        return self.full(result, node, len(_shape(node)) - 1 if last else 1)

    def _whole(self, node: fx.Node, arguments: Any, options: Any) -> fx.Node:
        """The operation as it is, on whole tensors."""
        if node.op == "call_method" and isinstance(arguments[0], _Sizes):  # a method of torch.Size
            arguments = (self.new.call_function(torch.Size, (self.value(arguments[0]),)), *arguments[1:])
        arguments = fx.node.map_aggregate(arguments, self.value)
        options = fx.node.map_aggregate(options, self.value)
        target = node.target
        if node.op == "call_module":
            target = self.put(str(target), self.modules[str(target)])
        return self.new.create_node(node.op, target, arguments, options)

    def _module(self, node: fx.Node, module: Any, arguments: tuple, options: dict) -> Any:
        name = str(node.target)
        x = arguments[0] if arguments and not options else None
        old: Any = node.args[0] if node.args else None
        if isinstance(module, Attention):
            return self._attention(node, name, module, arguments, options)
        if name in self.last:
            return self._gated(node, name, module, arguments, options)
        if isinstance(module, TRANSPOSED):
            raise ValueError(f"{name!r} is a transposed convolution, of which compaction cannot take anything away")
        layer = self.layers.setdefault(name, is_layer(module)) if x is not None else False
        if layer and isinstance(module, CONVOLUTIONS):
            x = self._by(1, x, old)
            return self._grouped(node, name, module, x) if module.groups > 1 else self._linear(node, name, module, x)
        if layer:
            return self._linear(node, name, module, self._by(len(_shape(old)) - 1, x, old))
        if isinstance(module, Affine):
            return self._affine(name, self._by(module.dim, x, old), module.scale, module.shift)
        if isinstance(module, Expand):
            return self._placed(node, self._by(module.dim, x, old), module.live, module.rest)
        if isinstance(module, Join):
            nothing = torch.zeros(module.size, dtype=node.meta["dtype"], device=self.device)
            places = torch.arange(module.size) if module.first is None else module.first, module.second
            first, second = (self._by(module.dim, *pair) for pair in zip(arguments, node.args, strict=True))
            first = self._placed(node, first, places[0].to(self.device), nothing, zero=True)
            return self._add(node, first, self._placed(node, second, places[1], nothing, zero=True))
        if arguments and isinstance(arguments[0], _Flow) and self._is_same(node, arguments, options):
            if isinstance(module, Identity):
                return replace(arguments[0])
            self.put(name, module)
            return self._elementwise(arguments[0], lambda v: self._emit(node, v, arguments, options), lambda rest: rest)
        if isinstance(x, _Flow):
            if is_elementwise(module):
                return self._elementwise(x, lambda v: self.call(name, module, v), module)
            if isinstance(module, BATCH_NORMS) and x.dim == 1 and module.running_mean is not None:
                norm: Any = module
                scale = torch.rsqrt(norm.running_var + norm.eps)
                scale = scale if norm.weight is None else scale * norm.weight
                shift = -norm.running_mean * scale + (0 if norm.bias is None else norm.bias)
                return self._affine(name, x, scale, shift)
            if qualified(type(module)) in SCALES and x.dim == len(x.shape) - 1:
                return self._affine(name, x, module.gamma, None)
            if isinstance(module, POOLS) and x.dim == 1 and "shape" in node.meta:
                if not (_changes_constants(module) and bool(x.constants().any())):
                    moved = None if x.node is None else self.call(name, module, x.node)
                    return replace(x, node=moved, shape=_shape(node))
            if isinstance(module, FLATTEN) and module.start_dim == 1 and module.end_dim == -1:
                return self._flatten(node, x)
        return self._whole(node, arguments, options)

    def _is_same(self, node: fx.Node, arguments: tuple, options: dict) -> bool:
        """Whether an operation gives its first argument as it is, if not always then in evaluation: dropout, a copy."""
        return bool(node.meta.get("same")) and not any(
            isinstance(part, _Flow) for part in (*arguments[1:], *options.values())
        )

    def _function(self, node: fx.Node, arguments: tuple, options: dict) -> Any:
        target = node.target
        x = arguments[0] if arguments else None
        known = self._known(node, arguments, options)
        if known is not None:
            return known[0]
        if target in (operator.add, torch.add, "add") and not options:
            result = self._add(node, *arguments)
            if result is not None:
                return result
        if target in (operator.mul, torch.mul, "mul") and not options:
            result = self._multiply(node, *arguments)
            if result is not None:
                return result
        if target in (torch.cat, torch.concat, torch.concatenate) and isinstance(x, tuple | list):
            dim = options.get("dim", arguments[1] if len(arguments) > 1 else 0)
            result = self._concatenate(node, x, dim)
            if result is not None:
                return result
        if isinstance(x, _Flow):
            named = getattr(target, "__name__", target)
            if self._is_same(node, arguments, options) or target in ("contiguous", "clone"):
                return self._elementwise(x, lambda v: self._emit(node, v, arguments, options), lambda rest: rest)
            if named in PARTS or target is operator.getitem:
                is_slice = target is operator.getitem
                result = self._slice(node, x, arguments[1]) if is_slice else self._parts(node, x, arguments, options)
                if result is not None:
                    return result
            if target is PAD and self._pads_places_with_zeros(x, arguments, options):
                moved = None if x.node is None else self._emit(node, x.node, arguments, options)
                return replace(x, node=moved, shape=_shape(node))
            if (
                target in ELEMENTWISE
                and len(arguments) == 1
                and not any(isinstance(o, _Flow) for o in options.values())
            ):
                apply: Any = target
                return self._elementwise(
                    x, lambda v: self.new.call_function(apply, (v,), options), lambda rest: apply(rest, **options)
                )
            pools = ("adaptive_avg_pool2d", "adaptive_max_pool2d", "max_pool2d")
            if named in pools and x.dim == 1 and "shape" in node.meta:
                moved = None if x.node is None else self._emit(node, x.node, arguments, options)
                return replace(x, node=moved, shape=_shape(node))
            start = arguments[1] if len(arguments) > 1 else options.get("start_dim", 0)
            if named == "flatten" and start == 1 and len(arguments) < 3 and "end_dim" not in options:
                return self._flatten(node, x)
            if named == "mean":
                result = self._mean(node, x, arguments, options)
                if result is not None:
                    return result
        return self._whole(node, arguments, options)

    def _emit(self, node: fx.Node, x: fx.Node, arguments: tuple, options: dict) -> fx.Node:
        """The same operation on other channels."""
        return self.new.create_node(node.op, node.target, (x, *arguments[1:]), options)

    # --- shapes -------------------------------------------------------------------------------------------------------

    def _known(self, node: fx.Node, arguments: tuple, options: dict) -> tuple[Any] | None:
        """What is known of a shape, alone in a tuple: the number of channels is a constant, other sizes are not."""
        target, x = node.target, arguments[0] if arguments else None
        if isinstance(x, _Flow):
            dim = options.get("dim", arguments[1] if len(arguments) > 1 else None)
            if target == "size" and isinstance(dim, int):
                return (self._size(x, dim),)
            if (target == "size" and dim is None) or (target is getattr and dim == "shape"):
                return (_Sizes(x),)
            if target in ("dim", "ndimension") or (target is getattr and arguments[1] == "ndim"):
                return (len(x.shape),)
            if target is getattr and arguments[1] in ("dtype", "device") and x.node is not None:
                return (self.new.call_function(getattr, (x.node, arguments[1])),)
            return None
        if isinstance(x, _Sizes) and target is operator.getitem and isinstance(arguments[1], int | slice):
            dims: Any = range(len(x.of.shape))[arguments[1]]
            return (self._size(x.of, dims) if isinstance(dims, int) else tuple(self._size(x.of, dim) for dim in dims),)
        if isinstance(x, _Sizes) and target is len:
            return (len(x.of.shape),)
        if isinstance(x, tuple) and target is operator.getitem and isinstance(arguments[1], int | slice):
            return (x[arguments[1]],)
        if target is torch._assert and x is True:
            return (None,)
        if node.op == "call_function" and isinstance(x, tuple) and target is len:
            return (len(x),)
        if node.op == "call_function" and getattr(target, "__module__", "") in ("_operator", "math"):
            if all(isinstance(part, int | float) for part in arguments) and not options:
                return (target(*arguments),)  # type: ignore[operator]
        return None

    def _size(self, x: _Flow, dim: int) -> Any:
        dim %= len(x.shape)
        if dim == x.dim:
            return len(x.rest)
        size, each = x.shape[dim]
        if x.node is None and not each:
            return size
        return self.new.call_method("size", (self.value(x) if x.node is None else x.node, dim))

    # --- parts --------------------------------------------------------------------------------------------------------

    def _parts(self, node: fx.Node, x: _Flow, arguments: tuple, options: dict) -> Any:
        """What ``chunk``, ``split`` and their like give of the channels, as flows; None if they do something else."""
        given = [*arguments[1:], *options.values()]
        given = [part for each in given for part in (each if isinstance(each, tuple | list) else [each])]
        if not all(isinstance(part, int) for part in given):
            return None
        sizes = [size + 2 * each for size, each in x.shape]
        numbers = torch.arange(len(x.rest)).view([-1 if dim == x.dim else 1 for dim in range(len(sizes))]).expand(sizes)
        call: Any = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
        parts = call(numbers, *arguments[1:], **options)
        several = isinstance(parts, tuple | list)
        made = []
        for part in parts if several else (parts,):
            if any(size != part.shape[dim] for dim, size in enumerate(sizes) if dim != x.dim):
                return None
            shape = tuple((part.shape[dim], 0) if dim == x.dim else size for dim, size in enumerate(x.shape))
            made.append(self._part(x, part.movedim(x.dim, -1).flatten(0, -2)[0].to(x.live.device), shape))
        return tuple(made) if several else made[0]

    def _slice(self, node: fx.Node, x: _Flow, index: Any) -> _Flow | None:
        """Slices of some dimensions; of the channels only those whose ends are known."""
        index = list(index) if isinstance(index, tuple | list) else [index]
        if Ellipsis in index:
            place = index.index(Ellipsis)
            index[place : place + 1] = [slice(None)] * (len(x.shape) - len(index) + 1)
        index += [slice(None)] * (len(x.shape) - len(index))
        if not all(isinstance(part, slice) for part in index) or len(index) > len(x.shape):
            return None
        channels, index[x.dim] = index[x.dim], slice(None)
        if not all(isinstance(part, int | None) for part in (channels.start, channels.stop, channels.step)):
            return None
        if index != [slice(None)] * len(index):
            moved = None if x.node is None else self.new.call_function(operator.getitem, (x.node, tuple(index)))
            x = replace(x, node=moved)
        return self._part(x, torch.arange(len(x.rest), device=x.live.device)[channels], _shape(node))

    def _pads_places_with_zeros(self, x: _Flow, arguments: tuple, options: dict) -> bool:
        """Whether padding leaves every channel what it is: no constant but zero meets the border."""
        zeros = (
            len(arguments) == 2
            and isinstance(arguments[1], tuple | list)
            and options.get("value") in (None, 0)
            and not bool(x.constants().any())
        )
        return zeros and len(arguments[1]) <= 2 * (len(x.shape) - 1 - x.dim)

    def _part(self, x: _Flow, index: Tensor, shape: Shape) -> _Flow:
        """Some of the channels; ``index`` increases."""
        inside = torch.zeros(len(x.rest), dtype=torch.bool, device=index.device).index_fill(0, index, True)
        taken = inside[x.live].nonzero().flatten()
        node = x.node if len(taken) else None
        if node is not None and len(taken) < len(x.live):
            first, number = int(taken[0]), len(taken)
            if int(taken[-1]) - first == number - 1:
                node = self.new.call_function(torch.narrow, (node, x.dim, first, number))
            else:
                node = self.call("select", Select(taken, x.dim), node)
        live = torch.searchsorted(index.contiguous(), x.live[taken])
        return _Flow(node, x.dim, live, x.rest[index], x.zero[index], shape)

    # --- layers -------------------------------------------------------------------------------------------------------

    def _linear(self, node: fx.Node, name: str, module: Any, x: _Flow) -> _Flow:
        if isinstance(module, CONVOLUTIONS) and _padded(module) and bool(x.constants().any()):
            self.value(x)  # at the border a constant channel is not constant
        weight = module.weight if x.whole else module.weight[:, x.live]
        bias = module.bias
        if not x.whole:
            absent = torch.ones(len(x.rest), dtype=torch.bool, device=x.live.device)
            absent[x.live] = False
            moved = module.weight.flatten(2).sum(2) if module.weight.ndim > 2 else module.weight
            if bool(x.constants().any()):
                moved = moved[:, absent] @ x.rest[absent]
                bias = moved if bias is None else bias + moved
        dim = 1 if isinstance(module, CONVOLUTIONS) else x.dim
        if x.node is None:
            rest = torch.zeros_like(module.weight.flatten(1)[:, 0]) if bias is None else bias
            zero = torch.full(rest.shape, bias is None, device=rest.device)
            return _Flow(None, dim, x.live, rest.detach().clone(), zero, _shape(node))
        return self.full(self.call(name, cut_layer(module, weight, bias), x.node), node, dim)

    def _grouped(self, node: fx.Node, name: str, module: Any, x: _Flow) -> _Flow:
        groups, each_in = module.groups, module.in_channels // module.groups
        each_out = module.out_channels // groups
        present = torch.zeros(len(x.rest), dtype=torch.bool, device=x.live.device)
        present[x.live] = True
        if _padded(module):
            present |= x.constants()
        alive = present.view(groups, each_in).any(1)
        rest = torch.zeros_like(module.weight.flatten(1)[:, 0])
        rest = rest if module.bias is None else module.bias.detach().clone()
        per_input = module.weight.flatten(2).sum(2).view(groups, each_out, each_in)
        rest = rest + torch.einsum("goi,gi->go", per_input, x.rest.view(groups, each_in)).flatten()
        outputs = alive.repeat_interleave(each_out)
        live = outputs.nonzero().flatten()
        rest = torch.where(outputs, 0, rest)
        zero = outputs.clone()  # of a live channel nothing is asked
        if module.bias is None:
            zero |= ~x.constants().view(groups, each_in).any(1).repeat_interleave(each_out)
        if not bool(alive.any()):
            return _Flow(None, 1, live, rest, zero, _shape(node))
        wanted = alive.repeat_interleave(each_in).nonzero().flatten()
        source = self.shaped(x, wanted)
        bias = None if module.bias is None else module.bias[outputs]
        made = cut_layer(module, module.weight[outputs], bias, groups=int(alive.sum()))
        return _Flow(self.call(name, made, source), 1, live, rest, zero, _shape(node))

    def _attention(self, node: fx.Node, name: str, module: Attention, arguments: tuple, options: dict) -> Any:
        kept = self.mask.get(name)
        if kept is None or self.mask.units[name].kind != "head" or bool(kept.all()):
            return self._whole(node, arguments, options)
        pair = "shape" not in node.meta  # MultiheadAttention also returns its weights
        check_heads(name, module, node)
        if not bool(kept.any()):
            shape = _shape(next(iter(node.users)) if pair else node)
            rest = module.nothing().detach()
            nothing = torch.zeros(0, dtype=torch.long, device=rest.device)
            zero = torch.full(rest.shape, module.projection.bias is None and not module.form.whole, device=rest.device)
            flow = _Flow(None, 1 if module.is_image else len(shape) - 1, nothing, rest, zero, shape)
            return (flow, None) if pair else flow
        self.modules[name] = fewer_heads(module, kept)
        return self._whole(node, arguments, options)

    def _gated(self, node: fx.Node, name: str, module: nn.Module, arguments: tuple, options: dict) -> Any:
        last = last_layer(module)
        kept, outputs = (
            torch.ones(size, dtype=torch.bool, device=self.device) if mask is None else mask.to(self.device)
            for mask, size in (
                (self.mask.get(name), last.in_features),
                (self.mask.get(self.last[name]), last.out_features),
            )
        )
        if bool(kept.all()) and bool(outputs.all()):
            return self._whole(node, arguments, options)
        shape, live = _shape(node), outputs.nonzero().flatten()
        rest = last.weight.new_zeros(len(outputs))
        if not bool(kept.any()) or not len(live):
            bias = rest if last.bias is None else last.bias.detach() * outputs
            zero = ~outputs if last.bias is not None else rest == 0
            return _Flow(None, len(shape) - 1, live[:0], bias.clone(), zero, shape)
        if not bool(kept.all()):
            check_units(name, module)
        self.modules[name] = fewer_units(module, kept, outputs)
        return _Flow(self._whole(node, arguments, options), len(shape) - 1, live, rest, rest == 0, shape)

    def _elementwise(self, x: _Flow, emit: Callable[[fx.Node], fx.Node], apply: Callable[[Tensor], Tensor]) -> _Flow:
        rest = apply(x.rest.clone())
        rest[x.live] = 0
        zero = x.zero & bool(apply(x.rest.new_zeros(1)) == 0)
        made = None if x.node is None else emit(x.node)
        if made is not None:
            self.passing.add(made)
        return replace(x, node=made, rest=rest, zero=zero)

    def _placed(self, node: fx.Node, x: _Flow, index: Tensor, rest: Tensor, zero: bool = False) -> _Flow:
        """The channels of a tensor at these places among others, which are constants."""
        zeros = torch.full(rest.shape, zero, device=rest.device).index_copy(0, index, x.zero)
        return _Flow(x.node, x.dim, index[x.live], rest.index_copy(0, index, x.rest), zeros, _shape(node))

    def _affine(self, name: str, x: _Flow, scale: Tensor | None, shift: Tensor | None) -> _Flow:
        rest = x.rest if scale is None else x.rest * scale
        rest = rest if shift is None else rest + shift
        rest = rest.index_fill(0, x.live, 0)
        node = x.node
        if node is not None:
            parts = [None if part is None else part.detach()[x.live] for part in (scale, shift)]
            node = self.call(name, Affine(parts[0], parts[1], x.dim), node)
        return replace(x, node=node, rest=rest, zero=x.zero if shift is None else torch.zeros_like(x.zero))

    def _add(self, node: fx.Node, a: Any, b: Any) -> _Flow | None:
        if not (isinstance(a, _Flow) and isinstance(b, _Flow)) or a.dim != b.dim or a.shape != b.shape:
            flow, other = (a, b) if isinstance(a, _Flow) else (b, a)
            if isinstance(flow, _Flow) and isinstance(other, fx.Node) and other.op != "get_attr":
                if _shape(node.args[0]) == _shape(node.args[1]):  # type: ignore[arg-type]
                    return self._add(node, flow, self.full(other, node, flow.dim))
            return None
        either = torch.zeros(len(a.rest), dtype=torch.bool, device=a.live.device)
        either[a.live] = True
        either[b.live] = True
        live = either.nonzero().flatten()
        rest = torch.where(either, 0, a.rest + b.rest)
        # a constant of one may meet a live channel of the other
        shift = torch.where(either, a.rest + b.rest, 0)
        meets = bool((either & (a.constants() | b.constants())).any())
        result: fx.Node | None
        if a.node is None or b.node is None:
            result = a.node if b.node is None else b.node
        elif len(a.live) == len(b.live) == len(live):
            result = self.new.call_function(operator.add, (a.node, b.node))
        else:
            first, second = (a, b) if len(a.live) >= len(b.live) else (b, a)
            places = torch.searchsorted(live, first.live), torch.searchsorted(live, second.live)
            result = self.call("join", Join(*places, len(live), a.dim), first.node, second.node)
        flow = _Flow(result, a.dim, live, torch.zeros_like(rest), a.zero & b.zero, a.shape)
        if meets and result is not None:
            flow = self._affine("shift", flow, None, shift)
        return replace(flow, rest=rest, zero=a.zero & b.zero)

    def _multiply(self, node: fx.Node, a: Any, b: Any) -> _Flow | None:
        if isinstance(a, int | float) or isinstance(b, int | float):
            x, factor = (b, a) if isinstance(a, int | float) else (a, b)
            if isinstance(x, _Flow):
                return self._elementwise(
                    x, lambda v: self.new.call_function(operator.mul, (v, factor)), lambda rest: rest * factor
                )
            return None
        if not (isinstance(a, _Flow) and isinstance(b, _Flow)) or a.dim != b.dim or len(a.rest) != len(b.rest):
            return None
        lives = []
        for flow in (a, b):
            present = torch.zeros(len(flow.rest), dtype=torch.bool, device=flow.live.device)
            present[flow.live] = True
            lives.append(present)
        zero = (~lives[0] & a.zero) | (~lives[1] & b.zero)
        wanted = (lives[0] | lives[1]) & ~zero
        if bool((wanted & ~(lives[0] & lives[1])).any()):
            return None  # a live channel times a constant that is not zero
        x, y = self.narrow(a, wanted | ~lives[0]), self.narrow(b, wanted | ~lives[1])
        if len(x.live) != len(y.live):  # groups that could not be cut further
            return None
        rest = torch.where(wanted, 0, a.rest * b.rest)
        if x.node is None or y.node is None:
            return _Flow(None, a.dim, x.live, rest, zero, _shape(node))
        product = self.new.call_function(operator.mul, (x.node, y.node))
        return _Flow(product, a.dim, x.live, rest, zero, _shape(node))

    def _concatenate(self, node: fx.Node, given: Any, dim: int) -> _Flow | None:
        dim %= len(_shape(node))
        if not any(isinstance(part, _Flow) and part.dim == dim for part in given):
            return None
        olds = node.args[0]
        if not isinstance(olds, tuple | list):  # the parts are those of one operation
            if not all(isinstance(part, _Flow) and part.dim == dim for part in given):
                return None
            olds = [None] * len(given)
        parts = [self._by(dim, part, old) for part, old in zip(given, olds, strict=True)]
        offset, lives = 0, []
        for part in parts:
            lives.append(part.live + offset)
            offset += len(part.rest)
        nodes = [part.node for part in parts if part.node is not None]
        joined = self.new.call_function(torch.cat, (nodes, dim)) if len(nodes) > 1 else nodes[0] if nodes else None
        rest, zero = (torch.cat([getattr(part, name) for part in parts]) for name in ("rest", "zero"))
        return _Flow(joined, dim, torch.cat(lives), rest, zero, _shape(node))

    def _flatten(self, node: fx.Node, x: _Flow) -> Any:
        if x.dim != 1 or any(each for _, each in x.shape[2:]):
            return self._whole(node, (x,) if node.op == "call_module" else (x, 1), {})
        places = math.prod(size for size, _ in x.shape[2:])
        live = (x.live[:, None] * places + torch.arange(places, device=x.live.device)).flatten()
        flat = None if x.node is None else self.new.call_function(torch.flatten, (x.node, 1))
        rest, zero = x.rest.repeat_interleave(places), x.zero.repeat_interleave(places)
        return _Flow(flat, 1, live, rest, zero, _shape(node))

    def _mean(self, node: fx.Node, x: _Flow, arguments: tuple, options: dict) -> _Flow | None:
        dims = arguments[1] if len(arguments) > 1 else options.get("dim")
        if dims is None:
            return None
        dims = {d % len(x.shape) for d in ([dims] if isinstance(dims, int) else dims)}
        if x.dim in dims or 0 in dims:
            return None
        kept = len(_shape(node)) == len(x.shape)
        dim = x.dim if kept else x.dim - sum(d < x.dim for d in dims)
        moved = (
            None if x.node is None else self.new.create_node(node.op, node.target, (x.node, *arguments[1:]), options)
        )
        return replace(x, node=moved, dim=dim, shape=_shape(node))


def _asks_sizes(node: fx.Node) -> bool:
    """Whether an operation takes no more of a tensor than what it is like."""
    return node.target in ("size", "dim", "ndimension") or (
        node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")
    )


def _shape(node: fx.Node) -> Shape:
    return node.meta.get("shape", ())


def _changes_constants(pool: nn.Module) -> bool:
    """Whether the mean of a constant is another one: where zeros around the image, or another number, count."""
    if not type(pool).__module__.startswith("torch.nn"):
        return True
    if not isinstance(pool, AVERAGES):
        return False
    return (pool.count_include_pad and _padded(pool)) or getattr(pool, "divisor_override", None) is not None


def _padded(module: Any) -> bool:
    padding = module.padding
    return (not is_ordinary(module)) or (
        padding != "valid" if isinstance(padding, str) else any(padding if isinstance(padding, tuple) else (padding,))
    )
