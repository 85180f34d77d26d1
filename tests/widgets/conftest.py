"""Node, which comes with playwright."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pxp

HERE = Path(__file__).resolve().parent
WIDGETS = Path(pxp.__file__).resolve().parent / "widgets"


@pytest.fixture(scope="session")
def node() -> str:
    """Path of Node's program."""
    driver = pytest.importorskip("playwright._impl._driver")
    return str(driver.compute_driver_executable()[0])


@pytest.fixture(scope="session")
def computed(node) -> Callable[[str, Any, list[dict]], list[dict]]:
    """What ``compute`` of an explorer's module gives for some states."""

    def run(name: str, data: Any, states: list[dict], script: str = "compute.mjs") -> list[dict]:
        given = json.dumps({"data": data, "states": states})
        found = subprocess.run(
            [node, HERE / script, name, WIDGETS],
            input=given,
            capture_output=True,
            text=True,
            encoding="utf8",
            check=False,
        )
        assert found.returncode == 0, found.stderr
        return json.loads(found.stdout)

    return run
