"""The networks of ``zoo.txt``: made from their line, with weights that no mistake can hide behind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

LIST = Path(__file__).parent / "zoo.txt"


@dataclass(frozen=True)
class Entry:
    """One line of the list."""

    library: str
    name: str
    size: int
    options: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.library}/{self.name}"


def entries() -> list[Entry]:
    lines = LIST.read_text(encoding="utf8").splitlines()
    return [_entry(line) for line in lines if line.strip() and not line.startswith("#")]


def _entry(line: str) -> Entry:
    (path, *options) = line.split()
    library, name = path.split("/")
    given = {key: _value(value) for key, value in (option.split("=") for option in options)}
    size = given.pop("size", 64)
    return Entry(library, name, size, given)


def _value(text: str) -> int | tuple[int, ...]:
    return tuple(int(part) for part in text.split(",")) if "," in text else int(text)


def build(entry: Entry, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in evaluation mode, two images for it, and the classes that it finds most likely."""
    torch.manual_seed(seed)
    if entry.library == "tv":
        options = {key: bool(value) if key == "aux_logits" else value for key, value in entry.options.items()}
        options |= {"init_weights": False} if entry.name in ("googlenet", "inception_v3") else {}
        model = getattr(torchvision.models, entry.name)(weights=None, num_classes=10, **options)
    else:
        model = timm.create_model(entry.name, pretrained=False, num_classes=10, **entry.options)
    images = torch.rand(2, 3, entry.size, entry.size)
    enliven(model, images)
    with torch.no_grad():
        return model, images, model(images).argmax(1)


@torch.no_grad()
def enliven(model: nn.Module, images: Tensor) -> None:
    """Replace what training would have changed: gains of 1, biases of 0, layer scales and heads of almost 0.

    With such values a gain that is forgotten, a bias that is counted twice or a branch that is lost does not show.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            continue
        low, high = float(parameter.min()), float(parameter.max())
        if parameter.ndim > 1 and "weight" in name:
            spread = math.sqrt(1 / max(1, parameter[0].numel()))
            if high - low < 0.2 * spread:  # made as good as 0
                parameter.normal_(0, spread)
        elif high - low < 1e-6:
            parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3) if high else parameter.new_zeros(()))
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.1) if high < 0.5 else parameter.new_zeros(()))
    norms = [m for m in model.modules() if isinstance(getattr(m, "running_var", None), Tensor)]
    model.eval()
    for norm in norms:  # statistics of what they really see
        norm.reset_running_stats()  # type: ignore[operator]
        norm.momentum = None  # type: ignore[assignment]
        norm.train()
    if norms:
        model(torch.rand(4, *images.shape[1:]))
    for norm in norms:
        norm.eval()
        norm.momentum = 0.1  # type: ignore[assignment]
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.2)).clamp_(min=1e-3)  # type: ignore
        norm.running_mean.add_(torch.randn_like(norm.running_mean) * 0.05 * norm.running_var.sqrt())  # type: ignore
