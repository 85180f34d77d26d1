"""Exercises: the solution passes, the stub is not attempted, each typical mistake gets its own words."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from torch import nn

import pxp
from pxp.exercises import numbers
from pxp.exercises.compare import difference, shown
from pxp.exercises.form import fnv, hashed
from pxp.exercises.kinds import Choice, Code, Number, Open

ALL = {number: pxp.exercise(number) for number in numbers()}
CODE = [number for number, one in ALL.items() if isinstance(one, Code)]
CHOICES = [number for number, one in ALL.items() if isinstance(one, Choice)]
NUMBERS = [number for number, one in ALL.items() if isinstance(one, Number)]


def test_every_chapter_has_three():
    kinds = [type(one) for one in ALL.values()]
    assert list(ALL) == [f"{chapter}.{place}" for chapter in range(1, 15) for place in (1, 2, 3)]
    assert all(kind in (Choice, Number) for kind in kinds[::3])
    assert set(kinds[1::3]) == {Code} and set(kinds[2::3]) == {Open}


@pytest.mark.parametrize("number", ALL)
def test_an_exercise_is_complete(number):
    one = ALL[number]
    assert one.title and one.text.strip() and one.hints and one.minutes > 0 and one.stars in (1, 2, 3)
    assert one.words or isinstance(one, Code)
    assert one.heading.startswith(f"### Exercise {number.split('.')[1]} · {one.title}\n\n")
    assert not re.search(r"[^\n]\n[^\n-]", one.heading)  # a paragraph is a line
    for nothing in (None, ...):
        assert one.check(nothing).outcome == "not attempted"


@pytest.mark.parametrize("number", CODE)
def test_the_solution_passes_and_the_stub_is_not_attempted(number, capsys):
    one = ALL[number]
    assert one.check(one.reference)
    names = {"pxp": pxp, "torch": torch}
    exec(one.attempt.rsplit("\n", 1)[0], names)
    assert one.check(names[one.reference.__name__]).outcome == "not attempted"
    assert max(map(len, [*one.attempt.splitlines(), *one.written.splitlines()])) <= 80
    one.solution()
    assert capsys.readouterr().out.startswith(one.written)
    assert ast.get_docstring(one.reference.__code__ and ast.parse(one.written).body[0])


@pytest.mark.parametrize("number", CODE)
def test_each_mistake_gets_its_own_words(number):
    one = ALL[number]
    assert len(one.mistakes) >= 3
    for message, mistaken in one.mistakes.items():
        verdict = one.check(mistaken)
        assert verdict.outcome == "incorrect" and not verdict
        assert verdict.message.startswith(f"{message} {one.reference.__name__}("), verdict
    other = one.check(lambda *arguments: "something else")
    assert other.outcome == "incorrect" and not any(other.message.startswith(m) for m in one.mistakes)


@pytest.mark.parametrize("number", [n for n in CODE if n not in ("9.2", "10.2", "11.2")])  # of scores and numbers
def test_what_a_function_does_to_its_arguments_is_seen_and_undone(number):
    one = ALL[number]

    def breaks(*arguments):
        found = one.reference(*arguments)
        first = arguments[0]
        if isinstance(first, nn.Module):
            first.train()
        elif isinstance(first, dict):
            first["new"] = first.pop(next(iter(first)))
        elif isinstance(first, torch.Tensor):
            first.add_(1)
        else:
            first[:] = 0
        return found

    assert re.search(
        r"changes the (tensor|network|dict|ndarray) that it was given: work on a", one.check(breaks).message
    )
    assert one.check(one.reference)


def test_an_exception_is_quoted_with_its_arguments():
    verdict = ALL["11.2"].check(lambda good, total, sure, repeats: 1 / 0)
    assert verdict.message == "trials(10, 512, 0.95, False) raised ZeroDivisionError: division by zero"
    verdict = ALL["2.2"].check(lambda a: a)
    assert "zplus_layer(<Tensor of shape (20, 6)>, " in verdict.message and "raised TypeError: " in verdict.message
    assert ALL["2.2"].check(3).message == "Give the function itself: check(zplus_layer), without calling it."
    sometimes = ALL["11.2"].check(lambda good, total, sure, repeats: None if repeats else 131)
    assert sometimes.outcome == "incorrect"


@pytest.mark.parametrize("number", CHOICES)
def test_a_choice_has_one_right_answer(number):
    one = ALL[number]
    verdicts = [one.check(place) for place in range(1, len(one.options) + 1)]
    assert [bool(verdict) for verdict in verdicts].count(True) == 1 and len(verdicts) >= 4
    assert len({verdict.message for verdict in verdicts}) == len(verdicts) and all(v.message for v in verdicts)
    for wrong in (0, len(verdicts) + 1, "a", True, 1.5):
        assert one.check(wrong).message == f"Answer with 1 to {len(verdicts)}, not {wrong!r}."


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_is_right_within_its_steps(number):
    one = ALL[number]
    assert len(one.mistakes) >= 3
    for answer in (one.answer, one.answer + one.step, one.answer - one.step, np.float32(one.answer), f"{one.answer}"):
        assert one.check(answer)
    for answer in (one.answer + 2.6 * one.step, one.answer - 2.6 * one.step):
        assert one.check(answer).outcome == "incorrect"
    for value, message in one.mistakes.items():
        assert one.check(value).message == message and one.check(value).outcome == "incorrect"
        assert f"{one.answer:g}" not in message.split()
    assert one.check("many").message == "Answer with a number, not 'many'."
    assert one.check(float("nan")).outcome == "incorrect"


def test_hints_come_one_after_the_other(capsys):
    first, again = pxp.exercise("7.2"), pxp.exercise("7.2")
    for one, place in ((first, 1), (first, 2), (first, 2), (again, 1)):
        one.hint()
        assert capsys.readouterr().out.startswith(f"Hint {place} of 2: ")
    first.solution()


def test_an_unknown_number_names_those_that_are():
    with pytest.raises(ValueError, match=r"^there is no exercise '15\.1'; there are 1\.1, 1\.2, .*14\.3$"):
        pxp.exercise("15.1")


@pytest.mark.parametrize(
    "found, expected, words",
    [
        (1.0, 1.00001, ""),
        (1.0, 1.1, "the value is not right"),
        (torch.ones(2), np.ones(2), ""),
        ([1, 2], (1, 2), ""),
        ([1, 2], [1, 2, 3], r"the shape (2,) is not what is asked for"),
        (torch.tensor([1.0, 5.0]), torch.tensor([1.0, 2.0]), "the value at 1, 5, is not right"),
        (torch.tensor([torch.nan]), torch.tensor([2.0]), "the value at 0, nan, is not right"),
        ({"a": 1}, {"a": 1, "b": 2}, "'b' is missing"),
        ({"a": 1, "c": 2}, {"a": 1}, "'c' is not asked for"),
        ({"a": 1}, {"a": 2}, "at 'a' the value is not right"),
        (3, {"a": 2}, "int is not what is asked for"),
        ("x", 2.0, "str is not what is asked for"),
        (("x", 1), ("y", 1), "at 0 'x' is not right"),
        (("x",), ("y", 1), "1 values are not what is asked for"),
        (1, ("y", 1), "int is not what is asked for"),
    ],
)
def test_a_difference_does_not_tell_the_answer(found, expected, words):
    assert difference(found, expected) == words


@pytest.mark.parametrize(
    "value, words",
    [
        (torch.tensor([True, False]), "[True, False]"),
        (torch.tensor([[0.12345, 2]], dtype=torch.bfloat16), "[[0.1235, 2]]"),
        (torch.tensor(3.0, requires_grad=True), "3"),
        (np.float32(0.5), "0.5"),
        (np.arange(9), "values of shape (9,)"),
        ({"a": 1}, "{'a': 1}"),
        ("x" * 70, "<str>"),
        (1e-9, "1e-09"),
    ],
)
def test_a_value_in_few_words(value, words):
    assert shown(value) == words


NODE = """
const [script, answers] = JSON.parse(require("fs").readFileSync(0, "utf8"));
const said = { textContent: "" }, form = { querySelector: () => said };
let given = "";
globalThis.document = { getElementById: () => form };
globalThis.FormData = class { get() { return given; } };
eval(script);
console.log(JSON.stringify(answers.map((answer) => {
  given = answer;
  form.onsubmit({ preventDefault() {} });
  return said.textContent;
})));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script")
@pytest.mark.parametrize("number", [*CHOICES, *NUMBERS])
def test_the_page_says_what_the_check_says(number):
    one = ALL[number]
    if isinstance(one, Choice):
        answers = list(range(1, len(one.options) + 1))
    else:
        answers = [one.answer, one.answer + one.step, *one.mistakes, one.answer + 3 * one.step, 1e6, -1]
    script = one._repr_html_().split("<script>")[1].split("</script>")[0]
    given = json.dumps([script, [str(a).replace(".", ",") if i % 2 else str(a) for i, a in enumerate(answers)]])
    done = subprocess.run(["node", "-e", NODE], input=given, capture_output=True, text=True, check=True)
    for answer, said in zip(answers, json.loads(done.stdout), strict=True):
        expected = repr(one.check(answer)).replace("\n", " ")
        assert said.replace("\n", " ") in (expected, "Incorrect. That is not it."), answer
        assert said.startswith("Correct") == bool(one.check(answer))


@pytest.mark.parametrize("number", [*CHOICES, *NUMBERS])
def test_the_page_does_not_show_its_answers(number):
    one = ALL[number]
    page = one._repr_html_()
    assert page == one._repr_html_() and f'id="pxp-exercise-{number.replace(".", "-")}"' in page
    messages = one.options.values() if isinstance(one, Choice) else one.mistakes.values()
    assert not any(message[:20] in page for message in messages) and "orrect" not in page.split("<script>")[0]
    assert "http" not in page and len(page) < 6000


def test_the_hash_is_fnv():
    """Its authors' values."""
    assert (fnv(""), fnv("a"), fnv("foobar")) == ("811c9dc5", "e40c292c", "bf9cf968")
    assert hashed("5.1", 3) == fnv("5.1:3")
