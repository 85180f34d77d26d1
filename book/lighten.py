"""Takes from the built site what its pages do not need, see ``_config.yml``.

The theme brings 1,400 icons twice, as fonts and as a script of 1.5 MB, of which
a page shows about twenty. The fonts keep those; the script, which only draws
them once more, is emptied. MathJax stays on pages with formulas. Pictures of
noise, as heatmaps of photographs are, become WebP. And the bibliography loses a
role, that of a list, whose members are none, and what the search quotes of a
page its table of contents.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pydata_sphinx_theme
from fontTools import subset
from PIL import Image

HEAVY = 150_000  # bytes of a picture
QUALITY = 85
LEFT_OUT = '[".headerlink", "script", "style"]'
QUOTED = '[".headerlink", "script", "style", "noscript", "#jb-print-docs-body"]'
FALSE_LIST = '<div role="list" class="citation-list">'
FONTS = "vendor/fontawesome/webfonts"
# `.fa-rocket:before{content:"\f135"}`, and several names with one icon
ICON = re.compile(r'((?:\.fa-[\w-]+:before,?)+)\{content:"\\([0-9a-f]{2,4})"\}')
CODE = re.compile(r'"\\u?([0-9a-f]{4})"')
MATHJAX = re.compile(r'<script[^>]*src="[^"]*mathjax/[^"]*"[^>]*></script>\n?')


def lighten(app: Any, failed: Exception | None) -> None:
    """Sphinx calls it when all pages are written."""
    if failed is None and app.builder.format == "html":
        static = Path(app.outdir, "_static")
        pages = list(Path(app.outdir).rglob("*.html"))
        without_idle_mathjax(pages)
        without_false_lists(pages)
        with_few_icons(static, pages)
        with_clean_excerpts(static / "searchtools.js")
        with_light_pictures(Path(app.outdir, "_images"), pages)


def without_idle_mathjax(pages: list[Path]) -> None:
    for page in pages:
        text = page.read_text(encoding="utf8")
        if 'class="math' not in text and MATHJAX.search(text):
            page.write_text(MATHJAX.sub("", text), encoding="utf8")


def without_false_lists(pages: list[Path]) -> None:
    """Docutils calls citations a list; each is an entry, which has its role."""
    for page in pages:
        text = page.read_text(encoding="utf8")
        if FALSE_LIST in text:
            plain = text.replace(FALSE_LIST, '<div class="citation-list">')
            page.write_text(plain, encoding="utf8")


def with_clean_excerpts(script: Path) -> None:
    """The theme puts a table of contents for print into the text."""
    text = script.read_text(encoding="utf8")
    if LEFT_OUT not in text and QUOTED not in text:
        raise ValueError(
            f"{script} does not leave out {LEFT_OUT}; see lighten.py"
        )
    script.write_text(text.replace(LEFT_OUT, QUOTED), encoding="utf8")


def with_few_icons(static: Path, pages: list[Path]) -> None:
    sheets = [path.read_text(encoding="utf8") for path in static.rglob("*.css")]
    codes = used(sheets, [*pages, *static.glob("scripts/*theme.js")])
    theme = Path(pydata_sphinx_theme.__file__).parent.joinpath("theme")
    for font in theme.rglob(f"static/{FONTS}/*.woff2"):
        keep_icons(font, codes, static / FONTS / font.name)
    for font in static.joinpath(FONTS).glob("*.ttf"):
        font.unlink()  # for browsers that know no woff2
    script = static / "scripts" / "fontawesome.js"
    if script.exists():
        script.write_text("// the icons come from the fonts\n", encoding="utf8")
        for other in script.parent.glob("fontawesome.js.*"):
            other.unlink()


def used(sheets: list[str], files: list[Path]) -> set[int]:
    """Codes of the icons that pages name by class, or style sheets by code."""
    names: set[str] = set()
    for file in files:
        text = file.read_text(encoding="utf8")
        names |= set(re.findall(r"\bfa-[\w-]+", text))
    codes = set()
    for sheet in sheets:
        for rule, code in ICON.findall(sheet):
            if names & set(re.findall(r"fa-[\w-]+", rule)):
                codes.add(int(code, 16))
        codes |= {int(code, 16) for code in CODE.findall(ICON.sub("", sheet))}
    return codes


def keep_icons(font_file: Path, codes: set[int], to: Path) -> None:
    """Write a font with the icons of some codes."""
    options = subset.Options(flavor="woff2", notdef_outline=True)
    font = subset.load_font(str(font_file), options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=codes)
    subsetter.subset(font)
    subset.save_font(font, str(to), options)


def with_light_pictures(folder: Path, pages: list[Path]) -> None:
    heavy = {
        path.name: path.with_suffix(".webp")
        for path in folder.glob("*.png")
        if path.stat().st_size > HEAVY
    }
    for name, light in heavy.items():
        with Image.open(folder / name) as picture:
            picture.convert("RGB").save(light, quality=QUALITY, method=6)
        folder.joinpath(name).unlink()
    for page in pages:
        text = page.read_text(encoding="utf8")
        if named := [name for name in heavy if name in text]:
            for name in named:
                text = text.replace(name, heavy[name].name)
            page.write_text(text, encoding="utf8")


def setup(app: Any) -> dict[str, bool]:
    """Sphinx asks every extension for this."""
    app.connect("build-finished", lighten, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
