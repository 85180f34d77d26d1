"""What nbval does not see: ``python tests/notebook_lint.py [FILE ...]`` prints every problem, exits 1 if there is one.

nbval passes a cell that was never executed, does not compare pictures and ignores misspelt markers. The checks here
make sure that a committed notebook was executed from top to bottom, is clean, runs on a fresh machine, and is a
complete page. Each check is a generator of messages; ``CHECKS`` lists them.
"""

from __future__ import annotations

import ast
import base64
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import nbformat
import notebook_exercises
import versions
from nbformat import NotebookNode
from nbval_tolerance import stated_tolerance
from notebook_execute import FOLDED

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"

PARTS = ("You will learn", "Before you start", "## Pitfalls", "## Exercises", "## Take-away", "## References")

MAX_LINES = 25
MAX_COLUMNS = 80  # the book's page shows about 85
MAX_BYTES = 1_000_000
MAX_OPEN = 25  # code cells whose code shows, without those that a reader writes
EXERCISES = 3
# a phone shows a figure 358 pixels wide: 12 points at two pixels each are then 9 pixels high, the least that can be read
MAX_WIDTH = 954
MIN_POINTS = 12

# import name -> name in requirements.txt, where the two differ (or where the second always brings the first)
DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "IPython": "ipywidgets",
    "sqlalchemy": "optuna",
    "traitlets": "ipywidgets",
    "PIL": "matplotlib",
    "mpl_toolkits": "matplotlib",
    "cycler": "matplotlib",
}

# what the book and the benchmarks are made with; no chapter may need it
TOOLS = {"book", "bench"}

KNOWN_TAGS = {
    "hide-cell", "hide-input", "hide-output", "remove-input", "remove-output", "remove-cell",
    "raises-exception", "nbval-ignore-output", "nbval-skip", "solution", "report", "exercise", "live",
}  # fmt: skip

# nbval also reads markers from comments, and silently ignores the ones it does not know
KNOWN_COMMENTS = {"NBVAL_IGNORE_OUTPUT", "NBVAL_SKIP", "NBVAL_RAISES_EXCEPTION", "NBVAL_CHECK_OUTPUT"}

ABSOLUTE_PATH = re.compile(r"(?<![\w/.:])(?:/(?:home|root|tmp|usr|work|opt|mnt|content|Users|var)/|[A-Z]:\\\\)")
VERDICT = re.compile(r"(?:^|[\s:|])(?:True|False|yes|no)\s*$|^(?:True|False|yes|no)\s*\|")
PART = re.compile(r"^#{1,2} |^#{2,4} Exercise (\d+)\b|<details>\s*<summary>[^<]*Solution", re.MULTILINE)
PLACEHOLDER = re.compile(r"^(?:@?[A-Z][A-Z0-9_]{3,}|TODO.*)$", re.MULTILINE)
DIRECTIVE = re.compile(r"^\s*(?:`{3,}|:{3,})\{[\w:-]+\}|(?<!`)\{[\w:-]+\}`[^`]", re.MULTILINE)


def first_cell(root: Path = ROOT, extras: Mapping[str, Collection[str]] | None = None) -> str:
    """The set-up cell that every notebook starts with; repository and branch come from ``_config.yml``.

    ``extras`` says which extras of the package the chapter needs, and which of their modules it imports: it installs
    the package with them where any of the modules is missing.
    """
    url, branch = repository(root)
    names, missing = "", 'importlib.util.find_spec("pxp") is None'
    if extras:
        names = f"[{','.join(sorted(extras))}]"
        modules = ", ".join(f'"{name}"' for name in ("pxp", *sorted(set().union(*extras.values()))))
        missing = f"not all(map(importlib.util.find_spec, ({modules})))"
    return (
        "import importlib.util\n\n"
        "# in Colab: the package with its data and networks\n"
        f"if {missing}:\n"
        f'    package = "pxp-book{names} @ git+{url}@{branch}"\n'
        '    %pip install -q "{package}"'
    )


def repository(root: Path = ROOT) -> tuple[str, str]:
    """Address and branch of the repository, from the one place that states them."""
    import yaml

    section = yaml.safe_load((root / "_config.yml").read_text(encoding="utf8"))["repository"]
    return section["url"], section["branch"]


def requirements(root: Path = ROOT) -> set[str]:
    """Names in the runtime section of ``requirements.txt``: what a fresh machine gets."""
    return sections(root)[""]


def extras(root: Path = ROOT) -> dict[str, set[str]]:
    """Names in every section of ``requirements.txt`` that a reader may install: extra -> names."""
    return {extra: names for extra, names in sections(root).items() if extra and extra not in TOOLS}


def sections(root: Path = ROOT) -> dict[str, set[str]]:
    """Names in each section of ``requirements.txt``; the runtime section is ``""``."""
    found = versions.sections((root / "requirements.txt").read_text(encoding="utf8"))
    return {extra: declared(lines) for extra, lines in found.items()}


def declared(lines: Iterable[str]) -> set[str]:
    names = (re.match(r"[A-Za-z0-9_.-]+", line) for line in lines)
    return {name.group().lower() for name in names if name}


def needed_extras(notebook: NotebookNode, root: Path = ROOT) -> dict[str, set[str]]:
    """Extras of the package that a chapter needs, by what it imports: extra -> imported modules."""
    modules = {name for _, cell in code_cells(notebook) for name in imports_of(cell)}
    found = {extra: {m for m in modules if distribution(m) in names} for extra, names in extras(root).items()}
    return {extra: modules for extra, modules in found.items() if modules}


def distribution(module: str) -> str:
    """Name in ``requirements.txt`` of what brings a module."""
    return DISTRIBUTIONS.get(module, module).lower()


def code_cells(notebook: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            yield number, cell


def tags(cell: NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", []))


def has_image(cell: NotebookNode) -> bool:
    return any(key.startswith("image/") for output in cell.outputs for key in output.get("data", {}))


def python_source(source: str) -> str:
    """Source without magics, so that ``ast`` can read it; a magic becomes ``pass`` at the same indentation."""
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE)


def check_executed(notebook: NotebookNode) -> Iterator[str]:
    for expected, (number, cell) in enumerate(code_cells(notebook), start=1):
        if cell.execution_count != expected:
            yield f"cell {number}: execution_count is {cell.execution_count}, expected {expected}; run it anew"
        if not cell.source.strip():
            yield f"cell {number}: empty code cell"


def check_errors(notebook: NotebookNode) -> Iterator[str]:
    for number, cell in code_cells(notebook):
        failed = any(output.output_type == "error" for output in cell.outputs)
        if failed and "raises-exception" not in tags(cell):
            yield f"cell {number}: stored traceback without the tag raises-exception"
        if "raises-exception" in tags(cell) and not failed:
            yield f"cell {number}: tagged raises-exception, but nothing was raised"


def check_stderr(notebook: NotebookNode) -> Iterator[str]:
    for number, cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                yield f"cell {number}: output on stderr: {output.text.strip()[:80]!r}"


def check_markers(notebook: NotebookNode) -> Iterator[str]:
    for number, cell in enumerate(notebook.cells):
        for tag in sorted(tags(cell) - KNOWN_TAGS):
            yield f"cell {number}: unknown tag {tag!r}; known are {', '.join(sorted(KNOWN_TAGS))}"
        if cell.cell_type != "code":
            continue
        for marker in re.findall(r"^\s*#\s*((?i:nbval)[\w-]*)", cell.source, re.MULTILINE):
            if marker not in KNOWN_COMMENTS:
                yield f"cell {number}: unknown marker {marker!r}"


def check_tolerance(notebook: NotebookNode) -> Iterator[str]:
    for number, cell in enumerate(notebook.cells):
        try:
            if stated_tolerance(cell.metadata) is not None and cell.cell_type != "code":
                yield f"cell {number}: states a tolerance, but has no output"
        except ValueError as error:
            yield f"cell {number}: {error}"


def check_size(notebook: NotebookNode) -> Iterator[str]:
    for number, cell in code_cells(notebook):
        lines = len(cell.source.splitlines())
        if lines > MAX_LINES:
            yield f"cell {number}: {lines} lines, at most {MAX_LINES}"
    size = len(json.dumps(notebook, ensure_ascii=False).encode())
    if size > MAX_BYTES:
        yield f"notebook has {size:,} bytes, at most {MAX_BYTES:,}"


def check_open_cells(notebook: NotebookNode) -> Iterator[str]:
    hidden = {"hide-input", "hide-cell", "remove-input", "remove-cell", "exercise"}  # these are the reader's
    shown = sum(not tags(cell) & hidden for _, cell in code_cells(notebook))
    if shown > MAX_OPEN:
        yield f"{shown} code cells show their code, at most {MAX_OPEN}: join some, tag those that draw hide-input"


def check_values(notebook: NotebookNode) -> Iterator[str]:
    """A verdict tells a reader less than the number that it was made of."""
    for number, cell in code_cells(notebook):
        for output in cell.outputs:
            text = output.get("text", "") or output.get("data", {}).get("text/plain", "")
            for line in text.splitlines():
                if VERDICT.search(line):
                    yield f"cell {number}: {line.strip()[:60]!r} is a verdict; print the value"


def check_metadata(notebook: NotebookNode) -> Iterator[str]:
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "kernelspec is not python3"
    if notebook.metadata.get("language_info", {}).get("name") != "python":
        yield "language_info is missing or not python"
    if "widgets" in notebook.metadata:
        yield "widget state is stored; a page would ask another host for the widget scripts"


def check_figures(notebook: NotebookNode) -> Iterator[str]:
    names: list[str] = []
    for number, cell in code_cells(notebook):
        mystnb = cell.metadata.get("mystnb", {})
        figure, image = mystnb.get("figure"), mystnb.get("image")
        if not has_image(cell):
            if figure or image:
                yield f"cell {number}: figure metadata, but no image in the output"
            continue
        if not (image or {}).get("alt", "").strip():
            yield f"cell {number}: image without alt text (metadata mystnb.image.alt)"
        if not (figure or {}).get("caption", "").strip():
            yield f"cell {number}: image without caption (metadata mystnb.figure.caption)"
        if not (figure or {}).get("name", "").startswith("fig-"):
            yield f"cell {number}: image without a name fig-… (metadata mystnb.figure.name)"
        else:
            names.append(figure["name"])
        if sum("image/png" in output.get("data", {}) for output in cell.outputs) > 1:
            yield f"cell {number}: more than one figure in one cell; each needs its own alt text and caption"
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"figure name {name!r} is used twice"


def check_legible(notebook: NotebookNode) -> Iterator[str]:
    """Figures are no wider than a phone can show, and come with their numbers."""
    for number, cell in code_cells(notebook):
        for points in re.findall(r"(?:font|label|title)size=([\d.]+)", cell.source):
            if float(points) < MIN_POINTS:
                yield f"cell {number}: text of {points} points, at least {MIN_POINTS}"
        for output in cell.outputs:
            width = width_of(output.get("data", {}).get("image/png", ""))
            if width > MAX_WIDTH:
                yield f"cell {number}: figure of {width} pixels across, at most {MAX_WIDTH}"
        if has_image(cell) and not re.search(r"pxp\.plots\.show\(\)|^pxp\.widgets\.", cell.source, re.MULTILINE):
            yield f"cell {number}: a figure without its numbers; show it with pxp.plots.show()"


def width_of(picture: str) -> int:
    """Pixels across of a PNG in base64, which its header states; 0 of none."""
    return int.from_bytes(base64.b64decode(picture[:32])[16:20], "big")


def check_columns(notebook: NotebookNode) -> Iterator[str]:
    """Magics and code in Markdown too, which ruff does not see."""
    for number, cell in enumerate(notebook.cells):
        fenced = re.findall(r"^```.*?^```", cell.source, re.DOTALL | re.MULTILINE)
        for line in "\n".join([cell.source] if cell.cell_type == "code" else fenced).splitlines():
            if len(line) > MAX_COLUMNS:
                yield f"cell {number}: {len(line)} columns, at most {MAX_COLUMNS}: {line.strip()[:40]!r}"


def check_first_cell(notebook: NotebookNode, root: Path = ROOT) -> Iterator[str]:
    first = next((cell.source for _, cell in code_cells(notebook)), "")
    agreed = first_cell(root, needed_extras(notebook, root))
    if first.strip() != agreed:
        yield f"the first code cell is not the agreed set-up cell:\n{agreed}"


def check_imports(notebook: NotebookNode, root: Path = ROOT) -> Iterator[str]:
    allowed = requirements(root).union(*extras(root).values())
    first = next((number for number, _ in code_cells(notebook)), 0)
    for number, cell in code_cells(notebook):
        try:
            ast.parse(python_source(cell.source))
        except SyntaxError as error:
            if "raises-exception" not in tags(cell):
                yield f"cell {number}: does not parse: {error.msg}"
            continue
        for name in sorted(imports_of(cell)):
            if name == "pxp" or name in sys.stdlib_module_names:
                continue
            if distribution(name) not in allowed:
                yield f"cell {number}: imports {name!r}, which requirements.txt does not declare for readers"
        if number_of_magics := len(re.findall(r"^\s*[%!]", cell.source, re.MULTILINE)):
            if number != first:
                yield f"cell {number}: {number_of_magics} magic or shell line(s) outside the set-up cell"


def imports_of(cell: NotebookNode) -> set[str]:
    """Top-level names of all modules that a cell imports; none where it does not parse."""
    try:
        return imported(ast.parse(python_source(cell.source)))
    except SyntaxError:
        return set()


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of all modules that the code imports."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def check_paths(notebook: NotebookNode) -> Iterator[str]:
    for number, cell in enumerate(notebook.cells):
        texts = [cell.source]
        if cell.cell_type == "code":
            for output in cell.outputs:
                texts.append(str(output.get("text", "")))
                texts.append(str(output.get("data", {}).get("text/plain", "")))
                texts.extend(output.get("traceback", []))
        for text in texts:
            if match := ABSOLUTE_PATH.search(text):
                yield f"cell {number}: absolute path {text[match.start() :][:40]!r}"


def check_markdown(notebook: NotebookNode) -> Iterator[str]:
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown" and (match := DIRECTIVE.search(cell.source)):
            yield f"cell {number}: {match.group().strip()!r} shows as raw text in Colab; use plain Markdown"
        if cell.cell_type == "markdown" and (match := PLACEHOLDER.search(cell.source)):
            yield f"cell {number}: {match.group()!r} stands where a text should"


def check_title(notebook: NotebookNode) -> Iterator[str]:
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    titles = [line for source in cells for line in headings(source) if line.startswith("# ")]
    if len(titles) != 1 or not cells[0].startswith("# "):
        yield f"a page starts with its one title; found {len(titles)}"


def check_parts(notebook: NotebookNode) -> Iterator[str]:
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for part in PARTS:
        if part not in text:
            yield f"the page has no part {part!r}"


def headings(source: str) -> list[str]:
    """Heading lines of a Markdown text, without those inside fenced code."""
    outside = re.sub(r"^```.*?^```", "", source, flags=re.DOTALL | re.MULTILINE)
    return [line for line in outside.splitlines() if re.match(r"#{1,6} ", line)]


def check_folded(notebook: NotebookNode) -> Iterator[str]:
    for number, cell in code_cells(notebook):
        folded = tags(cell) & FOLDED.keys()
        if folded and not cell.metadata.get("jupyter", {}).get("source_hidden"):
            yield f"cell {number}: tagged {min(folded)}, and not folded in Jupyter; run tests/notebook_execute.py"


def check_live(notebook: NotebookNode) -> Iterator[str]:
    """What needs a kernel is on no page, and what it shows is stored nowhere."""
    for number, cell in code_cells(notebook):
        if "live" in tags(cell):
            if not tags(cell) >= {"remove-cell", "nbval-ignore-output"}:
                yield f"cell {number}: live, so tag it remove-cell and nbval-ignore-output"
            if cell.outputs:
                yield f"cell {number}: live, and with outputs; run tests/notebook_execute.py"
        elif "interact" in cell.source:
            yield f"cell {number}: widgets belong into a cell with the tag live"


def check_exercises(notebook: NotebookNode) -> Iterator[str]:
    found: list[int] = []
    solved: set[int] = set()
    current = 0  # the exercise that the text is in; 0 outside
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            if cell.source.count("<details") != cell.source.count("</details>"):
                yield f"cell {number}: <details> that is not closed in the same cell"
            for part in PART.finditer(cell.source):
                if part.group(1):
                    current = int(part.group(1))
                    found.append(current)
                elif part.group().startswith("#"):
                    current = 0
                else:
                    solved.add(current)
                    if not current:
                        yield f"cell {number}: a solution outside an exercise"
        elif tags(cell) & {"solution", "report"}:
            solved |= {current} if "solution" in tags(cell) else set()
            if not current:
                yield f"cell {number}: a solution outside an exercise"
            if "hide-cell" not in tags(cell):
                yield f"cell {number}: the solution is not folded in the book (tag hide-cell)"
    if found != list(range(1, EXERCISES + 1)):
        yield f"exercises found: {found}, expected 1 to {EXERCISES}, each with a heading '### Exercise N'"
    for exercise in found:
        if exercise not in solved:
            yield f"exercise {exercise} has no folded solution"


CHECKS: tuple[Callable[[NotebookNode], Iterator[str]], ...] = (
    check_executed,
    check_errors,
    check_stderr,
    check_markers,
    check_tolerance,
    check_size,
    check_open_cells,
    check_values,
    check_columns,
    check_metadata,
    check_figures,
    check_legible,
    check_first_cell,
    check_imports,
    check_paths,
    check_markdown,
    check_title,
    check_folded,
    check_live,
)
# of a page with goals and exercises
CHAPTER_CHECKS: tuple[Callable[[NotebookNode], Iterator[str]], ...] = (
    check_parts,
    check_exercises,
    notebook_exercises.problems,
)


def lint(notebook: NotebookNode, chapter: bool = True) -> list[str]:
    """All problems of one notebook."""
    checks = CHECKS + CHAPTER_CHECKS * chapter
    return [message for check in checks for message in check(notebook)]


def is_chapter(path: Path) -> bool:
    """A chapter has a number; another page has neither goals nor exercises."""
    return path.stem[:2].isdigit()


def chapters() -> list[Path]:
    """The notebooks of the book: what lies directly in ``notebooks/``."""
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def main(arguments: list[str]) -> int:
    paths = [Path(argument) for argument in arguments] or chapters()
    problems = [
        f"{path}: {message}" for path in paths for message in lint(nbformat.read(path, as_version=4), is_chapter(path))
    ]
    print("\n".join(problems) if problems else f"notebook lint: {len(paths)} notebooks, no problem")
    if not paths:
        print("no notebook found")
    return int(bool(problems) or not paths)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
