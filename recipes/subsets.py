"""Make the shipped Fashion-MNIST subsets from the original files: ``python recipes/subsets.py ROOT``."""

import hashlib
import json
import sys

import numpy as np

from pxp import data

PER_CLASS = {"reference": 100, "tune": 100, "eval": 200}


def draw(labels, pool, per_class, generator):
    return np.concatenate([np.sort(generator.permutation(pool[labels[pool] == c])[:per_class]) for c in range(10)])


def main(root):
    train_images, train_labels, test_images, test_labels = data._read_full(root)
    generator = np.random.default_rng(0)
    tune = draw(train_labels, np.arange(len(train_labels)), PER_CLASS["tune"], generator)
    rest = np.setdiff1d(np.arange(len(train_labels)), tune)
    reference = draw(train_labels, rest, PER_CLASS["reference"], generator)
    evaluation = draw(test_labels, np.arange(len(test_labels)), PER_CLASS["eval"], generator)
    arrays = {"tune_index": tune.astype(np.int32)}
    for name, images, labels, index in (
        ("reference", train_images, train_labels, reference),
        ("tune", train_images, train_labels, tune),
        ("eval", test_images, test_labels, evaluation),
    ):
        arrays[f"{name}_images"] = images[index].astype(np.uint8)
        arrays[f"{name}_labels"] = labels[index].astype(np.uint8)
    path = data.ASSETS / "fashion-mnist.npz"
    np.savez_compressed(path, **arrays)
    card = {
        "name": "Fashion-MNIST, balanced subsets",
        "source": "Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747",
        "licence": "MIT, Copyright (c) 2017 Zalando SE",
        "splits": {
            "reference": "100 per class, training images",
            "tune": "100 per class, training images that no shipped network was trained on",
            "eval": "200 per class, test images",
        },
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    path.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1])
