"""A private copy of a model's structure that shares its weights: what attribution works on instead of the model.

Everything an explanation needs (evaluation mode, BatchNorm folded into its convolution, no in-place activation, hooks)
is done to the replica. The user's model is never modified, so there is nothing to restore and nothing that an exception
could leave behind.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from .attention import make_explicit
from .gated import show_hidden
from .layers import is_activation


def replica(model: nn.Module) -> nn.Module:
    """Copy the module tree in evaluation mode; parameters and buffers share memory with the model's.

    The copy's parameters need no gradient, its activations are not in-place, its attentions show their parts (see
    :class:`pxp.network.attention.Attention`), its gated MLPs their hidden units (:mod:`pxp.network.gated`), and the
    user's hooks come along.

    Raises
    ------
    ValueError
        A model with parametrised or torch-pruned weights, or one that cannot be copied.
    """
    memo: dict[int, object] = {id(p): nn.Parameter(_shared(p), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): _shared(b) for b in model.buffers()}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module) or hasattr(module, "weight_orig"):
            raise ValueError(
                f"the weights of {name!r} are computed from others; make them permanent first "
                "(torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove)"
            )
        # tensors that the model or a hook keeps of an earlier pass cannot be copied otherwise
        memo |= {id(value): value.detach() for value in vars(module).values() if isinstance(value, Tensor)}
    try:
        twin = copy.deepcopy(model, memo).eval()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{type(model).__name__} cannot be copied, which explaining it needs: {error}") from error
    for module in twin.modules():
        if is_activation(module) and getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
        elif isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            for function, its_module in ((F.relu, nn.ReLU), (F.gelu, nn.GELU)):  # what activation="gelu" stands for
                if module.activation is function:
                    module.activation = its_module().eval()
    show_hidden(twin)
    return make_explicit(twin)


def _shared(tensor: Tensor) -> Tensor:
    """The same memory without history; a copy of what was made in inference mode, which no graph may hold."""
    if not tensor.is_inference():
        return tensor.detach()
    with torch.inference_mode(False):
        return tensor.clone()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put ``model`` in evaluation mode; afterwards every module has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
