"""Pruning curves: accuracy at growing pruning rates, with what is needed to say how sure it is."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .criteria import as_count
from .data import shipped_file
from .files import FORMAT, Newer, check_format, renewed
from .rates import as_rates, fraction
from .statistics import ENOUGH, FEWEST, Estimate, estimate, of_draws

UNKNOWN = "unknown"  # draw of scores that do not know their references


@dataclass(frozen=True)
class Hits:
    """Which images were classified correctly, a bit for each.

    Attributes
    ----------
    shape : tuple of int
        (runs, rates, images).
    bits : bytes
        In this order, eight to a byte.
    images : str
        A hash of the images and their labels: only curves on the same ones can be compared image by image.
    """

    shape: tuple[int, int, int]
    bits: bytes
    images: str = ""

    @classmethod
    def of(cls, right: np.ndarray, images: str = "") -> Hits:
        """Pack bools (runs, rates, images)."""
        runs, rates, number = right.shape
        if not right.size:
            raise ValueError(f"hits of shape {right.shape} are those of no image")
        return cls((runs, rates, number), np.packbits(right).tobytes(), images)

    def array(self) -> np.ndarray:
        """bool, (runs, rates, images)."""
        number = math.prod(self.shape)
        return np.unpackbits(np.frombuffer(self.bits, np.uint8), count=number).astype(bool).reshape(self.shape)

    def entries(self) -> dict:
        """For JSON: of each rate what differs from the one before, which is little, compressed."""
        right = self.array()
        changes = np.concatenate([right[:, :1], right[:, 1:] ^ right[:, :-1]], axis=1)
        text = base64.b64encode(zlib.compress(np.packbits(changes).tobytes(), 9)).decode()
        return {"shape": list(self.shape), "changes": text, "images": self.images}

    @classmethod
    def from_entries(cls, entries: dict) -> Hits:
        """What :meth:`entries` gave."""
        runs, rates, number = (as_count("size", size) for size in entries["shape"])
        limit = -(-runs * rates * number // 8)
        unpack = zlib.decompressobj()
        bits = unpack.decompress(
            base64.b64decode(entries["changes"]), limit
        )  # a damaged file shall not fill the memory
        if len(bits) != limit:
            raise ValueError(f"hits of shape {tuple(entries['shape'])} need {limit} bytes, got {len(bits)}")
        changes = np.unpackbits(np.frombuffer(bits, np.uint8), count=runs * rates * number)
        right = np.bitwise_xor.accumulate(changes.reshape(runs, rates, number), axis=1)
        return cls.of(right.astype(bool), str(entries["images"]))


@dataclass(frozen=True, repr=False)
class Curve:
    """Accuracy at growing pruning rates, for one or several sets of reference samples.

    Attributes
    ----------
    rates : tuple of float
        In [0, 1], growing; a list, array, Tensor or generator becomes a tuple of floats.
    runs : tuple of tuple of float
        Accuracy, in [0, 1], per run (row) and rate (column).
    criterion : str
        What ranked the components.
    settings : dict
        How they were selected.
    draws : tuple of str
        What each run owes to chance, see :attr:`pxp.Scores.draw`; empty where nobody knows.
    hits : Hits, optional
        Which images were right, from which ``runs`` follows; without it intervals leave out the images' part.

    Raises
    ------
    ValueError
        Runs, draws or hits of other numbers than the rates and the runs ask for; accuracies outside [0, 1].
    """

    rates: tuple[float, ...]
    runs: tuple[tuple[float, ...], ...]
    criterion: str = ""
    settings: dict = field(default_factory=dict)
    draws: tuple[str, ...] = ()
    hits: Hits | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", as_rates(self.rates))
        object.__setattr__(self, "runs", tuple(tuple(fraction("accuracy", a) for a in run) for run in self.runs))
        object.__setattr__(self, "draws", tuple(self.draws))
        if not self.rates or not self.runs or any(len(run) != len(self.rates) for run in self.runs):
            raise ValueError(f"every run needs one accuracy for each of the {len(self.rates)} rates")
        if self.draws and len(self.draws) != len(self.runs):
            raise ValueError(f"{len(self.draws)} draws do not belong to {len(self.runs)} runs")
        if self.hits is not None:
            if self.hits.shape[:2] != (len(self.runs), len(self.rates)):
                raise ValueError(
                    f"hits of shape {self.hits.shape} do not belong to {len(self.runs)} runs at {len(self.rates)} rates"
                )
            if not np.allclose(self.hits.array().mean(2), self.runs, rtol=0, atol=1e-9):
                raise ValueError("the accuracies do not follow from the hits")

    @classmethod
    def of_hits(cls, rates: Iterable[float], right: np.ndarray, images: str = "", **other: Any) -> Curve:
        """A curve from which image was right in which run at which rate, bool (runs, rates, images)."""
        runs = tuple(tuple(row) for row in right.mean(2).tolist())
        return cls(as_rates(rates), runs, hits=Hits.of(right, images), **other)

    @cached_property
    def right(self) -> np.ndarray | None:
        """Which images were classified correctly, bool (runs, rates, images); None where nobody knows."""
        return None if self.hits is None else self.hits.array()

    @property
    def images(self) -> int:
        """On how many images it was measured; 0 where nobody knows."""
        return 0 if self.hits is None else self.hits.shape[2]

    @property
    def depends(self) -> bool:
        """Whether it depends on draws (of reference samples, of seeds) at all; magnitude does not."""
        return any(self.draws) or not self.draws

    @property
    def rows(self) -> list[int]:
        """The runs that tell something new: the first of each draw; all of them where nobody knows their draws."""
        known = self.draws or tuple(map(str, range(len(self.runs))))
        return [i for i, draw in enumerate(known) if draw.startswith(UNKNOWN) or draw not in known[:i]]

    def same_draws(self, other: Curve) -> bool:
        """Whether run i of both saw the same reference samples, so that what they have in common cancels.

        Of curves that were both made without ``draws`` this is taken for granted, if they have as many runs.
        """
        if not self.draws and not other.draws:
            return len(self.runs) == len(other.runs)
        own, its = ([curve.draws[i].partition("|")[0] for i in curve.rows if curve.draws] for curve in (self, other))
        return own == its and all(own) and UNKNOWN not in own

    @property
    def accuracy(self) -> np.ndarray:
        """Mean over runs, (rates,)."""
        return np.mean(self.runs, axis=0)

    def at(self, *rates: float) -> Curve:
        """The same runs at some of the rates only, as for a comparison at one; A_PR is then the mean over these.

        Raises
        ------
        ValueError
            A rate that the curve does not have.
        """
        wanted = as_rates(rates)
        if missing := [rate for rate in wanted if rate not in self.rates]:
            raise ValueError(f"the curve has no rate {missing[0]}; it has {', '.join(map(str, self.rates))}")
        places = [self.rates.index(rate) for rate in wanted]
        runs = tuple(tuple(run[place] for place in places) for run in self.runs)
        hits = None if self.hits is None or self.right is None else Hits.of(self.right[:, places], self.hits.images)
        return replace(self, rates=wanted, runs=runs, hits=hits)

    @property
    def a_pr_runs(self) -> np.ndarray:
        """A_PR of each run, (runs,)."""
        return np.mean(self.runs, axis=1)

    @property
    def a_pr(self) -> float:
        """A_PR: mean accuracy over the rates (Hatefi et al. 2024, as reported); at most 1."""
        return float(np.mean(self.runs))

    @property
    def area(self) -> float:
        """Area by the trapezoid rule, as in the paper's public code; at most the last rate minus the first."""
        return float(np.trapezoid(self.accuracy, self.rates))

    def top_pr(self, share: float = 0.95) -> float:
        """Highest rate up to which the mean accuracy never falls below ``share`` of that at the first rate.

        Of a curve that starts at rate 0 that is the unpruned network's; of another it is not, and the Top-PR of two
        curves can only be compared if they start alike. ``share`` is a fraction, 0.95 for 95 %.
        """
        share = fraction("share", share)
        good = self.accuracy >= share * self.accuracy[0]
        return self.rates[int(np.argmin(good)) - 1] if not good.all() else self.rates[-1]

    def interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Interval of the accuracy at each rate; two arrays (rates,).

        It covers both sources of variation, which references (or seeds) were drawn and which images the accuracy is
        measured on, see ``pxp.statistics``; of a criterion that depends on no draw, the images; of a curve without
        hits, the draws. How often it holds what it promises, the book shows: from ten draws and 500 images on mostly,
        not where some draws collapse. ``level`` is a fraction, 0.95 for 95 %. With fewer than three draws of a
        criterion that depends on them nobody can tell: NaN.
        """
        x = None if self.right is None else self.right[self.rows].transpose(1, 0, 2)
        return self._estimate(x, np.asarray(self.runs)[self.rows].T).proportion(level)

    def a_pr_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Interval of A_PR; as :meth:`interval`."""
        x = None if self.right is None else self.right[self.rows].mean(1)
        low, high = self._estimate(x, self.a_pr_runs[self.rows]).proportion(level)
        return float(low), float(high)

    def _estimate(self, right: np.ndarray | None, runs: np.ndarray) -> Estimate:
        if right is None:
            return of_draws(runs)
        return estimate(right, self.depends)

    def plot(self, ax=None, **kwargs):
        """Draw accuracy against pruning rate; see :func:`pxp.plots.curves`."""
        from . import plots

        return plots.curves({self.criterion or "curve": self}, ax=ax, **kwargs)

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(self._entries(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Curve:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            The file is no such JSON, what it holds is no curve, or a newer pxp wrote it.
        """
        try:
            return cls._made_of(json.loads(Path(path).read_text()), path)
        except Newer:
            raise
        except (zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no curve written by pxp: {error}") from error

    def _entries(self) -> dict:
        entries: dict = {"format": FORMAT, "rates": self.rates, "runs": self.runs, "criterion": self.criterion}
        entries |= {"settings": self.settings, "draws": self.draws}
        if self.hits is not None:  # from which the runs follow
            entries |= {"runs": [], "hits": self.hits.entries()}
        return entries

    @classmethod
    def _made_of(cls, entries: dict, path: object) -> Curve:
        hits = Hits.from_entries(entries["hits"]) if entries.get("hits") else None
        runs = tuple(tuple(run) for run in (entries["runs"] if hits is None else hits.array().mean(2).tolist()))
        criterion, settings = entries["criterion"], dict(entries["settings"])
        if check_format(entries.get("format"), path) < 2:
            criterion, kept, turned = renewed(criterion)
            settings |= {"by": "signed"} if kept else {}
            if turned and settings.get("by") == "signed":  # the lowest were the most useful
                settings["order"] = "least" if settings.get("order") == "most" else "most"
        return cls(tuple(entries["rates"]), runs, criterion, settings, tuple(entries.get("draws", ())), hits)

    def __repr__(self) -> str:
        low, high = self.a_pr_interval()
        spread = "" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]"
        first, best = self.rates[0], self.accuracy[0]
        since = f" from {first:.0%} on" if first else ""  # where nothing is said about the unpruned network
        start = f"relative to {best:.3f} at {first:.0%}" if first else f"unpruned {best:.3f}"
        number = len(self.runs)
        runs = f"{number} run{'s' * (number > 1)}" + (f" on {self.images:,} images" if self.images else "")
        few = ""
        draws = len(self.rows)
        if self.depends and draws < FEWEST:
            few = f"; no interval below {FEWEST} draws" if draws > 1 or self.draws else ""
        elif self.depends and draws < ENOUGH:
            few = f"; below {ENOUGH} draws the interval may be too short"
        return (
            f"Curve({self.criterion or 'unnamed'}, {runs}: "
            f"A_PR {self.a_pr:.3f}{spread}{since}, Top-PR {self.top_pr():.0%}, {start}{few})"
        )


def save_curves(curves: Mapping[str, Curve], path: str | Path) -> None:
    """Write named curves as one JSON file.

    Parameters
    ----------
    curves : mapping of str to Curve
    path : path
    """
    written = {name: curve._entries() for name, curve in curves.items()}
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(entries)}" for name, entries in written.items())
    Path(path).write_text(f"{{\n{rows}\n}}\n")


def load_curves(path: str | Path) -> dict[str, Curve]:
    """Read what :func:`save_curves` wrote.

    Parameters
    ----------
    path : path or str
        A file, or the name of curves that ship with the package: the results on the shipped networks, ``"vgg"``,
        ``"resnet"``, ``"vit-heads"``, ``"vit-neurons"``; with these as TASK, ``"exchanged-TASK"`` (the layers of one
        criterion, the components of another) and ``"repair-TASK"`` (as cut and repaired); ``"vgg-leaders"`` (the best
        of the grid).

    Returns
    -------
    dict of str to Curve
        In the order in which they were written.

    Raises
    ------
    FileNotFoundError
        Neither a file nor shipped curves; the message names those.
    ValueError
        Not a file of this kind, or damaged.
    """
    file = shipped_file(path, "curves")
    try:
        return {name: Curve._made_of(entries, file) for name, entries in json.loads(file.read_text()).items()}
    except Newer:
        raise
    except (zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} holds no curves written by pxp: {error}") from error
