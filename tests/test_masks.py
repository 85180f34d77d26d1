"""Masked networks compute what the network without the components would."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import MODES, network, only, randomise, relative
from oracle import Oracle
from small import Switched
from torch import nn
from torch.overrides import TorchFunctionMode
from vits import MODELS, Encoder, images_of, lively, two_blocks

import pxp
from pxp.sweep import silenced


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*MODELS, "shipped"])
def test_every_single_mask_of_a_transformer_changes_the_logits(name, mode):
    torch.manual_seed(0)
    model = pxp.load_model("vit").double() if name == "shipped" else lively(MODELS[name]())
    if name == "shipped":
        images = pxp.load_dataset("fashion-mnist").eval[0][:1].double()
    else:
        images, _ = images_of(model, 1)
    units = pxp.find_components(model, ("head", "neuron"))
    with MODES[mode]():
        before = model(images)
        for layer, each in units.items():
            for index in range(each.size):
                with pxp.masked(model, only(units, layer, index)):
                    assert not torch.equal(model(images), before), (layer, index)
        assert torch.equal(model(images), before)


@pytest.mark.parametrize("mode", MODES)
def test_a_masked_head_is_one_that_mixes_nothing(mode):
    model = two_blocks()
    images, _ = images_of(model, 1)
    units = pxp.find_components(model, "head")
    kept = {"encoder.layers.encoder_layer_0.self_attention": [True, False, True],
            "encoder.layers.encoder_layer_1.self_attention": [False, False, True]}  # fmt: skip
    mask = pxp.Mask(units, {name: torch.tensor(value) for name, value in kept.items()})
    expected = Oracle(model, images[0], {name: torch.tensor(value).double() for name, value in kept.items()}).logits
    with MODES[mode](), pxp.masked(model, mask):
        assert relative(model(images)[0].detach(), expected.detach()) < 1e-12


def test_masked_heads_of_timm_are_zeroed_columns():
    torch.manual_seed(0)
    model = lively(MODELS["deit3 with layer scale"]())
    images, _ = images_of(model, 2)
    units = pxp.find_components(model, "head")
    mask = only(units, "blocks.1.attn", 2)
    with torch.no_grad():
        with pxp.masked(model, mask):
            found = model(images)
        model.blocks[1].attn.proj.weight[:, 16:24] = 0
        assert relative(found, model(images)) < 1e-13


def test_head_masks_nest_and_survive_errors(untouched):
    model = untouched(two_blocks())
    images, _ = images_of(model)
    units = pxp.find_components(model, "head")
    first, second = (only(units, name, 1) for name in units)
    both = pxp.Mask(units, {name: first[name] & second[name] for name in units})
    with torch.no_grad():
        with pxp.masked(model, both):
            expected = model(images)
        with pxp.masked(model, first), pxp.masked(model, second):
            assert torch.equal(model(images), expected)
        before = model(images)
        with pytest.raises(RuntimeError), pxp.masked(model, first):
            model.encoder(torch.zeros(1, 10, 7, dtype=torch.float64))
        with pytest.raises(AssertionError), pxp.masked(model, first):
            model(torch.zeros(1, 3, 5, 5, dtype=torch.float64))
        assert torch.equal(model(images), before)


def test_an_interrupt_leaves_no_head_pruned(untouched):
    """torch calls a forward hook after an Exception only."""

    class Interrupt(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func.__name__ == "multi_head_attention_forward":
                raise KeyboardInterrupt
            return func(*args, **(kwargs or {}))

    model = untouched(two_blocks())
    images, _ = images_of(model)
    units = pxp.find_components(model, "head")
    name = next(iter(units))
    before = model(images)
    with pytest.raises(KeyboardInterrupt), pxp.masked(model, only(units, name, 1)):
        with pytest.raises(KeyboardInterrupt), pxp.masked(model, only(units, name, 2)), Interrupt():
            model(images)
        raise KeyboardInterrupt
    assert torch.equal(model(images), before)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_mask_reaches_torchs_fast_encoder(activation, untouched):
    torch.manual_seed(0)
    model = untouched(lively(Encoder(activation)))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    units = pxp.find_components(model, ("head", "neuron"), example=x)
    assert units.of_kind("head").total == 6 and units.of_kind("neuron").total == 32
    units = units.of_kind("head") if activation == "relu" else units  # some of ReLU's neurons are dead
    for mode in MODES.values():
        with mode():
            before = model(x)
            for layer, each in units.items():
                for index in range(each.size):
                    with pxp.masked(model, only(units, layer, index)):
                        found = model(x)
                    with silenced(model, only(units, layer, index)) as twin, torch.no_grad():
                        assert relative(found.detach(), twin(x)) < 1e-12
                    assert relative(found.detach(), before.detach()) > 1e-6


def zeroed(model: nn.Module, mask: pxp.Mask) -> nn.Module:
    """The network in which every pruned filter's output after BatchNorm is zero, by its parameters."""
    twin = copy.deepcopy(model)
    for layer, kept in mask.items():
        for name in mask.units[layer].site:
            site = twin.get_submodule(name)
            if hasattr(site, "running_mean"):
                site.running_mean[~kept] = 0
            for part in (site.weight, site.bias):
                if part is not None:
                    part.data[~kept] = 0
    return twin


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet", "bottleneck", "grouped", "conv1d"])
def test_masked_is_the_physically_zeroed_network(name, rate, untouched):
    model, x, _labels, units = network(name)
    mask = pxp.attribute(model, None, units, pxp.Random(2)).select(rate)
    untouched(model)
    with pxp.masked(model, mask) as same_model:
        assert same_model is model
        found = model(x).detach()
    assert relative(found, zeroed(model, mask)(x).detach()) < 1e-12
    assert relative(model(x).detach(), found) > 1e-6


@pytest.mark.parametrize("name", ["vgg", "resnet", "grouped"])
def test_a_pruned_filter_is_exactly_zero_behind_batch_norm(name):
    model, x, _labels, units = network(name)
    mask = pxp.attribute(model, None, units, pxp.Random(2)).select(0.4)
    seen = {}
    with pxp.masked(model, mask):
        handles = [
            model.get_submodule(units[layer].site[0]).register_forward_hook(
                lambda m, i, o, layer=layer: seen.__setitem__(layer, o.clone())
            )
            for layer in units
        ]
        model(x)
    for handle in handles:
        handle.remove()
    for layer, kept in mask.items():
        assert bool((seen[layer][:, ~kept] == 0).all())
        assert bool((seen[layer][:, kept] != 0).flatten(2).any(2).all())


@pytest.mark.parametrize("name", ["resnet", "grouped", "conv1d", "mlp"])
def test_every_single_mask_changes_the_logits(name):
    model, x, labels, units = network(name, samples=4)
    plain = model(x).detach()
    scores = pxp.attribute(model, (x, labels), units, pxp.Taylor())
    tried = 0
    for layer, entry in units.items():
        for index in range(0, entry.size, max(1, entry.size // 4)):
            kept = {n: torch.ones(u.size, dtype=torch.bool) for n, u in units.items()}
            kept[layer][index] = False
            if float(scores[layer][index]) == 0:
                continue  # a filter that a ReLU silences for these images
            with pxp.masked(model, pxp.Mask(units, kept)), torch.no_grad():
                assert relative(model(x), plain) > 1e-9, (layer, index)
            tried += 1
    assert tried > 2 * len(units)


def test_masks_nest_and_restore(untouched):
    model, x, _labels, units = network("vgg")
    untouched(model)
    one, two = (pxp.attribute(model, None, units, pxp.Random(seed)).select(0.3) for seed in (0, 1))
    both = pxp.Mask(units, {name: one[name] & two[name] for name in units})
    plain = model(x).detach()
    with pxp.masked(model, both):
        expected = model(x).detach()
    with pxp.masked(model, one):
        alone = model(x).detach()
        with pxp.masked(model, two):
            assert torch.equal(model(x), expected)
            with pxp.masked(model, two):
                assert torch.equal(model(x), expected)
        assert torch.equal(model(x), alone)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_exception_unmasks(error, untouched):
    model, _x, _labels, units = network("vgg")
    model.features[0].register_forward_hook(lambda *_: None)
    untouched(model)
    mask = pxp.attribute(model, None, units, pxp.Random()).select(0.5)
    with pytest.raises(error), pxp.masked(model, mask):
        raise error


def test_masks_work_in_training_mode_and_with_gradients():
    model, x, _labels, units = network("vgg")
    mask = pxp.attribute(model, None, units, pxp.Random()).select(0.5)
    model.train()
    with pxp.masked(model, mask):
        model(x).sum().backward()
    for layer, kept in mask.items():
        gradient = model.get_submodule(layer).weight.grad.flatten(1).abs().sum(1)
        assert bool((gradient[~kept] == 0).all()) and bool((gradient[kept] > 0).any())


def test_the_mask_of_a_nan_is_zero():
    model, x, _labels, units = network("vgg")
    with torch.no_grad():
        model.features[0].weight[3] = torch.nan
    kept = {name: torch.ones(layer.size, dtype=torch.bool) for name, layer in units.items()}
    kept["features.0"][3] = False
    with pxp.masked(model, pxp.Mask(units, kept)):
        assert bool(model(x).isfinite().all())


def test_a_shared_layer_is_masked_at_each_of_its_norms():
    model = randomise(Switched())
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    units = pxp.find_components(model, example=x)
    kept = dict(pxp.Mask.all(units)) | {"twice": torch.arange(6) % 3 != 1}
    keep = kept["twice"].double()[:, None, None]
    with torch.no_grad(), pxp.masked(model, pxp.Mask(units, kept)):
        found = model(x)
    with torch.no_grad():
        h = torch.relu(model.first(model.twice(torch.relu(model.stem(x)))) * keep)
        expected = model.fc((model.second(model.twice(h)) * keep).mean((2, 3)))
    assert relative(found, expected) < 1e-12
