"""The searches that the book reports: ``python recipes/searches.py NAME...`` makes or goes on with them.

A study is kept as ``runs/NAME.journal`` while it runs, so that any number of processes can work on it, and written to
``pxp/assets/studies/NAME.json`` when it is complete. Tuning images: 50 per class; references: 10 per class.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import pxp
from pxp.data import ASSETS

# name → model, kind of component, space, sampler, trials (None: the whole grid)
SEARCHES = {
    "vgg-grid": ("vgg", "filter", "paper", "grid", None),
    "resnet-tpe": ("resnet", "filter", "paper", "tpe", 60),
    "resnet-gp": ("resnet", "filter", "paper", "gp", 60),
    "vit-heads-tpe": ("vit", "head", "paper", "tpe", 60),
    "vit-neurons-tpe": ("vit", "neuron", "paper", "tpe", 60),
    "vgg-extended": ("vgg", "filter", "extended", "tpe", 60),
    "resnet-extended": ("resnet", "filter", "extended", "tpe", 60),
}


def search(name: str, seed: int | None) -> None:
    network, kind, space, sampler, trials = SEARCHES[name]
    data, model = pxp.load_dataset(), pxp.load_model(network)
    Path("runs").mkdir(exist_ok=True)
    study = pxp.tune(
        model,
        pxp.reference_samples(data.reference, per_class=10),
        pxp.find_components(model, kind),
        pxp.reference_samples(data.tune, per_class=50),
        trials,
        space=pxp.search_space(model, space) | ({"min_keep": [0, 4]} if space == "extended" else {}),
        sampler=sampler,
        storage=f"runs/{name}.journal",
        study_name=name,
        seed=seed,
    )
    (ASSETS / "studies").mkdir(exist_ok=True)
    pxp.save_study(study, ASSETS / "studies" / f"{name}.json")
    print(f"{name}: {len(study.trials)} trials, best {study.best_value:.3f} by {pxp.winner(study)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=SEARCHES, metavar="NAME", help=", ".join(SEARCHES))
    parser.add_argument("--seed", type=int, default=0, help="of the sampler; several workers need different ones")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for each in arguments.names:
        search(each, arguments.seed)
