"""Safetensors with a JSON header that tells which components the tensors are about; nothing is unpickled."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .network.components import Components, Layer
from .network.trace import Trace

_GROUPS = {"mask": {"kept"}, "scores": {"magnitude", "signed"}, "compact": {"kept", "state"}}
_EXTRA = {"mask": set(), "scores": {"criterion", "samples", "has_sign"}, "compact": {"model", "example"}}
_SINCE_2 = {"has_sign"}

FORMAT = 2  # of everything that is written; what 0.1 and 0.2 wrote bears no number, which is 1


class Newer(ValueError):
    """A file that a later version of the package wrote."""


def check_format(found: object, path: object) -> int:
    """The format of something that was written, if this version can read it.

    Raises
    ------
    Newer
        It cannot.
    """
    version = 1 if found is None else found
    if not isinstance(version, int) or version > FORMAT:
        raise Newer(f"{path} has format {version}, which a newer pxp wrote; this one reads up to {FORMAT}: upgrade pxp")
    return version


def renewed(criterion: str) -> tuple[str, bool, bool]:
    """The text of a criterion of format 1 in today's words, and what it meant.

    Returns
    -------
    (str, bool, bool)
        The text; whether its scores kept their sign (``absolute="never"``, today ``by="signed"``); whether the sign was
        that of a loss, so that useful was negative.
    """
    text = re.sub(r"(, )?absolute='never'", "", criterion).replace("(, ", "(")
    return text, text != criterion, "start='loss'" in text


def save_tensors(
    path: str | Path,
    what: str,
    units: Components,
    groups: Mapping[str, Mapping[str, Tensor]],
    extra: dict | None = None,
) -> None:
    """Write named groups of tensors about some components as safetensors."""
    tensors = {
        f"{group}/{name}": tensor.contiguous().clone()
        for group, by_layer in groups.items()
        for name, tensor in by_layer.items()
    }
    layers = [asdict(layer) for layer in units.values()]
    header: dict = {"format": FORMAT, "what": what}
    header |= {"kind": units.kind, "layers": layers, "trace": asdict(units.trace), "extra": extra or {}}
    save_file(tensors, path, metadata={"pxp": json.dumps(header)})


def load_tensors(path: str | Path, what: str) -> tuple[Components, dict[str, dict[str, Tensor]], dict]:
    """Read what :func:`save_tensors` wrote: components, group → name → tensor, and the rest."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["pxp"])
            version = check_format(header.get("format"), path)
            if header["what"] != what:
                raise KeyError(f"it holds {header['what']}, not {what}")
            tensors: dict[str, dict[str, Tensor]] = {}
            for key in file.keys():
                group, _, name = key.partition("/")
                tensors.setdefault(group, {})[name] = file.get_tensor(key)
        found = header["trace"]
        structure = Trace(
            tuple(found["order"]),
            {name: tuple(norms) for name, norms in found["norms"].items()},
            found["activations"],
            found["heads"],
            found["positions"],
            tuple(found["overwritten"]),
            {name: tuple(called) for name, called in found.get("functions", {}).items()},
            tuple(found.get("gates", ())),
            found.get("followed", False),
            tuple(found.get("elsewhere", ())),
            found.get("samples", {}),
            found.get("products", {}),
        )
        layers = [Layer(**{**entry, "site": tuple(entry["site"])}) for entry in header["layers"]]
        kind, extra = header["kind"], header["extra"]
        if set(tensors) != _GROUPS[what] or not _EXTRA[what] - (_SINCE_2 if version < 2 else set()) <= set(extra):
            raise KeyError(f"it holds {', '.join([*tensors, *extra])}")
    except (SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no {what} file written by pxp, or it is damaged: {error}") from error
    return Components(kind, layers, structure), tensors, extra
