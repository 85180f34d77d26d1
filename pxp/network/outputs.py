"""What modules and networks give out: tensors, or tuples, dictionaries and objects that hold them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def tensors(values: object) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, dicts and objects with ``logits``, which come first."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors(value)
    elif isinstance(values, dict):
        logits = [values["logits"]] if "logits" in values else []
        yield from tensors([*logits, *(value for key, value in values.items() if key != "logits")])
    elif isinstance(getattr(values, "logits", None), Tensor):
        yield values.logits  # type: ignore[attr-defined]


def logits_of(output: object) -> Tensor:
    """A classifier's output, or what it holds as ``logits``, as those of Hugging Face do: (samples, classes).

    Raises
    ------
    ValueError
        It is something else.
    """
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ValueError(f"the model's output must be logits of shape (batch, classes), got {shape}")
    return logits
