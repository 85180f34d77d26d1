"""Following a signal through every operation of a forward pass, whichever module or function computes it.

What is known of a tensor is its :class:`Signal`: whether it only weighs others (a gate), which layers it depends on,
and which operations without a rule lie on its way. A gate is a constant factor to an explanation, so what lies behind
it does not matter; what reaches the output does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from .attention import Attention
from .bake import kind_in_replica
from .layers import GATE, Kind, kind_of_function
from .outputs import tensors

# (function, its arguments, its options, what it is) → its result, with another backward pass
Pass = Callable[[Callable, tuple, dict, Kind], Any]
# what gives the same values in the same order
SAME = ("contiguous", "clone", "view_as", "to", "float", "double", "half", "bfloat16", "cpu", "cuda", "view", "reshape",
        "flatten", "squeeze", "unsqueeze")  # fmt: skip
SOFTMAX = "a softmax that neither weighs a signal nor ends the network"
OWN, DEPENDENT = "weights of its own", "a weight that depends on the input"
UNSEEN = "what cannot be followed (TorchScript, vmap, an autograd.Function, writing into a view)"
# of the second tensor only the shape or the type counts
LIKE = ("expand_as", "view_as", "reshape_as", "type_as", "to")
# gives values to Python
ASKS = ("bool", "item", "tolist", "int", "float", "index", "numpy", "array", "equal", "allclose", "is_nonzero")
# of all of them
MADE = ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
        "new_full", "new_empty", "new_tensor")  # fmt: skip

# what functions call their first and their second operand
FIRST = ("condition", "input", "tensor", "tensors")
HOOKED = ("rule", "affine", "identity", "normalisation")  # modules whose hooks read the input
SECOND = ("other", "exponent", "mat2", "vec")
BINARY = ("product", "quotient", "product of matrices", "extremum")


@dataclass(frozen=True)
class Signal:
    """What is known of a tensor that depends on the images.

    Attributes
    ----------
    gate : int
        How surely it is a gate, see :class:`pxp.network.layers.Kind`; 0 for a signal.
    soft : bool
        It depends on the images only through a softmax.
    layers : int
        The layers on its way, a bit for each in the order in which they first ran.
    faults : frozenset of (str, str)
        Operations on its way that have no rule: the module that computes it, and what it is.
    """

    gate: int = 0
    soft: bool = False
    layers: int = 0
    faults: frozenset[tuple[str, str]] = frozenset()

    def __or__(self, other: Signal) -> Signal:
        return Signal(
            min(self.gate, other.gate),
            self.soft and other.soft,
            self.layers | other.layers,
            self.faults | other.faults,
        )


class Signals(TorchFunctionMode):
    """Follows the images through a replica while it runs inside :meth:`watching`.

    Parameters
    ----------
    twin : nn.Module
        A replica.
    images : Tensor
    passes : mapping of str to Pass, optional
        How functions let relevance pass, by the names of :class:`pxp.network.layers.Kind`, and ``"half"``. Default:
        nothing is changed.

    Attributes
    ----------
    layers : dict
        Layer with a rule → its bit.
    changed : bool
        Whether there is a function whose backward pass ``passes`` has changed or would change.
    asked : bool
        Whether the forward pass has read a value that depends on the images, as whoever branches on it does.
    """

    strict = False  # whether what no operation was seen to make is a fault; needs images that want a gradient, no rules

    def __init__(self, twin: nn.Module, images: Tensor, passes: Mapping[str, Pass] | None = None) -> None:
        super().__init__()
        self.twin = twin
        self.modules = dict(twin.named_modules())
        self.kinds = {name: kind_in_replica(module) for name, module in self.modules.items()}
        self.passes = passes
        self.inside = [""]  # the modules that are running, the innermost last; a hook may run behind the model itself
        self.layers: dict[str, int] = {}
        self.changed = self.asked = False
        self._signals: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._values: WeakIdKeyDictionary = WeakIdKeyDictionary()  # truths and numbers that depend on the images
        self._signals[images] = Signal()
        self._entered: WeakIdKeyDictionary = WeakIdKeyDictionary()  # probabilities → what the softmax was given

    @contextmanager
    def watching(self) -> Iterator[Signals]:
        """Follow what runs inside the context."""
        handles = []
        for name, module in self.modules.items():
            handles.append(module.register_forward_pre_hook(lambda _, inputs, name=name: self.enter(name, inputs)))
            if self.strict:
                handles.append(module.register_forward_hook(lambda *_: self.end(), prepend=True))
            handles.append(
                module.register_forward_hook(
                    lambda _, args, options, output, name=name: self.leave(name, args, options, output),
                    with_kwargs=True,
                )
            )
        try:
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def of(self, tensor: object) -> Signal | None:
        """What is known of a tensor; None if it does not depend on the images."""
        if not isinstance(tensor, Tensor):
            return None
        known = self._signals.get(tensor)
        if known is None and self.strict and tensor.grad_fn is not None:
            return Signal(faults=frozenset({(self.inside[-1], UNSEEN)}))
        return known

    def logits(self, output: Tensor) -> Tensor:
        """What enters the softmax or sigmoid with which a network ends; the output of one that does not."""
        return self._entered.get(output, output)

    def enter(self, name: str, inputs: tuple) -> None:
        kind = self.kinds[name]
        if not inputs and kind is not None and kind.passes in HOOKED:
            raise by_keyword(name)
        self.inside.append(name)

    def end(self) -> None:
        """What hooks of users do behind a module is not the module's: it is looked up as in the one around it."""
        self.inside[-1] = self.inside[-2]

    def leave(self, name: str, args: tuple, options: dict, output: object) -> None:
        self.inside.pop()
        kind = self.kinds[name]
        if kind is None:
            return
        given = [signal for tensor in tensors([*args, *options.values()]) if (signal := self.of(tensor)) is not None]
        if kind.passes == "softmax" or kind.name == "gate":
            self._remember(output, next(tensors([args, options])))
        weight = getattr(self.modules[name], "weight", None)
        if kind.passes == "rule" and self.of(weight) is not None:
            given.append(Signal(GATE, True, 0, frozenset({(name, DEPENDENT)})))
        if kind.passes == "softmax" and given:
            given.append(Signal(GATE, True, 0, frozenset({(name, SOFTMAX)})))
        if self.strict and given:  # what hooks have done to it
            seen = [signal.faults for tensor in tensors(output) if (signal := self.of(tensor)) is not None]
            given.append(Signal(GATE, True, 0, frozenset().union(*seen)))
        if given:
            self.mark(output, self._through(kind, given, name if kind.passes == "rule" else None))

    def _remember(self, output: object, entered: Tensor) -> None:
        if isinstance(output, Tensor) and output.ndim == 2:  # the weights of an attention would only take memory
            self._entered[output] = entered

    def mark(self, made: object, signal: Signal) -> None:
        for tensor in tensors(made):
            if tensor.is_floating_point() or tensor.is_complex():
                self._signals[tensor] = signal
            else:  # neither truths nor indices carry relevance
                self._values[tensor] = None

    def _ask(self, func: Callable, result: object) -> None:
        """Note a question about values, and truths and numbers that only follow from such."""
        if isinstance(result, Tensor):
            if not result.is_floating_point():
                self._values[result] = None
        elif getattr(func, "__name__", "").strip("_") in ASKS:
            self.asked = True

    def _through(self, kind: Kind | None, given: list[Signal], layer: str | None = None) -> Signal:
        """What comes out of an operation of this kind."""
        signal = reduce(operator.or_, given)
        if kind is None or kind.passes in ("rule", "affine", "normalisation", "attention"):
            signal = replace(signal, gate=0)
        elif kind.gate:
            signal = replace(signal, gate=kind.gate, soft=signal.soft or kind.passes == "softmax")
        if layer is not None:
            signal = replace(signal, layers=signal.layers | self.layers.setdefault(layer, 1 << len(self.layers)))
        return signal

    def __torch_function__(self, func, types, args=(), kwargs=None):
        options, kind = kwargs or {}, kind_of_function(func)
        given = {id(t): t for t in tensors([*args, *options.values()])}
        if getattr(func, "__name__", "") in LIKE:
            given = dict(list(given.items())[:1])
        elif getattr(func, "__name__", "") in MADE:
            given = {}
        known = {key: signal for key, tensor in given.items() if (signal := self.of(tensor)) is not None}
        if not known:
            result = func(*args, **options)
            if any(tensor in self._values for tensor in given.values()):
                self._ask(func, result)
            return result
        name = self.inside[-1]
        trusted = self.kinds[name] is not None or isinstance(self.modules[name], Attention)
        args, options = _by_position(func, kind, args, options)
        how, kept = ("", list(known.values())) if trusted else self._verdict(func, kind, args, options, known)
        if how.startswith("constant"):
            gate = int(how.split()[1])
            if self.passes is not None:
                args = tuple(a.detach() if i == gate else a for i, a in enumerate(args))
            result = func(*args, **options)
            self.changed = True
        elif how and kind is not None:
            self.changed = True
            apply = None if self.passes is None else self.passes[how]
            result = func(*args, **options) if apply is None else apply(func, args, options, kind)
        else:
            result = func(*args, **options)
        self._ask(func, result)
        made = args[0] if result is None else result  # x[0] = y has none
        self.mark(made, self._through(kind, kept))
        if kind is not None and isinstance(result, Tensor):
            if kind.passes == "softmax" or kind.name == "gate":
                self._remember(result, args[0])
            elif func.__name__ in SAME and isinstance(args[0], Tensor) and args[0] in self._entered:
                entered = self._entered[args[0]]
                if result.shape == entered.shape:  # else it tells of other classes, or of other samples
                    self._entered[result] = entered
        return result

    def _verdict(
        self, func: Callable, kind: Kind | None, args: tuple, options: dict, known: dict[int, Signal]
    ) -> tuple[str, list[Signal]]:
        """How relevance passes an operation, and the signals that it comes from.

        ``""`` is the derivative, ``"constant 1"`` the derivative with the second argument held constant, other names
        are those of ``passes``.
        """
        signals = list(known.values())
        name = getattr(func, "__name__", str(func))

        def fault(what: str) -> tuple[str, list[Signal]]:
            wrong = Signal(GATE, True, 0, frozenset({(self.inside[-1], what)}))
            return "", [*signals, wrong]

        if kind is None and name == "detach" and self.passes is not None:
            return "", signals  # by a hook that reads a layer: of the network's own the trace would have told
        if kind is None:
            return fault(name.strip("_"))
        if kind.passes == "attention":
            return fault("attention")
        if kind.passes == "rule":
            weight = options.get("weight", args[1] if len(args) > 1 else None)
            return fault(f"{name} with {OWN if self.of(weight) is None else DEPENDENT}")
        if kind.passes == "identity" and name.endswith("_") and not name.startswith("__"):
            return fault(f"{name}, in place")
        if kind.passes == "identity" and len(signals) > 1:
            return fault(f"{name} by what depends on the input")
        if kind.passes in ("identity", "normalisation", "glu"):
            return kind.passes, signals
        if kind.passes == "softmax":  # right only as a gate, or as the end, whose input is explained
            return fault(SOFTMAX)
        if kind.name == "extremum":
            constants = [t for t in tensors(args[1:]) if self.of(t) is None]
            return fault(f"{name} with a constant") if any(bool(t.any()) for t in constants) else ("", signals)
        if kind.passes != "product":
            return "", signals
        return self._product(name, kind, args, options, fault)

    def _product(
        self, name: str, kind: Kind, args: tuple, options: dict, fault: Callable[[str], tuple[str, list[Signal]]]
    ) -> tuple[str, list[Signal]]:
        """The same for a product: half to each of two signals, and all of it to the one if the other is a gate."""
        places = [place for place, value in enumerate(args) if isinstance(value, Tensor)]
        known = [(place, signal) for place in places if (signal := self.of(args[place])) is not None]
        signals = [signal for _, signal in known]
        plain = name.strip("_")
        if kind.name == "product of matrices":
            if "add" in plain:  # the first of three is added
                return fault(name) if len(signals) > 1 or self.of(args[0]) is None else ("", signals)
            if len(places) == 1:  # einsum may only sum
                return "", signals
            if len(known) < 2:
                return fault(f"{name} with {OWN}")
            if len(places) > 2:
                return fault(f"{name} of {len(places)} tensors")
            if len({signal.soft for signal in signals}) == 2:
                return fault("attention")
        elif plain in ("square", "pow"):
            exponent = 2 if plain == "square" else args[1]
            if isinstance(exponent, Tensor):
                if known[-1][0] == 1:
                    return fault(f"{plain} by what depends on the input")
                exponent = exponent.flatten()[0].item() if len(exponent.unique()) == 1 else "a tensor"
            if exponent == 1:
                return "", signals
            return ("half", signals) if exponent == 2 else fault(f"{plain} by {exponent}")
        elif kind.name == "sum with a product":
            factors = [self.of(factor) for factor in (*args[1:], options.get("tensor1"), options.get("tensor2"))]
            return fault(name) if sum(factor is not None for factor in factors) > 1 else ("", signals)
        elif kind.name == "quotient":
            right = [place for place, _ in known] == [0] and plain[0] != "r"
            if not right:
                return fault("quotient")
        if len(known) < 2:
            # every value times several weights, to be summed: a linear layer by hand, which takes no rule
            shape = torch.broadcast_shapes(*(args[place].shape for place in places))
            signal = args[known[0][0]]
            mixes = shape != signal.shape and any(
                args[place] is not signal and args[place].numel() > 1 for place in places
            )
            return fault(f"{name} of each value with several of {OWN}") if mixes else ("", signals)
        (one, first), (other, second) = known
        if first.gate == second.gate:
            return "half", signals
        gate = other if second.gate > first.gate else one
        if gate == 0 and ((name.endswith("_") and not name.startswith("__")) or name.startswith("__i")):
            return fault(f"{name} that overwrites a gate")
        return f"constant {gate}", [first if gate == other else second]


def _by_position(func: Callable, kind: Kind | None, args: tuple, options: dict) -> tuple[tuple, dict]:
    """The arguments of a known function with its operands, as far as they are named or listed, in their places."""
    if kind is None:
        return args, options
    options = dict(options)
    first = next((name for name in FIRST if name in options), None) if not args else None
    if first is not None:
        args = (options.pop(first),)
    second = next((name for name in SECOND if name in options), None) if len(args) == 1 else None
    if second is not None and kind.name in BINARY:
        args = (*args, options.pop(second))
    if func.__name__ == "einsum" and len(args) == 2 and isinstance(args[1], tuple | list):
        args = (args[0], *args[1])
    return args, options


def by_keyword(name: str) -> TypeError:
    """What is told of a layer whose rule sees no input."""
    return TypeError(f"layer {name!r} is called by keyword; rules see positional inputs: write layer(x)")


def without_functions() -> Any:
    """Operations in this context are not followed."""
    return torch._C.DisableTorchFunction()
