"""Check a built book: ``python tests/book_check.py _build/html``; prints every problem, exits 1 if there is one.

Every page of the table of contents is there, no page is heavy, nothing that a page needs lies on another host, and no
link inside the book is dead.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 2_000_000  # of a page with its own images

# attributes whose address a browser fetches by itself, without a click
FETCHED = {
    "audio": ("src",), "embed": ("src",), "iframe": ("src",), "img": ("src", "srcset"), "input": ("src",),
    "object": ("data",), "script": ("src",), "source": ("src", "srcset"), "track": ("src",), "video": ("src", "poster"),
}  # fmt: skip
FETCHED_LINKS = {"stylesheet", "preload", "modulepreload", "prefetch", "icon", "shortcut", "manifest"}
REMOTE = re.compile(r"^\s*(?:https?:)?//", re.IGNORECASE)
REMOTE_CSS = re.compile(r"(?:url\(\s*['\"]?|@import\s+['\"])\s*((?:https?:)?//[^'\")\s]+)", re.IGNORECASE)
REMOTE_SCRIPT = re.compile(
    r"(?:import\s*\(?\s*|from\s+|fetch\(\s*|\.src\s*=\s*)['\"]((?:https?:)?//[^'\"]+)", re.IGNORECASE
)


class Page(HTMLParser):
    """What a page fetches, where it links to, and which anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.images_without_alt: list[str] = []
        self._inline = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self._inline = tag if tag in ("script", "style") else ""
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        for name in FETCHED.get(tag, ()):
            if name in values:
                parts = values[name].split(",") if name == "srcset" else [values[name]]
                self.fetched.extend(part.split()[0] for part in parts if part.split())
        if tag == "link" and FETCHED_LINKS & set(values.get("rel", "").lower().split()):
            self.fetched.append(values.get("href", ""))
        if "style" in values:
            self.fetched.extend(REMOTE_CSS.findall(values["style"]))
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "img" and not values.get("alt", "").strip() and values.get("aria-hidden") != "true":
            self.images_without_alt.append(values.get("src", "")[:60])

    def handle_data(self, data: str) -> None:
        if self._inline == "script":
            self.fetched.extend(REMOTE_SCRIPT.findall(data))
        elif self._inline == "style":
            self.fetched.extend(REMOTE_CSS.findall(data))

    def handle_endtag(self, tag: str) -> None:
        self._inline = ""


def toc_pages(toc: dict) -> list[str]:
    """All files of a Jupyter Book table of contents, in reading order, without suffix."""
    pages = [toc["root"]] if "root" in toc else [toc["file"]] if "file" in toc else []
    for key in ("parts", "chapters", "sections"):
        for entry in toc.get(key, []):
            pages.extend(toc_pages(entry))
    return [re.sub(r"\.(md|ipynb)$", "", page) for page in pages]


def local_target(page: Path, address: str) -> Path:
    return (page.parent / unquote(urlsplit(address).path)).resolve()


def check(site: Path, pages: list[str]) -> Iterator[str]:
    """All problems of the site; ``pages`` are the ones that must exist."""
    for name in ("index", *pages):
        if not (site / f"{name}.html").is_file():
            yield f"{name}.html was not built"
    parsed = {path.resolve(): Page(path.read_text(encoding="utf8")) for path in sorted(site.rglob("*.html"))}
    for path, page in parsed.items():
        name = path.relative_to(site.resolve())
        if "_static" in name.parts:
            continue
        remote = {address for address in page.fetched if REMOTE.match(address)}
        for address in sorted(remote):
            yield f"{name}: needs {address} from another host"
        size = path.stat().st_size
        for address in set(page.fetched) - remote:
            if address.startswith("data:") or not address:
                continue
            target = local_target(path, address)
            if not target.is_file():
                yield f"{name}: {address} does not exist"
            elif "_static" not in target.parts:
                size += target.stat().st_size
        if size > MAX_BYTES:
            yield f"{name}: {size:,} bytes with its images, at most {MAX_BYTES:,}"
        for source in page.images_without_alt:
            yield f"{name}: image {source} has no alt text"
        yield from dead_links(name, path, page, parsed)
    for path in sorted(site.rglob("*.css")):
        for address in sorted(set(REMOTE_CSS.findall(path.read_text(encoding="utf8")))):
            yield f"{path.relative_to(site)}: needs {address} from another host"


def dead_links(name: Path, path: Path, page: Page, parsed: dict[Path, Page]) -> Iterator[str]:
    for address in sorted(set(page.links)):
        parts = urlsplit(address)
        if parts.scheme or parts.netloc or not address.strip("#"):
            continue
        target = local_target(path, address) if parts.path else path
        if not target.is_file():
            yield f"{name}: dead link {address}"
        elif parts.fragment and target in parsed and unquote(parts.fragment) not in parsed[target].anchors:
            yield f"{name}: dead anchor {address}"


def main(arguments: list[str]) -> int:
    site = Path(arguments[0] if arguments else ROOT / "_build" / "html")
    pages = toc_pages(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf8")))
    problems = list(check(site, pages))
    if problems:
        print("\n".join(problems))
        return 1
    print(f"book check: {len(pages)} pages, no problem. Open {site.resolve() / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
