"""What an exercise is: a choice, a number, a function, or an open question.

An exercise is written once. Its page in the book, its check, its hints and the
tests of all three are made of the same object.
"""

from __future__ import annotations

import ast
import copy
import inspect
import math
import random
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from . import form
from .compare import changed, described, difference, shown, states

WORDS = {
    "choice": "Concept",
    "number": "Concept",
    "code": "Code",
    "open": "Open",
}


@dataclass(frozen=True)
class Verdict:
    """What :meth:`Exercise.check` says; true if the answer is correct.

    Attributes
    ----------
    outcome : {"correct", "incorrect", "not attempted", "open"}
    message : str
        What is probably wrong, and the value that shows it; never the answer.
    """

    outcome: str
    message: str = ""

    def __bool__(self) -> bool:
        return self.outcome == "correct"

    def __repr__(self) -> str:
        words = f"{self.outcome.capitalize()}. {self.message}".strip()
        return textwrap.fill(words, 79)


NOT_YET = Verdict("not attempted", "Write your answer first.")
RIGHT = Verdict("correct")

LONGEST = 300  # characters of an exception's text


def paragraphs(text: str) -> str:
    """Text as it is on a page: one line for each paragraph."""
    parts = textwrap.dedent(text).strip().split("\n\n")
    return "\n\n".join(" ".join(part.split("\n")) for part in parts)


def incorrect(message: str) -> Verdict:
    return Verdict("incorrect", message)


@dataclass(kw_only=True)
class Exercise:
    """One exercise of the book.

    Attributes
    ----------
    number : str
        Chapter and place in it, such as "5.2".
    title : str
    minutes, stars : int
        How long it takes, and how hard it is, of three.
    text : str
        The question, in Markdown.
    hints : tuple of str
        From vague to plain.
    words : str
        The solution, in Markdown.
    """

    number: str
    title: str
    minutes: int
    stars: int
    text: str
    words: str = ""
    hints: tuple[str, ...] = ()
    _told: int = field(default=0, init=False)

    kind = "open"
    summary = "Solution"

    def check(self, answer: Any) -> Verdict:
        """Whether an answer is right; your own objects stay as they are."""
        if answer is None or answer is ...:
            return NOT_YET
        return self._check(answer)

    def _check(self, answer: Any) -> Verdict:
        return Verdict("open", "No single answer is right: compare yours.")

    def hint(self) -> None:
        """Print the next hint."""
        if not self.hints:
            print("There is no hint.")
            return
        place = min(self._told, len(self.hints) - 1)
        self._told += 1
        words = f"Hint {place + 1} of {len(self.hints)}: {self.hints[place]}"
        print(textwrap.fill(words, 79))

    def solution(self) -> None:
        """Print the solution."""
        for part in paragraphs(self.words).split("\n\n"):
            print(textwrap.fill(part, 79))

    @property
    def heading(self) -> str:
        """The statement, as it is in the chapter."""
        stars = "★" * self.stars + "☆" * (3 - self.stars)
        place = self.number.split(".")[1]
        return (
            f"### Exercise {place} · {self.title}\n\n"
            f"{WORDS[self.kind]} · {self.minutes} minutes · {stars}\n\n"
            f"{paragraphs(self.text)}"
        )

    @property
    def folded(self) -> str:
        """The solution in words, as it is in the chapter."""
        return (
            f"<details><summary>{self.summary}</summary>\n\n"
            f"{paragraphs(self.words)}\n\n</details>"
        )

    @property
    def attempt(self) -> str:
        """The cell in which a reader answers."""
        return f'pxp.exercise("{self.number}")'

    def __repr__(self) -> str:
        return f"Exercise {self.number} · {self.title}"


@dataclass(kw_only=True, repr=False)
class Open(Exercise):
    """A question without a single answer; its solution is a report."""


@dataclass(kw_only=True, repr=False)
class Choice(Exercise):
    """One of several statements holds.

    Attributes
    ----------
    options : mapping of str to str
        Statement → what to say about it.
    right : int
        The number of the one that holds, from 1.
    """

    options: Mapping[str, str]
    right: int

    kind = "choice"

    def _check(self, answer: Any) -> Verdict:
        number = len(self.options)
        try:
            place = 0 if isinstance(answer, bool) else int(answer)
            known = 1 <= place <= number and bool(place == answer)
        except Exception:  # anything may be given
            known = False
        if not known:
            return incorrect(f"Answer with 1 to {number}, not {shown(answer)}.")
        message = list(self.options.values())[place - 1]
        right = place == self.right
        return Verdict("correct" if right else "incorrect", message)

    def _repr_html_(self) -> str:
        said = {str(place): repr(self.check(place)) for place in self._places}
        return form.choice(self.number, self.title, list(self.options), said)

    @property
    def _places(self) -> range:
        return range(1, len(self.options) + 1)

    def __repr__(self) -> str:
        lines = [f"{i}  {text}" for i, text in enumerate(self.options, start=1)]
        name = f"Exercise {self.number} · {self.title}"
        return "\n".join([name, *lines, "q.check(number)"])


@dataclass(kw_only=True, repr=False)
class Number(Exercise):
    """A number, known to some accuracy.

    Attributes
    ----------
    answer, step : float
        Right is what is at most one and a half steps away.
    why : str
        What is said of the right answer.
    unit : str
        "%" if per cent are asked for.
    mistakes : mapping of float to str
        Wrong number → what leads there; two or three digits must agree.
    """

    answer: float
    step: float
    why: str
    unit: str = ""
    mistakes: Mapping[float, str]

    kind = "number"

    def _check(self, answer: Any) -> Verdict:
        try:
            text = (
                answer if isinstance(answer, str) else f"{float(answer):.17g}"
            )
            value = form.read(text, self.unit)
        except Exception:  # anything may be given
            value = None
        if value is None or not math.isfinite(value):
            return incorrect("Answer with a number.")
        said = self._said
        for key in (
            str(form.place(value, self.step)),
            form.digits(value, 3),
            form.digits(value, 2),
        ):
            if key in said:
                return said[key]
        return incorrect("That is not it.")

    @property
    def _said(self) -> dict[str, Verdict]:
        """Step of a right answer, or digits of a wrong one → what is said."""
        found = {}
        for value, message in self.mistakes.items():
            for number in (2, 3):
                found[form.digits(value, number)] = incorrect(message)
        middle = form.place(self.answer, self.step)
        for place in range(middle - 1, middle + 2):
            found[str(place)] = Verdict("correct", self.why)
        return found

    def _repr_html_(self) -> str:
        said = {key: repr(each) for key, each in self._said.items()}
        return form.number(self.number, self.title, self.step, self.unit, said)

    def __repr__(self) -> str:
        return f"Exercise {self.number} · {self.title}\nq.check(number)"


@dataclass(kw_only=True, repr=False)
class Code(Exercise):
    """A function to write.

    Attributes
    ----------
    reference : callable
        A solution; its name, arguments and docstring are the task's.
    cases : callable
        Makes the arguments of every call that the check tries.
    mistakes : mapping of str to callable
        What to say → a function that makes this mistake.
    words : str
        What the function shows once it is written, if the text asks.
    """

    reference: Callable[..., Any]
    cases: Callable[[], Sequence[tuple]]
    mistakes: Mapping[str, Callable[..., Any]]

    kind = "code"
    summary = "What it shows"

    def _check(self, answer: Any) -> Verdict:
        name = self.reference.__name__
        if not callable(answer):
            return incorrect(
                f"Give the function itself: check({name}), without calling it."
            )
        with undisturbed():
            return self._tried(answer, name)

    def _tried(self, answer: Callable[..., Any], name: str) -> Verdict:
        names = list(inspect.signature(self.reference).parameters)
        found: list[Any] = []
        wrong = ""
        for case in self.cases():
            call = f"{name}({', '.join(described(part) for part in case)})"
            given = copy.deepcopy(case)
            before = states(given)
            try:
                value = _called(answer, given)
            except NotImplementedError:  # a stub's other way to end
                return NOT_YET
            except (Exception, SystemExit) as error:
                return incorrect(f"{call} raised {quoted(error, answer)}")
            if value is None or value is ...:
                nothing = incorrect(f"{call} gives {value}.")
                return nothing if found else NOT_YET
            touched = changed(names, before, states(given))
            if touched:
                return incorrect(f"{call} changes {touched}: work on a copy.")
            found.append(value)
            expected = _called(self.reference, copy.deepcopy(case))
            differs = difference(value, expected)
            if differs and not wrong:
                wrong = f"{call} gives {shown(value)}: {differs}."
        return incorrect(self._likely(found) + wrong) if wrong else RIGHT

    def _likely(self, found: list[Any]) -> str:
        """What the mistake probably is: the one that gives the same."""
        for message, mistaken in self.mistakes.items():
            made = [_called(mistaken, each) for each in self.cases()]
            pairs = zip(found, made, strict=True)
            if not any(difference(one, other) for one, other in pairs):
                return f"{message} "
        return ""

    @property
    def attempt(self) -> str:
        lines = self.written.splitlines()
        body = ast.parse(self.written).body[0].body  # type: ignore[attr-defined]
        head = lines[: body[0].end_lineno]
        call = f'pxp.exercise("{self.number}").check({self.reference.__name__})'
        return "\n".join([*head, "    ...", "", "", call])

    @property
    def written(self) -> str:
        """The solution's code."""
        return textwrap.dedent(inspect.getsource(self.reference)).rstrip()

    def solution(self) -> None:
        print(self.written)
        if self.words:
            print()
            super().solution()


def _called(function: Callable[..., Any], case: tuple) -> Any:
    """What it gives; random numbers are the same each time."""
    torch.manual_seed(0)
    return function(*case)


@contextmanager
def undisturbed() -> Iterator[None]:
    """What is set for the whole process stays as it is."""
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    numbers = np.random.get_state()  # noqa: NPY002
    others = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        np.random.set_state(numbers)  # noqa: NPY002
        random.setstate(others)


def quoted(error: BaseException, answer: Callable[..., Any]) -> str:
    """An exception in a sentence, with the line of the answer it came from."""
    try:
        text = str(error)
    except Exception:
        text = ""
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
    place = ""
    code = getattr(answer, "__code__", None)
    for frame in traceback.extract_tb(error.__traceback__):
        if code is not None and frame.filename == code.co_filename:
            place = (
                f" (line {frame.lineno}: {frame.line})" if frame.line else ""
            )
    return f"{type(error).__name__}: {text}{place}"
