"""Apply every fault to a copy of the package and see whether tests turn red: ``python -m mutants.run``, from tests."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .faults import FAULTS, Fault

TESTS = Path(__file__).resolve().parent.parent
PACKAGE, RECIPES = TESTS.parent / "pxp", TESTS.parent / "recipes"
RED = 1  # pytest's exit code where tests have failed; others mean that none has run


def with_fault(fault: Fault, package: Path) -> str:
    """The module's text with the fault.

    Raises
    ------
    ValueError
        The line is not there, or more than once.
    """
    text = (package / fault.module).read_text(encoding="utf8")
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.module} has {text.count(fault.old)} times {fault.old!r}")
    return text.replace(fault.old, fault.new)


def outcome(tests: str, fault: Fault | None = None) -> subprocess.CompletedProcess[str]:
    """Run tests on a copy with a fault, or with none, until the first that fails."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "pxp"
        for source in (PACKAGE, RECIPES):
            shutil.copytree(source, Path(folder) / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        if fault is not None:
            (package / fault.module).write_text(with_fault(fault, package), encoding="utf8")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([folder, str(TESTS)]),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        # without the root in the path, where the package would hide its copy
        options = ["-x", "-q", "-p", "no:cacheprovider", "-o", "pythonpath="]
        command = [sys.executable, "-m", "pytest", *options, *tests.split()]
        return subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)


def is_killed(fault: Fault) -> bool:
    """Whether a test fails because of the fault.

    Raises
    ------
    RuntimeError
        The tests did not run at all.
    """
    ended = outcome(fault.tests, fault)
    if ended.returncode not in (0, RED):
        raise RuntimeError(f"{fault}: {ended.stdout[-500:]}{ended.stderr[-500:]}")
    return ended.returncode == RED


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    given = parser.parse_args(arguments)
    chosen = [fault for fault in FAULTS if given.only in fault.name]
    for fault in chosen:
        with_fault(fault, PACKAGE)  # before anything runs

    def tried(fault: Fault) -> bool:
        began = time.perf_counter()
        killed = is_killed(fault)
        print(f"{'killed' if killed else 'ALIVE '} {time.perf_counter() - began:5.1f} s  {fault}", flush=True)
        return killed

    with ThreadPoolExecutor(given.processes) as pool:
        # what fails without any fault kills nothing
        sound = list(pool.map(lambda tests: outcome(tests).returncode == 0, sorted({f.tests for f in chosen})))
        if not all(sound):
            failing = [
                tests for tests, right in zip(sorted({f.tests for f in chosen}), sound, strict=True) if not right
            ]
            print("these fail without any fault:", *failing, sep="\n  ")
            return 1
        killed = list(pool.map(tried, chosen))
    print(f"{sum(killed)} / {len(killed)} killed")
    return int(not all(killed))


if __name__ == "__main__":
    sys.exit(main())
