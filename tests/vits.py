"""Small vision transformers with lively parameters."""

from __future__ import annotations

import timm
import torch
from conftest import randomise
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.vision_transformer import VisionTransformer


def two_blocks(biases: bool = True, seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(
        image_size=12, patch_size=4, num_layers=2, num_heads=3, hidden_dim=12, mlp_dim=10, num_classes=4
    )
    return lively(model, biases)


def lively(model: nn.Module, biases: bool = True) -> nn.Module:
    """Float64, eval mode, no parameter at its initial constant (torchvision's head is all zero)."""
    randomise(model)
    for name, parameter in model.named_parameters():
        bias = name.rpartition(".")[2].endswith("bias")
        if bias and not biases:
            parameter.data.zero_()
        elif parameter.ndim == 1:
            shift = 0.0 if bias else 1.0
            parameter.data.copy_(shift + 0.3 * torch.randn_like(parameter))
        elif "token" in name or "pos_" in name:
            parameter.data.copy_(torch.zeros_like(parameter) if not biases else 0.3 * torch.randn_like(parameter))
        elif "in_proj" in name or not parameter.any():
            parameter.data.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model


def images_of(model: nn.Module, samples: int = 2) -> tuple[Tensor, Tensor]:
    config = getattr(model, "default_cfg", {})
    side = getattr(model, "image_size", None) or model.patch_embed.img_size[0]
    channels = 3 if config or not hasattr(model, "conv_proj") else model.conv_proj.in_channels
    torch.manual_seed(1)
    return torch.randn(samples, channels, side, side, dtype=torch.float64), torch.arange(samples) % 4


def small_timm(name: str, **options):
    def make() -> nn.Module:
        return timm.create_model(name, num_classes=4, depth=2, img_size=32, **{"patch_size": 16, **options})

    return make


MODELS = {
    "torchvision": lambda: VisionTransformer(32, 16, 2, 3, 24, 20, num_classes=4),
    "vit_tiny": small_timm("vit_tiny_patch16_224", embed_dim=24, num_heads=3, mlp_ratio=1),
    "deit": small_timm("deit_tiny_patch16_224", embed_dim=24, num_heads=3, mlp_ratio=1),
    "deit3 with layer scale": small_timm("deit3_small_patch16_224", embed_dim=24, num_heads=3, mlp_ratio=1),
    "q/k norm and registers": small_timm(
        "vit_tiny_patch16_224", embed_dim=24, num_heads=3, mlp_ratio=1, qk_norm=True, reg_tokens=3, init_values=0.1
    ),
    "average pooling": small_timm(
        "vit_tiny_patch16_224", embed_dim=24, num_heads=3, mlp_ratio=1, class_token=False, global_pool="avg"
    ),
    "dinov2 with registers": small_timm(
        "vit_small_patch14_reg4_dinov2", embed_dim=24, num_heads=3, mlp_ratio=1, patch_size=16
    ),
    "eva02": small_timm("eva02_tiny_patch14_224", embed_dim=24, num_heads=3),
    "eva02 unfused": small_timm("eva02_base_patch14_224", embed_dim=24, num_heads=3),
    "quick GELU and a norm first": small_timm(
        "vit_base_patch16_clip_quickgelu_224", embed_dim=24, num_heads=3, mlp_ratio=1
    ),
    "rope": small_timm("vit_base_patch16_rope_reg1_gap_256", embed_dim=24, num_heads=3),
    "dinov3": small_timm("vit_small_patch16_dinov3", embed_dim=24, num_heads=3),
}


GATED = {"eva02", "eva02 unfused"}  # gated MLPs, whose hidden units are products


LISTED = ("vit_b_16", "vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2")


class Wrapped(nn.Module):
    """One MultiheadAttention between two linear layers."""

    def __init__(self, attention: nn.MultiheadAttention, **options) -> None:
        super().__init__()
        self.inp, self.attention, self.options = nn.Linear(6, 6), attention, options
        self.unpacked, self.first = attention.kdim != 6, attention.batch_first
        self.other = nn.Linear(6, attention.kdim)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.inp(x)
        k = v = self.other(q) if self.unpacked else q
        if not self.first:
            q, k, v = (part.transpose(0, 1) for part in (q, k, v))
        y, _ = self.attention(q, k, v, **self.options)
        return self.out((y if self.first else y.transpose(0, 1)).mean(1))


def mha(**options) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(6, 3, **{"batch_first": True, **options})


class Around(nn.Module):
    """Something between two linear layers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inp, self.inner, self.out = nn.Linear(6, 6), inner, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(self.inp(x)).mean(1))


class Encoder(nn.Module):
    """torch's own encoder, which takes a fast path where it can."""

    def __init__(self, activation="relu", **options) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, activation=activation, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(x).mean(1))


def small_swin(second: bool = False, **options) -> SwinTransformer:
    """torchvision's, with windows that do not divide the image and are shifted in every second block."""
    parts = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if second else {}
    return SwinTransformer([2, 2], 12, [2, 1], [3, 3], [4, 4], mlp_ratio=1.0, num_classes=4, **parts, **options)


def timm_swin(cls: type[nn.Module], **options) -> nn.Module:
    return cls(
        img_size=24, patch_size=2, num_classes=4, embed_dim=12, depths=(2, 1), num_heads=(3, 3), window_size=4,
        mlp_ratio=1, **options,
    )  # fmt: skip


POSITIONED = {
    "torchvision's Swin": small_swin,
    "torchvision's Swin v2": lambda: small_swin(True),
    "timm's Swin": lambda: timm_swin(timm.models.swin_transformer.SwinTransformer),
    "timm's Swin v2": lambda: timm_swin(timm.models.swin_transformer_v2.SwinTransformerV2),
    "BEiT": small_timm("beit_base_patch16_224", embed_dim=24, num_heads=3, mlp_ratio=1),
    "BEiT, one bias for all": small_timm(
        "beit_base_patch16_224", embed_dim=24, num_heads=3, mlp_ratio=1, use_rel_pos_bias=False,
        use_shared_rel_pos_bias=True,
    ),
}  # fmt: skip


def positioned(name: str, samples: int = 2, biases: bool = True) -> tuple[nn.Module, Tensor, Tensor]:
    """A model of attentions with relative position bias, images and targets."""
    torch.manual_seed(0)
    model = lively(POSITIONED[name](), biases)
    side = 22 if name.startswith("torchvision") else 32 if name.startswith("BEiT") else 24
    return model, torch.randn(samples, 3, side, side, dtype=torch.float64), torch.arange(samples) % 4
