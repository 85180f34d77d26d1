"""A network pruned in the page: the shipped VGG in JavaScript, or any network live."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attribute import attribute, heatmap
from ..batches import Data, whole
from ..criteria import Criterion, Magnitude, Random, Taylor
from ..curve import Curve, load_curves
from ..data import ASSETS, load_dataset, reference_samples
from ..lrp.composites import LRP
from ..masks import Mask, masked
from ..models import VGG, load_model
from ..network.components import Components, find_components
from ..repair import repair
from .explorer import Explorer, grey, rounded

RATES = tuple(step / 20 for step in range(20))
CRITERIA: dict[str, Criterion] = {
    "LRP-epsilon": LRP("epsilon"),
    "LRP-zplus": LRP("zplus"),
    "Taylor": Taylor(),
    "magnitude": Magnitude(),
    "random": Random(),
}
NAMES = {"LRP-epsilon": "LRP-ε", "LRP-zplus": "LRP-z⁺"}
RULES = {"epsilon": LRP("epsilon"), "zplus": LRP("zplus")}
PER_CLASS = 6  # images in the page
MASKS = ASSETS / "explorers" / "vgg.json"  # made by recipes/explorers.py


def prune_explorer(model: nn.Module | None = None, refs: Data | None = None, images: Data | None = None) -> Explorer:
    """Prune a network and look: filters kept, accuracy, what it says of an image, and why.

    Parameters
    ----------
    model : nn.Module, optional
        Default: the shipped VGG. In a page without a kernel a ``pxp.models.VGG`` can be shown, since the page
        computes it itself; any other network of one input channel live.
    refs : data, optional
        Images and labels that rank the filters. Default: ten images per class of the reference split.
    images : data, optional
        Square grey images in [0, 1] with labels, to look at and to measure on. Default: six per class of the
        evaluation split.

    Returns
    -------
    Explorer
        Its repair measures BatchNorm's statistics on ``images``, without their labels.

    Raises
    ------
    ValueError
        Images that are not grey, square and in [0, 1].
    """
    shipped = model is None and refs is None
    classes: tuple[str, ...] = ()
    if model is None:
        model = load_model("vgg")
    if refs is None or images is None:
        data = load_dataset()
        classes = data.classes
        refs = reference_samples(data.reference, 10) if refs is None else refs
        images = reference_samples(data.eval, PER_CLASS) if images is None else images
    given, labels = whole(images)
    shown = grey(given)
    seen = shown.to(next(model.parameters()))
    units = find_components(model, "filter", example=seen[:1])
    masks = json.loads(MASKS.read_text(encoding="utf8")) if shipped else ranked(model, refs, units)
    start: dict[str, Any] = {
        "criterion": "LRP-epsilon",
        "control": False,
        "scope": "global",
        "step": 4,
        "repair": False,
        "rule": "epsilon",
        "image": 0,
        "pixels": None,
    }
    held: dict[str, Any] = {
        "start": start,
        "side": shown.shape[-1],
        "images": _text(_bytes(shown)),
        "labels": labels.tolist(),
        "classes": list(classes) or [str(label) for label in range(int(labels.max()) + 1)],
        "rates": list(RATES),
        "sizes": [layer.size for layer in units.values()],
        "names": NAMES,
        "masks": masks,
        "curves": _curves() if shipped else {},
    }
    alone = isinstance(model, VGG) and _is_computed_in_the_page(model, shown)
    if isinstance(model, VGG) and alone:
        held |= {"layout": layout(model), "weights": _text(_halves(model))}
    network: nn.Module = model
    height, width = shown.shape[2:]

    def answer(state: dict[str, Any]) -> dict[str, Any]:
        """What ``compute`` of prune.js gives, by the package's own verbs."""
        kind = "shuffled" if state["control"] else "own"
        mask = unpacked(masks[state["criterion"]][kind][state["scope"]], units)[state["step"]]
        small = repair(network, mask, seen, "statistics", progress=False) if state["repair"] else None
        pixels = state.get("pixels")
        image = seen[state["image"]] if pixels is None else torch.tensor(pixels).to(seen).view(1, height, width)
        if small is not None:
            found = _looked(small, image[None], state["rule"], seen, labels)
        else:
            with masked(network, mask):
                found = _looked(network, image[None], state["rule"], seen, labels)
        return {"kept": [int(kept.sum()) for kept in mask.values()], **found}

    def still() -> None:
        import matplotlib.pyplot as plt

        axes = plt.figure(figsize=(6.4, 5.4)).subplot_mosaic(
            [["image", "heat"], ["kept", "kept"]], height_ratios=(3, 2)
        )
        found = answer(start)
        heat = np.array(found["heat"]).reshape(height, width)
        most = abs(heat).max()
        axes["image"].imshow(shown[start["image"], 0].numpy(), cmap="gray", vmin=0, vmax=1)
        axes["heat"].imshow(heat, cmap="RdBu_r", vmin=-most, vmax=most)
        axes["image"].set_title(f"{RATES[start['step']]:.0%} of the filters pruned")
        axes["heat"].set_title(f"relevance for {held['classes'][found['target']]}")
        for name in ("image", "heat"):
            axes[name].axis("off")
        share = [100 * kept / size for kept, size in zip(found["kept"], held["sizes"], strict=True)]
        axes["kept"].bar(range(1, len(share) + 1), share, label="kept")
        axes["kept"].set(xlabel="convolution", ylabel="filters kept (%)", ylim=(0, 105))

    return Explorer("prune", "A network pruned in the page", held, answer, still, 1500, alone)


def _looked(model: nn.Module, image: Tensor, rule: str, images: Tensor, labels: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        logits = model(image)[0]
        right = int((model(images).argmax(1).cpu() == labels).sum())
    target = int(logits.argmax())
    heat = heatmap(model, image, target, RULES[rule])[0].flatten()
    return rounded({"logits": logits.tolist(), "target": target, "heat": heat.tolist(), "right": right}, 5)


def ranked(model: nn.Module, refs: Data, units: Components) -> dict[str, dict[str, dict[str, str]]]:
    """Criterion → ``"own"`` or ``"shuffled"`` → scope → masks at every rate, as base64 of bits."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for name, criterion in CRITERIA.items():
        scores = attribute(model, refs, units, criterion, progress=False)
        kinds = {"own": scores, "shuffled": scores.shuffled(seed=0)}
        found[name] = {
            kind: {scope: packed([each.select(rate, scope=scope) for rate in RATES]) for scope in ("global", "layer")}
            for kind, each in kinds.items()
        }
    return found


def packed(masks: list[Mask]) -> str:
    """Bits of masks, True = kept, the first one lowest; each mask begins a byte."""
    bits = [np.concatenate([kept.numpy() for kept in mask.values()]) for mask in masks]
    return _text(np.packbits(np.stack(bits), axis=1, bitorder="little"))


def unpacked(text: str, units: Components) -> list[Mask]:
    """The masks of :func:`packed`."""
    rows = np.frombuffer(base64.b64decode(text), np.uint8).reshape(len(RATES), -1)
    bits = torch.from_numpy(np.unpackbits(rows, axis=1, count=units.total, bitorder="little").astype(bool))
    sizes = [layer.size for layer in units.values()]
    return [Mask(units, dict(zip(units, row.split(sizes), strict=True))) for row in bits]


def layout(model: VGG) -> dict[str, list[Any]]:
    """Shapes of the layers, in the order in which their numbers stand in the page."""
    features: list[nn.Module] = list(model.features)
    convolutions = [
        {
            "inputs": layer.in_channels,
            "outputs": layer.out_channels,
            "pool": any(isinstance(other, nn.MaxPool2d) for other in features[at + 3 : at + 4]),
        }
        for at, layer in enumerate(features)
        if isinstance(layer, nn.Conv2d)
    ]
    linear = [[m.out_features, m.in_features] for m in model.classifier if isinstance(m, nn.Linear)]
    return {"convolutions": convolutions, "linear": linear}


def _is_computed_in_the_page(model: VGG, images: Tensor) -> bool:
    """Whether vgg.js gives the model's logits: its formulas, on weights of 16 bits, compared with the model itself."""
    x, at = images, 0
    numbers = torch.from_numpy(_halves(model)).float()

    def take(*shape: int) -> Tensor:
        nonlocal at
        at += math.prod(shape)
        return numbers[at - math.prod(shape) : at].view(shape)

    shapes = layout(model)
    for layer in shapes["convolutions"]:
        outputs = layer["outputs"]
        x = F.conv2d(x, take(outputs, layer["inputs"], 3, 3), take(outputs), padding=1)
        weight, bias, mean, variance = (take(outputs) for _ in range(4))
        x = F.batch_norm(x, mean, variance, weight, bias).relu()
        x = F.max_pool2d(x, 2) if layer["pool"] else x
    x = x.mean((2, 3))
    for index, (outputs, inputs) in enumerate(shapes["linear"]):
        x = F.linear(x if index == 0 else x.relu(), take(outputs, inputs), take(outputs))
    with torch.no_grad():
        logits = model(images.to(next(model.parameters()))).cpu().float()
    return logits.shape == x.shape and bool((logits - x).abs().max() < 1e-3)


def _numbers(model: VGG) -> Iterator[Tensor]:
    for layer in (*model.features, *model.classifier):
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            yield from (layer.weight, layer.bias)  # type: ignore[misc]
        if isinstance(layer, nn.BatchNorm2d):
            yield from (layer.running_mean, layer.running_var)  # type: ignore[misc]


def _halves(model: VGG) -> np.ndarray:
    return torch.cat([each.detach().flatten() for each in _numbers(model)]).half().numpy()


def _bytes(images: Tensor) -> np.ndarray:
    return images.mul(255).round().clamp(0, 255).byte()[:, 0].numpy()


def _text(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _curves() -> dict[str, Any]:
    """Criterion (``", shuffled"``) → scope → repair → the shipped curve on 2,000 images, as far as there is one."""
    found: dict[str, Any] = {}

    def add(name: str, scope: str, how: str, curve: Curve) -> None:
        low, high = curve.interval()
        entry = {"rates": curve.rates, "mean": curve.accuracy.tolist(), "low": low.tolist(), "high": high.tolist()}
        found.setdefault(name, {}).setdefault(scope, {})[how] = rounded(entry, 3)

    twenty: Mapping[str, Curve] = load_curves("vgg")
    for name in CRITERIA:
        for each in (name, f"{name}, shuffled"):
            if each in twenty:
                add(each, "global", "none", twenty[each])
    stored = load_curves("repair-vgg")
    for name in CRITERIA:
        for each in (name, f"{name}, shuffled"):
            for scope in ("global", "layer"):
                for how in ("none", "statistics"):
                    curve = stored.get(f"{each.replace('LRP-epsilon', 'LRP')}, {how}, {scope}")
                    if curve is not None and how not in found.get(each, {}).get(scope, {}):
                        add(each, scope, how, curve)
    return found
