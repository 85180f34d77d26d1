"""Recovering accuracy: score again while pruning, and train what is left for a short time."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from .attribute import Criterion, attribute
from .components import Components
from .criteria import Magnitude, Random
from .data import Data
from .prune import Mask, Scores, masked
from .replica import evaluating
from .studies import whole


def prune_gradually(
    model: nn.Module,
    refs: Data,
    units: Components,
    criterion: Criterion,
    rate: float,
    *,
    steps: int = 5,
    by: str = "magnitude",
    min_keep: int = 0,
    batch_size: int = 32,
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
    progress : bool, default True

    Returns
    -------
    Mask
        What one step has pruned, the next ones never bring back.

    Raises
    ------
    ValueError
        ``steps`` below 1; as :func:`pxp.attribute` and :meth:`pxp.Scores.select`.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}")
    mask = Mask(units, {name: torch.ones(layer.size, dtype=torch.bool) for name, layer in units.items()})
    bar = tqdm(range(1, steps + 1), desc="prune", delay=5, leave=False, disable=not progress)
    for step in bar:
        with masked(model, mask):
            scores = attribute(model, refs, units, criterion, batch_size=batch_size, progress=False)
        chosen = scores if by == "magnitude" else scores.signed
        lowest = min(float(values.min()) for values in chosen.values()) - 1
        # what is gone stays the lowest, whatever the criterion says of a silent component
        fixed = {name: torch.where(mask[name], values, lowest) for name, values in chosen.items()}
        once = Scores(units, fixed, fixed, criterion=scores.criterion, samples=scores.samples)
        mask = once.select(rate * step / steps, min_keep=min_keep)
        if isinstance(criterion, Magnitude | Random):  # they do not look at the network's state
            return once.select(rate, min_keep=min_keep)
    return mask


def finetune(
    model: nn.Module,
    data: Data,
    *,
    epochs: int = 1,
    teacher: nn.Module | None = None,
    lr: float = 1e-3,
    batch_size: int = 128,
    temperature: float = 2.0,
    seed: int = 0,
    state: str | Path | None = None,
    progress: bool = True,
) -> nn.Module:
    """Train a pruned network for a short time; all its weights, but none that was removed can come back.

    AdamW with a one-cycle learning rate on the cross-entropy of the labels; with a teacher, its mean with the
    divergence from the teacher's softened outputs (Hinton et al. 2015, arXiv:1503.02531).

    Parameters
    ----------
    model : nn.Module
        Best a compact one. Left as it is: a copy is trained.
    data : (images, labels), Dataset or DataLoader
        Training images. Read once and kept in memory.
    epochs : int, default 1
    teacher : nn.Module, optional
        Usually the unpruned network; it is only evaluated.
    lr : float, default 1e-3
        Highest learning rate.
    batch_size : int, default 128
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
        ``epochs``, ``lr`` or ``temperature`` that is not positive; a state of another run.
    """
    for name, value in (("epochs", epochs), ("lr", lr), ("temperature", temperature), ("batch_size", batch_size)):
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    images, labels = whole(data)
    trained = copy.deepcopy(model)
    parameters = [parameter.requires_grad_() for parameter in trained.parameters()]
    images, labels = images.to(parameters[0]), labels.to(parameters[0].device)
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    batches_per_epoch = -(-len(labels) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches_per_epoch)
    about = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed, "images": len(labels)}
    begun = 0
    if state is not None and Path(state).is_file():
        saved = torch.load(state, weights_only=True)
        if saved["about"] != about:
            raise ValueError(f"{state} is the state of another run: {saved['about']}, not {about}")
        trained.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        begun = saved["epoch"]
    bar = tqdm(total=(epochs - begun) * batches_per_epoch, desc="finetune", delay=5, leave=False, disable=not progress)
    devices = [parameters[0].device] if parameters[0].is_cuda else []
    with bar, torch.random.fork_rng(devices), evaluating(teacher or nn.Identity()):
        trained.train()
        for epoch in range(begun, epochs):
            torch.manual_seed(seed + epoch)  # for dropout, too
            order = torch.randperm(len(labels))
            for index in order.split(batch_size):
                x, y = images[index], labels[index]
                logits = trained(x)
                loss = F.cross_entropy(logits, y)
                if teacher is not None:
                    with torch.no_grad():
                        goal = teacher(x)
                    loss = (loss + _divergence(logits, goal, temperature)) / 2
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            if state is not None:
                parts = {"model": trained.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({"about": about, "epoch": epoch + 1, "schedule": schedule.state_dict(), **parts}, state)
    return trained.eval()


def _divergence(logits: Tensor, goal: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of the softened outputs, on the scale of the cross-entropy's gradient."""
    soft, target = F.log_softmax(logits / temperature, 1), F.log_softmax(goal / temperature, 1)
    return temperature**2 * F.kl_div(soft, target, reduction="batchmean", log_target=True)
