"""Eight of the faults; all of them: ``make mutants``."""

from __future__ import annotations

import pytest

from .faults import FAULTS
from .run import PACKAGE, is_killed, with_fault


def test_every_fault_is_of_a_line_that_is_there():
    assert len(FAULTS) >= 40 and len({fault.name for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        text = with_fault(fault, PACKAGE)
        if fault.module.endswith(".py"):
            compile(text, fault.module, "exec")


QUICK = [fault for fault in FAULTS if " -k " in fault.tests]


@pytest.mark.parametrize("fault", QUICK[:: len(QUICK) // 8][:8], ids=str)
def test_a_fault_is_noticed(fault):
    assert is_killed(fault)
