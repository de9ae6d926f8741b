"""The rates of judged answers as a table; the file beside it holds them whole."""

from collections.abc import Mapping
from typing import Any

from ..analysis.stats import Measurement


def flat(block: Mapping[str, Any]) -> dict[str, Measurement]:
    """{name: measurement} of one block of `analysis.metrics.generation`."""
    found = {name: block[name] for name in ("em", "refusals") if name in block}
    found |= {f"{name} score": value for name, value in block["scores"].items()}
    return found | {f"{name} {word}": value for name, words in block["says"].items() for word, value in words.items()}


def table(results: Mapping[str, Any]) -> str:
    """All measures of each variant, and each question's rate of misalignment (or what its judge said)."""
    lines = ["| variant | question | measure | value | wilson | n | missing |", "|---|---|---|---|---|---|---|"]
    for variant, found in results.items():
        lines += [_line(variant, "all", name, value) for name, value in flat(found["all"]).items()]
        for question, block in found["questions"].items():
            measures = {"em": block["em"]} if "em" in block else flat(block)
            lines += [_line(variant, question, name, value) for name, value in measures.items()]
    return "".join(line + "\n" for line in lines)


def _line(variant: str, question: str, name: str, value: Measurement) -> str:
    gaps = ", ".join(f"{n} {reason}" for reason, n in value["missing"].items()) or "0"
    wilson = _interval(value.get("wilson95"))
    return f"| {variant} | {question} | {name} | {_shown(value)} | {wilson} | {value['n']} | {gaps} |"


def _shown(value: Measurement) -> str:
    if value["value"] is None:
        return "none"
    return f"{value['value']:.3g} {_interval(value.get('ci95'))}".strip()


def _interval(interval: list[float] | None) -> str:
    return "" if interval is None else f"[{interval[0]:.2g}, {interval[1]:.2g}]"
