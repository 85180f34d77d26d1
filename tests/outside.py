"""Programs outside of Python that tests run: Node, which comes with playwright, and Chromium, as the machine has it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pxp

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


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
            [node, Path(__file__).parent / "widgets" / script, name, Path(pxp.__file__).resolve().parent / "widgets"],
            input=given,
            capture_output=True,
            text=True,
            encoding="utf8",
            check=False,
        )
        assert found.returncode == 0, found.stderr
        return json.loads(found.stdout)

    return run


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    """A browser; without one the tests that need it are skipped."""
    sync_api = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium) -> Iterator:
    """Opens an address in a page of its own; what its console says and what it asks for is in ``page.heard``."""
    pages = []

    def open_page(address: str, width: int = 1280, theme: str = "light"):
        page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
        pages.append(page)
        page.heard, page.asked = [], []
        page.on("console", lambda message: page.heard.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: page.heard.append(f"error: {error}"))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(address)
        return page

    yield open_page
    for page in pages:
        page.close()
