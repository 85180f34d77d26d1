"""pytest plugin ``-p nbval_tolerance``: nbval's comparison of outputs, with a tolerance for printed numbers.

In text outputs (streams and ``text/*`` of results and displays) everything but numbers is compared exactly. A number
may differ from the stored one

- by what its cell's metadata states, ``{"nbval": {"tolerance": 0.03}}``, absolute and in printed units; it holds for
  every number of the cell, integers too;
- else by two units of its last printed digit, if it is a measured value: one with a decimal point (0.93 by 0.02), an
  exponent (1.2e-05 by 2e-06) or a percent sign (93 % by 2);
- else not at all: an integer is a count, a rank, a class or a shape, and another one is another statement.

A number stands alone. Digits that touch a letter, or join a word or other digits by ``. - : /``, are text: ``conv1``,
``features.3``, ``3x3``, ``LRP-0``, ``1.2.3``, ``2024-01-05``, ``12:30``; so are ``nan`` and ``inf``. How many decimals
are printed, whether with an exponent, a percent sign, a leading + or separators of thousands, is text too. Spaces next
to a number do not count, since a column's padding changes with the number's width.

What nbval pairs, sanitises and skips stays as it is, messages of exceptions are compared exactly, and pictures, which
nbval skips, must at least be there.
"""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from decimal import Decimal

import pytest
from nbval.plugin import IPyNbCell

UNITS = 2

NUMBER = re.compile(
    r"""\ *
    (?<![\w.\#]) (?<!\w[-−]) (?<![0-9][:/])
    (?P<sign>[-+−]?)
    (?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+) (?:\.(?P<decimals>[0-9]+))? (?P<exponent>[eE][-+]?[0-9]{1,3})?)
    (?!\w) (?![.\-−]\w) (?![:/][0-9])
    (?P<percent>[ \u00a0\u202f]?%)?
    \ *""",
    re.VERBOSE,
)


def stated_tolerance(metadata: dict) -> Decimal | None:
    """The tolerance that a cell's metadata states, or None; ValueError if it is not well-formed."""
    if "nbval" not in metadata:
        return None
    section = metadata["nbval"]
    value = section.get("tolerance") if isinstance(section, dict) and len(section) == 1 else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f'metadata nbval is {section!r}, expected {{"tolerance": a number, at least 0}}')
    return Decimal(str(value))


def value(number: re.Match) -> Decimal:
    return Decimal(number["sign"].replace("−", "-") + number["digits"].replace(",", ""))


def allowed(number: re.Match, stated: Decimal | None) -> Decimal:
    """How far the stored number may move."""
    if stated is not None:
        return stated
    measured = number["decimals"] or number["exponent"] or number["percent"]
    return UNITS * Decimal((0, (1,), value(number).as_tuple().exponent)) if measured else Decimal(0)


def same_format(old: re.Match, new: re.Match) -> bool:
    """Whether one format string can have printed both."""
    thousands = all(abs(value(number)) >= 1000 for number in (old, new))
    return (
        len(old["decimals"] or "") == len(new["decimals"] or "")
        and bool(old["exponent"]) == bool(new["exponent"])
        and old["percent"] == new["percent"]
        and {old["sign"], new["sign"]} not in ({"", "+"}, {"-", "−"})
        and not (thousands and ("," in old["digits"]) != ("," in new["digits"]))
    )


def between(line: str, numbers: list[re.Match]) -> list[str]:
    """The text around the numbers of a line, one piece more than there are numbers."""
    starts, ends = zip(*(number.span() for number in numbers), strict=True) if numbers else ((), ())
    return [line[a:b] for a, b in zip((0, *ends), (*starts, len(line)), strict=True)]


def difference(stored: str, found: str, stated: Decimal | None = None) -> str | None:
    """The first difference that counts, in words, or None."""
    before, after = stored.split("\n"), found.split("\n")
    if len(before) != len(after):
        return f"{len(before)} lines are now {len(after)}"
    for count, (line, now) in enumerate(zip(before, after, strict=True), start=1):
        numbers, others = list(NUMBER.finditer(line)), list(NUMBER.finditer(now))
        if between(line, numbers) != between(now, others):
            return f"line {count}: the text {line!r} is now {now!r}"
        for old, new in zip(numbers, others, strict=True):
            change = f"line {count}: {old.group().strip()} is now {new.group().strip()}"
            if not same_format(old, new):
                return f"{change}: another format"
            if abs(value(old) - value(new)) > allowed(old, stated):
                return f"{change}: {abs(value(old) - value(new))} apart, tolerance {allowed(old, stated)}"
    return None


def texts(outputs: list) -> dict[str, list[tuple[dict, str]]]:
    """Where the texts of the outputs stand, by stream or type, as nbval pairs them."""
    found = defaultdict(list)
    for output in outputs:
        if output["output_type"] == "stream":
            found[output["name"]].append((output, "text"))
        for mime in output.get("data", {}):
            if mime.startswith("text/"):
                found[mime].append((output["data"], mime))
    return found


def pictures(outputs: list) -> list[list[str]]:
    kinds = [sorted(mime for mime in output.get("data", {}) if mime.startswith("image/")) for output in outputs]
    return [kind for kind in kinds if kind]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Wrap the comparison of this one cell: a stored text that is near enough is taken for the computed one."""
    if not isinstance(item, IPyNbCell):
        return
    exact = item.compare_outputs

    def compare_outputs(test, ref, skip_compare=None):
        try:
            stated = stated_tolerance(item.cell.metadata)
        except ValueError as error:
            item.raise_cell_error(str(error))
        ref, messages = copy.deepcopy(ref), []
        computed = texts(test)
        for key, places in texts(ref).items():
            for (old, field), (new, _) in zip(places, computed[key], strict=False):  # nbval reports a missing one
                if message := difference(item.sanitize(old[field]), item.sanitize(new[field]), stated):
                    messages.append(f"{key}, {message}")
                else:
                    old[field] = new[field]
        same = exact(test, ref, skip_compare)
        if pictures(ref) != pictures(test):
            same = False
            messages.append(f"pictures {pictures(ref)} are now {pictures(test)}")
        item.comparison_traceback[:0] = messages
        return same

    item.compare_outputs = compare_outputs
