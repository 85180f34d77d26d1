"""Which modules and functions of torch, torchvision and timm are what."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FrozenBatchNorm2d)
# rules are placed on modules: what a forward pass calls as a function has the ordinary derivative instead of its rule
ACTIVATIONS = {
    "gelu": nn.GELU, "silu": nn.SiLU, "mish": nn.Mish, "hardswish": nn.Hardswish, "elu": nn.ELU, "celu": nn.CELU,
    "selu": nn.SELU,
}  # fmt: skip
NORMALISATIONS = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}
ATTENTIONS = {"scaled_dot_product_attention", "multi_head_attention_forward"}
PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum", "tensordot"}
MIXES_CHANNELS = (nn.GLU, nn.Softmax2d, nn.Softmin, nn.PReLU)
POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
ELEMENTWISE = (
    F.relu, F.relu6, F.gelu, F.silu, F.hardswish, F.hardsigmoid, F.hardtanh, torch.relu, torch.sigmoid, F.sigmoid,
    torch.tanh, F.tanh, F.dropout,
)  # fmt: skip
# modules that give their input as it is where nothing is trained
IDENTITIES = ("Identity", "DropPath", "StochasticDepth")


def is_activation(module: nn.Module) -> bool:
    """Whether ``module`` is an elementwise non-linearity of torch or timm."""
    source = type(module).__module__
    if isinstance(module, nn.MultiheadAttention | nn.Softmax | nn.LogSoftmax):
        return False
    if source == "timm.models.nfnet":
        return type(module).__name__ == "GammaAct"  # an activation times a constant
    return source == "torch.nn.modules.activation" or source.startswith("timm.layers.activations")


def is_normalisation(module: nn.Module) -> bool:
    """Whether ``module`` is a LayerNorm or RMSNorm of torch or timm."""
    name = type(module).__name__.lower()
    return isinstance(module, nn.LayerNorm) or (name.startswith("rmsnorm") and hasattr(module, "normalized_shape"))


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a BatchNorm: one of torch's, or one that keeps a mean and a variance for each channel."""
    if isinstance(module, BATCH_NORMS):
        return True
    mean, variance = (getattr(module, f"running_{part}", None) for part in ("mean", "var"))
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
    return dropout or (is_activation(module) and not isinstance(module, MIXES_CHANNELS))
