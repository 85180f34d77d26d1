"""Bounds are read as they are meant, and pip's plan for an environment is told apart: kept, changed, added, impossible."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
import versions
from versions import install, oldest, sections

TEXT = """# a comment
torch>=2.4
zennit>=0.5.1

# --- export: the extra [onnx]
onnx>=1.17

# --- tools: the extra [book]
pxp-book[onnx]
pytest>=8,<10
"""


def wheel(folder: Path, name: str, version: str, *needs: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        requires = "".join(f"Requires-Dist: {need}\n" for need in needs)
        info = f"{name}-{version}.dist-info"
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Packages to be had: ``need`` in two versions, and ``new``, of which the second version wants the newer one."""
    wheel(tmp_path, "need", "1.0")
    wheel(tmp_path, "need", "2.0")
    wheel(tmp_path, "new", "1.0", "need>=1", "big.thing")
    wheel(tmp_path, "new", "2.0", "need>=2", "big.thing")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


def test_sections_and_oldest():
    found = sections(TEXT)
    assert found == {
        "": ["torch>=2.4", "zennit>=0.5.1"],
        "onnx": ["onnx>=1.17"],
        "book": ["pxp-book[onnx]", "pytest>=8,<10"],
    }
    assert oldest(found) == ["torch==2.4", "zennit==0.5.1", "onnx==1.17"]


def test_what_satisfies_is_kept_and_what_is_added_is_told(index):
    there = {"need": "1.0", "Big_Thing": "7.1"}
    assert install(["need>=1"], there) == ({}, {})
    assert install(["new<2"], there) == ({}, {"new": "1.0"})


def test_a_changed_version_is_found_also_where_a_new_package_asks_for_it(index, tmp_path):
    there = {"need": "1.0", "Big_Thing": "7.1"}
    assert install(["need>=1.5"], there) == ({"need": ("1.0", "2.0")}, {})
    assert install(["new"], there) == ({"need": ("1.0", "2.0")}, {"new": "2.0"})
    held = tmp_path / "pins.txt"
    held.write_text("need==1.0\n")
    assert install(["new"], there, held) == ({}, {"new": "1.0"})


def test_no_solution_is_told_in_pips_words(index):
    with pytest.raises(ValueError, match=r"No matching distribution found for need>=3"):
        install(["need>=3"], {"need": "1.0"})


@pytest.mark.parametrize("changes", [0, 1])
def test_the_command_fails_on_a_change(changes, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(versions, "PINS", tmp_path / "pins.txt")
    (tmp_path / "pins.txt").write_text(f"# Python {sys.version_info.major}.{sys.version_info.minor}\nneed==1.0\n")
    monkeypatch.setattr(versions, "install", lambda *_: ({"need": ("1.0", "2.0")} if changes else {}, {"new": "1"}))
    assert versions.colab() == changes
    assert ("need 1.0 -> 2.0" in capsys.readouterr().out) == bool(changes)


def test_the_command_wants_colabs_python(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(versions, "PINS", tmp_path / "pins.txt")
    (tmp_path / "pins.txt").write_text("# Python 3.99\nneed==1.0\n")
    assert versions.colab() == 1
    assert "COLAB_PYTHON=python3.99" in capsys.readouterr().out
