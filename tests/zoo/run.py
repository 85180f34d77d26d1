"""Try the package on every network of the list: ``python -m zoo.run [--every N] [--write]``, from the folder tests.

Prints a table, and ends with an error if anything is wrong or fewer networks are complete than before. ``--write``
stores what was found in ``results.json`` and writes the page *Which networks* of the book.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import timm
import torch
import torchvision

from .examine import Row, examine
from .networks import entries
from .page import PAGE, page

RESULTS = Path(__file__).parent / "results.json"
LEAST = 85  # complete ones


def run(every: int = 1, processes: int = 2) -> Iterator[Row]:
    """Rows in the order of the list; each network has a process of its own, so that none runs out of memory."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, maxtasksperchild=1) as pool:
        yield from pool.imap(_alone, range(0, len(entries()), every), chunksize=1)


def _alone(number: int) -> Row:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    entry = entries()[number]
    try:
        return examine(entry)
    except Exception as error:
        return Row(str(entry), wrong=[f"{type(error).__name__}: {str(error)[:200]}"])


def stored() -> dict:
    return json.loads(RESULTS.read_text(encoding="utf8"))


def line(row: Row) -> str:
    said = "; ".join([*row.wrong, *(f"{step}: {reason}" for step, reason in row.stops.items())])
    kinds = ", ".join(f"{number} {kind}s" for kind, number in row.kinds.items())
    return f"{row.network:<40} {row.status:<9} {row.seconds:6.1f} s  {row.compact:8.1g}  {kinds}  {said}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--every", type=int, default=1, help="only each so manieth network")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--write", action="store_true", help="store the results and write the page of the book")
    given = parser.parse_args(arguments)
    rows = []
    for row in run(given.every, given.processes):
        rows.append(row)
        print(line(row), flush=True)
    counts = {status: sum(row.status == status for row in rows) for status in ("complete", "refused", "wrong")}
    print(", ".join(f"{number} {status}" for status, number in counts.items()))
    if given.write:
        versions = {library.__name__: library.__version__ for library in (torch, torchvision, timm)}
        found = {"versions": versions, "networks": [row.as_dict() for row in rows]}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")
        PAGE.write_text(page(found), encoding="utf8")
    few = given.every == 1 and counts["complete"] < LEAST
    return int(bool(counts["wrong"]) or few)


if __name__ == "__main__":
    sys.exit(main())
