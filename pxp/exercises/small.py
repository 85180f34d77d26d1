"""Small networks and scores on which a check is done at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import pxp


def network() -> nn.Module:
    """Three convolutions, of which the last has BatchNorm; four classes."""
    torch.manual_seed(1)
    head = nn.Linear(40, 4)
    nn.init.normal_(head.weight)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 10, 3, bias=False),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        head,
    )
    with torch.no_grad():  # BatchNorm learns what is usual
        model.train()(images(64, seed=1))
    return model.eval()


def images(number: int = 20, seed: int = 0) -> Tensor:
    """Noise, (number, 1, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 1, 8, 8, generator=generator)


def labelled(
    model: nn.Module, number: int = 20, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Images with the classes that the network sees in them, but for a few."""
    x = images(number, seed)
    with torch.no_grad():
        labels = model(x).argmax(1)
    labels[::7] = (labels[::7] + 1) % 4
    return x, labels


def scores(criterion: pxp.Criterion | None = None) -> pxp.Scores:
    """Scores of the small network's filters, by LRP-ε."""
    model = network()
    units = pxp.find_components(model, "filter", example=images(1))
    return pxp.attribute(
        model,
        labelled(model),
        units,
        criterion or pxp.LRP("epsilon"),
        progress=False,
    )
