"""A tenth of the zoo (all of it: ``make zoo``), and the page that is made of what the whole gave."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from .examine import Row, examine
from .networks import entries
from .page import PAGE, page
from .run import LEAST, stored

FOUND = {row["network"]: Row(**row) for row in stored()["networks"]}


@pytest.mark.parametrize("entry", entries()[6::10], ids=str)
def test_a_tenth_of_the_zoo(entry):
    torch.set_num_threads(1)
    row = examine(entry)
    assert row.wrong == []
    before = FOUND[str(entry)]
    assert (row.status, row.kinds, set(row.stops)) == (before.status, before.kinds, set(before.stops))


def test_the_whole_zoo_was_tried_and_nothing_was_wrong():
    assert list(FOUND) == [str(entry) for entry in entries()]
    counts = Counter(row.status for row in FOUND.values())
    assert counts["complete"] >= LEAST and counts["wrong"] == 0
    # a refusal names a module of the network or the network itself
    for row in FOUND.values():
        assert all("'" in said or "cannot be" in said for said in row.stops.values()), row.network


def test_the_page_is_made_of_it():
    assert PAGE.read_text(encoding="utf8") == page(stored())
