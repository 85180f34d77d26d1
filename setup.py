"""Reads the dependencies from requirements.txt, their one source; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup


def names(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


lines = (Path(__file__).parent / "requirements.txt").read_text(encoding="utf8")
runtime, book = lines.split("# --- book, tests and tools: the extra [book]\n")

setup(install_requires=names(runtime), extras_require={"book": names(book)})
