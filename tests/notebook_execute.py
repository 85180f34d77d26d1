"""Execute notebooks in place and write them in one normal form: ``python tests/notebook_execute.py [FILE ...]``.

Every notebook runs in a fresh kernel, from its own folder. What differs between two runs of the same notebook without
meaning anything (time stamps, kernel version, widget state, cell ids) is removed, so that a diff shows real changes
only. Heavy figures are written with a palette, and what cells tagged ``live`` show is not kept. Cells tagged
``solution``, ``report`` or ``hide-input`` are folded for Jupyter and Colab. ``--normalise`` does only this and runs
nothing.
"""

from __future__ import annotations

import base64
import io
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
HEAVY = 50_000  # bytes of a figure from which it is written with a palette
CELL_TIMEOUT = 120  # seconds, as for nbval in the Makefile
# tag of cells whose code is folded → what the book's button says to show and to hide it
FOLDED = {
    "hide-input": ("Show the code", "Hide the code"),
    "solution": ("Solution", "Solution"),
    "report": ("What it gives here", "What it gives here"),
}


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Run all code cells in a fresh kernel whose working directory is ``folder``; stops at the first error."""
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        store_widget_state=True,  # what is shown by an interact is kept there until it is thrown away
    )
    return client.execute()


def normalise(notebook: NotebookNode) -> NotebookNode:
    """Bring metadata, ids and streams into the one form that is committed. Idempotent."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
        }
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    count = 0
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            cell.pop("attachments", None)
            continue
        for tag, prompt in FOLDED.items():
            if tag in cell.metadata.get("tags", []):
                fold(cell, *prompt)
        count += 1
        cell.execution_count = count
        cell.outputs = [] if "live" in cell.metadata.get("tags", []) else merge_streams(cell.outputs)
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = lighter(output.data["image/png"])
    return notebook


def lighter(figure: str) -> str:
    """A heavy figure (base64 of a PNG) in 256 colours: heatmaps and photographs do not compress otherwise."""
    data = base64.b64decode(figure)
    if len(data) < HEAVY:
        return figure
    image = Image.open(io.BytesIO(data))
    if image.mode == "P":
        return figure
    written = io.BytesIO()
    image.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT).save(written, "PNG", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def fold(cell: NotebookNode, show: str, hide: str) -> None:
    """Hide a cell's code in Jupyter and Colab too, and name the button that shows it in the book."""
    cell.metadata["jupyter"] = {"source_hidden": True}
    cell.metadata["cellView"] = "form"
    mystnb = cell.metadata.setdefault("mystnb", {})
    mystnb["code_prompt_show"], mystnb["code_prompt_hide"] = show, hide


def merge_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Join neighbouring pieces of the same stream; how a kernel cuts them is a matter of timing."""
    merged: list[NotebookNode] = []
    for output in outputs:
        last = merged[-1] if merged else None
        if last is not None and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            merged.append(output)
    return merged


def main(arguments: list[str]) -> int:
    normalise_only = "--normalise" in arguments
    paths = [Path(argument) for argument in arguments if argument != "--normalise"]
    for path in paths or sorted(NOTEBOOKS.rglob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        start = time.perf_counter()
        notebook = normalise(notebook if normalise_only else execute(notebook, path.resolve().parent))
        nbformat.validate(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {'normalised' if normalise_only else 'executed'} in {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
