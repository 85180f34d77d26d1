"""What requirements.txt means elsewhere: on the oldest versions that it allows, and in Colab.

``python tests/versions.py oldest`` prints the lower bounds as pins, for ``make oldest``. ``python tests/versions.py
colab``, which is ``make colab-resolve``, asks pip what an install of pxp would do to Colab's preinstalled packages
(``colab-pins.txt``) and exits 1 if it would change one of them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "tests" / "colab-pins.txt"


def sections(text: str | None = None) -> dict[str, list[str]]:
    """Lines of requirements.txt by extra; what is always installed has the key ``""``."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf8") if text is None else text
    runtime, *extras = re.split(r"^# --- .*: the extra \[(\w+)\]$", text, flags=re.MULTILINE)
    found = {"": runtime, **dict(zip(extras[::2], extras[1::2], strict=True))}
    return {
        extra: [line for line in part.splitlines() if line and not line.startswith("#")]
        for extra, part in found.items()
    }


def pins(text: str) -> dict[str, str]:
    """Version by name, from lines ``name==version``."""
    return dict(line.split("==") for line in text.splitlines() if line and not line.startswith("#"))


def oldest(found: dict[str, list[str]]) -> list[str]:
    """The lower bounds of what users install, as pins: ``a>=1.2`` means 1.2.0."""
    return [line.replace(">=", "==") for extra in ("", "onnx") for line in found[extra]]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def install(
    requirements: Iterable[str], installed: dict[str, str], constraints: Path | None = None
) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """What pip would do where ``installed`` is there: versions it changes, as old and new, and packages it adds.

    Only the names and versions of what is installed are made up, in an empty environment. So pip decides as it does
    there, keeps what satisfies it, and fetches little more than metadata.

    Raises
    ------
    ValueError
        With pip's own words, if it finds no solution.
    """
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder)
        site = Path(sysconfig.get_path("purelib", "venv", {"base": folder, "platbase": folder}))
        for name, version in installed.items():
            entry = site / f"{name.replace('-', '_')}-{version}.dist-info"
            entry.mkdir()
            (entry / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf8")
        command = [sys.executable, "-m", "pip", "--python", folder, "--disable-pip-version-check", "install", "--quiet",
                   "--dry-run", "--only-binary=:all:", "--report", f"{folder}/report.json", *requirements]  # fmt: skip
        run = subprocess.run(
            command + (["-c", str(constraints)] if constraints else []), capture_output=True, text=True
        )
        if run.returncode:
            raise ValueError(run.stderr.strip())
        report = json.loads(Path(folder, "report.json").read_text(encoding="utf8"))
    old = {normal(name): version for name, version in installed.items()}
    new = {normal(item["metadata"]["name"]): item["metadata"]["version"] for item in report["install"]}
    changed = {name: (old[name], version) for name, version in new.items() if name in old}
    return changed, {name: version for name, version in new.items() if name not in old}


def colab() -> int:
    text = PINS.read_text(encoding="utf8")
    python = re.search(r"Python (3\.\d+)", text).group(1)
    if python != f"{sys.version_info.major}.{sys.version_info.minor}":
        print(
            f"Colab has Python {python}, this is {sys.version.split()[0]}: COLAB_PYTHON=python{python} chooses another"
        )
        return 1
    found, there, failed = sections(), pins(text), False
    # The newest onnx lifts protobuf above what Colab's grpc packages allow. That is told; it fails only if no onnx suits.
    for title, wanted, held, exact in (
        ("pxp", found[""], None, True),
        ("pxp with [onnx]", found[""] + found["onnx"], None, False),
        ("pxp with [onnx], Colab's versions held", found[""] + found["onnx"], PINS, True),
    ):
        try:
            changed, added = install(wanted, there, held)
        except ValueError as error:
            print(f"{title}: pip finds no solution beside Colab's packages\n{error}")
            failed = True
            continue
        failed |= exact and bool(changed)
        print(
            f"{title}: changes {len(changed) or 'nothing'}, adds", ", ".join(" ".join(item) for item in added.items())
        )
        for name, (before, after) in changed.items():
            print(f"    {name} {before} -> {after}")
    return int(failed)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["oldest"]:
            print(*oldest(sections()), sep="\n")
        case ["colab"]:
            sys.exit(colab())
        case _:
            sys.exit("usage: versions.py oldest | colab")
