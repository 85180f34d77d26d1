"""The page *Which networks* of the book, made of what the zoo found."""

from __future__ import annotations

from pathlib import Path

from .networks import entries

PAGE = Path(__file__).resolve().parent.parent.parent / "book" / "which-networks.md"
LIBRARIES = {"tv": "torchvision", "timm": "timm"}
KINDS = {"filter": "filters", "neuron": "neurons", "head": "heads"}


def page(found: dict) -> str:
    rows = found["networks"]
    complete = [row for row in rows if not row["stops"] and not row["wrong"]]
    refused = [row for row in rows if row["stops"] and not row["wrong"]]
    shortened = sum(any(option.startswith("depth") for option in entry.options) for entry in entries())
    versions = ", ".join(f"{name} {version.partition('+')[0]}" for name, version in found["versions"].items())
    oracles = {
        said: sum(row["oracle"] == oracle for row in complete)
        for oracle, said in {
            "gradient × input": "equals gradient × input",
            "logit": "sums to the logit of the same network without biases, tokens and shifts",
            "self-test": "passes the self-test alone, since some constant is left when these are taken out",
        }.items()
    }
    return f"""\
# Which networks

<!-- Written by `make zoo WRITE=1`; edit tests/zoo/page.py. -->

What of the package works on {len(rows)} architectures that researchers bring: {len(complete)} go all the way, {len(refused)} are refused at some step, with a
sentence that names the module. Measured with {versions}. All have 10 classes, {shortened} large transformers fewer blocks than usual. They
have random weights, made lively: no gain is 1, no bias and no layer scale 0, so that a part that is forgotten shows.

*Complete* means, for every kind of component that the network has:

- {{func}}`pxp.find_components` lists it;
- {{func}}`pxp.attribute` scores filters and neurons with ε, z⁺ and γ, heads with ε, all finite and not all 0;
- a mask of the highest scores changes the logits;
- {{func}}`pxp.compact` cuts the lowest 30 % out, and the smaller network gives the masked one's logits within 10⁻⁴ of the largest (at most
  {_power(max(row["compact"] for row in complete))} here);
- the model is afterwards what it was.

Relevance is compared with an independent figure too. Under LRP-0 with attention weights as constants it
{"; in others it ".join(f"{said} ({number} networks)" for said, number in oracles.items() if number)}.

## Complete

{_tables(complete)}

## Refused

{_refusals(refused)}

Whether *your* network works is a matter of three lines, since what `pxp` sees that it cannot explain, mask or cut is an error at once:

```python
units = pxp.find_components(model, "filter", example=images[:1])
scores = pxp.attribute(model, (images, labels), units, pxp.LRP("epsilon"))
small = pxp.compact(model, scores.select(0.3), example=images)
```
"""


def _tables(rows: list[dict]) -> str:
    """One for each library, so that names are short enough for a phone."""
    parts = []
    for short, library in LIBRARIES.items():
        parts += [f"### {library}", _table([row for row in rows if row["network"].startswith(f"{short}/")])]
    return "\n\n".join(parts)


def _table(rows: list[dict]) -> str:
    lines = [
        f"| Network | Weights (M) | {' | '.join(name.capitalize() for name in KINDS.values())} |",
        f"|---|---:|{'---:|' * len(KINDS)}",
    ]
    for row in rows:
        numbers = " | ".join(f"{row['kinds'][kind]:,}" if kind in row["kinds"] else "" for kind in KINDS)
        lines.append(f"| `{row['network'].partition('/')[2]}` | {row['parameters'] / 1e6:.1f} | {numbers} |")
    return "\n".join(lines)


def _refusals(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        (_, reason), *_ = row["stops"].items()
        works = " and ".join(KINDS[kind] for kind in row["kinds"] if kind in KINDS) or "nothing"
        lines.append(f"- {_name(row)}, {works} found: {_short(reason)}")
    return "\n".join(lines)


def _short(reason: str) -> str:
    """A refusal up to where it says what to do."""
    return reason.partition(";")[0].replace("<", "&lt;")


def _name(row: dict) -> str:
    library, name = row["network"].split("/")
    return f"`{name}` ({LIBRARIES[library]})"


def _power(value: float) -> str:
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa} · 10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
