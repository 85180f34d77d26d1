"""The committed notebooks pass the lint, and every check of the lint can fail."""

from __future__ import annotations

import base64
import copy
import functools
import inspect
import io
import os
import tomllib

import nbformat
import notebook_execute
import notebook_exercises
import notebook_lint
import numpy as np
import pytest
import torch
import torchvision
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

import pxp
from pxp.data import IMAGENETTE_CLASSES, ImageData, Photographs

CHAPTERS = notebook_lint.chapters()
ALL_CHECKS = notebook_lint.CHECKS + notebook_lint.CHAPTER_CHECKS
FIGURE = {"mystnb": {"image": {"alt": "A line."}, "figure": {"caption": "It rises.", "name": "fig-test-line"}}}
PNG = "iVBORw0KGgo="


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_is_clean(path):
    assert notebook_lint.lint(nbformat.read(path, as_version=4), notebook_lint.is_chapter(path)) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_is_in_normal_form(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook_execute.normalise(copy.deepcopy(notebook)) == notebook


def test_figure_names_are_unique_in_the_book():
    names = [
        cell.metadata["mystnb"]["figure"]["name"]
        for path in CHAPTERS
        for cell in nbformat.read(path, as_version=4).cells
        if "figure" in cell.metadata.get("mystnb", {})
    ]
    assert len(names) == len(set(names))


def full_profile_cells() -> dict[str, str]:
    """Chapter → source of the cell that loads what the full profile works on."""
    return {
        path.stem: cell.source
        for path in CHAPTERS
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "code" and 'load_dataset("imagenette"' in cell.source
    }


def test_chapters_with_a_full_profile_load_it_in_one_place():
    with_profile = {path.stem for path in CHAPTERS if "PXP_PROFILE" in path.read_text(encoding="utf8")}
    assert {"02_lrp_foundations", "04_pixels_to_filters", "05_pruning_cnns"} <= with_profile
    assert with_profile == set(full_profile_cells())


class Offline:
    """``pxp`` where nothing can be downloaded: random weights, a small folder of images."""

    def __init__(self, root) -> None:
        self.root = root

    def __getattr__(self, name: str):
        return getattr(pxp, name)

    def load_dataset(self, name, root=None):
        return pxp.load_dataset(name, root=self.root)

    @staticmethod
    @functools.cache
    def load_model(name, weights=None):
        return pxp.load_model(name)

    def reference_samples(self, data, per_class=1, classes=None, seed=0):
        return pxp.reference_samples(data, 1, classes, seed)


@pytest.mark.parametrize("chapter", full_profile_cells())
def test_the_full_profile_loads_without_a_download(chapter, photographs):
    """And takes the first steps of every chapter with it."""
    names = {"pxp": Offline(photographs), "torch": torch, "FULL": True, "PROFILE": "full", "os": os, "copy": copy}
    exec(full_profile_cells()[chapter], names)
    loader = next((value for value in names.values() if inspect.isfunction(value) and value.__name__ != "claim"), None)
    loaded = list(names.values()) if loader is None else loader()
    flat = [part for each in loaded for part in (each.values() if isinstance(each, dict) else [each])]
    model = next(part for part in flat if isinstance(part, torch.nn.Module))
    transformer = isinstance(model, torchvision.models.VisionTransformer)
    units = pxp.find_components(model, "head" if transformer else "filter")
    data = next((part for part in flat if isinstance(part, ImageData | Photographs)), None)
    images, labels = loaded[1:3] if data is None else pxp.reference_samples(getattr(data, "reference", data), 1)
    assert images.shape[1:] == (3, 224, 224) and set(labels.tolist()) == {i for i, _ in IMAGENETTE_CLASSES.values()}
    scores = pxp.attribute(model, (images[:1], labels[:1]), units, pxp.Activation())
    assert units.total in (4224, 4800, 144) and scores.samples == 1


def png(width: int) -> str:
    written = io.BytesIO()
    Image.new("L", (width, 1)).save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()


def exercise_cells(*numbers: str) -> list[nbformat.NotebookNode]:
    """Cells 5 to 12 of the page below."""
    cells = []
    for number in numbers:
        for part, (kind, source, tags) in notebook_exercises.parts(pxp.exercise(number)).items():
            cell = new_code_cell(source) if kind == "code" else new_markdown_cell(source)
            cell.metadata.update(exercise={"number": number, "part": part}, **({"tags": tags} if tags else {}))
            cells.append(cell)
    return cells


def good_notebook() -> nbformat.NotebookNode:
    """A complete page in miniature."""
    image = new_output("display_data", data={"image/png": PNG, "text/plain": "<Figure size 640x480 with 1 Axes>"})
    page = new_notebook(
        cells=[
            new_markdown_cell("# Title\n\n**You will learn**\n\n- one thing\n\n**Before you start:** nothing."),
            new_code_cell(notebook_lint.first_cell()),
            new_code_cell(
                "import torch\n\nprint(torch.ones(2).sum().int().item())", outputs=[new_output("stream", text="2\n")]
            ),
            new_code_cell("pxp.plots.show()", metadata=copy.deepcopy(FIGURE), outputs=[image]),
            new_markdown_cell("## Pitfalls\n\nNone.\n\n## Exercises"),
            *exercise_cells("1.1", "1.2", "1.3"),
            new_markdown_cell("## Take-away\n\nOne line.\n\n## References\n\n- none"),
        ]
    )
    return notebook_execute.normalise(page)


def test_a_good_notebook_passes():
    notebook = good_notebook()
    nbformat.validate(notebook)
    assert notebook_lint.lint(notebook) == []


def _set(index, **fields):
    return lambda notebook: notebook.cells[index].update(fields)


def _source(index, source):
    return _set(index, source=source)


def _output(index, *output, **fields):
    return lambda notebook: notebook.cells[index].outputs.append(new_output(*output, **fields))


def _tags(index, *tags):
    return lambda notebook: notebook.cells[index].metadata.update(tags=list(tags))


def _nbval(index, **fields):
    return lambda notebook: notebook.cells[index].metadata.update(nbval=fields)


def _mystnb(part, key, value):
    return lambda notebook: notebook.cells[3].metadata["mystnb"][part].update({key: value})


BROKEN = {
    "never executed": (_set(2, execution_count=None), "execution_count is None, expected 2"),
    "executed out of order": (_set(2, execution_count=9), "execution_count is 9, expected 2"),
    "empty cell": (_source(2, " \n"), "empty code cell"),
    "traceback": (_output(2, "error", ename="E", evalue="", traceback=[]), "stored traceback"),
    "nothing raised": (_tags(2, "raises-exception"), "nothing was raised"),
    "stderr": (_output(2, "stream", name="stderr", text="a warning"), "output on stderr: 'a warning'"),
    "misspelt tag": (_tags(2, "nbval-ignore-ouput"), "unknown tag 'nbval-ignore-ouput'"),
    "misspelt marker": (_source(2, "# NBVAL_IGNORE_OUPUT\n1"), "unknown marker 'NBVAL_IGNORE_OUPUT'"),
    "misspelt tolerance": (_nbval(2, tolerence=0.03), "metadata nbval is {'tolerence': 0.03}"),
    "malformed tolerance": (_nbval(2, tolerance="3 %"), "metadata nbval is {'tolerance': '3 %'}"),
    "tolerance of a text": (_nbval(4, tolerance=0.03), "states a tolerance, but has no output"),
    "long cell": (_source(2, "x = 1\n" * 26), "26 lines, at most 25"),
    "wide line": (_source(2, "x = " + "1" * 77), "81 columns, at most 80: 'x = 111"),
    "wide line in a magic": (_source(1, "%pip install " + "x" * 80), "93 columns, at most 80"),
    "wide line in a comment": (_source(2, "x = 1\n# " + "·" * 79), "81 columns, at most 80"),
    "wide line in Markdown": (
        _source(4, f"## Pitfalls\n\n```bash\nls {'x' * 78}\n```\n\n## Exercises"),
        "81 columns, at most 80",
    ),
    "large file": (_output(2, "stream", text="x" * 1_100_000), "bytes, at most 1,000,000"),
    "other kernel": (lambda n: n.metadata.kernelspec.update(name="myenv"), "kernelspec is not python3"),
    "no language_info": (lambda n: n.metadata.pop("language_info"), "language_info is missing"),
    "widget state": (lambda n: n.metadata.update(widgets={}), "widget state is stored"),
    "no alt text": (_mystnb("image", "alt", " "), "image without alt text"),
    "no caption": (_mystnb("figure", "caption", ""), "image without caption"),
    "no name": (_mystnb("figure", "name", "line"), "image without a name fig-"),
    "two figures": (_output(3, "display_data", data={"image/png": PNG}), "more than one figure"),
    "small text": (_source(3, "ax.tick_params(labelsize=11)\npxp.plots.show()"), "text of 11 points, at least 12"),
    "wide figure": (_output(3, "display_data", data={"image/png": png(955)}), "955 pixels across, at most 954"),
    "no numbers": (_source(3, "plt.show()"), "a figure without its numbers"),
    "figure without image": (_set(3, outputs=[]), "figure metadata, but no image"),
    "no set-up cell": (_source(1, "import pxp"), "not the agreed set-up cell"),
    "other branch": (_source(1, notebook_lint.first_cell() + "x"), "not the agreed set-up cell"),
    "undeclared import": (_source(2, "import pandas as pd"), "imports 'pandas'"),
    "import of the tools": (_source(2, "import pytest"), "imports 'pytest'"),
    "undeclared inner import": (_source(2, "def f():\n    from seaborn.utils import x"), "imports 'seaborn'"),
    "syntax error": (_source(2, "1 +"), "does not parse"),
    "shell command": (_source(2, "!pip install x"), "magic or shell line"),
    "second set-up cell": (_source(2, notebook_lint.first_cell()), "magic or shell line"),
    "absolute path in code": (_source(2, "open('/home/me/x')"), "absolute path"),
    "absolute path in output": (_output(2, "stream", text="in /tmp/x"), "absolute path"),
    "directive": (_source(4, "## Pitfalls\n\n```{note}\nx\n```\n\n## Exercises"), "shows as raw text"),
    "role": (_source(4, "## Pitfalls\n\n{cite}`x`\n\n## Exercises"), "shows as raw text"),
    "a placeholder": (_source(4, "## Pitfalls\n\nREADING12\n\n## Exercises"), "'READING12' stands where a text should"),
    "two titles": (_source(4, "# Again\n\n## Pitfalls\n\n## Exercises"), "its one title; found 2"),
    "no take-away": (_source(13, "## References"), "no part '## Take-away'"),
    "two exercises": (lambda n: n.cells.pop(11), "exercises found: [1, 2]"),
    "unsolved": (_source(7, "Think."), "exercise 1 has no folded solution"),
    "another text": (_source(5, "### Exercise 1 · Think"), "exercise 1.1, text: not as in pxp/exercises"),
    "another solution": (_source(10, "1 + 1"), "exercise 1.2, solution: not as in pxp/exercises"),
    "no attempt": (lambda n: n.cells.pop(6), "exercise cells [('1.1', 'text'), ('1.1', 'solution')"),
    "no exercises": (lambda n: [c.metadata.pop("exercise", 0) for c in n.cells], "exercises of 0 chapters"),
    "unfolded in the book": (_tags(10, "solution"), "not folded in the book"),
    "unfolded in Jupyter": (lambda n: n.cells[10].metadata.pop("jupyter"), "not folded in Jupyter"),
    "live on the page": (_tags(2, "live"), "live, so tag it remove-cell"),
    "live with outputs": (_tags(2, "live", "remove-cell", "nbval-ignore-output"), "live, and with outputs"),
    "widgets on the page": (_source(2, "interact(len, x=3)"), "a cell with the tag live"),
    "a verdict": (
        lambda n: n.cells[2].outputs[0].update(text="LRP beats chance: True\n"),
        "'LRP beats chance: True' is a verdict; print the value",
    ),
    "too many open cells": (
        lambda n: n.cells.extend(new_code_cell("1", execution_count=7 + i) for i in range(25)),
        "28 code cells show their code, at most 25",
    ),
    "open code of a figure": (_tags(3, "hide-input"), "tagged hide-input, and not folded in Jupyter"),
    "stray solution": (
        _source(13, "## Take-away\n<details><summary>Solution</summary>x</details>\n## References"),
        "outside",
    ),
    "open details": (_source(7, "<details><summary>Solution</summary>"), "not closed"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_fault_is_found(name):
    damage, message = BROKEN[name]
    notebook = good_notebook()
    damage(notebook)
    assert any(message in problem for problem in notebook_lint.lint(notebook)), notebook_lint.lint(notebook)


def test_a_stated_tolerance_passes():
    notebook = good_notebook()
    _nbval(2, tolerance=0.03)(notebook)
    assert notebook_lint.lint(notebook_execute.normalise(notebook)) == []


def test_every_check_can_fail():
    failing = set()
    for damage, _ in BROKEN.values():
        notebook = good_notebook()
        damage(notebook)
        failing |= {check for check in ALL_CHECKS if list(check(notebook))}
    assert failing == set(ALL_CHECKS)


def test_lines_up_to_the_limit_pass():
    notebook = good_notebook()
    notebook.cells[2].source = "# " + "x" * 78
    notebook.cells[4].source = "## Pitfalls\n\n" + "Prose is as long as it wants. " * 9 + "\n\n## Exercises"
    assert list(notebook_lint.check_columns(notebook)) == []


@pytest.fixture
def elsewhere(tmp_path):
    """Root folder of another project, whose package has extras."""
    (tmp_path / "_config.yml").write_text("repository: {url: https://example.org/a/b, branch: trunk}")
    (tmp_path / "requirements.txt").write_text(
        "# all of them\ntorch>=2\n\n# --- export: the extra [onnx]\nonnx>=1\nonnxruntime>=1\n\n"
        "# --- tables, for readers: the extra [tables]\npandas>=2\nscikit-learn>=1\n\n"
        "# --- tools: the extra [book]\npxp-book[onnx]\npytest>=8\n\n# --- benchmarks: the extra [bench]\nfast[all]>=1\n"
    )
    return tmp_path


def test_extras_are_read_from_the_requirements(elsewhere):
    assert notebook_lint.requirements(elsewhere) == {"torch"}
    assert notebook_lint.extras(elsewhere) == {"onnx": {"onnx", "onnxruntime"}, "tables": {"pandas", "scikit-learn"}}
    assert notebook_lint.sections(elsewhere)["book"] == {"pxp-book", "pytest"}
    assert "book" in notebook_lint.sections() and "bench" in notebook_lint.sections()


@pytest.mark.parametrize(
    ("imports", "condition", "package"),
    [
        ("import torch", 'importlib.util.find_spec("pxp") is None', "pxp-book"),
        ("import onnxruntime", 'not all(map(importlib.util.find_spec, ("pxp", "onnxruntime")))', "pxp-book[onnx]"),
        (
            "import pandas as pd\nfrom onnx.helper import x\nfrom sklearn import y",
            'not all(map(importlib.util.find_spec, ("pxp", "onnx", "pandas", "sklearn")))',
            "pxp-book[onnx,tables]",
        ),
    ],
    ids=["none", "one", "two"],
)
def test_a_chapter_installs_the_extras_that_it_imports(imports, condition, package, elsewhere):
    notebook = good_notebook()
    notebook.cells[2].source = imports
    [message] = notebook_lint.check_first_cell(notebook, elsewhere)
    wanted = message.split(":\n", 1)[1]
    assert wanted == (
        "import importlib.util\n\n# in Colab: the package with its data and networks\n"
        f'if {condition}:\n    package = "{package} @ git+https://example.org/a/b@trunk"\n    %pip install -q "{{package}}"'
    )
    notebook.cells[1].source = wanted
    assert list(notebook_lint.check_first_cell(notebook, elsewhere)) == []
    assert list(notebook_lint.check_imports(notebook, elsewhere)) == []


def test_an_extra_that_no_cell_needs_is_not_installed(elsewhere):
    notebook = good_notebook()
    notebook.cells[1].source = notebook_lint.first_cell(elsewhere, {"onnx": {"onnxruntime"}})
    assert len(list(notebook_lint.check_first_cell(notebook, elsewhere))) == 1


def test_the_set_up_cell_installs_only_what_is_missing(elsewhere):
    """Run as IPython runs it: the magic gets the whole requirement, and only where a module is not found."""
    from IPython.core.interactiveshell import InteractiveShell

    asked = []
    shell = InteractiveShell()
    shell.register_magic_function(asked.append, "line", "pip")
    for module, extra in (("torch", "onnx"), ("no_such_module", "onnx")):
        assert shell.run_cell(notebook_lint.first_cell(elsewhere, {extra: {module}})).success
    assert shell.run_cell(notebook_lint.first_cell(elsewhere)).success
    assert asked == ['install -q "pxp-book[onnx] @ git+https://example.org/a/b@trunk"']


def test_ruff_holds_notebooks_to_the_same_width():
    settings = tomllib.loads((notebook_lint.NOTEBOOKS / "ruff.toml").read_text(encoding="utf8"))
    assert settings["line-length"] == notebook_lint.MAX_COLUMNS
    assert settings["extend"] == "../pyproject.toml"


def test_lint_as_a_command(tmp_path, capsys):
    path = tmp_path / "page.ipynb"
    nbformat.write(good_notebook(), path)
    assert notebook_lint.main([str(path)]) == 0
    broken = good_notebook()
    broken.cells[2].execution_count = None
    nbformat.write(broken, path)
    assert notebook_lint.main([str(path)]) == 1
    assert "cell 2" in capsys.readouterr().out


def test_normal_form_removes_what_differs_between_runs():
    notebook = good_notebook()
    noisy = copy.deepcopy(notebook)
    noisy.metadata["widgets"] = {}
    noisy.metadata.language_info["version"] = "3.11.7"
    noisy.cells[2].metadata["execution"] = {"iopub.status.busy": "2024-01-01"}
    noisy.cells[2].execution_count = 17
    noisy.cells[2].outputs = [new_output("stream", text="2"), new_output("stream", text="\n")]
    assert notebook_execute.normalise(noisy) == notebook


def test_heavy_figures_are_written_with_a_palette():
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 4), dtype=np.uint8)
    figures = []
    for pixels in (noise, noise[:50, :50]):
        written = io.BytesIO()
        Image.fromarray(pixels, "RGBA").save(written, "PNG")
        figures.append(base64.b64encode(written.getvalue()).decode())
    heavy, light = figures
    lighter = notebook_execute.lighter(heavy)
    assert len(lighter) < len(heavy) / 2 and notebook_execute.lighter(lighter) == lighter
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(lighter))).convert("RGB"), dtype=float)
    assert shown.shape == (400, 400, 3) and np.abs(shown - noise[..., :3]).mean() < 40
    assert notebook_execute.lighter(light) == light


def test_execution_runs_in_the_given_folder(tmp_path):
    code = "from pathlib import Path\n\nPath.cwd().name, 1 + 1"
    done = notebook_execute.execute(new_notebook(cells=[new_code_cell(code)]), tmp_path)
    assert done.cells[0].outputs[0].data["text/plain"] == f"('{tmp_path.name}', 2)"
