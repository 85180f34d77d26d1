"""Printed numbers are compared with tolerance, everything else exactly; what is wrong turns red."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import nbval_tolerance
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook, new_output
from nbval_tolerance import NUMBER, difference, stated_tolerance

TESTS = Path(__file__).resolve().parent

# stored, computed, tolerance stated in the metadata
NEAR = [
    ("0.93", "0.95", None),
    ("0.93", "0.91", None),
    ("x 0.9300 y", "x 0.9298 y", None),
    ("93 %", "95 %", None),
    ("93%", "91%", None),
    ("93.4 %", "93.6 %", None),
    ("1.2e-05", "1.4e-05", None),
    ("9.9e-06", "1.0e-05", None),
    ("1e-3", "3e-3", None),
    ("26,560.4", "26,560.6", None),
    ("999.9", "1,000.1", None),
    ("-0.01", "0.01", None),
    ("−0.01", "0.01", None),
    ("+0.01", "-0.01", None),
    ("-0.00", "0.00", None),
    ("[-0.01  0.50]", "[ 0.01  0.49]", None),
    ("a   9.99  b", "a  10.01  b", None),
    ("a  9.99  7\nb  1.00  8", "a 10.01  7\nb  0.99  8", None),
    ("['-0.05', ' 0.35']", "['-0.06', ' 0.34']", None),
    ("(0.36,0.96)", "(0.37,0.95)", None),
    ("sum 0.93.", "sum 0.94.", None),
    ("<td>0.93</td>", "<td>0.94</td>", None),
    ("nan   9.99", "nan  10.00", None),
    ("7", "7", None),
    ("0.93", "0.96", 0.03),
    ("0.93", "0.93", 0),
    ("26,560", "26,570", 10),
    ("999", "1,001", 2),
    ("83   97", "84   96", 1),
    ("x1 of conv1: 12", "x1 of conv1: 14", 2),
]
FAR = [
    ("0.93", "0.96", None),
    ("0.93", "0.97", None),
    ("93 %", "96 %", None),
    ("93%", "90%", None),
    ("1.2e-05", "1.5e-05", None),
    ("1.2e-05", "1.2e-04", None),
    ("0.03", "-0.03", None),
    ("+0.03", "-0.03", None),
    ("−0.03", "0.03", None),
    ("26,560.4", "26,570.4", None),
    ("0.93", "0.97", 0.03),
    ("0.93", "0.94", 0),
    ("93 %", "94 %", 0.5),
    ("26,560", "26,571", 10),
    ("ab 0.5 0.5", "ab 0.5 0.9", None),
]
TEXT = [  # is not a number that may move, whatever the tolerance
    ("conv1", "conv2"),
    ("features.3", "features.4"),
    ("3x3", "5x5"),
    ("LRP-0", "LRP-1"),
    ("1.2.3", "1.2.4"),
    ("2024-01-05", "2024-01-06"),
    ("05/01/2024", "06/01/2024"),
    ("12:30", "12:31"),
    ("10-20 %", "10-21 %"),
    ("0x7f", "0x8f"),
    ("#123456", "#123457"),
    ("3-fold", "4-fold"),
    ("w²", "w³"),
    ("12ms", "13ms"),
    ("nan", "0.5"),
    ("nan", "inf"),
    ("inf", "-inf"),
    ("True", "False"),
    ("a 0.5", "b 0.5"),
    ("a  b 0.5", "a b 0.5"),
    ("0.5 0.5", "0.5"),
    ("0.5", "0.5 0.5"),
    ("0.5", "0.5\n"),
    ("0.5\n0.6", "0.5"),
    ("a\nb", "b\na"),
    ("0.9", "0.90"),
    ("0.9", "1"),
    ("1.0", "1."),
    ("0.00001", "1e-05"),
    ("93 %", "93%"),
    ("93 %", "93"),
    ("0.1", "+0.1"),
    ("-0.1", "−0.1"),
    ("26,560", "26560"),
]


def tolerance(value):
    return stated_tolerance({} if value is None else {"nbval": {"tolerance": value}})


@pytest.mark.parametrize("stored, found, stated", NEAR)
def test_near_enough(stored, found, stated):
    assert difference(stored, found, tolerance(stated)) is None


@pytest.mark.parametrize("stored, found, stated", FAR)
def test_too_far(stored, found, stated):
    assert "apart, tolerance" in difference(stored, found, tolerance(stated))


@pytest.mark.parametrize(
    "stored, found", [("12", "13"), ("12", "11"), ("[1, 2]", "[2, 1]"), ("-1", "1"), ("1,040", "1,041")]
)
def test_an_integer_is_exact_unless_a_tolerance_is_stated(stored, found):
    assert difference(stored, found).endswith("tolerance 0")
    assert difference(stored, found, Decimal(2)) is None


@pytest.mark.parametrize("stored, found", TEXT)
def test_text_is_exact(stored, found):
    for stated in (None, Decimal(10) ** 9):
        assert difference(stored, found, stated) is not None
        assert difference(found, stored, stated) is not None


def test_the_message_names_line_numbers_and_tolerance():
    assert difference("a\nb 0.93 c", "a\nb 0.97 c") == "line 2: 0.93 is now 0.97: 0.04 apart, tolerance 0.02"
    assert difference("a\nb", "a\nc") == "line 2: the text 'b' is now 'c'"
    assert difference("0.9", "0.90") == "line 1: 0.9 is now 0.90: another format"
    assert difference("a\nb\n", "a\n") == "3 lines are now 2"


@pytest.mark.parametrize("value", [0.03, 2, 0, 1e-6])
def test_a_stated_tolerance(value):
    assert stated_tolerance({"nbval": {"tolerance": value}, "tags": []}) == Decimal(str(value))


MALFORMED = [
    None, 0.03, [], {}, {"tolerence": 0.03}, {"tolerance": 0.03, "relative": True}, {"tolerance": "0.03"}, {"tolerance": -1},
    {"tolerance": True}, {"tolerance": None}, {"tolerance": float("nan")}, {"tolerance": float("inf")},
]  # fmt: skip


@pytest.mark.parametrize("section", MALFORMED, ids=str)
def test_a_malformed_tolerance_is_an_error(section):
    with pytest.raises(ValueError, match="metadata nbval is"):
        stated_tolerance({"nbval": section})


LINE = st.text(alphabet="ab.,-+−:/ %e_(['²0123456789", max_size=30)


@given(st.text() | LINE, st.sampled_from([None, Decimal(0), Decimal(3)]))
def test_a_text_equals_itself(text, stated):
    assert difference(text, text, stated) is None


@given(LINE, LINE)
def test_without_tolerance_only_spaces_and_the_sign_of_zero_are_free(stored, found):
    if difference(stored, found, Decimal(0)) is None:
        plain = [re.sub(r"[-+−]|\s", "", text) for text in (stored, found)]
        assert plain[0] == plain[1]


@given(
    st.integers(-(10**6), 10**6), st.integers(-9, 9), st.integers(1, 6), st.integers(1, 16),
    st.sampled_from(["{}", "sum {} of x1", "[{}, 0.5]", "a\nfeatures.3  {}  12 %", "({}% left)"]),
)  # fmt: skip
def test_two_units_of_the_last_printed_digit(value, step, decimals, width, template):
    stored, found = (
        template.format(f"{Decimal(n).scaleb(-decimals):{width}.{decimals}f}") for n in (value, value + step)
    )
    assert (difference(stored, found) is None) == (abs(step) <= nbval_tolerance.UNITS)
    assert (difference(stored, found, Decimal(3).scaleb(-decimals)) is None) == (abs(step) <= 3)


@given(LINE, st.integers(0, 30), st.sampled_from("abε_²\n(\"'"))
def test_an_inserted_character_is_seen(line, position, character):
    assert difference(line, line[:position] + character + line[position:], Decimal(10) ** 40) is not None


@given(st.lists(st.sampled_from(["a 0.5", "b 12 %", "", "c"]), min_size=1, max_size=5), st.data())
def test_a_dropped_line_is_seen(lines, data):
    gone = data.draw(st.integers(0, len(lines) - 1))
    assert len(lines) == 1 or difference("\n".join(lines), "\n".join(lines[:gone] + lines[gone + 1 :])) is not None


@given(LINE)
def test_numbers_stand_alone(line):
    for number in NUMBER.finditer(line):
        start, end = number.start("digits"), number.end("digits")
        assert not re.match(r"[\w.]", line[start - 1 : start]) and not re.match(r"\w", line[end : end + 1])


# End to end: one notebook, its stored outputs moved in three ways, under stock nbval and with the plugin.

PNG = "iVBORw0KGgo="
PICTURE = f'display({{"image/png": "{PNG}", "text/plain": "picture"}}, raw=True)'
HTML = 'display({"text/html": "<td>0.93</td>", "text/plain": "table"}, raw=True)'


def stream(text):
    return [new_output("stream", text=text)]


def shown(text="picture", **data):
    return [new_output("display_data", data={"text/plain": text, **data})]


def result(text):
    return [new_output("execute_result", data={"text/plain": text}, execution_count=1)]


def raised(message):
    return [new_output("error", ename="ValueError", evalue=message, traceback=[])]


IGNORE, SKIP, RAISES = ({"tags": [tag]} for tag in ("nbval-ignore-output", "nbval-skip", "raises-exception"))
WITHIN, TOLERANCE = {"nbval": {"tolerance": 0.05}}, {"nbval": {"tolerance": 3}}

# name: source, metadata, right output, stored output, passes with stock nbval, passes with the plugin
CELLS = {
    "unchanged": ("print('a 0.93')", {}, stream("a 0.93\n"), stream("a 0.93\n"), True, True),
    "no output": ("x = 1", {}, [], [], True, True),
    "within two units": ("print('a 0.93')", {}, stream("a 0.93\n"), stream("a 0.91\n"), False, True),
    "percent": ("print('a 93 %')", {}, stream("a 93 %\n"), stream("a 95 %\n"), False, True),
    "wider column": ("print('a 10.01')", {}, stream("a 10.01\n"), stream("a  9.99\n"), False, True),
    "result": ("[0.93, 'a']", {}, result("[0.93, 'a']"), result("[0.94, 'a']"), False, True),
    "html": (HTML, {}, shown("table", **{"text/html": "<td>0.93</td>"}), shown("table", **{"text/html": "<td>0.94</td>"}), False, True),
    "stderr": ("import sys; print('0.93', file=sys.stderr)", {}, [new_output("stream", name="stderr", text="0.93\n")], [new_output("stream", name="stderr", text="0.94\n")], False, True),
    "sanitised": ("print('at 0x7f 0.93')", {}, stream("at 0x7f 0.93\n"), stream("at 0x8e 0.94\n"), False, True),
    "within a stated tolerance": ("print('a 0.93')", WITHIN, stream("a 0.93\n"), stream("a 0.98\n"), False, True),
    "integer within a stated one": ("print('a 12')", TOLERANCE, stream("a 12\n"), stream("a 15\n"), False, True),
    "ignored output": ("print('a 0.93')", IGNORE, stream("a 0.93\n"), stream("b\n"), True, True),
    "skipped": ("1 / 0", SKIP, [], stream("b\n"), True, True),
    "expected exception": ("raise ValueError('0.93')", RAISES, raised("0.93"), raised("0.93"), True, True),
    "twice the tolerance": ("print('a 0.93')", {}, stream("a 0.93\n"), stream("a 0.97\n"), False, False),
    "twice a stated tolerance": ("print('a 0.93')", WITHIN, stream("a 0.93\n"), stream("a 0.83\n"), False, False),
    "twice the tolerance in a result": ("[0.93, 'a']", {}, result("[0.93, 'a']"), result("[0.97, 'a']"), False, False),
    "twice the tolerance of percent": ("print('a 93 %')", {}, stream("a 93 %\n"), stream("a 97 %\n"), False, False),
    "integer": ("print('a 12')", {}, stream("a 12\n"), stream("a 13\n"), False, False),
    "changed word": ("print('a 0.93')", {}, stream("a 0.93\n"), stream("b 0.93\n"), False, False),
    "dropped line": ("print('a 0.93\\nb')", {}, stream("a 0.93\nb\n"), stream("a 0.93\nb\nc\n"), False, False),
    "added line": ("print('a 0.93\\nb')", {}, stream("a 0.93\nb\n"), stream("a 0.93\n"), False, False),
    "changed order": ("print('a 0.93\\nb 0.94')", {}, stream("a 0.93\nb 0.94\n"), stream("b 0.94\na 0.93\n"), False, False),
    "more digits": ("print('a 0.93')", {}, stream("a 0.93\n"), stream("a 0.930\n"), False, False),
    "output missing": ("x = 1", {}, [], stream("a 0.93\n"), False, False),
    "output added": ("print('a 0.93')", {}, stream("a 0.93\n"), [], False, False),
    "one of two results missing": ("display(0.93)", {}, shown("0.93"), [*shown("0.93"), *shown("0.94")], False, False),
    "figure missing": ("x = 1", {}, [], shown(**{"image/png": PNG}), False, False),
    "picture of a figure missing": ("display({'text/plain': 'picture'}, raw=True)", {}, shown(), shown(**{"image/png": PNG}), True, False),
    "another picture": (PICTURE, {}, shown(**{"image/png": PNG}), shown(**{"image/png": PNG[:-2]}), True, True),
    "exception with another message": ("raise ValueError('0.93')", RAISES, raised("0.93"), raised("0.94"), False, False),
    "unexpected exception": ("print('a 0.93'); 1 / 0", {}, None, stream("a 0.93\n"), False, False),
    "unknown key": ("print('a 0.93')", {"nbval": {"tolerence": 1}}, None, stream("a 0.93\n"), True, False),
    "malformed tolerance": ("print('a 0.93')", {"nbval": {"tolerance": "1 %"}}, None, stream("a 0.93\n"), True, False),
}  # fmt: skip


def write(path, cells):
    made = [new_code_cell(code, metadata=metadata, outputs=out, execution_count=1) for code, metadata, out in cells]
    page = new_notebook(cells=made)
    nbformat.validate(page)
    nbformat.write(page, path)


def nbval(folder, *options):
    """File → which of its cells passed, None for a skipped one; and the report."""
    command = [
        sys.executable, "-m", "pytest", "--color=no", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider",
        "--nbval-sanitize-with", str(TESTS / "nbval_sanitize.cfg"), "--rootdir", str(folder),
        "--junit-xml", str(folder / "junit.xml"), *options, str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    report = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True).stdout
    cells: dict[str, list[bool | None]] = {}
    for case in ElementTree.parse(folder / "junit.xml").iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = None if "skipped" in kinds else not kinds & {"failure", "error"}
        cells.setdefault(case.get("classname"), []).append(outcome)
    return cells, report


@pytest.mark.parametrize("options", ["", "-p nbval_tolerance", "-p nbval_tolerance -n 1 --dist loadscope"])
def test_what_is_wrong_turns_red(options, tmp_path):
    """Under stock nbval, with the plugin, and with the plugin in a worker."""
    right = {name: cell[:3] for name, cell in CELLS.items() if cell[2] is not None}
    write(tmp_path / "right.ipynb", right.values())
    write(tmp_path / "stored.ipynb", [(cell[0], cell[1], cell[3]) for cell in CELLS.values()])
    found, report = nbval(tmp_path, *options.split())
    expected = {name: (near if options else exact) for name, (*_, exact, near) in CELLS.items()}
    skipped = {"skipped": None}
    assert dict(zip(right, found["right.ipynb"], strict=True)) == dict.fromkeys(right, True) | skipped, report
    assert dict(zip(CELLS, found["stored.ipynb"], strict=True)) == expected | skipped, report
    if options:
        assert [message for message in MESSAGES if message not in report] == [], report


MESSAGES = [
    "stdout, line 1: 0.97 is now 0.93: 0.04 apart, tolerance 0.02",
    "stdout, line 1: 0.83 is now 0.93: 0.10 apart, tolerance 0.05",
    "text/plain, line 1: 0.97 is now 0.93: 0.04 apart, tolerance 0.02",
    "stdout, line 1: 97 % is now 93 %: 4 apart, tolerance 2",
    "stdout, 4 lines are now 3",
    "pictures [['image/png']] are now []",
    "metadata nbval is {'tolerence': 1}",
]
