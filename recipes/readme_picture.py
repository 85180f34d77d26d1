"""Take the picture of the README, the explorer in a browser: ``python recipes/readme_picture.py``."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from pxp.widgets import prune_explorer

OUT = "book/assets/readme.png"
SIZE = {"width": 760, "height": 900}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = Path(folder, "page.html")
        page_file.write_text(f"<!doctype html><body style='margin: 12px'>{prune_explorer().html()}", encoding="utf8")
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, device_scale_factor=1.5)
        page.goto(page_file.as_uri())
        frame = page.frames[1]
        frame.wait_for_selector("main:not([aria-busy]) .pxp-says:not(:empty)")
        frame.get_by_label("image", exact=True).select_option("31")
        frame.get_by_label("heatmap", exact=True).select_option("zplus")
        frame.wait_for_selector("main:not([aria-busy])", timeout=60_000)
        page.wait_for_timeout(500)
        page.screenshot(path=OUT)
        browser.close()
    with Image.open(OUT) as picture:
        picture.convert("RGB").quantize(128).save(OUT, optimize=True)


if __name__ == "__main__":
    main()
