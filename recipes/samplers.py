"""How fast samplers find good settings: ``python recipes/samplers.py [SAMPLER ...]`` replays them on ``vgg-grid``.

Every setting of the paper's space on the VGG was measured once, so a trial is a lookup, and a sampler can be run with
many seeds. What is kept, as ``pxp/assets/evidence/samplers.json``: for each sampler and seed the best value after
every ten trials. Seeds that are there are not run again, so that the Gaussian process can be given more time:
``python recipes/samplers.py gp --seconds 3600``.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import optuna
import torch

import pxp
from pxp.data import ASSETS
from pxp.search.space import SearchSpace

PATH = ASSETS / "evidence" / "samplers.json"
AFTER = list(range(10, 101, 10))  # trials
# sampler → how it is made, and how many seeds are wanted
SAMPLERS = {
    "random": (optuna.samplers.RandomSampler, 200),
    "tpe": (optuna.samplers.TPESampler, 100),
    "gp": (optuna.samplers.GPSampler, 100),
}


def replay(sampler: optuna.samplers.BaseSampler, space: SearchSpace, table: dict) -> list[float]:
    """The best value after so many trials."""
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(lambda trial: table[_key(space(trial))], n_trials=AFTER[-1])
    best = np.maximum.accumulate([trial.value for trial in study.trials])
    return [round(float(best[number - 1]), 5) for number in AFTER]


def _key(params: dict) -> tuple:
    return tuple(sorted(params.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samplers", nargs="*", metavar="SAMPLER", help=f"{', '.join(SAMPLERS)}; default all")
    parser.add_argument(
        "--seconds", type=float, default=7200, help="after which no new seed is begun, for each sampler"
    )
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    space = pxp.search_space(pxp.load_model("vgg"))
    table = {_key(trial.params): trial.value for trial in pxp.load_study("vgg-grid").trials}
    known = (
        json.loads(PATH.read_text()) if PATH.exists() else {"after": AFTER, "best": max(table.values()), "found": {}}
    )
    for name in given.samplers or SAMPLERS:
        make, seeds = SAMPLERS[name]
        rows = known["found"].setdefault(name, [])
        end = time.monotonic() + given.seconds
        while len(rows) < seeds and time.monotonic() < end:
            rows.append(replay(make(seed=len(rows)), space, table))
            lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in known["found"].items())
            head = json.dumps({key: value for key, value in known.items() if key != "found"})[:-1]
            PATH.write_text(f'{head}, "found": {{\n{lines}\n}}}}\n')
        gaps = 100 * (known["best"] - np.array(rows))
        error = gaps.std(0, ddof=1) / len(gaps) ** 0.5
        shown = " ".join(f"{n}: {g:.2f} ± {e:.2f}" for n, g, e in zip(AFTER, gaps.mean(0), error, strict=True))
        print(f"{name}, {len(rows)} seeds, gap to the best in hundredths after trials: {shown}", flush=True)


if __name__ == "__main__":
    main()
