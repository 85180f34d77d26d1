"""A question that a page can answer without a kernel.

The page holds no answer in clear: for each possible one a hash, and behind it
what is to be said, in base64.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from string import Template

NUMBER = r"^\s*([-+]?)(\d+(?:[.,]\d*)?|[.,]\d+)(e[-+]?\d+)?\s*(%?)\s*$"
NO_NUMBER = "Incorrect. Answer with a number."


def read(text: str, unit: str) -> float | None:
    """A number as a reader writes it; None if it is none.

    A comma is a point; "4.8 %" is 0.048, and 4.8 where per cent are asked for.
    """
    found = re.match(NUMBER, text.replace("−", "-"), re.IGNORECASE | re.ASCII)
    if found is None:
        return None
    sign, digits, power, percent = found.groups()
    value = float(sign + digits.replace(",", ".") + (power or ""))
    return value / 100 if percent and unit != "%" else value


def hashed(number: str, answer: object) -> str:
    """Of an exercise and an answer; the page computes the same."""
    return fnv(f"{number}:{answer}")


def fnv(text: str) -> str:
    """FNV-1a, 32 bits."""
    value = 2166136261
    for byte in text.encode():
        value = (value ^ byte) * 16777619 % 2**32
    return f"{value:x}"


def place(value: float, step: float) -> int:
    """On which step a number lies."""
    return math.floor(value / step + 0.5)


def digits(value: float, number: int) -> str:
    """So many of its digits, as JavaScript's ``toExponential`` writes them."""
    mantissa, power = f"{value:.{number - 1}e}".split("e")
    return f"{mantissa}e{int(power):+d}"


def choice(
    number: str, title: str, options: Sequence[str], said: Mapping[str, str]
) -> str:
    """HTML of a question with several answers; ``said`` of each, from 1."""
    fields = "".join(
        f'<label style="display:block;padding:.3em 0">'
        f'<input type="radio" name="answer" value="{i}"> {_inline(option)}'
        "</label>"
        for i, option in enumerate(options, start=1)
    )
    return _form(number, f"{title}: which of these holds?", fields, 0, "", said)


def number(
    number: str, title: str, step: float, unit: str, said: Mapping[str, str]
) -> str:
    """HTML of a question for a number; ``said`` on each step."""
    field = (
        '<label style="display:block;padding:.3em 0">A number: '
        '<input type="text" inputmode="decimal" size="10" name="answer">'
        f" {unit}</label>"
    )
    return _form(number, f"{title}: your answer", field, step, unit, said)


def _inline(text: str) -> str:
    """Text of an option: code in backticks, emphasis in asterisks."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*([^*]+)\*", r"<em>\1</em>", text)


def _form(
    number: str,
    legend: str,
    fields: str,
    step: float,
    unit: str,
    said: Mapping[str, str],
) -> str:
    known = {
        hashed(number, answer): base64.b64encode(words.encode()).decode()
        for answer, words in said.items()
    }
    return PAGE.substitute(
        number=number,
        legend=html.escape(legend),
        fields=fields,
        step=repr(step),
        unit=unit,
        pattern=NUMBER,
        known=json.dumps(known, separators=(",", ":")),
    )


# several copies of a form may be on one page, and scripts may not run at all
PAGE = Template("""\
<form data-pxp-exercise="$number" onsubmit="return false">\
<fieldset style="border:1px solid currentColor;\
border-radius:4px;padding:.5em 1em;margin:0">
<legend style="font-size:1em;width:auto;padding:0 .4em">$legend</legend>
$fields
<button type="submit" style="min-height:2em;padding:.2em 1em">Check</button>
<output aria-live="polite" style="display:block;padding-top:.5em"></output>
</fieldset></form>
<script>
(() => {
  const known = $known, step = $step;
  const say = (answer) => {
    let hash = 2166136261;
    for (const byte of new TextEncoder().encode("$number:" + answer))
      hash = Math.imul(hash ^ byte, 16777619) >>> 0;
    const found = known[hash.toString(16)];
    if (!found) return "";
    const bytes = Uint8Array.from(atob(found), (c) => c.charCodeAt(0));
    return new TextDecoder().decode(bytes);
  };
  const verdict = (given) => {
    if (!given.trim()) return "Not attempted. Write your answer first.";
    if (!step) return say(given);
    const text = given.replace("−", "-");
    const parts = text.match(new RegExp(String.raw`$pattern`, "i"));
    if (!parts) return "Incorrect. Answer with a number.";
    let value = Number(
      parts[1] + parts[2].replace(",", ".") + (parts[3] || ""));
    if (parts[4] && "$unit" !== "%") value /= 100;
    return say(Math.floor(value / step + 0.5)) ||
      say(value.toExponential(2)) || say(value.toExponential(1)) ||
      "Incorrect. That is not it.";
  };
  document.querySelectorAll('[data-pxp-exercise="$number"]').forEach((form) => {
    const output = form.querySelector("output");
    form.onsubmit = (event) => {
      event.preventDefault();
      const given = new FormData(form).get("answer") || "";
      output.textContent = verdict(String(given));
    };
    form.oninput = () => { output.textContent = ""; };
  });
})();
</script>""")
