"""The explorers' JavaScript by Node's own tests and a linter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def test_node_s_own_tests_pass(node):
    found = subprocess.run([node, "--test", "tests/widgets/"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "fail 0" in found.stdout and "pass 0" not in found.stdout


def test_the_linter_finds_what_is_wrong(tmp_path):
    bad = tmp_path / "bad.js"
    bad.write_text("const unused = 1;\nif (2 == NaN) debugger;\n")
    linter = Path(sys.executable).with_name("oxlint")
    if not linter.exists():
        pytest.skip("oxlint is not installed")
    command = [str(linter), "-c", str(ROOT / ".oxlintrc.json")]
    assert subprocess.run([*command, str(bad)], capture_output=True, check=False).returncode != 0
    assert (
        subprocess.run(
            [*command, "pxp/widgets", "tests/widgets"], cwd=ROOT, capture_output=True, check=False
        ).returncode
        == 0
    )
