"""How the shipped networks were trained: ``python recipes/training.py vgg --root FOLDER`` does it again, resumably."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2
from tqdm.auto import tqdm

from pxp.data import ASSETS, Split, load_dataset
from pxp.models import SHIPPED

BATCH_SIZE = 128
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.05
EPOCHS = {"vgg": 12, "resnet": 7, "vit": 40}
MAX_LR = {"vgg": 2.5e-3, "resnet": 4e-3, "vit": 2e-3}
CLEAN_EPOCHS = 2  # at the end, on the images as they are, with a learning rate that falls from CLEAN_LR to 0
CLEAN_LR = 5e-4


def train(
    name: str,
    *,
    root: str | Path | None = None,
    epochs: int | None = None,
    seed: int = 0,
    run_folder: str | Path = "runs",
    asset_folder: str | Path = ASSETS,
    data: tuple[Split, Split] | None = None,
) -> dict:
    """Train a shipped architecture from scratch and write its checkpoint and model card.

    AdamW with a one-cycle learning rate, label smoothing, random crops and flips (drawn per batch), then two epochs on
    the images as they are. After each epoch the whole state is saved to ``run_folder``; a run that was stopped goes on
    from there.

    Parameters
    ----------
    name : {"vgg", "resnet", "vit"}
    root : path, optional
        Passed to :func:`pxp.load_dataset` for the full Fashion-MNIST.
    epochs : int, optional
        Augmented epochs; default the number that the shipped checkpoint was trained for.
    seed : int, default 0
    run_folder, asset_folder : path
        Where the resumable state, and the final ``<name>.safetensors`` (float16) and ``<name>.json`` go.
    data : (Split, Split), optional
        Other (train, test) splits, for trying the recipe; default the 59,000 training images that are not in
        ``tune``, and the 10,000 test images.

    Returns
    -------
    dict
        The model card.

    Raises
    ------
    ValueError
        Unknown name, or a saved state of a run with other epochs or seed.
    """
    if name not in SHIPPED:
        raise ValueError(f"unknown network {name!r}; available: {', '.join(map(repr, SHIPPED))}")
    epochs = EPOCHS[name] if epochs is None else epochs
    if data is None:
        full = load_dataset("fashion-mnist", full=True, root=root)
        assert isinstance(full.reference, Split) and isinstance(full.eval, Split)
        data = full.reference, full.eval
    (images, labels), test = data
    images = images.to(memory_format=torch.channels_last)

    torch.manual_seed(seed)
    model = SHIPPED[name]().to(memory_format=torch.channels_last)  # a third faster on a CPU
    optimizer = torch.optim.AdamW(model.parameters(), lr=MAX_LR[name], weight_decay=WEIGHT_DECAY)
    steps = -(-len(labels) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, MAX_LR[name], total_steps=epochs * steps)
    augment = v2.Compose([v2.RandomCrop(28, padding=2), v2.RandomHorizontalFlip()])

    state_path = Path(run_folder) / f"{name}.pt"
    state_path.parent.mkdir(parents=True, exist_ok=True)
    first = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        if (state["epochs"], state["seed"]) != (epochs, seed):
            raise ValueError(
                f"{state_path} is of a run with epochs={state['epochs']}, seed={state['seed']}, not epochs={epochs}, "
                f"seed={seed}; delete it or choose another run_folder"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])
        first = state["epoch"] + 1

    total = epochs + CLEAN_EPOCHS
    for epoch in range(first, total):
        model.train()
        clean = epoch >= epochs
        bar = tqdm(torch.randperm(len(labels)).split(BATCH_SIZE), desc=f"{name} {epoch + 1}/{total}", mininterval=5)
        for step, index in enumerate(bar):
            batch = images[index] if clean else augment(images[index])
            loss = F.cross_entropy(model(batch), labels[index], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            if clean:
                progress = ((epoch - epochs) * steps + step) / (CLEAN_EPOCHS * steps)
                for group in optimizer.param_groups:
                    group["lr"] = CLEAN_LR * (1 - progress)
            optimizer.step()
            if not clean:
                schedule.step()
        bar.write(f"{name} epoch {epoch + 1}: test accuracy {_test_accuracy(model, test):.4f}")
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "rng": torch.get_rng_state(),
            "epoch": epoch,
            "epochs": epochs,
            "seed": seed,
        }
        part = state_path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, state_path)  # never a half-written state

    half = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in model.state_dict().items()
    }
    model.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in half.items()})
    blob = save(half)
    card = {
        "name": name,
        "architecture": f"pxp.models.{SHIPPED[name].__name__}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": f"Fashion-MNIST, {len(labels):,} training images (the tune split was left out)",
        "recipe": f"AdamW, one-cycle learning rate up to {MAX_LR[name]}, weight decay {WEIGHT_DECAY}, "
        f"batch {BATCH_SIZE}, label smoothing {LABEL_SMOOTHING}, random crops (padding 2) and flips drawn per batch; "
        f"then {CLEAN_EPOCHS} epochs without augmentation, learning rate {CLEAN_LR} falling to 0",
        "epochs": total,
        "seed": seed,
        "test_images": len(test.labels),
        "test_accuracy": round(_test_accuracy(model, test), 4),
        "storage": "float16",
        "licence": "BSD-3-Clause",
        "sha256": hashlib.sha256(blob).hexdigest(),
    }
    (Path(asset_folder) / f"{name}.safetensors").write_bytes(blob)
    (Path(asset_folder) / f"{name}.json").write_text(json.dumps(card, indent=2) + "\n")
    return card


@torch.no_grad()
def _test_accuracy(model: nn.Module, test: Split) -> float:
    model.eval()
    hits = sum(
        (model(x).argmax(1) == y).sum() for x, y in zip(test.images.split(500), test.labels.split(500), strict=True)
    )
    return float(hits) / len(test.labels)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=SHIPPED)
    parser.add_argument("--root", help="folder with the original Fashion-MNIST files (default: download)")
    arguments = parser.parse_args()
    for network in arguments.names:
        print(json.dumps(train(network, root=arguments.root), indent=2))
