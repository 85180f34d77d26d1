"""The table of contents names real files, the prose cites real sources, and the check of the built book can fail."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import book_check
import nbformat
import numpy as np
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

import pxp

ROOT = Path(__file__).resolve().parent.parent
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf8"))
PAGES = book_check.toc_pages(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf8")))


@pytest.mark.parametrize("page", PAGES)
def test_page_of_the_contents_exists(page):
    assert any((ROOT / f"{page}{suffix}").is_file() for suffix in (".md", ".ipynb"))


def test_every_page_is_in_the_contents():
    written = [*ROOT.glob("book/*.md"), *ROOT.glob("notebooks/*.ipynb")]
    assert {path.relative_to(ROOT).with_suffix("").as_posix() for path in written} == set(PAGES)


def test_every_citation_is_in_the_bibliography():
    keys = set(re.findall(r"^@\w+\{(\w+),", (ROOT / "book/references.bib").read_text(encoding="utf8"), re.MULTILINE))
    for path in ROOT.glob("book/*.md"):
        for group in re.findall(r"\{cite:\w+\}`([^`]+)`", path.read_text(encoding="utf8")):
            assert {key.strip() for key in group.split(",")} <= keys, path.name


def test_every_public_name_has_its_place_in_the_api():
    pages = "".join(
        (ROOT / f"book/{page}.md").read_text(encoding="utf8") for page in ("api", "own-criterion", "own-layer")
    )
    listed = re.findall(r"^\.\. auto\w+:: pxp\.(\w+)$", pages, re.MULTILINE)
    assert sorted(listed) == sorted(pxp.__all__)


def test_nothing_is_executed_by_the_build_and_nothing_asks_another_host():
    assert CONFIG["execute"]["execute_notebooks"] == "off"
    sphinx = CONFIG["sphinx"]["config"]
    assert not {"sphinx_thebe", "sphinx.ext.intersphinx"} & set(sphinx["extensions"])
    assert (ROOT / "book/assets" / sphinx["mathjax_path"]).is_file()
    assert sphinx["nb_ipywidgets_js"] == {}


def test_what_is_shown_beside_a_figure_is_no_figure(monkeypatch):
    (suffix, (reader, *_)), *others = CONFIG["sphinx"]["config"]["nb_custom_formats"].items()
    assert (suffix, reader, others) == (".ipynb", "notebook_reader.read", [])
    monkeypatch.syspath_prepend(ROOT / CONFIG["sphinx"]["local_extensions"]["notebook_reader"])
    read = importlib.import_module("notebook_reader").read
    picture = new_output("display_data", {"image/png": "", "text/plain": "<Figure>"})
    table = new_output("display_data", {"text/html": "<table>", "text/plain": "numbers"})
    printed = new_output("stream", text="1")
    figure = {"mystnb": {"figure": {"name": "fig-a"}}, "tags": ["hide-input", "report"]}
    cells = [
        new_code_cell("1", outputs=[picture, printed, table], metadata=figure),
        new_code_cell("2", outputs=[picture, printed], metadata=figure),
        new_code_cell("3", outputs=[table]),
    ]
    first, behind, *rest = read(nbformat.writes(new_notebook(cells=cells))).cells
    assert first.outputs == [picture, printed] and first.metadata == figure and first.source == "1"
    assert behind.outputs == [table] and behind.metadata == {"tags": ["remove-input", "report"]}
    assert [cell.source for cell in rest] == ["2", "3"] and [len(cell.outputs) for cell in rest] == [2, 1]


def test_what_an_explorer_shows_keeps_the_code_and_its_still_stands_behind(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book")
    read = importlib.import_module("notebook_reader").read
    frame = new_output("display_data", {"text/html": "<iframe>", "text/plain": "an explorer"})
    picture = new_output("display_data", {"image/png": "", "text/plain": "<Figure>"})
    table = new_output("display_data", {"text/html": "<table>", "text/plain": "numbers"})
    figure = {"mystnb": {"figure": {"name": "fig-a"}}, "tags": ["hide-input"]}
    cell = new_code_cell("explorer()", outputs=[frame, picture, table], metadata=figure)
    before, still, behind = read(nbformat.writes(new_notebook(cells=[cell]))).cells
    assert before.source == "explorer()" and before.outputs == [frame] and before.metadata == {"tags": ["hide-input"]}
    assert still.outputs == [picture] and "remove-input" in still.metadata["tags"] and "mystnb" in still.metadata
    assert behind.outputs == [table] and behind.metadata == {"tags": ["remove-input"]}


@pytest.fixture
def lighten(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book")
    return importlib.import_module("lighten")


def test_a_page_keeps_mathjax_only_for_formulas(lighten, tmp_path):
    script = '<script defer="defer" src="../_static/mathjax/tex.js?v=1"></script>\n'
    idle, busy = tmp_path / "a.html", tmp_path / "b.html"
    idle.write_text(f"<head>{script}</head>text")
    busy.write_text(f'<head>{script}</head><span class="math notranslate">x</span>{lighten.FALSE_LIST}')
    lighten.without_idle_mathjax([idle, busy])
    lighten.without_false_lists([idle, busy])
    assert idle.read_text() == "<head></head>text"
    assert script in busy.read_text() and 'role="list"' not in busy.read_text()


def test_excerpts_leave_out_the_contents(lighten, tmp_path):
    script = tmp_path / "searchtools.js"
    script.write_text(f"for (const query of {lighten.LEFT_OUT}) {{}}")
    lighten.with_clean_excerpts(script)
    lighten.with_clean_excerpts(script)  # what is clean stays so
    assert script.read_text().count("#jb-print-docs-body") == 1
    script.write_text("another search")
    with pytest.raises(ValueError, match="does not leave out"):
        lighten.with_clean_excerpts(script)


def test_icons_that_a_page_names_stay(lighten, tmp_path):
    sheet = '.fa-star:before{content:"\\f005"}.fa-gear:before,.fa-cog:before{content:"\\f013"}a{--pst-icon-x:"\\uf00d"}'
    page = tmp_path / "a.html"
    page.write_text('<i class="fa-solid fa-cog"></i>')
    assert lighten.used([sheet], [page]) == {0xF013, 0xF00D}
    theme = Path(importlib.import_module("pydata_sphinx_theme").__file__).parent
    (font,) = theme.rglob("static/vendor/fontawesome/webfonts/fa-solid-900.woff2")
    small = tmp_path / "small.woff2"
    lighten.keep_icons(font, {0xF013, 0xF00D}, small)
    kept = importlib.import_module("fontTools.ttLib").TTFont(small).getBestCmap()
    assert set(kept) == {0xF013, 0xF00D} and small.stat().st_size < font.stat().st_size / 50


def test_pictures_of_noise_become_webp(lighten, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    Image.fromarray(noise[:9, :9]).save(tmp_path / "small.png")
    page = tmp_path / "a.html"
    page.write_text("<img src='_images/noise.png'><img src='_images/small.png'>")
    lighten.with_light_pictures(tmp_path, [page])
    assert page.read_text() == "<img src='_images/noise.webp'><img src='_images/small.png'>"
    assert {path.name for path in tmp_path.iterdir()} == {"a.html", "noise.webp", "small.png"}


def site(folder: Path, body: str) -> list[str]:
    """Problems of a site of two pages, the first one with the given body."""
    (folder / "index.html").write_text("<a href='page.html'>go</a>")
    (folder / "page.html").write_text(f"<html><body id='top'>{body}</body></html>")
    (folder / "figure.png").write_bytes(b"x" * 1_500_000)
    return list(book_check.check(folder, ["page"]))


def test_a_good_site_passes(tmp_path):
    assert site(tmp_path, "<img src='figure.png' alt='a'><a href='https://arxiv.org'>x</a><a href='#top'>up</a>") == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<script src='https://cdn.example/x.js'></script>", "from another host"),
        ("<script src='//cdn.example/x.js'></script>", "from another host"),
        ("<script>import('https://cdn.example/x.js')</script>", "from another host"),
        ("<link rel='stylesheet' href='https://cdn.example/x.css'>", "from another host"),
        ("<img src='https://cdn.example/x.png' alt='a'>", "from another host"),
        ("<img srcset='figure.png 1x, https://cdn.example/x.png 2x' alt='a'>", "from another host"),
        ("<style>@font-face { src: url(https://cdn.example/x.woff2) }</style>", "from another host"),
        ("<p style=\"background: url('https://cdn.example/x.png')\">", "from another host"),
        ("<iframe src='https://example.org'></iframe>", "from another host"),
        ("<img src='missing.png' alt='a'>", "missing.png does not exist"),
        ("<img src='figure.png'>", "has no alt text"),
        ("<img src='figure.png' alt='a'>" + "x" * 600_000, "at most 2,000,000"),
        ("<a href='other.html'>x</a>", "dead link other.html"),
        ("<a href='#nowhere'>x</a>", "dead anchor #nowhere"),
    ],
)
def test_each_fault_of_a_page_is_found(tmp_path, body, message):
    assert any(message in problem for problem in site(tmp_path, body))


def test_a_missing_page_and_a_remote_font_in_css_are_found(tmp_path):
    (tmp_path / "index.html").write_text("")
    (tmp_path / "style.css").write_text("@import 'https://fonts.example/x.css';")
    problems = list(book_check.check(tmp_path, ["gone"]))
    assert any("gone.html was not built" in problem for problem in problems)
    assert any("fonts.example" in problem for problem in problems)
