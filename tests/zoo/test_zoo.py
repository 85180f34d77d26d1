"""A tenth of the zoo; all of it: ``make zoo``."""

from __future__ import annotations

import pytest
import torch

from .examine import examine
from .networks import entries


@pytest.mark.parametrize("entry", entries()[5::10], ids=str)
def test_a_tenth_of_the_zoo(entry):
    torch.set_num_threads(1)
    row = examine(entry)
    assert row.wrong == []
    # a refusal names a module of the network or the network itself
    assert all("'" in said or "cannot be" in said for said in row.stops.values())
    assert row.status == "complete"
