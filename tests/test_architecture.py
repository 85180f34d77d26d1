"""The package's house: small modules, and imports that only go down."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from torch import nn

PACKAGE = Path(__file__).resolve().parent.parent / "pxp"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent == PACKAGE)
LINES = 450
FLOORS = 10
CIRCLES = [{"pxp.curve", "pxp.plots"}]  # a curve can draw itself

Graph = Mapping[str, set[str]]


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


def imports(path: Path) -> set[str]:
    """Modules of the package that one imports anywhere: at the top, inside functions, or for types only."""
    own = name_of(path).split(".")
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        above = own[: len(own) - node.level + (path.name == "__init__.py")] if node.level else []
        source = ".".join([*above, *filter(None, [node.module])])
        found |= {f"{source}.{alias.name}" for alias in node.names} & NAMES or {source} & NAMES
    return found - {name_of(path)}


def graph() -> dict[str, set[str]]:
    return {name_of(path): imports(path) for path in MODULES}


def reach(graph: Graph, start: str) -> set[str]:
    """All that ``start`` imports, directly or through others."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def circles(graph: Graph) -> list[set[str]]:
    reached = {name: reach(graph, name) for name in graph}
    found = [{other for other in reached[name] if name in reached[other]} for name in graph if name in reached[name]]
    return [each for number, each in enumerate(found) if each not in found[:number]]


def rooms(graph: Graph) -> dict[str, set[str]]:
    """A sub-package is one room."""

    def room(name: str) -> str:
        return ".".join(name.split(".")[:2])

    found: dict[str, set[str]] = {}
    for name, others in graph.items():
        found.setdefault(room(name), set()).update({room(other) for other in others} - {room(name)})
    return found


def floor(graph: Graph, name: str, below: tuple[str, ...] = ()) -> int:
    """A room stands above all that it imports."""
    others = graph[name] - {name, *below}
    return 1 + max((floor(graph, other, (*below, name)) for other in others), default=0)


@pytest.mark.parametrize("path", [p for p in MODULES if p.name != "follow.py"], ids=name_of)
def test_a_module_is_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf8").splitlines()) <= LINES


def test_imports_only_go_down():
    found = graph()
    assert found["pxp.masks"] >= {"pxp.files", "pxp.network.silence", "pxp.network.components"}
    assert "pxp.network.layers" in found["pxp.compaction.follow"] and "pxp.plots" in found["pxp.curve"]
    assert circles(found) == CIRCLES
    assert circles(rooms(found)) == CIRCLES


def test_there_are_few_floors():
    found = rooms(graph())
    assert max(floor(found, name) for name in found) <= FLOORS
    assert floor(found, "pxp.network") == 1


def test_circles_and_floors_are_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
    assert floor({"a": {"b", "c"}, "b": {"c"}, "c": set()}, "a") == 3


def layer_classes(source: str) -> set[str]:
    """Classes of layers that a module's code names as ``nn.X``."""
    used = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nn"
    }
    return {
        name
        for name in used - {"Module"}
        if isinstance(c := getattr(nn, name, None), type) and issubclass(c, nn.Module)
    }


def test_only_the_table_names_layers_of_torch_and_timm():
    assert layer_classes("x: nn.Module = nn.Linear(2, nn.Parameter(1), nn.functional.relu)") == {"Linear"}
    found = {name_of(path): path.read_text(encoding="utf8") for path in MODULES}
    assert layer_classes(found.pop("pxp.network.layers")) > {"Conv2d", "GELU", "LayerNorm"}
    # networks are made of layers
    found = {
        n: text
        for n, text in found.items()
        if n != "pxp.models" and not n.startswith(("pxp.exercises.", "pxp.widgets."))
    }
    assert {name: layer_classes(source) for name, source in found.items() if layer_classes(source)} == {}
    # what attentions look like is a table of its own
    classes = [n for n, text in found.items() if re.search(r"\btimm\.(layers|models)\.\w*\.?[A-Z]", text)]
    assert classes == ["pxp.network.attentions"]
