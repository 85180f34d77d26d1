"""What a forward pass shows of a network, attention by any name included."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vits import MODELS, Around, Wrapped, images_of, lively, mha, small_timm

import pxp


def test_unsupported_attention_is_named(untouched):
    torch.manual_seed(0)
    model = timm.create_model("convit_tiny", num_classes=4, depth=2, img_size=32).eval()
    model(torch.zeros(1, 3, 32, 32))  # it keeps what it makes of the first image's size
    untouched(model)
    with pytest.raises(ValueError, match=r"heads of 'blocks.0.attn' \(GPSA\) cannot be told apart"):
        pxp.find_components(model, "head")
    units = pxp.find_components(model, "neuron")
    images, targets = torch.rand(1, 3, 32, 32), torch.tensor([0])
    with pytest.raises(ValueError, match="there is no LRP rule for 'blocks.0.attn'"):
        pxp.attribute(model, (images, targets), units, pxp.LRP())
    assert pxp.attribute(model, (images, targets), units, pxp.Taylor()).samples == 1


def test_a_vision_transformer_with_attention_pooling_has_neurons(untouched):
    """Also those of the pooling's own MLP; its heads are not told apart."""
    make = small_timm("vit_base_patch16_siglip_224", embed_dim=24, num_heads=3, mlp_ratio=1)
    model = untouched(lively(make()))
    images, targets = images_of(model)
    units = pxp.find_components(model, "neuron")
    assert {name: layer.size for name, layer in units.items()} == {
        "blocks.0.mlp.fc1": 24, "blocks.1.mlp.fc1": 24, "attn_pool.mlp.fc1": 24,
    }  # fmt: skip
    scores = pxp.attribute(model, (images, targets), units, pxp.Taylor())
    curve = pxp.pruning_curve(model, scores, (images, targets), rates=(0, 0.5), progress=False, allow_shared=True)
    assert curve.rates == (0, 0.5)
    for call in (lambda: pxp.find_components(model, "head"), lambda: pxp.heatmap(model, images, targets)):
        with pytest.raises(ValueError, match=r"'attn_pool' \(AttentionPoolLatent\)"):
            call()


class Sharing(nn.Module):
    """An attention with another name, whose weights pass a dropout, a mixture of the heads and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.mix, self.drop = nn.Linear(6, 18), nn.Linear(2, 2), nn.Dropout(0.5)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        weights = self.mix((q @ k.mT).softmax(-1).movedim(1, -1)).movedim(-1, 1)
        weights = (1 - self.gate.sigmoid()) * weights + self.gate.sigmoid() * weights.mean(1, keepdim=True)
        return (self.drop(weights) @ v).transpose(1, 2).flatten(2)


class Fused(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class Own(nn.MultiheadAttention):
    pass


UNSUPPORTED = {
    "ConViT": (
        lambda: timm.create_model("convit_tiny", num_classes=4, depth=2, local_up_to_layer=1, img_size=32),
        r"'blocks.0.attn' \(GPSA\)",
    ),
    "CaiT": (
        lambda: timm.create_model("cait_xxs24_224", num_classes=4, depth=1, img_size=32),
        r"'blocks.0.attn' \(TalkingHeadAttn\)",
    ),
    "parallel scaling": (
        small_timm("vit_base_patch16_xp_224", embed_dim=24, num_heads=3), r"'blocks.0' \(ParallelScalingBlock\)"
    ),
    "of one's own": (lambda: Around(Sharing()), r"'inner' \(Sharing\)"),
    "fused": (lambda: Around(Fused()), r"'inner' \(Fused\)"),
    "another library's of the same name": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 16, 16), timm.models.efficientformer_v2.Attention2d(8, 4, 2, resolution=2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        ),
        r"'1' \(timm.models.efficientformer_v2.Attention2d\)",
    ),
    "bias_kv": (lambda: Wrapped(mha(add_bias_kv=True)), r"'attention' \(MultiheadAttention with add_bias_kv\)"),
    "zero_attn": (lambda: Wrapped(mha(add_zero_attn=True)), r"'attention' \(MultiheadAttention with add_zero_attn\)"),
    "subclass": (
        lambda: Wrapped(Own(6, 3, batch_first=True)), r"'attention' \(Own, a subclass of torch.*MultiheadAttention\)"
    ),
    "global context": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), timm.layers.GlobalContext(8, fuse_add=True, fuse_scale=False),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        ),
        r"'1' \(GlobalContext\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_attention_by_any_other_name_is_seen(case, untouched):
    make, message = UNSUPPORTED[case]
    model = untouched(make().eval())
    side = getattr(getattr(model, "patch_embed", None), "img_size", (32, 32))
    tokens = isinstance(model, Around | Wrapped)
    x = torch.randn(1, 5, 6) if tokens else torch.randn(1, 3, *side)
    with pytest.raises(ValueError, match=f"the heads of {message} cannot be told apart; supported are torch.nn.Mul"):
        pxp.find_components(model, "head", example=x)
    with pytest.raises(ValueError, match=f"there is no LRP rule for {message}; supported are torch.nn.Mul"):
        pxp.heatmap(model, x, 1)


class Selects(nn.Module):
    """A softmax over branches and one that only gates: none is an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.one, self.other, self.choose = (nn.Linear(6, 6) for _ in range(4))
        self.out = nn.Linear(6, 4)
        self.table = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        x = x * (self.choose(x)[..., :4].softmax(-1) @ self.table).sigmoid()
        weights = self.choose(x.mean(1, keepdim=True)).unflatten(-1, (2, 3)).softmax(2).repeat(1, 1, 1, 2)
        branches = torch.stack([self.one(x), self.other(x)], 2)
        return self.out((branches * weights).sum(2).mean(1)).softmax(-1)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: timm.create_model("skresnet18", num_classes=4), (3, 32, 32)),
        (lambda: timm.create_model("resnest14d", num_classes=4), (3, 32, 32)),
        (Selects, (5, 6)),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 8, 3), timm.layers.GlobalContext(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
            ),
            (3, 9, 9),
        ),
    ],
    ids=["selective kernels", "split attention", "selects", "a gate"],
)
def test_a_softmax_that_multiplies_no_matrix_or_is_a_gates_is_no_attention(make, shape):
    model = make().eval()
    assert bool((pxp.heatmap(model, torch.randn(1, *shape), 1) != 0).any())


def test_an_activation_is_one_use_of_its_input_whatever_it_computes():
    """Quick GELU is x · sigmoid(1.702 x)."""
    units = pxp.find_components(MODELS["quick GELU and a norm first"](), "neuron")
    assert {name: layer.activation for name, layer in units.items()} == {
        f"blocks.{i}.mlp.fc1": f"blocks.{i}.mlp.act" for i in range(2)
    }

    class Reads(nn.Module):
        """Something else reads the hidden units, so they are not the activation's alone."""

        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(6, 6), timm.layers.QuickGELU(), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc1(x)
            return self.fc2(self.act(x) + x)

    with pytest.raises(ValueError, match="no components of kind 'neuron'"):
        pxp.find_components(Reads(), "neuron")
