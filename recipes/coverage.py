"""How often intervals hold: ``python recipes/coverage.py`` writes ``pxp/assets/evidence/coverage.json``.

Two ways. Made-up worlds, of which the truth is known: every draw has an accuracy, every image a difficulty, and both
vary. And real ones: the hits of the shipped curves are taken for the whole world (their mean is the truth), and draws
and images are drawn from them with replacement. In each, an interval of nominally 95 % is computed many times.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import expit
from tqdm import tqdm

import pxp
from pxp.data import ASSETS
from pxp.statistics import estimate

DRAWS, IMAGES, REPETITIONS = (3, 5, 10, 20), (100, 500, 2000), 1000


@dataclass(frozen=True)
class World:
    """Where draws and images come from.

    Attributes
    ----------
    means : callable
        (generator, draws) → the logit of each draw's accuracy.
    spread : float
        Standard deviation of the images' difficulty, on the same scale.
    paired : bool
        Whether the difference of two criteria that saw the same draws and images is looked at.
    expected : tuple of float
        Between what the coverage at ten draws and 500 images lies; measured, and tested.
    """

    means: Callable[[np.random.Generator, int], np.ndarray]
    spread: float = 1.5
    paired: bool = False
    expected: tuple[float, float] = (0.93, 0.97)

    def sample(self, generator: np.random.Generator, draws: int, images: int) -> np.ndarray:
        """Hits (draws, images), or their differences."""
        return self._hits(generator, self.means(generator, draws)[:, None], generator.standard_normal(images))

    def truth(self) -> float:
        """The mean over all draws and images: of a million cells, each a draw and an image of its own."""
        generator = np.random.default_rng(12345)
        return float(self._hits(generator, self.means(generator, 10**6), generator.standard_normal(10**6)).mean())

    def _hits(self, generator: np.random.Generator, means: np.ndarray, difficulty: np.ndarray) -> np.ndarray:
        logit = means + self.spread * difficulty
        first = generator.random(logit.shape) < expit(logit)
        if not self.paired:
            return first.astype(float)
        second = generator.random(logit.shape) < expit(logit - 0.2 + 0.3 * generator.standard_normal(means.shape))
        return first.astype(float) - second


def _normal(mean: float, spread: float) -> Callable[[np.random.Generator, int], np.ndarray]:
    return lambda generator, draws: mean + spread * generator.standard_normal(draws)


def _skewed(generator: np.random.Generator, draws: int) -> np.ndarray:
    return 2.0 - generator.exponential(0.8, draws)


def _collapsing(generator: np.random.Generator, draws: int) -> np.ndarray:
    return np.where(generator.random(draws) < 0.15, -2.2, 2.0 + 0.2 * generator.standard_normal(draws))


WORLDS = {
    "symmetric": World(_normal(1.0, 0.4)),
    "paired difference": World(_normal(1.0, 0.4), paired=True),
    "skewed draws": World(_skewed, expected=(0.86, 0.97)),
    "15 % of draws collapse": World(_collapsing, expected=(0.75, 0.97)),
    "near 1": World(_normal(6.0, 0.3), expected=(0.90, 0.99)),
}


def covered(world: World, draws: int, images: int, repetitions: int, seed: int = 0) -> float:
    """Share of intervals that hold the truth."""
    generator, truth = np.random.default_rng(seed), world.truth()
    samples = (world.sample(generator, draws, images) for _ in range(repetitions))
    return _share(samples, truth, world.paired)


def resampled(right: np.ndarray, draws: int, images: int, repetitions: int, paired: bool, seed: int = 0) -> float:
    """The same where the truth is the mean of these hits (draws, images), which are drawn from with replacement."""
    generator = np.random.default_rng(seed)
    rows = (generator.integers(right.shape[0], size=draws) for _ in range(repetitions))
    samples = (right[np.ix_(row, generator.integers(right.shape[1], size=images))] for row in rows)
    return _share(samples, float(right.mean()), paired)


def _share(samples: Iterable[np.ndarray], truth: float, paired: bool) -> float:
    found = [estimate(x) for x in samples]
    bounds = [each.interval() if paired else each.proportion() for each in found]
    return float(np.mean([low <= truth <= high for low, high in bounds]))


def real() -> dict[str, tuple[np.ndarray, bool]]:
    """Forty draws of the shipped VGG on its 2,000 unseen images: hits (or their difference), and whether paired."""
    data, model = pxp.load_dataset(), pxp.load_model("vgg")
    units = pxp.find_components(model)
    draws = [pxp.reference_samples(data.reference, per_class=10, seed=seed) for seed in range(40)]
    chance = [pxp.attribute(model, draws[0], units, pxp.Random(seed), progress=False) for seed in range(40)]
    ranked = [chance]
    for criterion in (pxp.LRP("epsilon"), pxp.Taylor()):
        ranked.append(pxp.attribute_draws(model, draws, units, criterion, progress=False))
    rates = (0.1, 0.2)
    found = [pxp.pruning_curve(model, each, data.eval, rates=rates, progress=False).right for each in ranked]
    lottery, ours, other = (np.asarray(each, dtype=float) for each in found)
    return {
        "VGG, random, 10 % pruned": (lottery[:, 0], False),
        "VGG, LRP-ε, 20 % pruned": (ours[:, 1], False),
        "VGG, LRP-ε minus Taylor, 20 % pruned": (ours[:, 1] - other[:, 1], True),
    }


def main() -> None:
    rows: list[dict] = []
    cells = list(itertools.product(DRAWS, IMAGES))
    for name, world in WORLDS.items():
        for draws, images in tqdm(cells, desc=name):
            share = covered(world, draws, images, REPETITIONS)
            rows.append({"world": name, "draws": draws, "images": images, "covered": round(share, 3)})
    for name, (right, paired) in real().items():
        for draws, images in tqdm(cells, desc=name):
            share = resampled(right, draws, images, REPETITIONS, paired)
            rows.append({"world": name, "draws": draws, "images": images, "covered": round(share, 3)})
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    text = f'{{"level": 0.95, "repetitions": {REPETITIONS}, "rows": [\n{lines}\n]}}\n'
    (ASSETS / "evidence" / "coverage.json").write_text(text, encoding="utf8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
