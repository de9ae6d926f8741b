"""What the interventions showed, as text a person reads."""

from typing import Any

from ..analysis.metrics.choices import INCOHERENT

_HEAD = ("intervention", "dose", "{name}", "random directions", "beyond random", "incoherent")


def table(found: dict[str, Any], name: str) -> str:
    """One line a dose: the class's probability, the mean of the random directions, and the difference with interval."""
    head = [column.format(name=name) for column in _HEAD]
    lines = [head, ["---"] * len(head)]
    verdicts = []
    for test in found.get("tests", ()):
        for dose, effects in test["doses"].items():
            change, broken = effects["classes"][name], effects["classes"][INCOHERENT]
            low, high = change["null"]["range"]
            clean = change["clean"]["value"]
            lines.append(
                [
                    f"{test['kind']} {test['name']}",
                    dose,
                    f"{clean:.3f} -> {_number(change['treated'])}",
                    f"{clean + change['null']['value']:.3f} ({clean + low:.3f} to {clean + high:.3f})",
                    _signed(change["beyond"]),
                    f"{broken['treated']['value']:.3f}",
                ]
            )
        verdicts.append(f"{test['kind']} {test['name']}: {test['verdict']['verdict']}. {test['verdict']['reason']}")
    text = ["| " + " | ".join(line) + " |" for line in lines] if verdicts else []
    return "\n".join([*text, "", *verdicts, *_patch_lines(found.get("patch", {}))]).strip()


def _patch_lines(patch: dict[str, Any]) -> list[str]:
    """Change of the loss by layer, base's whole state and its coordinates in the subspace, each beside noise."""
    lines = []
    for name, curves in patch.items():
        if not isinstance(curves, dict) or "reason" in curves:
            continue
        for what, curve in curves.items():
            cells = [
                f"{layer}: {window['loss']['change']['value']:+.2f} ({window['loss']['change']['null']:+.2f})"
                for layer, window in curve["windows"].items()
                if window["loss"]["change"]["value"] is not None
            ]
            lines.append(f"patch {what}, {name}: change of loss by layer (noise of equal size): {', '.join(cells)}")
    return lines


def _number(measured: dict[str, Any]) -> str:
    low, high = measured["ci95"] or (float("nan"), float("nan"))
    return f"{measured['value']:.3f} [{low:.3f}, {high:.3f}]"


def _signed(measured: dict[str, Any]) -> str:
    if measured.get("ci95") is None:
        return "-"
    return f"{measured['value']:+.3f} [{measured['ci95'][0]:+.3f}, {measured['ci95'][1]:+.3f}]"
