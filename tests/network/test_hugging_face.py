"""Hugging Face's vision transformers, whose models give objects that hold the logits."""

from __future__ import annotations

import pytest
import torch
from conftest import MODES, drawn, only, relative
from oracle import scaled, straight
from torch import Tensor, nn
from torch.nn import functional as F
from vits import lively

import pxp
from pxp.network.replica import replica

transformers = pytest.importorskip("transformers", minversion="5.20")


def small(kind: str, implementation: str = "sdpa", **options) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=16, num_labels=4,
        **({"mlp_ratio": 1} if "Dino" in kind else {"intermediate_size": 20}), **options,
    )  # fmt: skip
    suffix = "ForImageClassification"
    model = getattr(transformers, kind + suffix)(config)
    model.set_attn_implementation(implementation)
    return lively(model)


MODELS = {
    "ViT": lambda implementation: small("ViT", implementation),
    "ViT without biases of q, k, v": lambda implementation: small("ViT", implementation, qkv_bias=False),
    "DeiT": lambda implementation: small("DeiT", implementation),
    "DINOv2": lambda implementation: small("Dinov2", implementation),
    "DINOv2, gated": lambda implementation: small("Dinov2", implementation, use_swiglu_ffn=True),
    "DINOv2 with registers": lambda implementation: small("Dinov2WithRegisters", implementation),
}


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    std = (x.var(-1, correction=0, keepdim=True) + layer.eps).sqrt().detach()
    return (x - x.mean(-1, keepdim=True)) / std * layer.weight + layer.bias


def by_hand(model: nn.Module, x: Tensor, cp: bool) -> tuple[Tensor, list[Tensor]]:
    """Logits, and of every block what the heads give to the projection."""
    trunk = model.base_model
    embeddings = trunk.embeddings
    patches = embeddings.patch_embeddings.projection(x).flatten(2).transpose(1, 2)
    first = [embeddings.cls_token]
    first += [embeddings.distillation_token] if hasattr(embeddings, "distillation_token") else []
    tokens = torch.cat([*(token.expand(len(x), -1, -1) for token in first), patches], 1)
    tokens = tokens + embeddings.position_embeddings
    if hasattr(embeddings, "register_tokens"):  # they have no place
        registers = embeddings.register_tokens.expand(len(x), -1, -1)
        tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], 1)
    found = []
    dino = hasattr(trunk, "encoder")
    for block in trunk.encoder.layer if dino else trunk.layers:
        attention = block.attention
        y = norm(block.norm1 if dino else block.layernorm_before, tokens)
        q, k, v = (
            F.linear(y, part.weight, part.bias).unflatten(-1, (3, 8))
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k, v = (q.detach(), k.detach(), v) if cp else (scaled(q, 0.25), scaled(k, 0.25), scaled(v, 0.5))
        weights = (torch.einsum("nqhc,nkhc->nhqk", q, k) / 8**0.5).softmax(-1)
        found.append(torch.einsum("nhqk,nkhc->nqhc", weights, v).flatten(2))
        y = attention.o_proj(found[-1])
        tokens = tokens + (y * block.layer_scale1.lambda1 if dino else y)
        y, mlp = norm(block.norm2 if dino else block.layernorm_after, tokens), block.mlp
        if hasattr(mlp, "gate_proj"):
            y = mlp.down_proj(scaled(straight(F.silu, mlp.gate_proj(y)) * mlp.up_proj(y), 0.5))
        else:
            y = mlp.fc2(straight(F.gelu, mlp.fc1(y)))
        tokens = tokens + (y * block.layer_scale2.lambda1 if dino else y)
    tokens = norm(trunk.layernorm, tokens)
    if not dino:
        return model.classifier(tokens[:, 0]), found
    skipped = 1 + (embeddings.register_tokens.shape[1] if hasattr(embeddings, "register_tokens") else 0)
    return model.classifier(torch.cat([tokens[:, 0], tokens[:, skipped:].mean(1)], 1)), found


@pytest.mark.parametrize("rule", ["attnlrp", "cp"])
@pytest.mark.parametrize("name", MODELS)
def test_heatmaps_and_heads_are_those_written_out(name, rule, untouched):
    torch.manual_seed(0)
    model = untouched(MODELS[name]("sdpa"))
    images, targets = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 3])
    point = images.clone().requires_grad_()
    logits, mixed = by_hand(model, point, rule == "cp")
    assert relative(logits, model(images).logits) < 1e-12
    of_pixels, *of_heads = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), (point, *mixed))
    criterion = pxp.LRP(pxp.Epsilon(1e-14), softmax=rule)
    assert relative(pxp.heatmap(model, images, targets, criterion), images * of_pixels) < 1e-9
    units = pxp.find_components(model, "head")
    scores = pxp.attribute(model, (images, targets), units, criterion)
    for layer, heads, gradient in zip(units, mixed, of_heads, strict=True):
        relevance = (heads.detach() * gradient).unflatten(-1, (3, -1)).sum(-1)
        assert relative(scores[layer], relevance.abs().sum(1).mean(0)) < 1e-9


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_masks_and_curves(name, implementation, untouched):
    torch.manual_seed(0)
    model = untouched(MODELS[name](implementation))
    images, targets = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 3])
    # where they are eager, ViT and DeiT compute the softmax in single precision
    error = 1e-6 if implementation == "eager" and "DINO" not in name else 1e-12
    units = pxp.find_components(model, ("head", "neuron", "mlp_output"))
    assert [layer.kind for layer in units.values()] == 2 * ["head", "neuron", "mlp_output"]
    before = model(images).logits.detach()
    assert relative(replica(model)(images).logits, before) < error
    for layer, each in units.of_kind("head").items():
        for index in range(each.size):
            twin = replica(model)
            attention = twin.get_submodule(layer)
            weight = attention.projection.weight.clone()
            weight[:, 8 * index : 8 * index + 8] = 0
            attention.projection.weight = nn.Parameter(weight, requires_grad=False)
            expected = twin(images).logits
            assert relative(expected, before) > 1e-4
            for mode in MODES.values():
                with mode(), pxp.masked(model, only(units, layer, index)):
                    assert relative(model(images).logits.detach(), expected) < error
    for layer, each in units.of_kind("neuron").items():
        for index in range(each.size):
            with torch.no_grad(), pxp.masked(model, only(units, layer, index)):
                assert not torch.equal(model(images).logits, before), (layer, index)
    scores = pxp.attribute(model, (images, targets), units, pxp.LRP("gamma", softmax="zplus"))
    curve = pxp.pruning_curve(model, scores, (images, targets), rates=(0, 0.3), progress=False, allow_shared=True)
    with pxp.masked(model, scores.select(0.3)):
        assert curve.runs[0][1] == pxp.accuracy(model, (images, targets))


@pytest.mark.parametrize("name", MODELS)
def test_heads_and_neurons_are_taken_out(name, untouched):
    model, x = untouched(MODELS[name]("sdpa")), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for kind in ("head", "neuron"):
        mask = drawn(pxp.find_components(model, kind, example=x), 0.5)
        small = pxp.compact(model, mask, example=x)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        with pxp.masked(model, mask), torch.no_grad():
            assert relative(small(x)["logits"].detach(), model(x).logits) < 1e-12


def test_others_of_hugging_face_are_refused_by_name():
    config = transformers.BeitConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, image_size=32, patch_size=16, num_labels=4,
        intermediate_size=20,
    )  # fmt: skip
    model = transformers.BeitForImageClassification(config).eval()
    with pytest.raises(ValueError, match=r"the heads of 'beit.*' \(Beit\w*Attention\) cannot be told apart"):
        pxp.find_components(model, "head")


CNNS = {
    "ResNet, basic": lambda: convolutional("ResNet", layer_type="basic"),
    "ResNet, bottleneck": lambda: convolutional("ResNet", layer_type="bottleneck"),
    "ConvNext": lambda: convolutional("ConvNext", num_stages=2),
}


def convolutional(kind: str, **options) -> nn.Module:
    own = {"embedding_size": 8} if kind == "ResNet" else {}
    config = getattr(transformers, f"{kind}Config")(
        hidden_sizes=[8, 16], depths=[1, 2], num_labels=4, **own, **options
    )  # fmt: skip
    return lively(getattr(transformers, f"{kind}ForImageClassification")(config))


@pytest.mark.parametrize("name", CNNS)
def test_convolutional_networks(name, untouched):
    torch.manual_seed(0)
    model = untouched(CNNS[name]())
    images, targets = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 3])
    point = images.clone().requires_grad_()
    logits = model(point).logits
    if "ResNet" in name:  # piecewise linear
        (gradient,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), point)
        assert relative(pxp.heatmap(model, images, targets, pxp.LRP(pxp.Epsilon(0))), images * gradient) < 1e-9
    for kind in ("filter",) if "ResNet" in name else ("filter", "neuron"):
        units = pxp.find_components(model, kind, example=images)
        scores = pxp.attribute(model, (images, targets), units, pxp.LRP("gamma"))
        mask = scores.select(0.3)
        curve = pxp.pruning_curve(model, scores, (images, targets), rates=(0, 0.3), progress=False, allow_shared=True)
        with pxp.masked(model, mask), torch.no_grad():
            assert curve.runs[0][1] == pxp.accuracy(model, (images, targets))
            pruned = model(images).logits
        assert relative(pxp.compact(model, mask, example=images)(images)["logits"].detach(), pruned) < 1e-9
        with pxp.masked(model, scores.select(0.3, order="most")), torch.no_grad():
            assert relative(model(images).logits, logits.detach()) > 1e-3
