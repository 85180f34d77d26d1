"""A model as a graph of operations: none changes a tensor in place, and of every tensor the shape is known."""

from __future__ import annotations

import copy
import inspect
import math
import operator
import sys
import traceback
from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..network.attention import Attention
from ..network.fold import Merged
from ..network.gated import hide_hidden, is_gated, last_layer
from ..network.layers import (
    BATCH_NORMS,
    IDENTITIES,
    SCALES,
    WHOLE,
    is_activation,
    is_normalisation,
    qualified,
)
from ..network.replica import replica
from .channels import Affine, Constant, Expand, Join, Select, Switch
from .cut import is_layer
from .nodes import run_node

IN_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.ifloordiv: operator.floordiv, operator.imod: operator.mod,
    operator.ipow: operator.pow, operator.iand: operator.and_, operator.ior: operator.or_, operator.ixor: operator.xor,
}  # fmt: skip
# what is asked of a tensor's shape and type, not of its values
ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "is_sparse", "layout", "requires_grad", "itemsize"}
QUESTIONS = {"size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex", "get_device"}

# behind an error that is not ours
OUTSIDE = (
    "; only operations on tensors can be followed: torch.zeros(x.shape[0], 3) is written x.new_zeros(x.shape[0], 3), "
    "and what looks at the type of its input (transforms) stays outside of the network"
)

# For every dimension its size without any input and what each input adds: images are ((0, 1), (3, 0), (32, 0), (32, 0))
Shape = tuple[tuple[int, int], ...]


def traced(twin: nn.Module, images: Tensor, layers: tuple[str, ...] = ()) -> tuple[nn.Module, fx.Graph]:
    """Trace a replica.

    Conditions on shapes are decided as the images decide them; the graph asserts that later ones decide likewise.

    Parameters
    ----------
    twin : nn.Module
        Left as it is.
    images : Tensor
        Two, or one if the model takes no more; then no dimension is known to count them.
    layers : tuple of str
        Names of what may be cut; the module around it must be looked into.

    Returns
    -------
    root : nn.Module
        A replica of it, with a module more for each function that does something else in training.
    graph : torch.fx.Graph
        Nodes that stand for a tensor have its ``meta["shape"]``, a ``Shape``, and ``meta["dtype"]``; those that give
        their first argument as it is, ``meta["same"]``. ``meta["at"]`` tells the module and the line of its source.

    Raises
    ------
    ValueError
        What runs depends on the values of a tensor or on the number of images; an operation changes a tensor in place
        and there is none that gives a new one instead. The message names module and line.
    """
    try:
        return _traced(twin, images, layers, defaults=False)
    except Exception:  # perhaps it asks whether an argument is given
        return _traced(twin, images, layers, defaults=True)


def _traced(twin: nn.Module, images: Tensor, layers: tuple[str, ...], defaults: bool) -> tuple[nn.Module, fx.Graph]:
    tracer, root = _Tracer(images, layers, defaults), hide_hidden(replica(twin))  # in which proxies may be left behind
    try:
        graph = tracer.trace(root)
        watch = _Watch(fx.GraphModule(root, graph))
        for batch in (images[:1], images):
            watch.run(batch.clone())  # which the model may change
    except Exception as error:
        why = "" if isinstance(error, ValueError) else OUTSIDE
        raise ValueError(f"{error}{_place(tracer.inside, _line(_frames_of(error)))}{why}") from error
    for node, (dtype, one, two) in watch.seen.items():
        if len(one) < len(two):  # the dimension of one image was squeezed
            one = (1, *two[1:])
        node.meta["dtype"] = dtype
        node.meta["shape"] = tuple((2 * a - b, b - a) for a, b in zip(one, two, strict=True))
        node.meta["same"] = node not in watch.changed
    _without_proxies(root, twin)
    # in training a model may count its steps: a copy does
    switches = _in_training(copy.deepcopy(twin), graph, _Tracer(images, layers, defaults, training=True))
    _without_in_place(graph)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node in switches:
            _switch(root, node, switches[node])
    return root, graph


# --- where --------------------------------------------------------------------------------------------------------


def _place(module: str | None, line: str) -> str:
    """Behind a message: module and line, as far as they are known."""
    parts = [f"in module {module!r}"] if module else []
    parts += [f"at {line}"] if line else []
    return f" ({', '.join(parts)})" if parts else ""


def place(node: fx.Node) -> str:
    """Behind a message about a node: module and line, as far as they are known."""
    return _place(*node.meta.get("at", (None, "")))


def _line(frames: Iterator[tuple[FrameType, int]]) -> str:
    """File and line of the innermost frame that is the model's."""
    ours = str(Path(__file__).parent), str(Path(torch.__file__).parent)
    for frame, number in frames:
        if frame.f_code is traced.__code__:
            return ""
        if not frame.f_code.co_filename.startswith(ours):
            return f"{frame.f_code.co_filename}:{number}"
    return ""


def _frames_of(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    return reversed(list(traceback.walk_tb(error.__traceback__)))


# --- tracing ------------------------------------------------------------------------------------------------------


class _Proxy(fx.Proxy):
    """Tells ``y += x`` from ``y = y + x``, and is a number where Python needs one that follows from shapes."""

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        return _Attribute(self, k)

    def __len__(self) -> int:
        return self.tracer.known(self.tracer.create_proxy("call_function", len, (self,), {}).node)  # type: ignore

    def __setitem__(self, *_: Any) -> None:
        raise ValueError(
            "a part of a tensor is assigned (x[...] = y); compaction needs an operation that gives a new one"
        )

    def __index__(self) -> int:
        return operator.index(self.tracer.known(self.node))  # type: ignore[attr-defined]

    def __int__(self) -> int:
        return int(self.tracer.known(self.node))  # type: ignore[attr-defined]

    def __float__(self) -> float:
        return float(self.tracer.known(self.node))  # type: ignore[attr-defined]


class _Attribute(_Proxy, fx.proxy.Attribute):
    """``x.shape`` and the like."""


def _method(target: Any) -> Any:
    return lambda self, *others: self.tracer.create_proxy("call_function", target, (self, *others), {})


for _target in IN_PLACE:
    setattr(_Proxy, f"__{_target.__name__}__", _method(_target))
for _target in (math.ceil, math.floor, math.trunc, round):
    setattr(_Proxy, f"__{_target.__name__}__", _method(_target))


class _Tracer(fx.Tracer):
    """Stops at what the algorithm treats as one operation."""

    def __init__(self, images: Tensor, layers: tuple[str, ...], defaults: bool, training: bool = False) -> None:
        loaded = {sys.modules[library]: names for library, names in WHOLE.items() if library in sys.modules}
        functions = [getattr(library, name, None) for library, names in loaded.items() for name in names]
        super().__init__(autowrap_functions=tuple(function for function in functions if function is not None))
        self.layers, self.defaults, self.training = layers, defaults, training
        self.runs: list[tuple[Tensor, dict[fx.Node, Any]]] = [(images[:1], {}), (images, {})]
        self.inside: str | None = None  # where an error was raised
        self.running = False

    def trace(self, root: nn.Module | Callable[..., Any], *args: Any, **options: Any) -> fx.Graph:
        assert isinstance(root, nn.Module)
        self.cut = {module for module in root.modules() if is_layer(module)}
        mode, root.training = root.training, self.training
        try:
            return super().trace(root, *args, **options)
        finally:
            root.training = mode

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(self, root_fn: Any, *args: Any, **options: Any) -> tuple[Any, list[Any]]:
        if not self.defaults:
            return super().create_args_for_root(root_fn, *args, **options)
        first = list(inspect.signature(root_fn).parameters)[1]  # behind self; the others keep their defaults
        return root_fn, [self.root, self.create_proxy("placeholder", first, (), {})]

    def create_node(self, *args: Any, **options: Any) -> fx.Node:
        node = super().create_node(*args, **options)
        node.type = None  # an annotation; as a string it keeps older torch from pickling the graph
        node.meta["at"] = self.scope.module_path, _line(traceback.walk_stack(sys._getframe(1)))
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, Attention | Merged | Affine | Constant | Expand | Join | Select | Switch)
        known = known or is_activation(m) or is_normalisation(m) or m in self.cut or _is_random(m)
        known = known or (isinstance(m, BATCH_NORMS) and not m._modules) or qualified(type(m)) in (*IDENTITIES, *SCALES)
        last, start = last_layer(m), f"{module_qualified_name}."
        if last is not None:  # one operation, unless a layer inside is cut, other than the last
            inside = [m.get_submodule(layer.removeprefix(start)) for layer in self.layers if layer.startswith(start)]
            return all(part is last for part in inside) if is_gated(m) else not inside
        return known or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.running:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        mode = m.training
        if not self.is_leaf_module(m, name):
            m.training = self.training
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.inside = name if self.inside is None else self.inside
            raise
        finally:
            m.training = mode

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.running else super().getattr(attr, attr_val, parameter_proxy_cache)

    # --- what Python asks of a proxy ---

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.known(obj.node))

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        return iter([obj[index] for index in range(len(obj))])  # type: ignore[index]

    def known(self, node: fx.Node) -> Any:
        """The value of a node if it follows from shapes, for one image and for several; the graph will assert it."""
        one, several = (self._value(node, *run) for run in self.runs)
        if not self._follows_from_shapes(node):
            raise ValueError("what runs depends on the values of a tensor, which differ from image to image")
        if one != several:
            raise ValueError("what runs depends on the number of images")
        same = self.create_proxy("call_function", operator.eq, (fx.Proxy(node, self), one), {})
        message = "this input has another size than the one that the network was compacted for; compact it again"
        self.create_proxy("call_function", torch._assert, (same, message), {})
        return one

    def _follows_from_shapes(self, node: fx.Node) -> bool:
        if node.op not in ("call_function", "call_method") or isinstance(self.runs[0][1][node], Tensor):
            return False
        asks = node.target in (len, torch.is_tensor) or (node.op == "call_method" and node.target in QUESTIONS)
        asks = asks or (node.target is getattr and node.args[1] in ATTRIBUTES)
        return asks or all(self._follows_from_shapes(source) for source in node.all_input_nodes)

    def _value(self, wanted: fx.Node, images: Tensor, values: dict[fx.Node, Any]) -> Any:
        self.running = True
        try:
            for node in self.graph.nodes:  # in order, for what is changed in place
                if wanted in values:
                    break
                if node not in values:
                    values[node] = self._run(node, images, values)
        finally:
            self.running = False
        return values[wanted]

    def _run(self, node: fx.Node, images: Tensor, values: dict[fx.Node, Any]) -> Any:
        return run_node(node, self.root, values, images)


def _without_proxies(root: nn.Module, original: nn.Module) -> None:
    """Take back what the traced forward pass has kept of itself, such as a shape, in attributes."""
    modules = dict(original.named_modules())
    for name, module in root.named_modules():
        for key, value in list(vars(module).items()):
            if key.startswith("_") and key in vars(nn.Module()):
                continue
            if _holds_proxy(value):
                del module.__dict__[key]
                if name in modules and key in vars(modules[name]):
                    module.__dict__[key] = vars(modules[name])[key]


def _holds_proxy(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        return any(_holds_proxy(part) for part in value)
    return isinstance(value, fx.Proxy)


def _is_random(module: nn.Module) -> bool:
    """Whether a module does something else in training and holds nothing: a dropout, whoever wrote it."""
    if module._parameters or module._buffers or module._modules:
        return False
    classes = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    methods = [part for each in classes for part in vars(each).values() if inspect.isfunction(part)]
    return any("training" in method.__code__.co_names for method in methods)


class _Watch(fx.Interpreter):
    """Notes the type of every tensor and its shape in each run, and what is not its first argument as it was."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.seen: dict[fx.Node, list[Any]] = {}
        self.changed: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        source = self.env.get(n.args[0]) if n.args and isinstance(n.args[0], fx.Node) else None
        version = source._version if isinstance(source, Tensor) else None
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.seen.setdefault(n, [value.dtype]).append(value.shape)
            if source is None or value is not source or value._version != version:
                self.changed.add(n)
        return value


# --- training -----------------------------------------------------------------------------------------------------


def _in_training(twin: nn.Module, graph: fx.Graph, tracer: _Tracer) -> dict[fx.Node, dict[int | str, Any]]:
    """Functions that take other arguments in training, such as ``F.dropout(x, 0.1, self.training)``, and which."""
    images = tracer.runs[0][0]
    try:
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            other = tracer.trace(twin)
    except Exception:  # it cannot be traced as it trains: then it is only what it is in evaluation
        return {}
    nodes, others = list(graph.nodes), list(other.nodes)
    names = [[(node.op, node.target) for node in part] for part in (nodes, others)]
    found: dict[fx.Node, dict[int | str, Any]] = {}
    for block in SequenceMatcher(None, names[0], names[1], autojunk=False).get_matching_blocks():
        for node, its in zip(nodes[block.a :][: block.size], others[block.b :][: block.size], strict=True):
            if node.op != "call_function" or getattr(node.target, "__name__", "").endswith("_norm"):
                continue
            given, theirs = ({**dict(enumerate(each.args)), **each.kwargs} for each in (node, its))
            given = {key: value for key, value in given.items() if isinstance(value, bool | int | float)}
            differs: dict[Any, Any] = {key: theirs.get(key, value) for key, value in given.items()}
            differs = {key: value for key, value in differs.items() if value != given[key]}
            if differs and all(isinstance(value, bool | int | float) for value in differs.values()):
                found[node] = differs
    return found


def _switch(twin: nn.Module, node: fx.Node, others: dict[int | str, Any]) -> None:
    """Call a function through a module, which knows whether it is trained."""
    if not set(others) <= {*range(len(node.args)), *node.kwargs}:  # its arguments were bound since
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
        others = {key if key in node.kwargs else names.index(str(key)): value for key, value in others.items()}
    name, number = f"in_training_{node.name}", 0
    while hasattr(twin, name):
        number += 1
        name = f"in_training_{node.name}_{number}"
    function: Any = node.target
    twin.add_module(name, Switch(function, others).eval())
    node.op, node.target = "call_module", name


# --- in place -----------------------------------------------------------------------------------------------------


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
        raise ValueError(f"{name!r} ({node.name}) changes a tensor in place{place(node)}")
    node.target = pure
    return True
