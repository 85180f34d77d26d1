"""Attention with visible heads computes what the original computes."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from conftest import MODES, only, relative
from vits import LISTED, MODELS, Wrapped, images_of, lively, mha

import pxp
from pxp.network.attention import Attention
from pxp.network.replica import replica
from pxp.sweep import silenced

UPPER = torch.ones(5, 5, dtype=torch.bool).triu(1)


ATTENTIONS = {
    "packed": lambda: Wrapped(mha()),
    "tokens first": lambda: Wrapped(mha(batch_first=False)),
    "without bias": lambda: Wrapped(mha(bias=False)),
    "unpacked": lambda: Wrapped(mha(kdim=4, vdim=4)),
    "bool mask": lambda: Wrapped(mha(), attn_mask=UPPER),
    "float mask": lambda: Wrapped(mha(), attn_mask=torch.randn(5, 5, dtype=torch.float64), need_weights=False),
    "mask per head": lambda: Wrapped(mha(), attn_mask=UPPER.expand(6, 5, 5)),
    "padding": lambda: Wrapped(mha(), key_padding_mask=torch.tensor([[False] * 4 + [True], [False] * 5])),
    "both": lambda: Wrapped(mha(), attn_mask=UPPER, key_padding_mask=torch.tensor([[False] * 4 + [True], [False] * 5])),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_multihead_attention_has_an_equal(name, untouched):
    torch.manual_seed(0)
    model = untouched(lively(ATTENTIONS[name]()))
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    twin = replica(model)
    assert isinstance(twin.attention, Attention)
    with torch.no_grad():
        assert relative(twin(x), model(x)) < 1e-14
        for average in (True, False):
            options = {**model.options, "need_weights": True, "average_attn_weights": average}
            same_input = [part.transpose(0, 1) if name == "tokens first" else part for part in (x, x, x)]
            if name == "unpacked":
                same_input[1] = same_input[2] = torch.randn(2, 5, 4, dtype=torch.float64)
            expected, weights = model.attention(*same_input, **options)
            found, own = twin.attention(*same_input, **options)
            assert relative(found, expected) < 1e-13 and relative(own, weights) < 1e-13


@pytest.mark.parametrize("name", MODELS)
def test_transformers_have_equal_outputs_and_batches_equal_singles(name, untouched):
    torch.manual_seed(0)
    model = untouched(lively(MODELS[name]()))
    images, targets = images_of(model, 3)
    with torch.no_grad():
        assert relative(replica(model)(images), model(images)) < 1e-13
    units = pxp.find_components(model, ("head", "neuron"))
    assert units.of_kind("head").total == 6
    criterion = pxp.LRP("gamma", softmax="zplus")
    together = pxp.attribute(model, (images, targets), units, criterion)
    singly = [pxp.attribute(model, (images[i : i + 1], targets[i : i + 1]), units, criterion) for i in range(3)]
    for layer in units:
        assert relative(together[layer], sum(one[layer] for one in singly) / 3) < 1e-10
        assert float(together[layer].min()) > 0


BIG = {"vit_b_16", "deit3_small_patch16_224"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.weekly] * (name in BIG)) for name in LISTED])
def test_listed_models_at_full_size(name, untouched):
    """Equal outputs, three lines to prune, and the effect of single heads' masks; float32 as users have it.

    The networks at full size, images of half of it: what is tried depends on no number of tokens.
    """
    torch.manual_seed(0)
    if name == "vit_b_16":
        model = torchvision.models.vit_b_16(image_size=112, num_classes=4)
    else:
        model = timm.create_model(name, num_classes=4, img_size=56 if "dinov2" in name else 112)
    model = untouched(lively(model).float())
    images, targets = (part.to(torch.float32) if part.is_floating_point() else part for part in images_of(model, 1))
    with torch.no_grad():
        before = model(images)
        assert relative(replica(model)(images), before) < 1e-4
        units = pxp.find_components(model, "head")
        mask = pxp.attribute(model, (images, targets), units, pxp.LRP("epsilon")).select(0.2)
        with pxp.masked(model, mask):
            pruned = model(images)
        assert mask.kept == units.total - round(0.2 * units.total) and relative(pruned, before) > 1e-4
        with silenced(model, mask) as twin:
            assert relative(twin(images), pruned) < 1e-3
        assert torch.equal(model(images), before)
    for mode in MODES:
        for layer in list(units)[:: 5 if name == "vit_b_16" else 1]:
            # what differs between the modes is the way through a layer, not through its heads
            step = 1 if name.startswith("vit_tiny") or mode == "inference" else units[layer].size
            for index in range(0, units[layer].size, step):
                with MODES[mode](), pxp.masked(model, only(units, layer, index)):
                    assert not torch.equal(model(images), before), (layer, index)
