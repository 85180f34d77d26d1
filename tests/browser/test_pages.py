"""Every page of the built book as a reader has it: `make browser`."""

from __future__ import annotations

import gzip
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import book_check
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
SITE = ROOT / "_build" / "html"
PAGES = [*book_check.toc_pages(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf8"))), "genindex", "search"]
MOST = 1_000_000  # bytes of all that a page loads, compressed as a server does it
MOST_OF = {"notebooks/prune_in_the_page": 1_500_000}
COMPRESSED = {".woff", ".woff2", ".png", ".webp", ".jpg"}
GRAVE = {"critical", "serious"}

pytestmark = pytest.mark.browser


@pytest.fixture
def settled(opened):
    """Opens a page of the book and waits until formulas and explorers stand."""

    def open_page(page: str, width: int = 1280, theme: str = "light"):
        found = opened((SITE / f"{page}.html").as_uri(), width, theme)
        found.wait_for_load_state("networkidle")
        found.wait_for_function("!window.MathJax?.startup || MathJax.startup.promise.then(() => true)")
        for frame in found.frames[1:]:
            frame.wait_for_selector(".pxp-says:not(:empty)")
        return found

    return open_page


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_calm_light_and_asks_nobody(settled, name):
    page = settled(name)
    assert [line for line in page.heard if not line.startswith(("log:", "info:", "debug:"))] == []
    assert all(address.startswith(("file:", "about:", "data:", "blob:")) for address in page.asked)
    weight = 0
    for file in {Path(unquote(a[7:].split("?")[0].split("#")[0])) for a in page.asked if a.startswith("file://")}:
        assert file.is_file(), file
        data = file.read_bytes()
        weight += len(data if file.suffix in COMPRESSED else gzip.compress(data, 6))
    assert weight <= MOST_OF.get(name, MOST), f"{weight:,} bytes"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_wider_than_the_screen(settled, name, width):
    page = settled(name, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = page.evaluate(
        """() => [...document.querySelectorAll('article *')].filter((e) => {
          const box = e.getBoundingClientRect();
          if (!box.width || box.right <= innerWidth + 1) return false;
          for (let a = e; a && a.tagName !== 'ARTICLE'; a = a.parentElement)
            if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(a).overflowX)) return false;
          return true;
        }).map((e) => e.outerHTML.slice(0, 120))"""
    )
    assert wide == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing_grave(settled, name, theme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = settled(name, 1280, theme)
    found = [each for each in axe.run(page).response["violations"] if each["impact"] in GRAVE]
    told = [
        f"{each['id']} ({each['impact']}): {len(each['nodes'])} × {each['nodes'][0]['html'][:160]}" for each in found
    ]
    assert told == []


def test_what_is_folded_is_printed(settled):
    page = settled("notebooks/02_lrp_foundations")
    shut = "document.querySelectorAll('article details:not([open])').length"
    assert page.evaluate(shut) > 5
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(shut) == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(shut) > 5


def test_a_search_quotes_the_text(chromium):
    """Over a server, as a reader has it: what a result quotes is no table of contents."""
    handler = partial(QuietHandler, directory=str(SITE))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        page = chromium.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/search.html?q=conservation")
        page.wait_for_function("document.querySelectorAll('#search-results p.context').length > 3")
        quoted = page.eval_on_selector_all("#search-results p.context", "all => all.map((p) => p.textContent)")
        page.close()
        server.shutdown()
    assert not any(text.strip("\n .").startswith("Contents") for text in quoted)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass
