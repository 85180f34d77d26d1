"""Reads the dependencies from requirements.txt, their one source; everything else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup


def names(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


text = (Path(__file__).parent / "requirements.txt").read_text(encoding="utf8")
runtime, *extras = re.split(r"# --- .*: the extra \[(\w+)\]\n", text)

setup(
    install_requires=names(runtime),
    extras_require=dict(zip(extras[::2], map(names, extras[1::2]), strict=True)),
)
