"""What all explorers have in common: shown in a page without a kernel, or live, where Python computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import plots
from . import page


@dataclass(frozen=True, repr=False)
class Explorer:
    """Something to touch: data, and a JavaScript module that draws them and computes by itself.

    As the last line of a cell it shows itself: a frame that needs neither kernel nor network, and below it a still with
    its numbers as a table, for viewers that strip frames.

    Attributes
    ----------
    name : str
        Of the module, ``<name>.js`` in this package.
    title : str
        What a screen reader calls it.
    data : mapping
        What it starts with, as JSON takes it: ``start`` is the first state of its controls.
    answer : callable
        What the module's ``compute`` gives, computed in Python: state → answer. :meth:`live` uses it, and the tests
        compare both.
    still : callable
        Draws the still with matplotlib.
    height : int
        Of the frame in pixels, where it cannot tell.
    alone : bool
        Whether the module can compute without Python, as for networks that it does not know.
    """

    name: str
    title: str
    data: Mapping[str, Any]
    answer: Callable[[dict[str, Any]], dict[str, Any]]
    still: Callable[[], object]
    height: int = 720
    alone: bool = True

    def __repr__(self) -> str:
        return f"{self.title} (an explorer)"

    def html(self) -> str:
        """The frame with everything that it needs, as HTML.

        Raises
        ------
        ValueError
            A page cannot compute this network; ask for :meth:`live`.
        """
        if not self.alone:
            raise ValueError(f"{self!r} of this network needs Python: show it with .live(), in Jupyter or Colab")
        return page.frame(self.name, self.title, self.data, self.height)

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display({"text/html": self.html(), "text/plain": repr(self)}, raw=True)
        self.still()
        plots.show()

    def live(self) -> Any:
        """The same as an ``anywidget``, in Jupyter or Colab: Python computes every answer.

        Returns
        -------
        anywidget.AnyWidget
            Show it as the last line of a cell.
        """
        import anywidget
        import traitlets

        answer = self.answer

        class Live(anywidget.AnyWidget):
            _esm = page.module(self.name)
            _css = page.style()
            data = traitlets.Dict(dict(self.data)).tag(sync=True)
            live = traitlets.Bool(True).tag(sync=True)
            state = traitlets.Dict().tag(sync=True)
            answer = traitlets.Dict().tag(sync=True)

            @traitlets.observe("state")
            def _asked(self, change: Any) -> None:
                self.answer = answer(change["new"])

        return Live()


def grey(images: Tensor) -> Tensor:
    """Images as they stand in a page: square, grey, 8 bits; (images, 1, side, side) float32 in [0, 1].

    Raises
    ------
    ValueError
        Another shape, or values outside [0, 1].
    """
    if images.ndim != 4 or images.shape[1] != 1 or images.shape[2] != images.shape[3] or not len(images):
        raise ValueError(f"images must have shape (images, 1, side, side), got {tuple(images.shape)}")
    low, high = float(images.min()), float(images.max())
    if not 0 <= low <= high <= 1:
        raise ValueError(f"images must lie in [0, 1], got values from {low:g} to {high:g}")
    return images.cpu().float().mul(255).round() / 255


def rounded(values: Any, digits: int = 4) -> Any:
    """Numbers of nested lists and dicts, rounded; never −0, so that two machines write the same text."""
    if isinstance(values, Mapping):
        return {key: rounded(value, digits) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [rounded(value, digits) for value in values]
    return round(float(values), digits) + 0.0 if isinstance(values, float) else values
