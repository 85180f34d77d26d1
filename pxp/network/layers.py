"""The one table of layers: what every kind of module and function is, and how relevance passes it.

It is a whitelist. A module whose class is in the table is trusted as a whole; of every other module each operation that
its forward pass computes with a signal is looked up here, and what is not found is refused (see
``pxp.network.trace``). :func:`pxp.register_layer` adds to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# what other modules put in the place of others
from torch.nn import Identity as Identity
from torch.nn import Linear as Linear
from torch.nn import Sequential as Sequential
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.misc import Permute
from torchvision.ops.stochastic_depth import StochasticDepth

GATE, SQUASH, CLIP = 3, 2, 1  # how surely a factor that ends in such a non-linearity only weighs the other factor


@dataclass(frozen=True)
class Kind:
    """What is known of one kind of layer.

    Attributes
    ----------
    name : str
    passes : str
        How relevance passes. ``"rule"``: by the rule that a composite gives. ``"derivative"``: linear without weights
        of its own, or piecewise linear through 0, so that its derivative is LRP-0. ``"affine"``: by a constant factor.
        ``"identity"``: unchanged, f(x) = x · (f(x) / x). ``"normalisation"``: by a constant factor 1/σ, after the mean
        is subtracted. ``"product"``: half to each of two signals, all of it to the one if the other is a gate.
        ``"glu"``: a · σ(b) of two halves, the second being a gate. ``"softmax"``: a constant where it weighs elements.
        ``"attention"``: by a rule of its own.
    classes : tuple
        Module classes, or the qualified names of such that need not be installed. A subclass that has a forward pass
        of its own is another kind.
    functions : tuple of str
        Names of functions of torch and of methods of tensors that compute the same.
    gate : int
        How surely a factor that ends in it is a gate: the one of two factors with the larger number is a constant.
    over : str
        Of a normalisation: what is normalised. ``"last"``: the last dimensions; ``"channels"``: dimension 1;
        ``"groups"`` of channels and all places; ``"places"``: every channel by itself; ``"given"``: the dimensions that
        the call names.
    centred : bool
        Whether a normalisation subtracts the mean.
    """

    name: str
    passes: str
    classes: tuple[type | str, ...] = ()
    functions: tuple[str, ...] = ()
    gate: int = 0
    over: str = ""
    centred: bool = False


def _timm(module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"timm.layers.{module}.{name}" for name in names)


def _hugging_face(*names: str) -> tuple[str, ...]:
    return tuple(f"transformers.activations.{name}" for name in names)


KINDS = [
    Kind("convolution", "rule", (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_timm("conv2d_same", "Conv2dSame")),
         ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")),
    Kind("transposed convolution", "rule", (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
    Kind("linear", "rule", (nn.Linear, *_timm("linear", "Linear")), ("linear",)),
    Kind(
        "batch normalisation", "affine",
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FrozenBatchNorm2d,
         *_timm("norm_act", "BatchNormAct2d", "FrozenBatchNormAct2d")),
        ("batch_norm",),
    ),
    Kind(
        "layer normalisation", "normalisation",
        (nn.LayerNorm, *_timm("norm", "LayerNorm", "LayerNormFp32")), ("layer_norm",), over="last", centred=True,
    ),
    Kind(
        "normalisation over channels", "normalisation",
        ("torchvision.models.convnext.LayerNorm2d", *_timm("norm", "LayerNorm2d", "LayerNorm2dFp32")),
        over="channels", centred=True,
    ),
    Kind("RMS normalisation", "normalisation", (nn.RMSNorm, *_timm("norm", "RmsNorm", "RmsNormFp32")), ("rms_norm",),
         over="last"),
    Kind("RMS normalisation over channels", "normalisation", _timm("norm", "RmsNorm2d", "RmsNorm2dFp32"),
         over="channels"),
    Kind("group normalisation", "normalisation", (nn.GroupNorm, *_timm("norm", "GroupNorm", "GroupNorm1")),
         ("group_norm",), over="groups", centred=True),
    Kind("instance normalisation", "normalisation", (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
         ("instance_norm",), over="places", centred=True),
    Kind("division by the norm", "normalisation", (), ("normalize",), over="given"),
    Kind("rectifier", "derivative", (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, *_timm("activations", "PReLU")),
         ("relu", "leaky_relu", "prelu", "rrelu", "abs", "absolute")),
    Kind(
        "activation", "identity",
        (nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.ELU, nn.CELU, nn.SELU, nn.Softplus, nn.LogSigmoid, nn.Hardshrink,
         nn.Softshrink, nn.Tanhshrink, nn.Threshold, "timm.models.nfnet.GammaAct",
         *_timm("activations", "Swish", "Mish", "HardSwish", "HardMish", "GELU", "GELUTanh", "QuickGELU"),
         *_timm("activations_me", "SwishMe", "MishMe", "HardSwishMe", "HardMishMe"),
         *_hugging_face("GELUActivation", "NewGELUActivation", "FastGELUActivation", "QuickGELUActivation", "GELUTanh",
                        "PytorchGELUTanh", "AccurateGELUActivation", "SiLUActivation",
                        "MishActivation")),
        ("gelu", "silu", "mish", "hardswish", "elu", "celu", "selu", "softplus", "logsigmoid", "log_sigmoid",
         "hardshrink", "softshrink", "tanhshrink", "threshold"),
    ),
    Kind("clipped activation", "identity", (nn.ReLU6, nn.Hardtanh, *_hugging_face("ClippedGELUActivation")),
         ("relu6", "hardtanh", "clamp", "clip"), gate=CLIP),
    Kind("squashing activation", "identity", (nn.Tanh, nn.Softsign, *_timm("activations", "Tanh")),
         ("tanh", "softsign"), gate=SQUASH),
    Kind(
        "gate", "identity",
        (nn.Sigmoid, nn.Hardsigmoid, *_timm("activations", "Sigmoid", "HardSigmoid"),
         *_timm("activations_me", "HardSigmoidMe")),
        ("sigmoid", "hardsigmoid"), gate=GATE,
    ),
    Kind("softmax", "softmax", (nn.Softmax, nn.Softmax2d, nn.LogSoftmax), ("softmax", "log_softmax"), gate=GATE),
    Kind(
        "pooling", "derivative",
        (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
         nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
         *_timm("pool2d_same", "AvgPool2dSame", "MaxPool2dSame"), *_timm("blur_pool", "BlurPool2d")),
        ("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
         "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
         "adaptive_max_pool3d", "mean", "sum", "amax", "amin", "topk", "cumsum"),
    ),
    Kind("extremum", "derivative", (), ("max", "min", "maximum", "minimum")),
    Kind(
        "reshaping", "derivative",
        (nn.Flatten, nn.Unflatten, nn.Identity, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Upsample,
         nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad2d,
         nn.ReplicationPad2d, nn.ConstantPad2d, nn.Fold, nn.Unfold, Permute),
        ("view", "view_as", "reshape", "reshape_as", "permute", "transpose", "t", "swapaxes", "swapdims", "movedim",
         "moveaxis", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as", "repeat", "tile",
         "repeat_interleave", "broadcast_to", "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "narrow",
         "select", "getitem", "setitem", "index_select", "take_along_dim", "gather", "index_copy", "index_add",
         "index_put", "scatter", "roll", "flip", "rot90", "cat", "concat", "concatenate", "stack", "hstack", "vstack",
         "pad", "interpolate", "upsample", "grid_sample", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
         "fold", "unfold", "contiguous", "clone", "to", "type_as", "type", "float", "double", "half", "bfloat16",
         "cpu", "cuda", "alias", "where", "masked_fill", "tril", "triu", "diagonal", "get", "requires_grad",
         "resolve_conj", "copy"),
    ),
    Kind("sum", "derivative", (), ("add", "radd", "iadd", "sub", "subtract", "rsub", "isub", "neg", "negative")),
    Kind("product", "product", (), ("mul", "multiply", "rmul", "imul", "square", "pow")),
    Kind("sum with a product", "product", (), ("addcmul",)),
    Kind("quotient", "product", (), ("div", "divide", "true_divide", "truediv", "rdiv", "rtruediv", "itruediv")),
    Kind("gated linear unit", "glu", (), ("glu",)),
    Kind("product of matrices", "product", (),
         ("matmul", "rmatmul", "bmm", "mm", "einsum", "baddbmm", "addmm", "addbmm", "tensordot", "mv")),
    Kind("fused attention", "attention", (), ("scaled_dot_product_attention", "multi_head_attention_forward")),
    Kind(
        "dropout", "derivative",
        (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, StochasticDepth,
         *_timm("drop", "DropPath", "DropBlock2d"), *_timm("patch_dropout", "PatchDropout", "PatchDropoutWithIndices")),
        ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
         "stochastic_depth"),
    ),
]  # fmt: skip


_BY_CLASS: dict[type | str, Kind] = {}
_BY_FUNCTION: dict[str, Kind] = {}


for _kind in KINDS:
    _BY_CLASS.update(dict.fromkeys(_kind.classes, _kind))
    _BY_FUNCTION.update(dict.fromkeys(_kind.functions, _kind))


def qualified(cls: type) -> str:
    """A class's module and name."""
    return f"{cls.__module__}.{cls.__qualname__}"


def kind_of_class(cls: type) -> Kind | None:
    """What modules of this very class are; subclasses are another matter, see :func:`kind_of`."""
    return _BY_CLASS.get(cls) or _BY_CLASS.get(qualified(cls))


def kind_of(module: nn.Module) -> Kind | None:
    """What ``module`` is; None if nothing is known of it, as of one that only calls others."""
    if "forward" in vars(module):  # somebody has put another forward pass on this one module
        return None
    for cls in type(module).__mro__:
        kind = kind_of_class(cls)
        if kind is not None:
            # a subclass that computes something else is not what its parent is
            return kind if type(module).forward is cls.forward else None  # type: ignore[attr-defined]
    return None


def kind_of_function(function: object) -> Kind | None:
    """What a function of torch or a method of tensors computes; ``x += y`` and ``x.add_(y)`` are as ``x + y``."""
    name = getattr(function, "__name__", "")
    if name == "__get__" and function.__self__ is Tensor.data:  # type: ignore[attr-defined]
        return None  # x.data cuts the gradient as x.detach() does; other attributes, such as x.mT, are views
    return _BY_FUNCTION.get(name.strip("_"))


def passes(module: nn.Module) -> str:
    """How relevance passes ``module``; "" if nothing is known of it."""
    kind = kind_of(module)
    return "" if kind is None else kind.passes


def register_layer(cls: type[nn.Module], *, like: type[nn.Module] | str) -> Kind:
    """Tell what a module class of your own is like, so that relevance passes it as it passes that.

    What is told is checked as far as one image can tell: the first explanation of a model with such a module compares
    its copy with it, tries whether relevance is conserved (``pxp.lrp.balance``), and whether an activation looks at
    one place at a time. That a signal was called a gate, or channels that are mixed a reshaping, this does not see.

    Parameters
    ----------
    cls : type
        A subclass of ``torch.nn.Module``. It is then trusted as a whole: its own operations are not looked at. Its
        subclasses are of the same kind unless they have a forward pass of their own.
    like : type or str
        A class that is known, such as ``nn.Sigmoid`` for a gate, ``nn.GELU`` for an activation, ``nn.LayerNorm`` or
        ``nn.Conv2d``; or the name of a kind, such as ``"gate"``. A normalisation needs the attributes of the class it
        is like (``normalized_shape`` or ``num_groups``; ``eps``; its gain, if any, as ``weight``). A convolution or
        linear layer with a forward pass of its own is a subclass of torch's, and found to be one without being told.

    Returns
    -------
    Kind
        What ``cls`` is now known as.

    Raises
    ------
    TypeError
        ``cls`` is no module class, ``like`` neither a class nor a name; it is like a layer with weights, but no
        subclass of torch's.
    ValueError
        Nothing is known of ``like``.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"a layer is a subclass of torch.nn.Module, got {cls!r}")
    known = {kind.name: kind for kind in KINDS}
    if not isinstance(like, str | type):
        raise TypeError(f"like must be a class, such as nn.Sigmoid, or the name of a kind, got {like!r:.80}")
    kind = known.get(like) if isinstance(like, str) else kind_of_class(like)
    if kind is None:
        raise ValueError(
            f"nothing is known of {like!r}; give a known class or one of {', '.join(map(repr, known))}; "
            "an attention is described, with pxp.register_attention"
        )
    if kind.passes == "rule" and not issubclass(cls, LAYERS):
        raise TypeError(
            f"{cls.__name__} is no subclass of {', '.join(one.__name__ for one in LAYERS)}, so no "
            "rule can read its weight; make it one, whose forward pass uses self.weight and self.bias"
        )
    _BY_CLASS[cls] = kind
    return kind


# classes and functions that other modules ask for by what they are
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
LINEAR = (nn.Linear,)
LAYERS = (*CONVOLUTIONS, *LINEAR)
MULTIHEAD = nn.MultiheadAttention
RELU = nn.ReLU
FLATTEN = nn.Flatten
AVERAGES = (nn.AvgPool1d, nn.AvgPool2d)
SCALES = _timm("layer_scale", "LayerScale")  # of every channel of the last dimension
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FrozenBatchNorm2d)
POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
ELEMENTWISE = (
    F.relu, F.relu6, F.gelu, F.silu, F.hardswish, F.hardsigmoid, F.hardtanh, torch.relu, torch.sigmoid, F.sigmoid,
    torch.tanh, F.tanh, F.dropout,
)  # fmt: skip
IDENTITIES = (qualified(nn.Identity), qualified(StochasticDepth), *_timm("drop", "DropPath"))  # in evaluation
PAD = F.pad
# functions that must be seen as what they are, not traced: random in training, or dependent on the size of the image
WHOLE = {
    "timm.layers": ("drop_path", "drop_block_2d", "resample_abs_pos_embed"),
    "torchvision.ops": ("stochastic_depth", "drop_block2d", "drop_block3d"),
}
# torch's blocks call an activation that they are given as a function
BLOCKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
ACTIVATIONS = {F.relu: nn.ReLU, F.gelu: nn.GELU}
# what keeps torch's encoders from their fast path, which calls no layer
SLOW = {"activation_relu_or_gelu": 0, "use_nested_tensor": False}
# gated MLPs, whose hidden units are products, and their last layers
_DINO = "transformers.models.dinov2"
GATED = {
    "timm.layers.mlp.SwiGLU": "fc2",
    "timm.layers.mlp.GluMlp": "fc2",
    f"{_DINO}.modeling_dinov2.Dinov2SwiGLUFFN": "down_proj",
    f"{_DINO}_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersSwiGLUFFN": "down_proj",
}


def is_activation(module: nn.Module) -> bool:
    """Whether ``module`` is an elementwise non-linearity."""
    kind = kind_of(module)
    return kind is not None and (kind.passes == "identity" or kind.name == "rectifier")


def is_normalisation(module: nn.Module) -> bool:
    """Whether ``module`` divides by what it measures on its own input."""
    return passes(module) == "normalisation"


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a BatchNorm: one of torch's, or one that keeps a mean and a variance for each channel."""
    if isinstance(module, BATCH_NORMS):
        return True
    held = {**module._parameters, **module._buffers}
    mean, variance = (held.get(f"running_{part}") for part in ("mean", "var"))
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        return False
    return mean.ndim == 1 and mean.shape == variance.shape


def by_output(layer: nn.Module) -> Tensor:
    """A layer's weight as (outputs, weights); a transposed convolution's is (inputs, outputs / groups, ...)."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if isinstance(layer, TRANSPOSED):
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def for_weight(layer: nn.Module, values: Tensor) -> Tensor:
    """One value for each output of a layer in a shape that multiplies its weight."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if isinstance(layer, TRANSPOSED):
        values = values.view(layer.groups, -1).repeat_interleave(len(weight) // layer.groups, 0)
        return values.reshape(*values.shape, *[1] * (weight.ndim - 2))
    return values.reshape(-1, *[1] * (weight.ndim - 1))


def is_elementwise(module: nn.Module) -> bool:
    """Whether ``module`` computes each value from the one at its place, and the same in every channel."""
    dropout = isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d)
    return dropout or (is_activation(module) and not isinstance(module, nn.PReLU))
