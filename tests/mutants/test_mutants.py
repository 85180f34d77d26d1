"""Eight of the faults; all of them: ``make mutants``."""

from __future__ import annotations

import shutil

import pytest

from .faults import FAULTS
from .run import PACKAGE, apply, is_killed


def test_every_fault_is_of_a_line_that_is_there(tmp_path):
    assert len(FAULTS) >= 40 and len({fault.name for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        package = tmp_path / "pxp"
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
        apply(fault, package)
        compile((package / fault.module).read_text(encoding="utf8"), fault.module, "exec")
        shutil.rmtree(package)


QUICK = [fault for fault in FAULTS if " -k " in fault.tests]


@pytest.mark.parametrize("fault", QUICK[:: len(QUICK) // 8][:8], ids=str)
def test_a_fault_is_noticed(fault):
    assert is_killed(fault)
