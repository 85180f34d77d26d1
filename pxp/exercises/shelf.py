"""Finds an exercise by its number."""

from __future__ import annotations

from importlib import import_module

from .kinds import Exercise

CHAPTERS = 14


def numbers() -> list[str]:
    """The numbers of all exercises, in the order of the book."""
    return [each.number for each in _all().values()]


def exercise(number: str) -> Exercise:
    """One of the book's exercises.

    Parameters
    ----------
    number : str
        Chapter and place in it, such as ``"5.2"``.

    Returns
    -------
    Exercise
        With ``check(answer)``, ``hint()`` (each time the next) and
        ``solution()``; shown in a notebook, a question with its answers to
        choose from.

    Raises
    ------
    ValueError
        There is no such exercise.
    """
    known = _all()
    if number not in known:
        raise ValueError(
            f"there is no exercise {number!r}; there are {', '.join(known)}"
        )
    return known[number]


def _all() -> dict[str, Exercise]:
    # only now: they use the package themselves
    modules = [
        import_module(f".chapter{number:02}", __package__)
        for number in range(1, CHAPTERS + 1)
    ]
    return {one.number: one for each in modules for one in each.EXERCISES}
