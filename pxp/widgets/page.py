"""An explorer as one document: its module with all that it imports, its style and its data, for a frame in the page."""

from __future__ import annotations

import json
import re
from html import escape
from importlib.resources import files
from typing import Any

from ..plots import COLORS

_IMPORT = re.compile(r'^import \{[^}]*\} from "\./(\w+\.js)";\n', re.MULTILINE)
# lighter ones for a dark ground, in the order of COLORS
_ON_DARK = ("#56B4E9", "#F0803C", "#2FC79A", "#E59AC6", "#F2C14E")


def source(name: str) -> str:
    """Text of a file of this folder."""
    return files(__package__).joinpath(name).read_text(encoding="utf8")


def module(name: str) -> str:
    """An explorer and the modules that it imports, each once, as the text of one module without imports."""
    parts: dict[str, str] = {}

    def add(file: str) -> None:
        if file in parts:
            return
        text = source(file)
        for other in _IMPORT.findall(text):
            add(other)
        parts[file] = re.sub(r"^export (?!default)", "", _IMPORT.sub("", text), flags=re.MULTILINE)

    add(f"{name}.js")
    return "\n".join(parts.values())


def style() -> str:
    """The explorers' style sheet, with the colours of the book's figures."""

    def colors(selector: str, values: tuple[str, ...]) -> str:
        names = "; ".join(f"--c{number}: {value}" for number, value in enumerate(values))
        return f"{selector} {{ {names} }}\n"

    return colors(".pxp", COLORS[:5]) + colors('[data-theme="dark"] .pxp', _ON_DARK) + source("kit.css")


def document(name: str, title: str, data: Any) -> str:
    """A whole page that shows an explorer by itself."""
    explorer = module(name).replace("export default {", "const explorer = {")
    held = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    ground = (
        "html { color-scheme: light; background: #fff }\n"
        "html[data-theme=dark] { color-scheme: dark; background: #121212 }\n"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{ground} body {{ margin: 0 }}\n{style()}</style></head>"
        '<body><main id="explorer"></main>'
        f'<script type="application/json" id="data">{held}</script>'
        f'<script type="module">{explorer}\n{source("frame.js")}</script></body></html>'
    )


def frame(name: str, title: str, data: Any, height: int) -> str:
    """HTML of a frame that holds the document, as high as it is; ``height`` (pixels) where it cannot tell."""
    return (
        f'<iframe class="pxp-frame" title="{escape(title)}" srcdoc="{escape(document(name, title, data))}" '
        f'style="width: 100%; height: {height}px; border: 0"></iframe>'
        "<noscript><style>.pxp-frame { display: none }</style></noscript>"
    )
