"""Explorers as a reader has them: every control is moved, and what is shown is what Python computes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from explorers import MAKERS

from pxp.widgets import Explorer, prune_explorer


def expected(explorer: Explorer, state: dict) -> list[float]:
    """Numbers that the explorer's tables must show, row by row."""
    answer = explorer.answer(state)
    if explorer.name == "rules":
        rows = [
            [*r["middle"], *r["inputs"], sum(r["inputs"]), answer["output"] - sum(r["inputs"])] for r in answer["rules"]
        ]
        return [value for row in rows for value in row]
    if explorer.name == "softmax":
        rows = [[*r["logits"], *r["values"], sum(r["logits"]) + sum(r["values"])] for r in answer["softmax"]["rules"]]
        rows += [[*answer["norm"][key], sum(answer["norm"][key])] for key in ("free", "held")]
        return [value for row in rows for value in row]
    if explorer.name == "control":
        return [100 * value for line in answer["lines"] for value in line["mean"]]
    if explorer.name == "heads":
        whole = explorer.data["whole"][state["image"]]
        rows = [[a, b, b - a] for a, b in zip(whole, answer["logits"], strict=True)]
        return [value for row in rows for value in row]
    return [float(kept) for kept in answer["kept"]]


def shown(frame) -> list[float]:
    """The numbers of its tables."""
    cells = frame.eval_on_selector_all("tbody td", "cells => cells.map(cell => cell.textContent)")
    found = [re.match(r"[−-]?[\d.]+", cell) for cell in cells if not cell.endswith(" %")]
    return [float(number.group().replace("−", "-")) for number in found if number]


def steps(frame):
    """Moves every control once, one after the other."""
    for selector in ("input[type=range]", "select", "input[type=checkbox]", "button.pxp-head"):
        for number in range(min(frame.locator(selector).count(), 20)):
            control = frame.locator(selector).nth(number)
            name = control.evaluate("c => c.labels?.[0]?.textContent ?? c.getAttribute('aria-label')")
            assert name and name.strip(), "a control without a name"
            if selector == "select":
                control.select_option(index=1)
            elif "range" in selector:
                control.focus()
                control.press("ArrowRight")
            elif "checkbox" in selector:
                control.check()
            else:
                if number in (2, 3):
                    control.click()
            yield name


@pytest.mark.parametrize("name", MAKERS)
def test_every_control_shows_what_python_computes(opened, tmp_path, name):
    explorer = MAKERS[name]()
    file = Path(tmp_path, "page.html")
    file.write_text(f"<!doctype html><title>t</title><div class='cell'>{explorer.html()}</div>", encoding="utf8")
    page = opened(file.as_uri(), width=390)
    frame = page.frames[1]
    frame.wait_for_selector(".pxp-says:not(:empty)")
    assert page.locator(".pxp-moves").count() == 1  # the page around it knows that the still is not needed
    for moved in steps(frame):
        frame.wait_for_selector("main:not([aria-busy])", timeout=60_000)
        state = frame.evaluate("globalThis.pxp.model.get('state')")
        wanted, found = expected(explorer, state), shown(frame)
        assert len(found) == len(wanted), moved
        apart = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
        assert apart < 0.06 if name == "control" else apart < 0.011, moved
        if name == "prune":
            right, total = explorer.answer(state)["right"], len(explorer.data["labels"])
            assert f"Right: {100 * right / total:.1f} % of {total} images" in frame.text_content(".pxp-says"), moved
    assert page.heard == []
    assert all(address.startswith(("file:", "about:", "data:")) for address in page.asked)
    heard = frame.wait_for_selector(".pxp-unseen[aria-live=polite]:not(:empty)", state="attached")
    assert heard.text_content() == frame.text_content(".pxp-says")


@pytest.mark.parametrize("width", [1280, 390, 320])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_wider_than_its_place(opened, tmp_path, width, theme):
    for name, make in MAKERS.items():
        file = Path(tmp_path, f"{name}.html")
        file.write_text(f"<!doctype html><html data-theme={theme}><body>{make().html()}", encoding="utf8")
        page = opened(file.as_uri(), width=width)
        frame = page.frames[1]
        frame.wait_for_selector(".pxp-says:not(:empty)")
        assert frame.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        assert frame.evaluate("document.documentElement.dataset.theme") == theme
        page.wait_for_function("document.querySelector('iframe').clientHeight > 300")
        inside, outside = (
            frame.evaluate("document.documentElement.offsetHeight"),
            page.evaluate("document.querySelector('iframe').clientHeight"),
        )
        assert abs(inside - outside) <= 2, name


def test_a_drawing_is_answered(opened, tmp_path):
    file = Path(tmp_path, "page.html")
    file.write_text(f"<!doctype html>{prune_explorer().html()}", encoding="utf8")
    page = opened(file.as_uri())
    frame = page.frames[1]
    frame.wait_for_selector(".pxp-says:not(:empty)")
    field = frame.locator("canvas[aria-label*=draw]")
    field.scroll_into_view_if_needed()
    box = field.bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 120, box["y"] + 60, steps=8)
    page.mouse.up()
    state = frame.evaluate("globalThis.pxp.model.get('state')")
    assert sum(state["pixels"]) > 20
    answer = prune_explorer().answer(state)
    said = prune_explorer().data["classes"][answer["target"]]
    frame.wait_for_function(f"document.querySelector('.pxp-says').textContent.includes({said!r})")
    assert page.heard == []
