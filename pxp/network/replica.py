"""A private copy of a model that shares its weights: what attribution works on instead of the model.

Everything an explanation needs (evaluation mode, BatchNorm folded into its convolution, no in-place activation, hooks)
is done to the replica. The user's model is never modified, so there is nothing to restore and nothing that an exception
could leave behind.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .attention import make_explicit
from .bake import bake
from .gated import show_hidden
from .layers import ACTIVATIONS, BLOCKS, SLOW, is_activation
from .outputs import tensors


def replica(model: nn.Module) -> nn.Module:
    """Copy the module tree in evaluation mode; parameters share memory with the model's.

    Buffers and other tensors that modules hold do not: a forward pass may write into them (to count its calls, say).

    The copy's parameters need no gradient, its activations are not in-place, its attentions show their parts (see
    :class:`pxp.network.attention.Attention`), its gated MLPs their hidden units (:mod:`pxp.network.gated`), and the
    user's hooks on the forward pass come along. Weights that are computed from others have their values (see
    :mod:`pxp.network.bake`).

    Raises
    ------
    ValueError
        A model that cannot be copied, or of a kind that :func:`check_openable` names; a weight that is another one each
        time it is computed.
    """
    check_openable(model)
    # what the model or a hook keeps of an earlier pass has a history, which deepcopy does not copy
    memo: dict[int, object] = {id(held): _copied(held) for _, _, held in _held(model)}
    for module in model.modules():
        own = [value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")]
        memo |= {id(held): _copied(held) for held in tensors(own)}  # in lists and dictionaries too
    memo |= {id(p): nn.Parameter(_shared(p), requires_grad=False) for p in model.parameters()}
    try:
        twin = copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{type(model).__name__} cannot be copied, which explaining it needs: {error}") from error
    originals = {id(module) for module in model.modules()}
    for name, module in twin.named_modules():
        if id(module) in originals:
            raise ValueError(
                f"{name!r} ({type(module).__name__}) gives itself when it is copied, so explaining would change it; "
                "let copy.deepcopy make another one"
            )
    twin.eval()  # a train() of the user's may return nothing
    bake(twin)
    for module in twin.modules():
        # these see and may change the gradients of the user's own training
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
        if is_activation(module) and getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
        elif isinstance(module, BLOCKS) and module.activation in ACTIVATIONS:  # what activation="gelu" stands for
            module.activation = ACTIVATIONS[module.activation]().eval()
        for name, value in SLOW.items():
            if name in vars(module):
                setattr(module, name, value)
    show_hidden(twin)
    return make_explicit(twin)


def hooked(module: nn.Module) -> bool:
    """Whether a user's hook may change what a module takes or gives."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _held(model: nn.Module) -> Iterator[tuple[Any, str, Tensor]]:
    """Buffers and plain tensors: the dictionary that holds each, its name there, and the tensor."""
    for module in model.modules():
        for place in (module._buffers, vars(module)):
            yield from ((place, name, value) for name, value in place.items() if isinstance(value, Tensor))


def _shared(tensor: Tensor) -> Tensor:
    """The same memory without history; a copy of what was made in inference mode, which no graph may hold."""
    return _copied(tensor) if tensor.is_inference() else tensor.detach()


def _copied(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return tensor.detach().clone()


def check_openable(model: nn.Module) -> None:
    """Raise ValueError, with what to do instead, for a model whose layers cannot be read or hooked.

    That is one with TorchScript or quantised modules or with observers of a quantisation to come, with tensors of
    another kind than torch's own (sharded or quantised ones), with lazy layers that have not run yet, or inside a
    wrapper for several processes.
    """
    for name, module in model.named_modules():
        kind, source = type(module).__name__, type(module).__module__
        what = f"{name!r} ({kind})" if name else f"the model ({kind})"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{what} is TorchScript, whose layers take no hooks; give the module that it was made of")
        if source.startswith(("torch.ao.nn", "torch.nn")) and "quantized" in source:
            raise ValueError(
                f"{what} is quantised and has no gradient; explain and prune the network in floating point, and "
                "quantise it afterwards"
            )
        if source in ("torch.ao.quantization.fake_quantize", "torch.ao.quantization.observer"):
            raise ValueError(
                f"{what} prepares the model for quantisation and changes with every batch; explain and prune the "
                "network before it is prepared"
            )
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
            raise ValueError(f"{what} is a wrapper for several processes; give the whole network inside it: .module")
        for part, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            if is_lazy(tensor):
                raise ValueError(f"{what} has not run yet, so its {part} has no shape; run the model on a batch first")
            plain = type(tensor.detach()).__torch_dispatch__ is Tensor.__torch_dispatch__
            if tensor.is_quantized or not plain:
                raise ValueError(
                    f"the {part} of {what} is a {type(tensor.data).__name__} of {tensor.dtype}, which no rule "
                    "can read; give the network with ordinary tensors in floating point"
                )


def check_values(model: nn.Module) -> None:
    """Raise ValueError for a model whose parameters have a shape but no values."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"the parameter {name!r} is on the meta device, where it has no values; move the model "
                '(model.to_empty(device="cpu")) and load its weights first'
            )


_eager: list[Any] = []  # the contexts that are open, in all threads; the first holds torch's
_eager_lock = Lock()


@contextmanager
def eager() -> Iterator[None]:
    """A context in which compiled modules and functions run as they are written: compiled ones ignore new hooks.

    Torch's own is one for all threads, so whoever comes first sets it and whoever leaves last gives it back.
    """
    with _eager_lock:
        _eager.append(None if _eager else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _eager_lock:
            held = _eager[0]
            _eager.pop()
            if not _eager:
                held.__exit__(None, None, None)


def out_of_memory(error: Exception) -> bool:
    """Whether an error of torch says that there is no memory left; on the CPU it has no class of its own."""
    said = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(words in str(error) for words in said)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put ``model`` in evaluation mode; afterwards every module has the mode and the tensors that it had."""
    modes = [(module, module.training) for module in model.modules()]
    held = [(*where, _copied(where[2]), _version(where[2])) for where in _held(model)]
    empty = [(module._buffers, name) for module in model.modules() for name, b in module._buffers.items() if b is None]
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
        for place, name in empty:
            place[name] = None
        for place, name, tensor, before, version in held:
            if name not in place or place[name] is not tensor:
                place[name] = tensor
            if tensor.is_inference() and not torch.equal(tensor, before):
                with torch.inference_mode():
                    tensor.copy_(before)
            elif _version(tensor) != version:
                with torch.no_grad():
                    tensor.copy_(before)


def _version(tensor: Tensor) -> int:
    """Grows with every change in place, except of what was made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version
