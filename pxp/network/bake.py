"""Weights that are computed from others, made plain in a replica: a rule then reads the weight that is really used.

A layer may compute its weight by a parametrization (``torch.nn.utils.parametrize``), by a hook before its forward pass
(``torch.nn.utils.prune``, the old ``weight_norm`` and ``spectral_norm``), or in a forward pass of its own (weight
standardisation). Where that weight does not depend on the input, the layer becomes one of torch's own that holds it. It
stays the same object, so that whatever refers to it finds the plain one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from .layers import LAYERS, LINEAR, TRANSPOSED, Kind, kind_of, kind_of_class

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
FUNCTIONS = {
    "linear": _CONVOLUTION[:3],
    **{f"conv{dims}d": _CONVOLUTION for dims in (1, 2, 3)},
    **{f"conv_transpose{dims}d": _TRANSPOSED for dims in (1, 2, 3)},
}


@torch.inference_mode(False)
def bake(twin: nn.Module) -> None:
    """Make all weights of a replica plain that are computed from others and not from the input.

    A layer whose forward pass computes something else than its class's, or with a weight that depends on the input,
    stays as it is and is an error for whoever needs its weight, see :func:`need_weight`.

    Raises
    ------
    ValueError
        A weight that is another one each time it is computed.
    """
    modules = list(twin.named_modules())
    with torch.no_grad():
        for name, module in modules:
            _without_parametrizations(name, module)
            _without_known_hooks(module)
    for _, module in modules:
        if isinstance(module, LAYERS) and not _is_plain(module):
            _make_plain(module)


def need_weight(name: str, layer: nn.Module) -> None:
    """Raise ValueError if a layer of a replica computes something else than its class does with its weight."""
    reason = vars(layer).get("_not_plain")
    if reason is not None:
        raise ValueError(
            f"{name!r} ({type(layer).__name__}) is no plain {_base(layer).__name__}: {reason}; neither a rule nor a "
            "merged BatchNorm would fit what it computes. Let its forward call the layer once, with a weight that is "
            "the same for every input, and do the rest in modules of their own"
        )


def plain(layer: nn.Module) -> bool:
    """Whether the output of a replica's layer follows from the weight and the bias that it holds."""
    return "_not_plain" not in vars(layer) and "weight" in layer._parameters


def kind_in_replica(module: nn.Module) -> Kind | None:
    """What a module of a replica is, as :func:`pxp.network.layers.kind_of` says it of one of a model.

    A convolution or linear layer with a forward pass of its own is by now what its class is, or an error of
    :func:`need_weight`.
    """
    kind = kind_of(module)
    return kind_of_class(_base(module)) if kind is None and isinstance(module, LAYERS) else kind


def _base(layer: nn.Module) -> type[nn.Module]:
    return next(one for one in type(layer).__mro__ if one in LAYERS)


def _is_plain(layer: nn.Module) -> bool:
    methods = ("forward", "_conv_forward", "_output_padding")
    own = any(getattr(type(layer), one, None) is not getattr(_base(layer), one, None) for one in methods)
    changed = any(one in vars(layer) for one in (*methods, "weight", "bias"))
    return not own and not changed


# --- parametrizations and hooks of torch -------------------------------------------------------------------------


def _without_parametrizations(name: str, module: nn.Module) -> None:
    if not parametrize.is_parametrized(module):
        return
    values = {}
    for part in module.parametrizations:  # type: ignore[union-attr]
        value = getattr(module, part)
        if not _equal(value, getattr(module, part)):
            raise ValueError(
                f"the {part} of {name!r} is another one each time it is computed; let its parametrization be the same "
                "in evaluation mode, or make it permanent (torch.nn.utils.parametrize.remove_parametrizations)"
            )
        values[part] = value
    module.__class__ = type(module).__bases__[0]  # torch makes a class for every parametrised module
    del module.parametrizations
    for part, value in values.items():
        setattr(module, part, _fixed(value))


def _without_known_hooks(module: nn.Module) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, WeightNorm | SpectralNorm):
            part = hook.name
        elif isinstance(hook, BasePruningMethod):
            part = hook._tensor_name
        else:
            continue
        hook(module, ())
        value = getattr(module, part)
        _drop_hook(module, key)
        for own in ("g", "v", "u", "orig", "mask"):
            module._parameters.pop(f"{part}_{own}", None)
            module._buffers.pop(f"{part}_{own}", None)
        vars(module).pop(part, None)
        setattr(module, part, _fixed(value))


def _drop_hook(module: nn.Module, key: int) -> None:
    module._forward_pre_hooks.pop(key)
    module._forward_pre_hooks_with_kwargs.pop(key, None)


def _fixed(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad=False)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.is_meta or (one.shape == other.shape and torch.equal(one, other))


# --- hooks and forward passes of users ---------------------------------------------------------------------------


class _Calls(TorchFunctionMode):
    """Notes every convolution and linear map with its arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, Any], Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in FUNCTIONS:
            self.found.append((name, dict(zip(FUNCTIONS[name], args, strict=False)) | (kwargs or {}), result))
        return result


class _Instead(TorchFunctionMode):
    """Lets the one convolution or linear map take another weight and bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in FUNCTIONS:
            given = dict(zip(FUNCTIONS[name], args, strict=False)) | (kwargs or {})
            given |= {"weight": self.weight, "bias": self.bias}
            positional = [given.pop(part) for part in FUNCTIONS[name][:3]]
            return func(*positional, **given)
        return func(*args, **(kwargs or {}))


class Prepared:
    """Mixed into a layer whose own forward prepares the input ("same" padding): that goes on, with a plain weight."""

    def forward(self, x: Tensor) -> Tensor:
        (original,) = self._original  # type: ignore[attr-defined]
        with _Instead(self.weight, self.bias):  # type: ignore[attr-defined]
            return original.forward(x)


_PREPARED: dict[type[nn.Module], type] = {
    base: type(f"Prepared{base.__name__}", (Prepared, base), {}) for base in LAYERS
}


def _inputs(layer: Any) -> Iterator[Tensor]:
    """Two small random inputs of a layer: one of positive values that wants a gradient, one of negative ones."""
    like = next(t for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)) if t.is_floating_point())
    if isinstance(layer, LINEAR):
        shape = [layer.in_features]
    else:
        padding = layer.padding if isinstance(layer.padding, tuple) else (0,) * len(layer.kernel_size)
        sizes = zip(layer.kernel_size, layer.dilation, layer.stride, padding, strict=True)
        shape = [layer.in_channels, *(dilation * (k - 1) + 1 + stride + pad for k, dilation, stride, pad in sizes)]
    generator = torch.Generator().manual_seed(0)
    for sign in (1, -1):
        values = torch.rand(2, *shape, generator=generator).add(0.1).mul(sign)
        yield values.to(like).requires_grad_(sign > 0)


def _make_plain(layer: Any) -> None:
    tensors = [*layer.parameters(), *layer.buffers()]
    if not tensors or any(tensor.is_meta for tensor in tensors):
        return  # there are no values
    probe = copy.deepcopy(layer)  # a forward pass may keep what it has seen
    hooks = _weight_hooks(probe) if {"weight", "bias"} & vars(layer).keys() else {}
    if not hooks and "weight" in vars(layer) and _own(layer) is None:
        return  # whoever runs the layer gives it a weight before
    try:
        with torch.enable_grad():
            runs = [_run(probe, hooks.values(), x) for x in _inputs(layer)]
    except Exception as error:  # it is the user's code
        layer._not_plain = f"its forward cannot be run by itself ({error})"
        return
    if "weight" in layer._parameters and "forward" not in vars(layer) and _as_its_class(probe, runs):
        return  # written in another way, such as x @ weight.t()
    reason = _why_not(layer, runs)
    if reason is not None:
        layer._not_plain = reason
        return
    name, call, _ = runs[1][1][0]
    weight, bias = _fixed(call["weight"]), None if call.get("bias") is None else _fixed(call["bias"])
    own = layer._parameters.get("weight"), layer._parameters.get("bias")
    as_it_is = not hooks and "forward" not in vars(layer) and _equal(own[0], weight) and _equal(own[1], bias)
    if as_it_is and (_own(layer) is None or _takes_any_weight(probe)):
        return
    prepares = _own(layer) is not None and _prepares(probe, list(hooks.values()))
    for key in hooks:
        _drop_hook(layer, key)
    if prepares:
        layer._original = (copy.copy(layer),)  # in a tuple, so that it is no module of the layer's
    base = _base(layer)
    layer.__class__ = _PREPARED[base] if prepares else base
    layer._parameters = {"weight": weight, "bias": bias}
    for part in ("weight", "bias", "forward", "_conv_forward", "_output_padding"):
        vars(layer).pop(part, None)
    if not prepares and name != "linear":
        _set_geometry(layer, call)


def _takes_any_weight(probe: Any) -> bool:
    """Whether a layer's forward uses its weight as it is, also a larger one: a BatchNorm may be merged into it."""
    larger = copy.copy(probe)
    larger._parameters = {**probe._parameters, "weight": _fixed(100 * probe.weight)}
    expected = larger.weight.clone()
    (x, _) = _inputs(larger)
    try:
        _, calls, _ = _run(larger, [], x)
    except Exception:  # it is the user's code
        return False
    return len(calls) == 1 and _equal(calls[0][1].get("weight"), expected)


def _prepares(probe: Any, hooks: list) -> bool:
    """Whether a layer's forward does something to an input of any shape; padding may depend on the size."""
    (x, _) = _inputs(probe)
    if isinstance(probe, LINEAR):
        shapes = [x.shape, (2, 3, x.shape[1]), (2, 2, 3, x.shape[1])]
    else:
        shapes = [(*x.shape[:2], *(size + more for size in x.shape[2:])) for more in range(max(probe.stride) + 1)]
    for shape in shapes:
        x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(x)
        try:
            _, ((_, call, result),), output = _run(probe, hooks, x)
        except Exception:  # it takes no such input
            return True
        if not _same(x, call["input"]) or not _same(output, result):
            return True
    return False


def _as_its_class(probe: Any, runs: list[tuple[Tensor, list, Any]]) -> bool:
    """Whether a layer that does not call one function gives what its class would with the same weight."""
    if all(len(calls) == 1 for _, calls, _ in runs):
        return False
    close = 1e-2 if probe.weight.dtype in (torch.float16, torch.bfloat16) else 1e-5
    with torch.no_grad():
        expected = [_base(probe).forward(probe, x) for x, _, _ in runs]
    found = [output for *_, output in runs]
    return all(
        isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a, b, rtol=close, atol=close)
        for a, b in zip(found, expected, strict=True)
    )


def _own(layer: nn.Module) -> Callable | None:
    """The forward pass of a layer if it is not its class's."""
    return None if "forward" not in vars(layer) and type(layer).forward is _base(layer).forward else layer.forward


def _set_geometry(layer: Any, call: dict[str, Any]) -> None:
    dims = len(layer.kernel_size)
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "output_padding": 0}
    given = {part: call.get(part, default) for part, default in defaults.items()}
    for part, value in given.items():
        if part != "groups" and not isinstance(value, str):
            value = (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)
        setattr(layer, part, value)
    layer.padding_mode = "zeros"


def _weight_hooks(probe: nn.Module) -> dict[int, Callable]:
    """The hooks before the forward pass that set a weight or bias, by their keys."""
    x = next(_inputs(probe)).detach()
    found = {}
    for key, hook in probe._forward_pre_hooks.items():
        before = {part: id(vars(probe).get(part)) for part in ("weight", "bias")}
        kept = [vars(probe).get(part) for part in before]  # an id is unique only as long as its tensor lives
        try:
            hook(probe, (x,)) if key not in probe._forward_pre_hooks_with_kwargs else hook(probe, (x,), {})
        except Exception:  # it may need what it would find in the network
            continue
        if any(id(vars(probe).get(part)) != before[part] for part in before) and kept:
            found[key] = hook if key not in probe._forward_pre_hooks_with_kwargs else _with_kwargs(hook)
    return found


def _with_kwargs(hook: Callable) -> Callable:
    return lambda module, inputs: hook(module, inputs, {})


def _run(probe: Any, hooks: Any, x: Tensor) -> tuple[Tensor, list, Any]:
    """(input, calls, output) of one run."""
    for parameter in probe.parameters():
        parameter.requires_grad_(False)
    for hook in hooks:
        hook(probe, (x,))
    with _Calls() as calls:
        output = probe.forward(x)
    return x, calls.found, output


def _why_not(layer: Any, runs: list[tuple[Tensor, list, Any]]) -> str | None:
    """Why a layer cannot be replaced by a plain one, or None."""
    function = _function(_base(layer))
    for x, calls, output in runs:
        if [name for name, *_ in calls] != [function]:
            return f"its forward calls {' and '.join(name for name, *_ in calls) or 'neither linear nor conv'}"
        _, call, result = calls[0]
        for part in ("weight", "bias"):
            if _depends(call.get(part), x):
                return f"its {part} depends on the input"
        if not torch.isin(call["input"].detach(), torch.cat([x.detach().flatten(), x.new_zeros(1)])).all():
            return f"its forward changes the values of the input before it calls {function}"
        if not isinstance(output, Tensor) or not _same(output, result):
            return f"its forward changes what {function} gives"
    one, two = (calls[0][1] for _, calls, _ in runs)
    if any(not _equal(one.get(part), two.get(part)) for part in ("weight", "bias")):
        return "its weight is another one each time it is computed"
    if call["weight"].ndim != 2 + len(getattr(layer, "kernel_size", ())):
        return f"its forward calls {function} with a weight of shape {tuple(call['weight'].shape)}"
    outputs = layer.out_features if function == "linear" else layer.out_channels
    if result.shape[1] != outputs:
        return f"its forward gives {result.shape[1]} outputs, not {outputs}"
    return None


def _depends(tensor: Tensor | None, x: Tensor) -> bool:
    if tensor is None or not tensor.requires_grad or not x.requires_grad:
        return False  # it may well depend on parameters that a closure holds
    return torch.autograd.grad(tensor.sum(), x, retain_graph=True, allow_unused=True)[0] is not None


def _function(base: type[nn.Module]) -> str:
    kind = "conv_transpose" if base in TRANSPOSED else "conv"
    return "linear" if base in LINEAR else f"{kind}{base.__name__[-2:].lower()}"


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.detach(), other.detach())
