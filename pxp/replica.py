"""A private copy of a model's structure that shares its weights: what attribution works on instead of the model.

Everything an explanation needs (evaluation mode, BatchNorm folded into its convolution, no in-place activation, hooks)
is done to the replica. The user's model is never modified, so there is nothing to restore and nothing that an exception
could leave behind.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torchvision.ops import FrozenBatchNorm2d

from .attention import Attention, copy_hooks, make_explicit
from .rules import is_normalisation

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, FrozenBatchNorm2d)
# rules are placed on modules: what a forward pass calls as a function has the ordinary derivative instead of its rule
ACTIVATIONS = {
    "gelu": nn.GELU, "silu": nn.SiLU, "mish": nn.Mish, "hardswish": nn.Hardswish, "elu": nn.ELU, "celu": nn.CELU,
    "selu": nn.SELU,
}  # fmt: skip
NORMALISATIONS = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}
ATTENTIONS = {"scaled_dot_product_attention", "multi_head_attention_forward"}
PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum", "tensordot"}


def is_activation(module: nn.Module) -> bool:
    """Whether ``module`` is an elementwise non-linearity of torch or timm."""
    source = type(module).__module__
    if isinstance(module, nn.MultiheadAttention | nn.Softmax | nn.LogSoftmax):
        return False
    if source == "timm.models.nfnet":
        return type(module).__name__ == "GammaAct"  # an activation times a constant
    return source == "torch.nn.modules.activation" or source.startswith("timm.layers.activations")


@dataclass(frozen=True)
class Trace:
    """What one forward pass shows of a model's structure; names are those of ``model.named_modules()``.

    Attributes
    ----------
    order : tuple of str
        Convolutions and linear layers in the order of their first execution, each once.
    norms : dict
        Layer → BatchNorms that directly take its output (one for every time the layer runs, "" where none does).
    activations : dict
        Layer → activation module that directly takes its output (after BatchNorm), where there is one.
    heads : dict
        Attention module → its number of heads, in order of execution.
    positions : dict
        Layer → number of places (pixels, tokens) at which it computes each of its outputs for one image.
    overwritten : tuple of str
        Layers whose output is then changed in place (by a residual sum).
    functions : dict
        Module → what its forward pass computes by itself though it would need a rule: ``"attention"``, and the names
        in ``torch.nn.functional`` of activations and normalisations.
    """

    order: tuple[str, ...]
    norms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    activations: dict[str, str] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    overwritten: tuple[str, ...] = ()
    functions: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def attentions(self) -> tuple[str, ...]:
        """Modules that compute an attention which is not one of ``heads``."""
        return tuple(name for name, called in self.functions.items() if "attention" in called)

    def site(self, layer: str) -> tuple[str, ...]:
        """Modules whose output is the layer's output: its BatchNorm where it has one, else the layer itself.

        A filter of which only the convolution is silenced still emits ``β − γμ/σ`` through its BatchNorm.
        """
        return tuple(dict.fromkeys(norm or layer for norm in self.norms[layer]))


def replica(model: nn.Module) -> nn.Module:
    """Copy the module tree in evaluation mode; parameters and buffers share memory with the model's.

    The copy's parameters need no gradient, its activations are not in-place, its attentions show their parts (see
    :class:`pxp.attention.Attention`), and the user's hooks come along.

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
    return make_explicit(twin)


def _shared(tensor: Tensor) -> Tensor:
    """The same memory without history; a copy of what was made in inference mode, which no graph may hold."""
    if not tensor.is_inference():
        return tensor.detach()
    with torch.inference_mode(False):
        return tensor.clone()


# A tensor as it is now; changed in place (by a residual sum) it is another one, though its id stays.
_Key = tuple[int, int]


def _key(tensor: Tensor) -> _Key:
    return id(tensor), 0 if tensor.is_inference() else tensor._version


@dataclass
class _Call:
    """One execution of a convolution or linear layer."""

    layer: str
    output: _Key
    tensor: Tensor
    norm: str = ""
    norm_output: _Key | None = None
    activation: str | None = None


class _Uses(TorchFunctionMode):
    """Counts how many operations take each tensor, and notes what is computed outside of the modules that have rules.

    An activation module is one operation, whatever it computes. An attention is known by a softmax that is multiplied
    by another signal as a matrix. One that only weighs elements (the gates of a CNN) or ends the network is none.
    """

    def __init__(self, modules: Mapping[str, nn.Module], images: Tensor) -> None:
        super().__init__()
        self.modules = modules
        self.inside = [""]  # the modules that are running, the innermost last; a hook may run behind the model itself
        self.counts: Counter[_Key] = Counter()
        self.functions: dict[str, dict[str, None]] = {}
        self.alive: list[object] = []  # an id is unique only as long as its tensor lives
        self.signals = {id(images)}  # what depends on the images, also when it is changed in place
        self.weights: set[int] = set()  # those that depend on them only through a softmax

    def enter(self, name: str, inputs: tuple) -> None:
        self.inside.append(name)
        if is_activation(self.modules[name]):
            self.counts.update(_key(a) for a in inputs if isinstance(a, Tensor))

    def leave(self) -> None:
        self.inside.pop()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        inputs = [*args, *(kwargs or {}).values()]
        inputs += [part for a in inputs if isinstance(a, tuple | list) for part in a]  # torch.cat takes a list
        given = {_key(a): a for a in inputs if isinstance(a, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.alive.append((given, result))
        module = self.modules[self.inside[-1]]
        # neither questions about a tensor (its shape) nor dropout in evaluation mode, which returns it as it is
        passed_on = isinstance(result, Tensor) and _key(result) in given
        if isinstance(result, Tensor | tuple | list) and not passed_on and not is_activation(module):
            self.counts.update(given.keys())
        signals = {id(a) for a in given.values()} & self.signals
        if signals:
            made = args[:1] if result is None else result  # x[0] = y has none
            self._follow(getattr(func, "__name__", ""), module, signals, made)
        return result

    def _follow(self, function: str, module: nn.Module, signals: set[int], result: object) -> None:
        made = {id(a) for a in (result if isinstance(result, tuple | list) else [result]) if isinstance(a, Tensor)}
        weights, others = signals & self.weights, signals - self.weights
        self.signals |= made
        if function == "softmax" or not others:
            self.weights |= made
        else:
            self.weights -= made
        called = None
        if function in ATTENTIONS or (function in PRODUCTS and weights and others):
            called = None if isinstance(module, Attention) else "attention"
        elif function in ACTIVATIONS:
            called = None if is_activation(module) else function
        elif function in NORMALISATIONS:
            called = None if is_normalisation(module) else function
        if called is not None:
            self.functions.setdefault(self.inside[-1], {})[called] = None


def trace(model: nn.Module, images: Tensor) -> Trace:
    """Run one batch through a replica of ``model`` and note what runs in which order and what feeds what."""
    twin = replica(model)
    modules = dict(twin.named_modules())
    producer: dict[_Key, _Call] = {}
    calls: list[_Call] = []
    heads: dict[str, int] = {}

    def note(name: str, module: nn.Module):
        def hook(_: nn.Module, inputs: tuple, output: Tensor) -> None:
            if not inputs:
                raise TypeError(f"layer {name!r} is called by keyword; rules see positional inputs: write layer(x)")
            if not isinstance(output, Tensor):
                return
            source = producer.get(_key(inputs[0]))
            if isinstance(module, BATCH_NORMS):
                if source is None or source.norm:
                    return
                source.norm, source.norm_output, source.tensor = name, _key(output), output
                producer[_key(output)] = source
            elif is_activation(module):
                if source is not None and source.activation is None:
                    source.activation = name
            else:
                calls.append(_Call(name, _key(output), output))
                producer[_key(output)] = calls[-1]

        return hook

    with torch.inference_mode(False):
        images = images.clone() if images.is_inference() else images
    uses = _Uses(modules, images)
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda _, inputs, name=name: uses.enter(name, inputs))
        if isinstance(module, (*CONVOLUTIONS, *BATCH_NORMS, nn.Linear)) or is_activation(module):
            module.register_forward_hook(note(name, module))
        elif isinstance(module, Attention):
            module.heads.register_forward_hook(
                lambda *_, name=name, number=module.num_heads: heads.update({name: number})
            )
        module.register_forward_hook(lambda *_: uses.leave())
    with torch.inference_mode(False), torch.no_grad(), uses:
        twin(images)

    norms: dict[str, list[str]] = {}
    positions: dict[str, int] = {}
    overwritten: dict[str, None] = {}
    followers: dict[str, set[str | None]] = {}
    for call in calls:
        # what is used elsewhere too is neither the BatchNorm's alone nor the activation's alone
        if call.norm and uses.counts[call.output] != 1:
            call.norm, call.norm_output, call.activation = "", None, None
        if uses.counts[call.norm_output or call.output] != 1:
            call.activation = None
        norms.setdefault(call.layer, []).append(call.norm)
        components = call.tensor.shape[-1 if isinstance(modules[call.layer], nn.Linear) else 1]
        positions[call.layer] = positions.get(call.layer, 0) + call.tensor[0].numel() // components
        if _key(call.tensor) != (call.norm_output or call.output):
            overwritten[call.layer] = None
        followers.setdefault(call.layer, set()).add(call.activation)
    activations = {layer: found.pop() for layer, found in followers.items() if len(found) == 1}
    return Trace(
        tuple(norms),
        {layer: tuple(found) for layer, found in norms.items()},
        {layer: found for layer, found in activations.items() if found is not None},
        heads,
        positions,
        tuple(overwritten),
        {name: tuple(called) for name, called in uses.functions.items()},
    )


def fold_batch_norm(twin: nn.Module, structure: Trace) -> None:
    """Merge each BatchNorm of a replica into the one layer before it: W' = W·γ/σ, b' = (b − μ)·γ/σ + β.

    Explanation rules then see the affine map that the network really computes. A BatchNorm is left as it is when it
    does not directly follow exactly one convolution or linear layer, as the only one that takes its output.

    Raises
    ------
    ValueError
        A BatchNorm without running statistics has no fixed affine map to merge.
    """
    modules = dict(twin.named_modules())
    owners: dict[str, set[str]] = {}
    for layer, norms in structure.norms.items():
        for norm in norms:
            owners.setdefault(norm, set()).add(layer)
    for layer, norms in structure.norms.items():
        name = norms[0]
        if not name or len(norms) > 1 or len(owners[name]) > 1:
            continue
        linear, norm = modules[layer], modules[name]
        if norm.running_mean is None:
            raise ValueError(f"BatchNorm {name!r} has no running statistics, so its output depends on the batch")
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        bias = -norm.running_mean * scale if linear.bias is None else (linear.bias - norm.running_mean) * scale
        if norm.bias is not None:
            bias = bias + norm.bias
        weight = linear.weight * scale.reshape(-1, *[1] * (linear.weight.ndim - 1))
        linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
        # timm's BatchNormAct2d also holds the dropout and activation that follow
        parts = {part: getattr(norm, part, None) for part in ("drop", "act")}
        rest = OrderedDict((part, found) for part, found in parts.items() if isinstance(found, nn.Module))
        parent, _, child = name.rpartition(".")
        stand_in = nn.Sequential(rest) if rest else nn.Identity()
        copy_hooks(norm, stand_in)  # e.g. a mask that the user has put on the model
        setattr(modules[parent], child, stand_in)


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
