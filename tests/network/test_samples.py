"""Which dimension of a layer's output is that of the samples: networks that differ in nothing else score the same."""

from __future__ import annotations

import pytest
import torch
from conftest import drawn, relative
from torch import Tensor, nn

import pxp

CRITERIA = [
    pxp.LRP("gamma"),
    pxp.LRP("zplus", absolute="sample"),
    pxp.Taylor(absolute="sample"),
    pxp.Activation(),
    pxp.IntegratedGradients(3),
]


class Tokens(nn.Module):
    """Nine tokens of an image through ``body``, in an order of dimensions of its own."""

    def __init__(self, body: nn.Module, order: str) -> None:
        super().__init__()
        self.embed, self.body, self.head, self.order = nn.Conv2d(1, 16, 4, 4), body, nn.Linear(16, 3), order

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2)
        match self.order:
            case "samples first":
                return self.head(self.body(tokens.permute(0, 2, 1)).mean(1))
            case "tokens first":
                return self.head(self.body(tokens.permute(2, 0, 1)).mean(0))
            case "flat":
                return self.head(self.body(tokens.permute(0, 2, 1).flatten(0, 1)).unflatten(0, (len(x), -1)).mean(1))
            case _:  # windows of three tokens
                windows = tokens.permute(0, 2, 1).reshape(3 * len(x), 3, 16)
                return self.head(self.body(windows).reshape(len(x), 9, 16).mean(1))


def encoder(samples_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=samples_first, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def mlp() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16), nn.ReLU())


PAIRS = {
    "encoder": (lambda: Tokens(encoder(True), "samples first"), lambda: Tokens(encoder(False), "tokens first")),
    **{order: (lambda: Tokens(mlp(), "samples first"), lambda order=order: Tokens(mlp(), order))
       for order in ("tokens first", "flat", "windows")},
}  # fmt: skip


@pytest.mark.parametrize("number", [2, 9])  # nine samples of nine tokens
@pytest.mark.parametrize("name", PAIRS)
def test_scores_do_not_depend_on_the_order_of_dimensions(name, number, untouched):
    one, other = (make().double().eval() for make in PAIRS[name])
    other.load_state_dict(one.state_dict())
    x, y = torch.rand(number, 1, 12, 12).double(), torch.arange(number) % 3
    assert relative(other(x), one(x)) < 1e-12
    for kind in ("neuron", *(["mlp_output", "head"] if name == "encoder" else [])):
        for example in (x, x[:1]):
            units, own = (pxp.find_components(model, kind, example=example) for model in (one, other))
            for criterion in CRITERIA:
                expected = pxp.attribute(one, (x, y), units, criterion)
                found = pxp.attribute(untouched(other), (x, y), own, criterion)
                for layer in expected:
                    assert relative(found[layer], expected[layer]) < 1e-9
                    assert relative(found.signed[layer], expected.signed[layer]) < 1e-9


def test_samples_that_lie_among_each_other_are_refused():
    class Interleaved(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            tokens = self.embed(x).flatten(2).permute(2, 0, 1)
            return self.head(self.body(tokens.flatten(0, 1)).unflatten(0, (9, -1)).mean(0))

    model, x, y = Interleaved(mlp(), "").eval(), torch.rand(2, 1, 12, 12), torch.tensor([0, 1])
    units = pxp.find_components(model, "neuron", example=x)
    with pytest.raises(ValueError, match=r"not clear which values of 'body\.[13]' belong to which sample"):
        pxp.attribute(model, (x, y), units, pxp.LRP())
    # a mask is the same for all samples
    with pxp.masked(model, drawn(units, 0.5)), torch.no_grad():
        assert relative(model(x), torch.cat([model(x[:1]), model(x[1:])])) < 1e-5
