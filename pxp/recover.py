"""Recovering accuracy: score again while pruning, and train what is left for a short time."""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Iterable
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zennit.core import Composite

from .attribute import as_criterion, attribute
from .bars import bar
from .batches import BATCH_SIZE, Data, check_classes, fingerprints, whole
from .criteria import Criterion
from .files import FORMAT, check_format
from .identity import identity
from .masks import Mask, masked
from .network.components import Components, check_components
from .network.layers import is_batch_norm
from .network.outputs import logits_of
from .network.replica import evaluating
from .scores import Scores

WARM = 0.3  # of all steps, while the learning rate rises


def prune_gradually(
    model: nn.Module,
    refs: Data,
    units: Components,
    criterion: Criterion | Composite,
    rate: float,
    *,
    steps: int = 5,
    by: str = "magnitude",
    min_keep: int = 0,
    batch_size: int = BATCH_SIZE,
    state: str | Path | None = None,
    progress: bool = True,
) -> Mask:
    """Prune a little, score what is left anew, and go on: no component is judged by a network that no longer exists.

    Parameters
    ----------
    model, refs, units, criterion, batch_size
        As for :func:`pxp.attribute`. The model is left as it is.
    rate : float
        Fraction that is pruned in the end, in [0, 1].
    steps : int, default 5
        Attributions; 1 is the ordinary one-shot pruning.
    by, min_keep
        As for :meth:`pxp.Scores.select`.
    state : path, optional
        File for the state after each step; a call that finds one goes on from there.
    progress : bool, default True

    Returns
    -------
    Mask
        What one step has pruned, the next ones never bring back.

    Raises
    ------
    ValueError
        ``steps`` that is no number of steps; a file that is not this run's state; a state of a criterion that nothing
        tells from others, see ``pxp.identity``; as :func:`pxp.attribute` and :meth:`pxp.Scores.select`.
    FileNotFoundError
        No folder for the state.
    """
    steps = _count("steps", steps)
    check_components(units)
    even = {name: torch.zeros(layer.size) for name, layer in units.items()}
    signed = as_criterion(criterion).has_sign
    nothing = Scores(units, even, even, criterion=repr(criterion), has_sign=signed)
    nothing.select(rate, by=by, min_keep=min_keep)  # a wrong value is an error now, not after the first attribution
    mask, begun, about = nothing.select(0), 0, {}
    if state is not None:
        if (mark := identity(criterion)) is None:
            raise ValueError(f"a state needs a criterion that can be told from others by its values, got {criterion!r}")
        about = {"rate": float(rate), "steps": steps, "by": by, "min_keep": min_keep, "criterion": mark}
        about |= {"components": repr(units), "network": _digest(_tensors(model))}
        about |= {"references": None if refs is None else _digest(whole(refs))}
        # before format 2 a criterion was kept as its text, which left out parameters of rule objects, and the sign of a
        # loss was another
        text = repr(criterion)
        sure = text.count("(") == 1 and not (by == "signed" and "loss" in text)
        saved = _load(state, about, {**about, "criterion": text if sure else None})
        if saved is not None:
            mask, begun = Mask(units, saved["kept"]), saved["done"]
    rounds = bar(range(begun + 1, steps + 1), show=progress, desc="prune")
    for step in rounds:
        with masked(model, mask):
            scores = attribute(model, refs, units, criterion, batch_size=batch_size, progress=False)
        chosen = scores if by == "magnitude" else scores.signed
        lowest = min(float(values.min()) for values in chosen.values()) - 1
        # what is gone stays the lowest, whatever the criterion says of a silent component
        fixed = {name: torch.where(mask[name], values, lowest) for name, values in chosen.items()}
        once = Scores(units, fixed, fixed, criterion=scores.criterion, samples=scores.samples)
        mask = once.select(rate * step / steps, min_keep=min_keep)
        if scores.samples == 0:  # such a criterion does not look at the network's state
            return once.select(rate, min_keep=min_keep)
        if state is not None:
            _save(state, about, step, {"kept": dict(mask)})
    return mask


@torch.inference_mode(False)
@torch.enable_grad()
def finetune(
    model: nn.Module,
    data: Data,
    *,
    epochs: int = 1,
    teacher: nn.Module | None = None,
    lr: float = 1e-3,
    batch_size: int = BATCH_SIZE,
    temperature: float = 2.0,
    seed: int = 0,
    state: str | Path | None = None,
    progress: bool = True,
) -> nn.Module:
    """Train a pruned network for a short time; all weights that are not frozen, but none that was removed comes back.

    AdamW on the cross-entropy of the labels; with a teacher, its mean with T² times the divergence from the teacher's
    outputs softened by the temperature T (Hinton et al. 2015, arXiv:1503.02531). The learning rate rises linearly over
    the first 30 % of the steps and falls to 0 by a cosine, however few steps there are. The order of the images is
    another one in every epoch. Dropout is random and BatchNorm measures each batch, as in any training; a BatchNorm
    whose parameters are all frozen keeps its statistics.

    Parameters
    ----------
    model : nn.Module
        Best a compact one. Left as it is: a copy is trained. Parameters that want no gradient stay as they are.
    data : (images, labels), Dataset or DataLoader
        Training images. Read once and kept in memory.
    epochs : int, default 1
    teacher : nn.Module, optional
        Usually the unpruned network; it is only evaluated.
    lr : float, default 1e-3
        Highest learning rate.
    batch_size : int, default 64
        A single image that would be left over joins the batch before it.
    temperature : float, default 2
        Softens both outputs for the comparison with the teacher.
    seed : int, default 0
        Of the order of the images and of dropout. The same seed gives the same network on the same machine.
    state : path, optional
        File for the state after each epoch; a call that finds one goes on from there.
    progress : bool, default True
        Show a bar when it takes longer than five seconds.

    Returns
    -------
    nn.Module
        In evaluation mode.

    Raises
    ------
    ValueError
        ``epochs``, ``lr``, ``batch_size`` or ``temperature`` that is not positive; a network without parameters, or
        with frozen ones only; weights that become infinite or NaN; a file that is not this run's state.
    FileNotFoundError
        No folder for the state.
    """
    epochs, batch_size = _count("epochs", epochs), _count("batch_size", batch_size)
    for name, value in (("lr", lr), ("temperature", temperature)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    images, labels = whole(data)
    trained = copy.deepcopy(model)
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    if not parameters:
        found = "no parameters" if next(trained.parameters(), None) is None else "only frozen parameters"
        raise ValueError(f"{type(model).__name__} has {found}, so there is nothing to train")
    images, labels = images.to(parameters[0]), labels.to(parameters[0].device)
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    batches_per_epoch = len(_batches(torch.arange(len(labels)), batch_size))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_share, steps=epochs * batches_per_epoch))
    parts: dict[str, Any] = {"network": trained, "optimizer": optimizer, "schedule": schedule}
    about: dict[str, Any] = {}
    begun = 0
    if state is not None:
        about = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "temperature": temperature, "seed": seed}
        about |= {"network": _digest(_tensors(model)), "data": _digest((images, labels))}
        about |= {"teacher": None if teacher is None else _digest(_tensors(teacher))}
        saved = _load(state, about)
        if saved is not None:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            begun = saved["done"]
    ahead = bar(show=progress, total=(epochs - begun) * batches_per_epoch, desc="finetune")
    devices = [parameters[0].device] if parameters[0].is_cuda else []
    with ahead, torch.random.fork_rng(devices), evaluating(teacher or nn.Module()):
        trained.train()
        for module in trained.modules():
            own = [parameter.requires_grad for parameter in module.parameters()]
            if is_batch_norm(module) and own and not any(own):
                module.eval()
        for epoch in range(begun, epochs):
            torch.manual_seed(seed + epoch)  # for dropout, too
            order = torch.randperm(len(labels))
            for index in _batches(order, batch_size):
                x, y = images[index], labels[index]
                logits = logits_of(trained(x.clone()))
                check_classes(y, logits)
                loss = F.cross_entropy(logits, y)
                if teacher is not None:
                    with torch.no_grad():
                        goal = logits_of(teacher(x))
                    loss = (loss + _divergence(logits, goal, temperature)) / 2
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                ahead.update()
            if not all(bool(parameter.isfinite().all()) for parameter in parameters):
                raise ValueError(f"weights are infinite or NaN after epoch {epoch + 1} of {epochs}; lower lr={lr:g}")
            if state is not None:
                _save(state, about, epoch + 1, {name: part.state_dict() for name, part in parts.items()})
    trained.eval()
    return trained


def _share(step: int, steps: int) -> float:
    """Of the highest learning rate, at the middle of each step."""
    place = (step + 0.5) / steps
    return place / WARM if place < WARM else (1 + math.cos(math.pi * (place - WARM) / (1 - WARM))) / 2


def _batches(order: Tensor, size: int) -> list[Tensor]:
    """Indices by batches, none of a single image: BatchNorm has nothing to measure on it."""
    parts = list(order.split(size))
    if len(parts) > 1 and len(parts[-1]) == 1 < size:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _divergence(logits: Tensor, goal: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of the softened outputs, on the scale of the cross-entropy's gradient."""
    soft, target = F.log_softmax(logits / temperature, 1), F.log_softmax(goal / temperature, 1)
    return temperature**2 * F.kl_div(soft, target, reduction="batchmean", log_target=True)


def _count(name: str, value: int) -> int:
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
    return int(value)


# --- states -----------------------------------------------------------------------------------------------------------


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _digest(tensors: Iterable[Tensor]) -> str:
    """A short hash of all values, to see whether a state is of the same run."""
    marks = [
        mark for tensor in tensors for mark in (str(tensor.shape), *fingerprints(torch.atleast_2d(tensor), math.inf))
    ]
    return hashlib.blake2b("".join(marks).encode(), digest_size=6).hexdigest()


def _load(state: str | Path, about: dict[str, Any], before: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """What :func:`_save` wrote for the same run, None if there is no file yet; ``before``: ``about`` of format 1."""
    path = Path(state)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder for the state {path}")
    if not path.exists():
        return None
    damaged = f"{path} is no state that this function has written, or it is damaged"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise  # a folder, or no permission
    except Exception as error:  # there is no end to how a damaged pickle fails
        raise ValueError(damaged) from error
    found = saved.get("about") if isinstance(saved, dict) else None
    if isinstance(found, dict) and check_format(saved.get("format"), path) < 2:
        about = before or about
    if not isinstance(found, dict) or set(found) != set(about):
        raise ValueError(damaged)
    odd = [name for name in about if found[name] != about[name]]
    if odd:
        raise ValueError(f"{path} is the state of another run: {', '.join(odd)} differ; delete it or name another file")
    return saved


def _save(state: str | Path, about: dict[str, Any], done: int, parts: dict[str, Any]) -> None:
    path = Path(state)
    part = path.with_name(f"{path.name}.part")
    torch.save({"format": FORMAT, "about": about, "done": done, **parts}, part)
    os.replace(part, path)  # never a half-written state
