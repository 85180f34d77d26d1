"""Heads of a vision transformer: where they look, what they are worth, and the logits without them."""

from __future__ import annotations

import base64
import json
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attribute import attribute
from ..batches import Data, whole
from ..data import ASSETS, load_dataset, reference_samples
from ..lrp.composites import LRP
from ..masks import Mask, masked
from ..models import load_model
from ..network.attention import Attention
from ..network.components import Components, find_components
from ..network.replica import replica
from .explorer import Explorer, grey, rounded

MOST = 2  # heads that can be away at a time where no kernel computes
SHOWN = (0, 3, 5, 7, 8)  # classes of the images in the page
FILE = ASSETS / "explorers" / "vit.json"  # made by recipes/explorers.py


def head_explorer(model: nn.Module | None = None, images: Data | None = None) -> Explorer:
    """Take heads away and see the logits; where each looks, and its relevance, beside it.

    Parameters
    ----------
    model : nn.Module, optional
        A vision transformer whose tokens are a class token and square patches. Default: the shipped one.
    images : data, optional
        A few square grey images in [0, 1] with labels. Default: five of the evaluation split.

    Returns
    -------
    Explorer
        In a page without a kernel two heads can be away at a time; the logits without any one or two of them are in
        the page, in hundredths. Live any number can be.

    Raises
    ------
    ValueError
        As :func:`pxp.find_components`; images that are not grey, square and in [0, 1]; blocks of different numbers of
        heads; tokens other than a class token and square patches.
    """
    given = model is not None or images is not None
    model = load_model("vit") if model is None else model
    images = images_shown() if images is None else images
    given_images, labels = whole(images)
    shown = grey(given_images).to(next(model.parameters()))
    units = find_components(model, "head", example=shown[:1])
    network: nn.Module = model
    data = measured(model, shown, labels, units) if given else json.loads(FILE.read_text(encoding="utf8"))
    pixels = _pixels(data).to(next(model.parameters()))

    def answer(state: dict[str, Any]) -> dict[str, Any]:
        """What ``compute`` of heads.js gives, for any number of heads."""
        mask = without(units, state["gone"])
        with torch.no_grad(), masked(network, mask):
            return {"logits": rounded(network(pixels[state["image"]][None])[0].tolist(), 4)}

    def still() -> None:
        import matplotlib.pyplot as plt

        relevance = np.array(data["relevance"][0]).reshape(data["blocks"], data["heads"])
        most = abs(relevance).max()
        figure, ax = plt.subplots(figsize=(6.4, 4.4))
        grid = ax.imshow(relevance, cmap="RdBu_r", vmin=-most, vmax=most)
        ax.set_xticks(range(data["heads"]), [str(head + 1) for head in range(data["heads"])])
        ax.set_yticks(range(data["blocks"]), [str(block + 1) for block in range(data["blocks"])])
        ax.set(xlabel="head", ylabel="block")
        ax.grid(visible=False)
        figure.colorbar(grid, label="relevance, first image")

    return Explorer("heads", "Heads of a vision transformer", data, answer, still, 1250)


def images_shown() -> Data:
    """The images of the page."""
    return reference_samples(load_dataset().eval, 1, SHOWN, seed=1)


def without(units: Components, gone: list[int]) -> Mask:
    """All heads but some, counted through all blocks."""
    kept = torch.ones(units.total, dtype=torch.bool)
    kept[gone] = False
    sizes = [layer.size for layer in units.values()]
    return Mask(units, dict(zip(units, kept.split(sizes), strict=True)))


def measured(model: nn.Module, images: Tensor, labels: Tensor, units: Components) -> dict[str, Any]:
    """All that the page shows: attention and relevance of every head, and the logits without one or two."""
    sizes = {layer.size for layer in units.values()}
    if len(sizes) != 1:
        raise ValueError(f"every block must have as many heads as the others, got {sorted(sizes)}")
    (heads,) = sizes
    with torch.no_grad():
        whole = model(images)
        sets: list[list[int]] = [
            [],
            *([h] for h in range(units.total)),
            *map(list, combinations(range(units.total), 2)),
        ]
        logits = []
        for gone in sets:
            with masked(model, without(units, gone)):
                logits.append(model(images))
    relevance = [
        torch.cat(
            list(attribute(model, (image[None], said[None]), units, LRP("epsilon"), progress=False).signed.values())
        ).tolist()
        for image, said in zip(images, whole.argmax(1), strict=True)
    ]
    attention = _attention(model, images)
    side = round(attention.shape[-1] ** 0.5)
    if side**2 != attention.shape[-1] or images.shape[-1] % side:
        raise ValueError(
            f"the tokens must be one class token and square patches, got {attention.shape[-1]} tokens beside the first"
        )
    classes = load_dataset().classes if whole.shape[1] == 10 else [str(number) for number in range(whole.shape[1])]
    return {
        "start": {"image": 0, "gone": []},
        "blocks": len(units),
        "heads": heads,
        "side": side,
        "pixels": images.shape[-1],
        "most": MOST,
        "classes": list(classes),
        "labels": labels.tolist(),
        "images": _text(images.mul(255).round().byte().numpy()),
        "attention": _text((attention / attention.amax(-1, keepdim=True)).mul(255).round().byte().numpy()),
        "relevance": rounded(relevance, 3),
        "whole": rounded(whole.tolist(), 2),
        "logits": _text(torch.stack(logits, 1).mul(100).round().short().numpy()),
    }


class _Noted:
    """In place of a rule of the softmax: keeps the weights."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        logits = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        self.weights.append((logits if mask is None else logits + mask).softmax(-1))
        return self.weights[-1] @ v


def _attention(model: nn.Module, images: Tensor) -> Tensor:
    """Weights of the class token's row on the patches: (images, blocks × heads, patches)."""
    twin, noted = replica(model), _Noted()
    for module in twin.modules():
        if isinstance(module, Attention):
            module.rule = noted
    with torch.no_grad():
        twin(images)
    return torch.cat(noted.weights, 1)[:, :, 0, 1:]


def _pixels(data: dict[str, Any]) -> Tensor:
    raw = np.frombuffer(base64.b64decode(data["images"]), np.uint8).reshape(-1, 1, data["pixels"], data["pixels"])
    return torch.from_numpy(raw.copy()).float() / 255


def _text(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
