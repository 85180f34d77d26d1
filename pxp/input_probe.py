"""What a criterion may ask of a model about its input: the relevance of every pixel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from zennit.core import Composite

from .batches import Data
from .network.replica import eager
from .network.trace import Trace
from .probe import Probe, reading, unbroken


class InputProbe(Probe):
    """A probe whose only place is the input: every pixel counts by itself, under the name ``"input"``.

    Where a composite has an input rule, the relevance of a pixel is that of the value that the rule's layer reads of
    it. What a model computes of its images before, such as a normalisation, must leave every pixel a value of its own:
    relevance then passes it as it is, while x ⊙ g would split it between the pixel and the constants.
    """

    def __init__(self, model: nn.Module, structure: Trace, refs: Data, batch_size: int) -> None:
        super().__init__(model, structure, None, refs, batch_size)
        self._layer: str | None = None
        self._behind: dict[str, bool] = {}

    @contextmanager
    def rules(self, composite: Composite) -> Iterator[None]:
        self._layer = getattr(composite, "input_layer", None)
        try:
            with super().rules(composite):
                yield
        finally:
            self._layer = None

    def forward(self, images: Tensor, note: Callable[[str, Tensor], None]) -> None:
        note("input", images)

    def backward(
        self,
        images: Tensor,
        labels: Tensor,
        note: Callable[[str, Tensor, Tensor], None],
        *,
        start: str = "logit",
        exact: bool = False,
        carried: bool = False,
    ) -> None:
        layer = self._layer
        # a network may ask which values are 0, so without a rule for the input they stay
        point = (images.detach().clone() if layer is None else without_zeros(images)).requires_grad_()
        if layer is not None and layer not in self._behind:
            self._behind[layer] = is_behind(self.twin, layer, images[:1])
        if layer is None or not self._behind[layer]:
            with reading(self.twin, self.structure, None, None), unbroken(self.model):
                (flow,) = torch.autograd.grad(self._start(point, labels, start, carried), point)
            note("input", point.detach(), flow)
            return
        with reading(self.twin, self.structure, None, None), cut(self.twin, layer) as read, unbroken(self.model):
            begin = self._start(point, labels, start, carried)
            if len(read) != 1:
                raise refusal(layer, f"it runs {len(read)} times")
            flow, elsewhere = torch.autograd.grad(begin, (read[0], point), allow_unused=True)
        if flow is None or elsewhere is not None:
            raise refusal(layer, "other layers read the images too")
        note("input", read[0].detach().reshape(images.shape), flow.reshape(images.shape))

    def per_component(self, name: str, elements: Tensor, factor: Tensor | None = None) -> Tensor:
        return elements if factor is None else elements * factor

    def completed(self, found: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        return found


def without_zeros(values: Tensor) -> Tensor:
    """Tiny values for exact zeros: an input rule may give them relevance, and x ⊙ g must be able to say so."""
    tiny = torch.finfo(values.dtype).tiny ** (1 if values.dtype == torch.float16 else 0.25)
    return torch.where(values == 0, tiny, values)


def is_behind(twin: nn.Module, layer: str, image: Tensor) -> bool:
    """Whether a layer reads something that is computed of the images, not their own values.

    Values in other places, zeros around them (flattened images, patches, padding) are their own: there x ⊙ g is right.

    Parameters
    ----------
    twin : nn.Module
        A replica.
    layer : str
    image : Tensor
        (1, …); only its shape, dtype and device matter. The network runs on random images, up to the layer.

    Raises
    ------
    ValueError
        It is computed of them, but not each value of the pixel in its place alone.
    """
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.empty(image.shape).uniform_(0.1, 0.9, generator=generator).to(image) for _ in range(2))
    before, read = first_input(twin, layer, one)
    if bool(torch.isin(read, torch.cat([one.flatten(), one.new_zeros(1)])).all()):
        return False
    if not torch.equal(before, read):
        raise refusal(layer, "a hook changes what it reads")
    if read.numel() != one.numel():
        raise refusal(layer, f"of images of shape {tuple(one.shape[1:])} it reads {tuple(read.shape[1:])}")
    half = torch.randint(2, image.shape, generator=generator).bool().to(image.device)
    for changed in (half, ~half):
        again = first_input(twin, layer, torch.where(changed, other, one))[1]
        if not torch.equal(*(tensor.reshape(one.shape)[~changed] for tensor in (again, read))):
            raise refusal(layer, "what it reads in the place of a pixel depends on other pixels")
    return True


class _Reached(Exception):
    """The layer that is looked for begins."""


@torch.no_grad()
def first_input(twin: nn.Module, layer: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer is given when it first runs, and what is left of that behind its own hooks; nothing else runs."""
    found: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0].clone())
        if len(found) == 2:
            raise _Reached

    module = twin.get_submodule(layer)
    handles = [module.register_forward_pre_hook(note, prepend=prepend) for prepend in (True, False)]
    try:
        with eager():
            twin(images.clone())
    except _Reached:
        return found[0], found[1]
    finally:
        for handle in handles:
            handle.remove()
    raise refusal(layer, "it does not run on every image")


@contextmanager
def cut(twin: nn.Module, layer: str) -> Iterator[list[Tensor]]:
    """Give a layer leaves for its inputs, without zeros, one for every time it runs; the list is of these."""
    leaves: list[Tensor] = []

    def replace(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        leaves.append(without_zeros(inputs[0]).detach().requires_grad_())
        return leaves[-1], *inputs[1:]

    # before all other hooks of the layer: what they see is then still on the way
    handle = twin.get_submodule(layer).register_forward_pre_hook(replace, prepend=True)
    try:
        yield leaves
    finally:
        handle.remove()


def refusal(layer: str, why: str) -> ValueError:
    return ValueError(
        f"the input rule of layer {layer!r} does not give the relevance of pixels: {why}. Explain with no rule for the "
        "input, or change the images outside of the model, so that its first layer reads them as they are"
    )
