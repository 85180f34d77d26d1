"""How Sphinx reads a chapter, see ``nb_custom_formats`` in ``_config.yml``.

As it is, but what a cell shows beside its figure stands in a cell of its own:
MyST-NB would make a figure, with name and caption, of *every* output.
"""

from __future__ import annotations

from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell


def read(text: str) -> NotebookNode:
    """The notebook of a file's text."""
    notebook = nbformat.reads(text, as_version=4)
    cells = [part for cell in notebook.cells for part in separated(cell)]
    notebook.cells = cells
    return notebook


def separated(cell: NotebookNode) -> list[NotebookNode]:
    """The cell, and what it shows beside its figure in cells of their own.

    What comes after the figure comes behind it. What comes before it keeps the
    code: an explorer, whose still the figure is.
    """
    if "figure" not in cell.metadata.get("mystnb", {}):
        return [cell]
    shown = [each for each in cell.outputs if "data" in each]
    figures = ["image/png" in each.data for each in shown]
    if all(figures):
        return [cell]
    first = shown.index(shown[figures.index(True)])
    before, behind = shown[:first], shown[first:]
    behind = [each for each in behind if "image/png" not in each.data]
    cell.outputs = [e for e in cell.outputs if e not in (*before, *behind)]
    parts = [cell, _alone(cell, behind)] if behind else [cell]
    if before:
        source, cell.source = cell.source, "# the still of an explorer"
        tags = cell.metadata.get("tags", [])
        parts.insert(0, _alone(cell, before, source, tags))
        cell.metadata["tags"] = sorted({*tags, "remove-input"})
    return parts


def _alone(
    cell: NotebookNode,
    outputs: list[NotebookNode],
    source: str = "# shown beside a figure",  # without code it would be skipped
    tags: list[str] | None = None,
) -> NotebookNode:
    """A cell that shows outputs of another one."""
    if tags is None:
        kept = set(cell.metadata.get("tags", []))
        kept -= {"hide-input", "hide-output"}
        tags = sorted({*kept, "remove-input"})
    return new_code_cell(
        source,
        outputs=outputs,
        metadata={"tags": tags},
        execution_count=cell.execution_count,
    )


def setup(_: Any) -> dict[str, bool]:
    """Sphinx asks every extension for this; there is nothing to set up."""
    return {"parallel_read_safe": True, "parallel_write_safe": True}
