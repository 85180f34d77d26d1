"""What an exercise is: a choice, a number, a function, or an open question.

An exercise is written once. Its page in the book, its check, its hints and the
tests of all three are made of the same object.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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


def paragraphs(text: str) -> str:
    """Text as it is on a page: one line for each paragraph."""
    parts = textwrap.dedent(text).strip().split("\n\n")
    return "\n\n".join(
        part if "\n- " in f"\n{part}" else " ".join(part.split("\n"))
        for part in parts
    )


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
    _told: int = field(default=0, repr=False)

    kind = "open"

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
            "<details><summary>Solution</summary>\n\n"
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
        if isinstance(answer, bool) or answer not in range(1, number + 1):
            return Verdict(
                "incorrect", f"Answer with 1 to {number}, not {answer!r}."
            )
        message = list(self.options.values())[answer - 1]
        return Verdict(
            "correct" if answer == self.right else "incorrect", message
        )

    def _repr_html_(self) -> str:
        return form.choice(
            self.number,
            list(self.options),
            {place: repr(self.check(place)) for place in self._places},
        )

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
    unit : str
    mistakes : mapping of float to str
        Wrong number → what leads there.
    """

    answer: float
    step: float
    unit: str = ""
    mistakes: Mapping[float, str]

    kind = "number"

    def _check(self, answer: Any) -> Verdict:
        try:
            place = form.place(float(answer), self.step)
        except (TypeError, ValueError, OverflowError):
            return Verdict(
                "incorrect", f"Answer with a number, not {answer!r}."
            )
        return self._verdicts.get(
            place, Verdict("incorrect", f"{float(answer):g} is not it.")
        )

    @property
    def _verdicts(self) -> dict[int, Verdict]:
        """What is said at each step: of two that are near, the nearer."""
        said = {self.answer: Verdict("correct")}
        said |= {v: Verdict("incorrect", m) for v, m in self.mistakes.items()}
        exact = {form.place(v, self.step): each for v, each in said.items()}
        around = {
            n: e for v, e in said.items() for n in form.near(v, self.step)
        }
        return around | exact

    def _repr_html_(self) -> str:
        said = {place: repr(each) for place, each in self._verdicts.items()}
        return form.number(self.number, self.step, said)

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
    """

    reference: Callable[..., Any]
    cases: Callable[[], Sequence[tuple]]
    mistakes: Mapping[str, Callable[..., Any]]

    kind = "code"

    def _check(self, answer: Any) -> Verdict:
        name = self.reference.__name__
        if not callable(answer):
            return Verdict(
                "incorrect",
                f"Give the function itself: check({name}), without calling it.",
            )
        found: list[Any] = []
        wrong = ""
        for case in self.cases():
            call = f"{name}({', '.join(described(part) for part in case)})"
            given = copy.deepcopy(case)
            before = states(given)
            try:
                value = _called(answer, given)
            except Exception as error:
                return Verdict(
                    "incorrect",
                    f"{call} raised {type(error).__name__}: {error}",
                )
            if value is None or value is ...:
                nothing = Verdict("incorrect", f"{call} gives {value}.")
                return nothing if found else NOT_YET
            touched = changed(before, states(given))
            if touched:
                return Verdict(
                    "incorrect",
                    f"{call} changes {touched} that it was given: work on a "
                    "copy.",
                )
            found.append(value)
            expected = _called(self.reference, copy.deepcopy(case))
            differs = difference(value, expected)
            if differs and not wrong:
                wrong = f"{call} gives {shown(value)}: {differs}."
        if not wrong:
            return Verdict("correct")
        return Verdict("incorrect", f"{self._likely(found)}{wrong}")

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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return function(*case)
