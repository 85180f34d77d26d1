"""Exercises in the chapters are those of ``pxp.exercise``: ``python tests/notebook_exercises.py [FILE ...]``.

A cell whose metadata say ``{"exercise": {"number": "5.2", "part": "text"}}`` gets its source from the package; parts
are the text, the attempt (a form or a function to write), the solution, and words on what a function shows. What stands
between them is the chapter's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

import pxp
from pxp.exercises import numbers
from pxp.exercises.kinds import Code, Exercise, Open

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"

OPENING = """## Exercises

`q = pxp.exercise("{first}")` has `q.check(answer)`, `q.hint()` and `q.solution()`. The first one also answers on this page."""

Part = tuple[str, str, list[str]]


def parts(exercise: Exercise) -> dict[str, Part]:
    """Part → kind of cell, source and tags, in the order of the page."""
    found: dict[str, Part] = {"text": ("markdown", exercise.heading, [])}
    if isinstance(exercise, Code):
        found["attempt"] = ("code", exercise.attempt, ["exercise"])
        found["solution"] = ("code", exercise.written, ["hide-cell", "solution"])
        if exercise.words:
            found["words"] = ("markdown", exercise.folded, [])
        return found
    if not isinstance(exercise, Open):
        found["attempt"] = ("code", exercise.attempt, ["remove-input"])
    found["solution"] = ("markdown", exercise.folded, [])
    return found


def marked(notebook: NotebookNode) -> dict[tuple[str, str], NotebookNode]:
    """(number, part) → cell, in the order of the notebook."""
    cells = [cell for cell in notebook.cells if "exercise" in cell.metadata]
    return {(cell.metadata["exercise"]["number"], cell.metadata["exercise"]["part"]): cell for cell in cells}


def problems(notebook: NotebookNode) -> Iterator[str]:
    """What is missing, in another order, or written otherwise than in the package."""
    found = marked(notebook)
    chapter = {number.split(".")[0] for number, _ in found}
    if len(chapter) != 1:
        yield f"exercises of {len(chapter)} chapters: mark the cells of one"
        return
    (start,) = chapter
    own = [number for number in numbers() if number.split(".")[0] == start]
    expected = {(number, part): each for number in own for part, each in parts(pxp.exercise(number)).items()}
    if list(found) != list(expected):
        yield f"exercise cells {list(found)}, expected {list(expected)}"
        return
    for (number, part), (kind, source, tags) in expected.items():
        cell = found[number, part]
        if (cell.cell_type, cell.source, cell.metadata.get("tags", [])) != (kind, source, tags):
            yield f"exercise {number}, {part}: not as in pxp/exercises; run tests/notebook_exercises.py"


def write(notebook: NotebookNode) -> None:
    """Give the marked cells the package's source and tags."""
    for (number, part), cell in marked(notebook).items():
        kind, source, tags = parts(pxp.exercise(number))[part]
        if cell.cell_type != kind:
            raise ValueError(f"exercise {number}, {part} is a {kind} cell")
        cell.source = source
        if tags:
            cell.metadata["tags"] = tags


def main(arguments: list[str]) -> int:
    for path in [Path(argument) for argument in arguments] or sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        write(notebook)
        nbformat.write(notebook, path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
