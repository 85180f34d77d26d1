"""Progress bars: one look, and one switch for all."""

from __future__ import annotations

import os
from typing import Any

from tqdm.auto import tqdm

_shown = os.environ.get("PXP_PROGRESS", "1").lower() not in ("0", "false", "no", "off")


def progress(show: bool) -> None:
    """Show or silence all progress bars of the package from now on.

    They appear when something takes longer than five seconds, and go when it is done. The environment variable
    ``PXP_PROGRESS=0`` silences them from the start, as for tests; ``progress=False`` silences a single call.

    Parameters
    ----------
    show : bool

    Raises
    ------
    TypeError
        ``show`` is neither True nor False.
    """
    if not isinstance(show, bool):
        raise TypeError(f"progress is shown or not: True or False, got {show!r}")
    global _shown
    _shown = show


def bar(*iterable: Any, show: bool, **options: Any) -> tqdm:
    """A bar of tqdm for a call that was told to ``show`` it or not."""
    return tqdm(*iterable, delay=5, leave=False, disable=not (show and _shown), **options)
