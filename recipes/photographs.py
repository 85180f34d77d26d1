"""The four photographs of the book: ``python recipes/photographs.py`` writes ``pxp/assets/photographs.npz``.

Of scikit-image 0.26's data (``pip install scikit-image``): the middle of each, scaled to 224 x 224 pixels.
"""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path

import numpy as np
from PIL import Image

from pxp.data import ASSETS, sha256

SOURCES = {
    "chelsea.png": (285, "the cat Chelsea, by Stefan van der Walt; CC0"),
    "coffee.png": (967, "a cup of coffee, by Rachel Michetti, courtesy of Pikolo Espresso Bar; CC0"),
    "rocket.jpg": (657, "launch of a Falcon 9 with DSCOVR, by SpaceX; public domain"),
    "astronaut.png": (450, "the astronaut Eileen Collins, NASA Great Images; public domain"),
}


def middle(path: Path, side: int = 224) -> np.ndarray:
    image = Image.open(path).convert("RGB")
    edge = min(image.size)
    left, top = ((length - edge) // 2 for length in image.size)
    square = image.crop((left, top, left + edge, top + edge))
    return np.array(square.resize((side, side), Image.Resampling.BICUBIC))


if __name__ == "__main__":
    spec = util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install scikit-image, which brings the photographs")
    folder, path = Path(spec.origin).parent / "data", ASSETS / "photographs.npz"
    images = np.stack([middle(folder / name) for name in SOURCES])
    np.savez_compressed(path, images=images, labels=np.array([label for label, _ in SOURCES.values()]))
    card = {
        "name": "Four photographs",
        "source": "scikit-image's data, the middle of each at 224 x 224 pixels",
        "photographs": {name.split(".")[0]: text for name, (_, text) in SOURCES.items()},
        "sha256": sha256(path),
    }
    path.with_suffix(".json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf8")
