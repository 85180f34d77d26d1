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


def near(value: float, step: float) -> range:
    """That step and its neighbours."""
    middle = place(value, step)
    return range(middle - 1, middle + 2)


def choice(number: str, options: Sequence[str], said: Mapping[int, str]) -> str:
    """HTML of a question with several answers; ``said`` of each, from 1."""
    name = _name(number)
    fields = "".join(
        f'<label style="display:block;padding:.3em 0">'
        f'<input type="radio" name="{name}" value="{i}"> {_inline(option)}'
        "</label>"
        for i, option in enumerate(options, start=1)
    )
    return _form(number, fields, "", said, legend="One of these holds.")


def number(number: str, step: float, said: Mapping[int, str]) -> str:
    """HTML of a question for a number; ``said`` on each step."""
    field = (
        '<label style="display:block;padding:.3em 0">A number: '
        '<input type="text" inputmode="decimal" size="10" '
        f'name="{_name(number)}"></label>'
    )
    return _form(number, field, repr(step), said, legend="Your answer.")


def _name(number: str) -> str:
    return "pxp-exercise-" + number.replace(".", "-")


def _inline(text: str) -> str:
    """Text of an option: code in backticks, emphasis in asterisks."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*([^*]+)\*", r"<em>\1</em>", text)


def _form(
    number: str, fields: str, step: str, said: Mapping[int, str], legend: str
) -> str:
    known = {
        hashed(number, answer): base64.b64encode(words.encode()).decode()
        for answer, words in said.items()
    }
    return PAGE.substitute(
        name=_name(number),
        number=number,
        legend=legend,
        fields=fields,
        step=step or "0",
        known=json.dumps(known, separators=(",", ":")),
    )


PAGE = Template("""\
<form id="$name"><fieldset style="border:1px solid currentColor;\
border-radius:4px;padding:.5em 1em;margin:0">
<legend style="font-size:1em;width:auto;padding:0 .4em">$legend</legend>
$fields
<button type="submit" style="min-height:2em;padding:.2em 1em">Check</button>
<output aria-live="polite" style="display:block;padding-top:.5em"></output>
</fieldset></form>
<script>
(() => {
  const form = document.getElementById("$name"), known = $known;
  const step = $step;
  form.onsubmit = (event) => {
    event.preventDefault();
    const given = new FormData(form).get("$name") || "";
    const value = parseFloat(String(given).replace(",", "."));
    const answer = step ? Math.floor(value / step + 0.5) : value;
    let hash = 2166136261;
    for (const byte of new TextEncoder().encode("$number:" + answer))
      hash = Math.imul(hash ^ byte, 16777619) >>> 0;
    const found = known[hash.toString(16)];
    const bytes = Uint8Array.from(atob(found || ""), (c) => c.charCodeAt(0));
    form.querySelector("output").textContent = isNaN(value)
      ? "Not attempted. Write your answer first."
      : found ? new TextDecoder().decode(bytes) : "Incorrect. That is not it.";
  };
})();
</script>""")
