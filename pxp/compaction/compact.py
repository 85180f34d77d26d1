"""Compaction: from a mask to a network that really is smaller and computes the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..files import load_tensors, save_tensors
from ..masks import Mask, masked
from ..models import load_model
from ..network.components import Components
from ..network.fold import fold_batch_norm
from ..network.gated import hide_hidden
from ..network.outputs import tensors
from ..network.replica import evaluating, replica
from ..network.trace import example_input
from .follow import Compactor
from .graph import place, traced

LARGEST = 2**28  # values of one input; a file that names more is damaged


def compact(model: nn.Module, mask: Mask, *, example: Tensor | None = None) -> fx.GraphModule:
    """Build the network that is physically smaller and gives the masked model's outputs.

    Filters, neurons, MLP outputs and heads, of one kind or jointly, on any model that ``torch.fx`` can trace:
    torchvision's and timm's CNNs (residual, grouped, depthwise, squeeze-and-excitation) and vision transformers, also
    with gated MLPs and with heads that have relative positions of their own (Swin, BEiT, MaxViT). A
    residual branch computes only its kept channels and adds them at their places; a branch of which nothing is kept is
    gone; grouped convolutions lose whole groups. BatchNorm is merged into its convolution.

    Parameters
    ----------
    model : nn.Module
        Left as it is; the result shares no memory with it.
    mask : Mask
        What to keep.
    example : Tensor, optional
        One batch of inputs; default found as by :func:`pxp.find_components`.

    Returns
    -------
    torch.fx.GraphModule
        An ordinary module in evaluation mode whose layers have the names that they had. What is frozen in the model is
        frozen in it, a bias that a merged BatchNorm leaves with its layer. It can be trained, saved with
        :func:`pxp.save_compact`, compiled, exported, explained and compacted again. In training its dropouts are random
        as the model's are; what else a forward pass does only in training, by an ``if self.training`` of its own, is
        gone. Where the model decides by the size of the image, the result decides as ``example`` does, and raises
        AssertionError for an input that would decide otherwise.

    Raises
    ------
    ValueError
        A mask of another model; a model that cannot be traced or a module that cannot be cut (the message names the
        module and the line of its source); a model that carries forward hooks, such as those of :func:`pxp.masked`.

    Examples
    --------
    >>> small = pxp.compact(model, scores.select(0.3))  # doctest: +SKIP
    """
    if not isinstance(mask, Mask):
        raise TypeError(f"mask must be a pxp.Mask, got {type(mask).__name__}")
    blueprint = Blueprint(model, mask.units, example)
    with torch.inference_mode(False), torch.no_grad():
        return finished(model, blueprint, mask, blueprint.network(mask))


def finished(
    model: nn.Module, blueprint: Blueprint, mask: Mask, small: fx.GraphModule, twin: nn.Module | None = None
) -> fx.GraphModule:
    """A network that a blueprint has cut, with memory of its own, compared with what it was cut from.

    That is the blueprint's model under the mask, or a ``twin`` into whose weights the mask is written.
    """
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for inside, module in small.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            learns = _learns(f"{inside}.{name}".lstrip("."), trainable)
            setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=learns))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.detach().clone())
    try:
        output = small.forward(blueprint.noise)  # the call itself would print where the error is
    except Exception as error:
        reason = f"has a structure that compaction does not understand: {error}{_where(small, blueprint.noise)}"
        raise ValueError(f"{type(model).__name__} {reason}") from error
    if twin is None:
        blueprint.check([mask], (output,))
    else:
        blueprint.same(output, twin(blueprint.noise.clone()))
    example_shape = list(blueprint.images.shape)
    small.meta["pxp"] = {"mask": mask, "model": getattr(model, "pxp_name", None), "example": example_shape}
    return small


class Blueprint:
    """A traced model, from which the network of any mask can be cut; what all masks share is done once.

    Parameters
    ----------
    model, example
        As for :func:`compact`.
    units : Components
        Components of ``model``.

    Attributes
    ----------
    images : Tensor
        One input of the shape that was traced.
    noise : Tensor
        Two random inputs, one if the model takes no more; what is made is compared with the masked model on them.

    Raises
    ------
    ValueError
        As :func:`compact`.
    """

    def __init__(self, model: nn.Module, units: Components, example: Tensor | None = None) -> None:
        units.check(model)
        for name, module in model.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                raise ValueError(
                    f"{name!r} carries forward hooks, which a smaller network cannot keep; remove them first"
                )
        self.model, self.images = model, example_input(model, example)
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.rand(2, *self.images.shape[1:], generator=generator).to(self.images)
        with torch.inference_mode(False), torch.no_grad():
            twin = replica(model)
            fold_batch_norm(twin, units.trace)
            try:
                if not _accepts(twin, self.noise):  # a model of one image at a time
                    self.noise = self.noise[:1]
                self.twin, self.graph = traced(twin, self.noise, tuple(units))
            except Exception as error:
                raise ValueError(
                    f"{type(model).__name__} cannot be traced, so it cannot be made smaller: {error}"
                ) from error

    def cut(self, mask: Mask, twin: nn.Module | None = None) -> tuple[dict[str, Any], fx.Graph]:
        """The parts (name → module or tensor) and the graph of the smaller network; parts may be the model's own.

        They are cut from a replica of the model, or from a ``twin`` of it with other weights.
        """
        with torch.inference_mode(False), torch.no_grad():
            return Compactor(self.twin if twin is None else twin, self.graph, mask).run()

    def network(self, mask: Mask, twin: nn.Module | None = None) -> fx.GraphModule:
        """The smaller network, not yet compared with the masked model; may share memory with the model."""
        made = fx.GraphModule(*self.cut(mask, twin), class_name=type(self.model).__name__).eval()
        made.graph.eliminate_dead_code()
        made.graph.lint()
        made.delete_all_unused_submodules()
        made.recompile()
        return made

    def check(self, masks: Sequence[Mask], found: Sequence[Any]) -> None:
        """Compare outputs for ``noise`` with the masked model's: a structure that was misread must not go unnoticed."""
        for mask, output in zip(masks, found, strict=True):
            with masked(self.model, mask), evaluating(self.model), torch.no_grad():
                self.same(output, self.model(self.noise.clone()))

    def same(self, output: Any, expected: Any) -> None:
        """Raise ValueError unless the two outputs for ``noise`` are equal."""
        tolerance = 1e-2 if self.noise.dtype in (torch.float16, torch.bfloat16) else 1e-4
        wanted = list(tensors(expected))
        pairs = list(zip(tensors(output), wanted, strict=False))
        same = len(pairs) == len(wanted) > 0 and all(a.shape == b.shape for a, b in pairs)
        if not same or not all(_distance(a, b) <= tolerance for a, b in pairs):  # also NaN
            raise ValueError(f"{type(self.model).__name__} has a structure that compaction does not understand")


def _learns(name: str, trainable: dict[str, bool]) -> bool:
    """Whether a parameter of the smaller network wants a gradient: as its own of that name, or those around it, do."""
    found = [trainable[name]] if name in trainable else []
    while not found:
        name = name.rpartition(".")[0]
        found = [learns for own, learns in trainable.items() if not name or own.startswith(f"{name}.")]
    return any(found)


def _accepts(twin: nn.Module, images: Tensor) -> bool:
    try:
        replica(twin)(images.clone())
    except Exception:
        return False
    return True


def _where(small: fx.GraphModule, images: Tensor) -> str:
    """Module and line of the operation that cannot run."""
    failed: list[fx.Node] = []

    class Run(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            failed.append(n)
            value = super().run_node(n)
            failed.pop()
            return value

    run = Run(small)
    run.extra_traceback = False
    try:
        run.run(images)
    except Exception:
        return place(failed[-1])
    return ""


def _distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest expected value."""
    found, expected = found.float(), expected.float()  # also of indices and truths
    return float((found - expected).abs().max()) / max(1e-6, float(expected.abs().max()))


def save_compact(small: nn.Module, path: str | Path) -> None:
    """Write a compacted network as safetensors: its weights, the mask, and which network it was made of.

    Parameters
    ----------
    small : nn.Module
        From :func:`compact`, perhaps trained since.
    path : path

    Raises
    ------
    ValueError
        Not made by :func:`compact`.
    """
    about = getattr(small, "meta", {}).get("pxp")
    if about is None:
        raise ValueError("only what pxp.compact made can be written; save the state_dict of other modules")
    mask: Mask = about["mask"]
    extra = {"model": about["model"], "example": about["example"]}
    save_tensors(path, "compact", mask.units, {"kept": mask, "state": small.state_dict()}, extra)


def load_compact(path: str | Path, model: nn.Module | None = None) -> fx.GraphModule:
    """Read what :func:`save_compact` wrote; nothing is unpickled.

    Parameters
    ----------
    path : path
    model : nn.Module, optional
        A network of the original architecture, left as it is; only its structure matters. Default: made by
        :func:`pxp.load_model`, if the original was.

    Returns
    -------
    torch.fx.GraphModule
        In evaluation mode, on the CPU.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Not a file of this kind, or damaged; one that does not fit ``model``; no ``model`` for a network of your own.
    """
    units, held, extra = load_tensors(path, "compact")
    state, shape = held["state"], extra["example"]
    if model is None and extra["model"] is None:
        raise ValueError(f"{path} was made of a network that pxp.load_model does not make; pass model=<one like it>")
    try:
        if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
            raise ValueError(f"{shape!r} is no shape of an example")
        if math.prod(shape) > LARGEST:
            raise ValueError(f"an example of shape {tuple(shape)} is too large")
        dtype = next((value.dtype for value in state.values() if value.is_floating_point()), torch.float32)
        twin = hide_hidden(replica(load_model(extra["model"]) if model is None else model)).to("cpu", dtype)
        small = compact(twin, Mask(units, held["kept"]), example=torch.zeros(shape))
        small.load_state_dict(_checked(state, small))
    except Exception as error:  # the file may hold anything
        raise ValueError(f"{path} does not fit this network: {error}") from error
    return small


def _checked(state: dict[str, Tensor], small: nn.Module) -> dict[str, Tensor]:
    """A state whose tensors have the right types, and the places of channels that follow from the mask."""
    for name, own in small.state_dict().items():
        given = state.get(name, own)
        if given.dtype != own.dtype:
            raise ValueError(f"{name!r} is {given.dtype}, not {own.dtype}")
        if own.ndim and not own.is_floating_point() and not torch.equal(given, own):
            raise ValueError(f"{name!r} does not follow from the mask")
    return state
