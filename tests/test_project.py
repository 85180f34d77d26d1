"""Facts that several files state agree, and what the code imports is declared."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import notebook_lint
import pytest
import versions
import yaml
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
URL, BRANCH = notebook_lint.repository()
TEXTS = [
    "README.md", "CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml", "_config.yml",
    *(str(path.relative_to(ROOT)) for folder in ("book", "notebooks") for path in sorted((ROOT / folder).rglob("*"))
      if path.suffix in (".md", ".ipynb")),
]  # fmt: skip


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf8")


@pytest.mark.parametrize("name", TEXTS)
def test_every_mention_of_the_repository_agrees(name):
    owner, project = URL.rsplit("/", 2)[1:]
    text = read(name)
    for found in re.findall(rf"https?://[^\s\"'<>)]*/{project}\b[^\s\"'<>)]*", text):
        assert found.startswith((URL, f"https://colab.research.google.com/github/{owner}/{project}/")), found
        for branch in re.findall(r"(?:/blob/|/tree/|@|\?branch=)([\w.-]+)", found):
            assert branch == BRANCH, found


def test_the_address_stands_where_it_is_needed():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    assert project["urls"]["Repository"] == URL
    assert yaml.safe_load(read("CITATION.cff"))["repository-code"] == URL
    install = f'"pxp-book @ git+{URL}@{BRANCH}"'
    assert install in read("README.md")
    assert install in read("book/how-to-use.md")
    assert install in notebook_lint.first_cell()
    for badge in ("tests", "book"):
        assert f"{URL}/actions/workflows/{badge}.yml/badge.svg?branch={BRANCH}" in read("README.md")


def test_colab_links_name_every_chapter():
    owner_project = URL.removeprefix("https://github.com/")
    found = set(re.findall(rf"github/{owner_project}/blob/{BRANCH}/notebooks/(\w+)\.ipynb", read("README.md")))
    assert found == {path.stem for path in notebook_lint.chapters()}


def test_version_is_stated_in_agreement():
    version = re.search(r'^__version__ = "(.+)"$', read("pxp/__init__.py"), re.MULTILINE).group(1)
    assert yaml.safe_load(read("CITATION.cff"))["version"] == version
    assert f"## {version}" in read("CHANGELOG.md")
    assert "version" in tomllib.loads(read("pyproject.toml"))["project"]["dynamic"]


@pytest.mark.parametrize("path", sorted((ROOT / "pxp").rglob("*.py")), ids=lambda path: path.stem)
def test_imports_of_the_package_are_declared(path):
    names = notebook_lint.imported(ast.parse(path.read_text(encoding="utf8")))
    declared = notebook_lint.requirements().union(*notebook_lint.extras().values())
    for name in names - {"pxp"} - set(sys.stdlib_module_names):
        assert notebook_lint.distribution(name) in declared, name


def test_requirements_are_lower_bounds_and_reach_the_package():
    found = versions.sections()
    lines = [line for part in found.values() for line in part if not line.startswith("pxp-book[")]
    assert all(re.fullmatch(r"[\w.-]+(\[\w+\])?(>=[\d.]+(,<\d+)?|==[\d.]+post1)", line) for line in lines), lines
    bounds = dict(line.split(">=") for line in found[""] + found["onnx"])  # what users install has no upper bounds
    assert all(re.fullmatch(r"[\d.]+", version) for version in bounds.values()), bounds
    assert {line.split(">=")[0].lower() for line in found[""]} == notebook_lint.requirements()
    assert "jupyter-book" not in notebook_lint.requirements()
    assert list(found) == ["", "onnx", "imagenet", "book", "bench"]
    assert "pxp-book[onnx,imagenet]" in found["book"]
    command = [sys.executable, "-W", "ignore", "setup.py", "--quiet", "--name"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "pxp-book"


def test_bounds_keep_what_colab_has():
    colab = {versions.normal(name): version for name, version in versions.pins(read("tests/colab-pins.txt")).items()}
    bounds = dict(line.split(">=") for line in versions.sections()[""])
    assert {"torch", "numpy", "ipywidgets"} <= set(bounds) & set(colab)
    for name in set(bounds) & set(colab):
        assert Version(bounds[name]) <= Version(colab[name]), name


def test_constraints_cover_the_requirements():
    pinned = {line.split("==")[0].lower() for line in read("constraints.txt").splitlines() if "==" in line}
    wanted = [re.match(r"[\w.-]+", line).group().lower() for line in read("requirements.txt").splitlines()
              if line and not line.startswith(("#", "pxp-book["))]  # fmt: skip
    assert set(wanted) <= pinned
    assert not [name for name in pinned if name.startswith(("nvidia-", "cuda-", "triton"))]


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflows_parse_and_call_targets_that_exist(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf8"))
    assert {"name", "jobs", "permissions"} <= set(workflow)
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] if "timeout-minutes" in job else job["needs"]
        for step in job["steps"]:
            for target in re.findall(r"\bmake ([\w-]+)", step.get("run", "")):
                assert target in targets, target
    assert ".ci/run" not in path.read_text(encoding="utf8") or "make test" in read(".ci/run")


def test_every_tier_is_a_target_told_by_help_and_runs_weekly():
    tiers = re.search(r"^TIERS := (.+)$", read("Makefile"), re.MULTILINE).group(1).split()
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for tier in tiers:
        assert re.search(rf"^{tier}:", read("Makefile"), re.MULTILINE), tier
        assert re.search(rf"^make {tier} ", told, re.MULTILINE), tier
    job = yaml.safe_load(read(".github/workflows/weekly.yml"))["jobs"]["tier"]
    assert job["strategy"]["matrix"]["tier"] == tiers
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make ${{ matrix.tier }}"]
    assert re.findall(r"\bmake [\w-]+", read(".ci/run")) == ["make test", "make browser"]


def test_make_runs_its_targets_in_order_of_cost():
    plan = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    steps = [
        "ruff check",
        "ruff format --check",
        "notebook_lint.py",
        "mypy",
        "jupyter-book build",
        "pytest -q -n 2 --dist worksteal --durations 25 tests",
        "--nbval",
    ]
    positions = [plan.index(step) for step in steps]
    assert positions == sorted(positions)


def test_licences_are_there():
    assert read("LICENSE").startswith("BSD 3-Clause License")
    assert "Creative Commons Attribution 4.0 International Public License" in read("LICENSE-text")
    assert "Copyright (c) 2017 Zalando SE" in read("pxp/assets/LICENSE-fashion-mnist")
    assert "Apache License" in read("book/assets/mathjax/LICENSE")
    assert "patent" in read("README.md").lower()
