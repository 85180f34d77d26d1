"""Small networks that several tests share, and one around something that is to be tried."""

from __future__ import annotations

import torch
from conftest import without_biases
from torch import Tensor, nn
from torch.nn import functional as F


class Calls(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Switched(nn.Module):
    """One convolution that runs twice, each time with a BatchNorm of its own: neither can be merged."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)
        self.first, self.second = nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.twice(F.relu(self.stem(x)))))
        return self.fc(self.second(self.twice(x)).mean((2, 3)))


def around(middle: nn.Module, biases: bool = True) -> nn.Module:
    """A network with something between two convolutions of eight channels."""
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 8, 3), middle, nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*parts, nn.Linear(6, 3)).double().eval()
    return model if biases else without_biases(model)


def samples(number: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(number, 3, 12, 12, dtype=torch.float64), torch.arange(number) % 3
