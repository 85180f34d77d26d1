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
    """The cell, and behind it what it shows beside its figure, if any."""
    if "figure" not in cell.metadata.get("mystnb", {}):
        return [cell]
    beside = [
        output
        for output in cell.outputs
        if "data" in output and "image/png" not in output.data
    ]
    if not beside:
        return [cell]
    cell.outputs = [each for each in cell.outputs if each not in beside]
    tags = set(cell.metadata.get("tags", [])) - {"hide-input", "hide-output"}
    behind = new_code_cell(
        "# shown beside a figure",  # a cell without code would be skipped
        outputs=beside,
        metadata={"tags": sorted({*tags, "remove-input"})},
        execution_count=cell.execution_count,
    )
    return [cell, behind]


def setup(_: Any) -> dict[str, bool]:
    """Sphinx asks every extension for this; there is nothing to set up."""
    return {"parallel_read_safe": True, "parallel_write_safe": True}
