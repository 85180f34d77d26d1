"""The book's exercises, which answer back: ``pxp.exercise("5.2")``."""

from .shelf import exercise, numbers

__all__ = ["exercise", "numbers"]
