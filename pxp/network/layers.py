"""Which modules and functions of torch, torchvision and timm are what."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

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
    return source == "torch.nn.modules.activation" or source.startswith(
        ("timm.layers.activations", "transformers.activations")
    )


def is_normalisation(module: nn.Module) -> bool:
    """Whether ``module`` is a LayerNorm or RMSNorm of torch or timm."""
    name = type(module).__name__.lower()
    return isinstance(module, nn.LayerNorm) or (name.startswith("rmsnorm") and hasattr(module, "normalized_shape"))


def is_elementwise(module: nn.Module) -> bool:
    """Whether ``module`` computes each value from the one at its place, and the same in every channel."""
    dropout = isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d)
    return dropout or (is_activation(module) and not isinstance(module, MIXES_CHANNELS))
