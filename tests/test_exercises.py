"""Exercises: the solution passes, the stub is not attempted, each typical mistake gets its own words."""

from __future__ import annotations

import ast
import inspect
import json
import random
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
from pxp.exercises.form import fnv, hashed, read
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

    name = next(iter(inspect.signature(one.reference).parameters))
    assert one.check(breaks).message.endswith(f" changes {name}: work on a copy.")
    assert one.check(one.reference)


def left_masked(net, mask, points, labels, entered=[]):  # noqa: B006
    entered.append(pxp.masked(net, mask))
    entered[-1].__enter__()
    with torch.no_grad():
        return [100 * float((net(points).argmax(1) == labels)[labels == c].double().mean()) for c in labels.unique()]


def hooked(net, mask, points, labels):
    net[0].register_forward_pre_hook(lambda module, given: None)
    return ALL["3.2"].reference(net, mask, points, labels)


def frozen(net, mask, points, labels):
    net[0].weight.requires_grad_(False)
    return ALL["3.2"].reference(net, mask, points, labels)


@pytest.mark.parametrize("function", [left_masked, hooked, frozen])
def test_what_stays_on_a_network_is_seen(function):
    assert ALL["3.2"].check(function).message.endswith(" changes net: work on a copy.")


def test_scores_and_curves_are_seen_too():
    def changing(scores):
        found = ALL["10.2"].reference(scores)
        next(iter(scores.signed.values())).zero_()
        return found

    assert ALL["10.2"].check(changing).message.endswith(" changes scores: work on a copy.")

    def replacing(tuning, test):
        found = ALL["5.2"].reference(tuning, test)
        test["zplus"] = tuning["zplus"]
        return found

    assert ALL["5.2"].check(replacing).message.endswith(" changes test: work on a copy.")


@pytest.mark.parametrize("number", CODE)
def test_nothing_of_the_process_is_changed(number):
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    def disturbs(*arguments):
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        np.random.seed(1)  # noqa: NPY002
        random.seed(1)
        return 1.0

    assert ALL[number].check(ALL[number].reference) and not ALL[number].check(disturbs)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


class Odd:
    """Nothing can be done with it."""

    def __repr__(self):
        raise RuntimeError("no")

    __eq__ = __bool__ = __float__ = __len__ = __iter__ = __repr__
    __hash__ = object.__hash__


STRANGE = [
    Odd(), [Odd()], {"a": Odd()}, 10**5000, [10**400] * 5, float("nan"), 3j, torch.zeros(0), torch.zeros(2, device="meta"),
    (i for i in range(3)), nn.Linear(2, 2), "x" * 10000, torch.eye(3).to_sparse(), [None, 1], b"x",
    torch.tensor([1, 4]), np.array([1, 4]), [[1], [2, 3]], object, True, {1}, frozenset(),
]  # fmt: skip


@pytest.mark.parametrize("place", range(len(STRANGE)))
@pytest.mark.parametrize("number", ["1.1", "1.2", "2.2", "5.2", "8.2", "11.2", "13.1", "13.2"])
def test_no_answer_breaks_a_check(number, place):
    one, strange = ALL[number], STRANGE[place]
    verdict = one.check((lambda *arguments: strange) if isinstance(one, Code) else strange)
    assert not verdict and len(repr(verdict)) < 1500


class Unsaid(Exception):
    def __str__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize("error", [SystemExit(1), Unsaid(), ValueError("x" * 5000), RecursionError(), AssertionError()])
def test_any_exception_is_quoted(error):
    def fails(*arguments):
        raise error

    message = ALL["11.2"].check(fails).message
    assert f"raised {type(error).__name__}: " in message and len(message) < 600
    assert re.search(r"\(line \d+: raise error\)$", message)

    def later(*arguments):
        raise NotImplementedError

    assert ALL["11.2"].check(later).outcome == "not attempted"


def no_shared(model, scores, images, rates):
    return list(pxp.pruning_curve(model, scores, images, rates=rates, order="most", progress=False).accuracy)


def elementwise(a, weight, relevance):
    parts = (a[:, None] * weight).clamp(min=0)
    return (parts / parts.sum(2, keepdim=True) * relevance[:, :, None]).sum(1).float().numpy()


def with_gradients(model, units, images, labels):
    found = {}
    for name, layer in units.items():
        found[name] = []
        for head in range(layer.size):
            kept = {n: torch.ones(u.size, dtype=torch.bool) for n, u in units.items()}
            kept[name][head] = False
            with pxp.masked(model, pxp.Mask(units, kept)):
                now = model(images)[range(len(labels)), labels]
            found[name].append((now - model(images)[range(len(labels)), labels]).abs().mean())
    return found


def by_logarithms(good, total, sure, repeats):
    if repeats:
        return float(np.ceil(np.log(1 - sure) / np.log(1 - good / total)))
    chance, number = 0.0, 0
    while chance < sure:
        chance, number = chance + (1 - chance) * good / (total - number), number + 1
    return np.int64(number)


OTHER = {"1.2": no_shared, "2.2": elementwise, "8.2": with_gradients, "11.2": by_logarithms}


@pytest.mark.parametrize("number", OTHER)
def test_other_ways_are_right_too(number):
    assert ALL[number].check(OTHER[number]), ALL[number].check(OTHER[number])


def first_output(a, weight, relevance):
    parts = (a * weight[0]).clamp(min=0)
    return parts / parts.sum(1, keepdim=True) * relevance[:, :1]


def chosen_by(key):
    def report(tuning, test):
        name = max(tuning, key=lambda n: key(tuning[n], test[n]))
        return name, test[name].a_pr

    return report


WRONG = {
    "only the first output": ("2.2", first_output),
    "always the same": ("5.2", lambda tuning, test: ("epsilon", test["epsilon"].a_pr)),
    "both sets together": ("5.2", chosen_by(lambda a, b: a.a_pr + b.a_pr)),
    "the second rate": ("5.2", chosen_by(lambda a, b: a.accuracy[1])),
    "one side": ("7.2", lambda images, order, gone, side: ALL["7.2"].reference(images, order, gone, 4)),
    "the first layer": ("8.2", lambda *case: dict(list(ALL["8.2"].reference(*case).items())[:1])),
    "one rate": ("9.2", lambda scores, rate, number: ALL["9.2"].reference(scores, 0.6, 3)),
    "one criterion": ("4.2", lambda *case: ALL["4.2"].reference(*case[:-1], pxp.LRP("epsilon"))),
    "the cases": ("13.2", lambda work: ({"b", "c"}, 1 / 3) if "d" in work else ({"b"}, 0.5)),
}


@pytest.mark.parametrize("name", WRONG)
def test_half_a_solution_is_wrong(name):
    number, function = WRONG[name]
    assert ALL[number].check(function).outcome == "incorrect"


def test_an_exception_is_quoted_with_its_arguments():
    verdict = ALL["11.2"].check(lambda good, total, sure, repeats: 1 / 0)
    assert verdict.message.startswith("trials(10, 512, 0.95, False) raised ZeroDivisionError: division by zero (line ")
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
    assert one.check(float(one.right)) and one.check(np.int64(one.right)) and one.check(torch.tensor(one.right))


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_is_right_within_its_steps(number):
    one = ALL[number]
    assert len(one.mistakes) >= 3 and one.why
    for answer in (one.answer, one.answer + one.step, one.answer - one.step, np.float32(one.answer), f"{one.answer}"):
        assert one.check(answer).message == one.why
    for answer in (one.answer + 2.6 * one.step, one.answer - 2.6 * one.step):
        assert one.check(answer).outcome == "incorrect"
    for value, message in one.mistakes.items():
        assert one.check(value).message == message and one.check(value).outcome == "incorrect"
        assert one.check(1.0004 * value).message == message
        assert f"{one.answer:g}" not in message.split()
    for wrong in ("many", "", "1/4", "0x30", "0.048.3", "2½", [1], float("nan"), float("inf")):
        assert one.check(wrong).message == "Answer with a number."


@pytest.mark.parametrize(
    "text, unit, value",
    [
        ("25", "%", 25), ("25 %", "%", 25), ("4,8%", "", 0.048), (" .048 ", "", 0.048), ("−3", "", -3), ("5e-2", "", 0.05),
        ("+2.", "", 2), ("0.02*2", "", None), ("200/30", "", None), ("٣", "", None), ("%", "", None), ("1 2", "", None),
    ],
)  # fmt: skip
def test_a_number_as_it_is_written(text, unit, value):
    assert read(text, unit) == (value if value is None else pytest.approx(value))


def test_hints_come_one_after_the_other(capsys):
    for place in (1, 2, 2):
        pxp.exercise("7.2").hint()
        assert capsys.readouterr().out.startswith(f"Hint {place} of 2: ")
    pxp.exercise("9.1").solution()
    assert "constant" in capsys.readouterr().out


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
        (3, {"a": 2}, "it is a int, a dict is asked for"),
        ("x", 2.0, "str does not hold the numbers asked for"),
        (("x", 1), ("y", 1), "at 0 'x' is not right"),
        (("x",), ("y", 1), "1 values are not what is asked for"),
        (1, ("y", 1), "it is a int, a tuple is asked for"),
        ({"y"}, {"y"}, ""),
        (["y"], {"y"}, ""),
        ("y", {"y"}, "'y' is not right"),
        ([torch.ones(1, requires_grad=True)], [[1.0]], ""),
        (torch.eye(2).to_sparse(), np.eye(2), ""),
        (torch.ones(2, dtype=torch.bfloat16), np.ones(2), ""),
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
const forms = [{}, {}].map((form) => { const said = {}; form.querySelector = () => said; form.said = said; return form; });
let given = "";
globalThis.document = { querySelectorAll: () => forms };
globalThis.FormData = class { get() { return given; } };
eval(script);
console.log(JSON.stringify(answers.map((answer, number) => {
  const form = forms[number % 2];
  given = answer;
  form.onsubmit({ preventDefault() {} });
  const found = form.said.textContent;
  form.oninput();
  return form.said.textContent === "" ? found : "the old verdict stays";
})));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script")
@pytest.mark.parametrize("number", [*CHOICES, *NUMBERS])
def test_the_page_says_what_the_check_says(number):
    """In both of two copies of a form."""
    one = ALL[number]
    if isinstance(one, Choice):
        answers = [str(place) for place in range(1, len(one.options) + 1)]
    else:
        numbers = (
            one.answer,
            one.answer - one.step,
            one.answer + one.step,
            *one.mistakes,
            one.answer + 3 * one.step,
            1e6,
            -1,
            1e-9,
            12.5,
        )
        answers = [str(n).replace(".", ",") if i % 2 else f" {n}" for i, n in enumerate(numbers)]
        answers += [
            f"{one.answer} %",
            f"{100 * one.answer}%",
            "1/4",
            "0x30",
            "0.048.3",
            "2½",
            "−3",
            "many",
            "٣",
            "5e-2",
        ]
    script = one._repr_html_().split("<script>")[1].split("</script>")[0]
    done = subprocess.run(
        ["node", "-e", NODE], input=json.dumps([script, [*answers, " "]]), capture_output=True, text=True, check=True
    )
    *said, nothing = json.loads(done.stdout)
    for answer, found in zip(answers, said, strict=True):
        verdict = one.check(answer if isinstance(one, Number) else int(answer))
        assert found.replace("\n", " ") == repr(verdict).replace("\n", " "), answer
    assert nothing == "Not attempted. Write your answer first."


@pytest.mark.parametrize("number", [*CHOICES, *NUMBERS])
def test_the_page_does_not_show_its_answers(number):
    one = ALL[number]
    page = one._repr_html_()
    assert page == one._repr_html_() and f'data-pxp-exercise="{number}"' in page and " id=" not in page
    messages = one.options.values() if isinstance(one, Choice) else one.mistakes.values()
    assert not any(message[:20] in page for message in messages) and "orrect" not in page.split("<script>")[0]
    assert "http" not in page and len(page) < 9000


def test_the_hash_is_fnv():
    """Its authors' values."""
    assert (fnv(""), fnv("a"), fnv("foobar")) == ("811c9dc5", "e40c292c", "bf9cf968")
    assert hashed("5.1", 3) == fnv("5.1:3")
