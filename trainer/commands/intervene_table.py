"""The table that `holdfast intervene` prints."""

from typing import Any

from ...analysis.metrics.choices import INCOHERENT

_HEAD = ("intervention", "dose", "{name}", "random directions", "beyond random", "incoherent")


def table(results: dict[str, Any], name: str) -> str:
    """Return the table as text, with the verdicts and the patching curves below it.

    A line is a dose: the probability of the class, its mean under random directions, and the difference of the two with
    its interval.

    Args:
        results: content of interventions.json.
        name: class of answers that the verdict is about.
    """
    head = [column.format(name=name) for column in _HEAD]
    lines = [head, ["---"] * len(head)]
    verdicts = []
    for test in results.get("tests", ()):
        for dose, effects in test["doses"].items():
            change, incoherent = effects["classes"][name], effects["classes"][INCOHERENT]
            low, high = change["null"]["range"]
            clean = change["clean"]["value"]
            lines.append(
                [
                    f"{test['kind']} {test['name']}",
                    dose,
                    f"{clean:.3f} -> {_number(change['treated'])}",
                    f"{clean + change['null']['value']:.3f} ({clean + low:.3f} to {clean + high:.3f})",
                    _signed(change["beyond"]),
                    f"{incoherent['treated']['value']:.3f}",
                ]
            )
        verdicts.append(f"{test['kind']} {test['name']}: {test['verdict']['verdict']}. {test['verdict']['reason']}")
    text = ["| " + " | ".join(line) + " |" for line in lines] if verdicts else []
    return "\n".join([*text, "", *verdicts, *_patch_lines(results.get("patch", {}))]).strip()


def _patch_lines(patch: dict[str, Any]) -> list[str]:
    """Return the change of the loss by layer, beside that under noise of equal size.

    There is a line for base's whole state and a line for its coordinates in the subspace.
    """
    lines = []
    for name, curves in patch.items():
        if not isinstance(curves, dict) or "reason" in curves:
            continue
        for part, curve in curves.items():
            cells = [
                f"{layer}: {window['loss']['change']['value']:+.2f} ({window['loss']['change']['null']:+.2f})"
                for layer, window in curve["windows"].items()
                if window["loss"]["change"]["value"] is not None
            ]
            lines.append(f"patch {part}, {name}: change of loss by layer (noise of equal size): {', '.join(cells)}")
    return lines


def _number(measurement: dict[str, Any]) -> str:
    low, high = measurement["ci95"] or (float("nan"), float("nan"))
    return f"{measurement['value']:.3f} [{low:.3f}, {high:.3f}]"


def _signed(measurement: dict[str, Any]) -> str:
    if measurement.get("ci95") is None:
        return "-"
    return f"{measurement['value']:+.3f} [{measurement['ci95'][0]:+.3f}, {measurement['ci95'][1]:+.3f}]"
