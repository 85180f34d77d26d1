"""A model as a graph of operations: none changes a tensor in place, and of every tensor the shape is known."""

from __future__ import annotations

import inspect
import operator
import sys
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..network.attention import Attention
from ..network.layers import IDENTITIES, is_activation
from .channels import Affine, Constant, Expand, Join, Select

IN_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.ifloordiv: operator.floordiv, operator.imod: operator.mod,
    operator.ipow: operator.pow, operator.iand: operator.and_, operator.ior: operator.or_, operator.ixor: operator.xor,
}  # fmt: skip

# For every dimension its size without any input and what each input adds: images are ((0, 1), (3, 0), (32, 0), (32, 0))
Shape = tuple[tuple[int, int], ...]


def traced(twin: nn.Module, images: Tensor) -> fx.Graph:
    """Trace a replica.

    Parameters
    ----------
    twin : nn.Module
    images : Tensor
        Two, or one if the model takes no more; then no dimension is known to count them.

    Returns
    -------
    torch.fx.Graph
        Nodes that stand for a tensor have its ``meta["shape"]``, a ``Shape``, and ``meta["dtype"]``.

    Raises
    ------
    ValueError
        An operation changes a tensor in place and there is none that gives a new one instead.
    """
    graph = _Tracer().trace(twin)
    watch = _Watch(fx.GraphModule(twin, graph))
    for batch in (images[:1], images):
        watch.run(batch.clone())  # which the model may change
    for node, (dtype, one, two) in watch.seen.items():
        if len(one) < len(two):  # the dimension of one image was squeezed
            one = (1, *two[1:])
        node.meta["dtype"] = dtype
        node.meta["shape"] = tuple((2 * a - b, b - a) for a, b in zip(one, two, strict=True))
    _without_in_place(graph)
    graph.eliminate_dead_code()
    return graph


class _Proxy(fx.Proxy):
    """Tells ``y += x`` from ``y = y + x``."""


def _in_place_method(target: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_function", target, (self, other), {})


for _target in IN_PLACE:
    setattr(_Proxy, f"__{_target.__name__}__", _in_place_method(_target))


class _Tracer(fx.Tracer):
    """Stops at what the algorithm treats as one operation."""

    def __init__(self) -> None:
        timm = sys.modules.get("timm.layers")  # whose models of dynamic size compute with the image's shape
        super().__init__(autowrap_functions=() if timm is None else (timm.resample_abs_pos_embed,))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, Attention | Affine | Constant | Expand | Join | Select) or is_activation(m)
        known = known or type(m).__name__ in (*IDENTITIES, "LayerScale")
        return known or super().is_leaf_module(m, module_qualified_name)


class _Watch(fx.Interpreter):
    """Notes the type of every tensor and its shape in each run."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.seen: dict[fx.Node, list[Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.seen.setdefault(n, [value.dtype]).append(value.shape)
        return value


def _without_in_place(graph: fx.Graph) -> None:
    """Let every operation give a new tensor, and what reads a changed tensor afterwards read the new one."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        changed = node.args[0] if node.args else None
        if _out_of_place(node) and isinstance(changed, fx.Node) and "shape" in changed.meta:  # sizes are never changed

            def later(user: fx.Node, position: int = order[node]) -> bool:
                return order[user] > position

            changed.replace_all_uses_with(node, later)


def _out_of_place(node: fx.Node) -> bool:
    """Let an operation that changes its first argument give a new tensor instead; False if it is no such operation."""
    target: Any = node.target
    name = target if node.op == "call_method" else getattr(target, "__name__", "")
    pure: Any = None
    if node.op == "call_function" and target in IN_PLACE:
        pure = IN_PLACE[target]
    elif node.op == "call_method" and name.endswith("_") and not name.endswith("__"):
        pure = name[:-1] if callable(getattr(Tensor, name[:-1], None)) else None
    elif node.op == "call_function" and name.endswith("_") and target.__module__ != "_operator":
        pure = getattr(F, name[:-1], getattr(torch, name[:-1], None))
    elif node.op == "call_function" and inspect.isfunction(target):
        given = inspect.signature(target).bind(*node.args, **node.kwargs)
        if not given.arguments.pop("inplace", False):
            return False
        node.args, node.kwargs, pure = given.args, given.kwargs, target
    else:
        return False
    if pure is None:
        raise ValueError(f"{name!r} ({node.name}) changes a tensor in place")
    node.target = pure
    return True
