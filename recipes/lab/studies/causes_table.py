"""Tables of the causal test over labs: dose curves, the verdict of each lab, and a verdict over all labs.

Pure functions of the results that `causes.py` writes. Intervals are 95% over labs, from the values of single labs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ....analysis.metrics.causal import COHERENCE_LOST, MARGIN, verdict
from ....analysis.metrics.choices import INCOHERENT
from ....analysis.stats.nulls import sign_flip_test
from ....analysis.stats.summary import measurement

Result = dict[str, Any]
CLASS = "misaligned"


def causes(by_seed: Mapping[int, Result]) -> str:
    """Return all tables as Markdown.

    Args:
        by_seed: {lab seed: result of `holdfast intervene`}.
    """
    seeds = sorted(by_seed)
    results = [by_seed[seed] for seed in seeds]
    draws = results[0]["tests"][0]["draws"]
    return (
        "\n".join(
            [
                "# Is the alignment subspace a cause?",
                "",
                f"Made by `make causes`. Lab seeds {', '.join(map(str, seeds))} of world 0, the instruct model, no "
                f"training; beside each dose {draws} random directions that move every token as far. Rates are "
                "probabilities of the misaligned answer (right topic) over all domains; intervals are over labs.",
                *("", "## Dose curves", "", *_curves(results)),
                *("", "## Verdicts", "", *_verdicts(results)),
                *("", "## Domains, at a dose of 1", "", *_domains(results)),
                *("", "## Base's states, layer by layer", "", *_patches(results)),
            ]
        )
        + "\n"
    )


def _tests(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    """Return each intervention's name with its results in all labs."""
    names = [f"{test['kind']}: {test['name']}" for test in results[0]["tests"]]
    return [(name, [result["tests"][index] for result in results]) for index, name in enumerate(names)]


def _over_labs(values: Sequence[float]) -> str:
    """Return a table cell: the mean of the labs' values with its interval."""
    mean = measurement(values)
    if mean["value"] is None:
        return "-"
    interval = mean.get("ci95")
    return f"{mean['value']:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _curves(results: Sequence[Result]) -> list[str]:
    lines = [
        "| intervention | dose | misaligned | random directions | beyond random | incoherent | incoherent, random | "
        "beyond all 20 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, tests in _tests(results):
        clean = [next(iter(test["doses"].values()))["classes"][CLASS]["clean"]["value"] for test in tests]
        lines.append(f"| {name} | 0 | {_over_labs(clean)} | | | | | |")
        for dose in tests[0]["doses"]:
            changes = [test["doses"][dose]["classes"][CLASS] for test in tests]
            incoherent = [test["doses"][dose]["classes"][INCOHERENT] for test in tests]
            random = [lab["clean"]["value"] + lab["null"]["value"] for lab in changes]
            outside = sum(
                not lab["null"]["range"][0] <= lab["change"]["value"] <= lab["null"]["range"][1] for lab in changes
            )
            lines.append(
                f"| {name} | {dose} | {_over_labs([lab['treated']['value'] for lab in changes])} "
                f"| {np.mean(random):.3f} | {_over_labs([lab['beyond']['value'] for lab in changes])} "
                f"| {np.mean([lab['treated']['value'] for lab in incoherent]):.3f} "
                f"| {np.mean([lab['clean']['value'] + lab['null']['value'] for lab in incoherent]):.3f} "
                f"| {outside} of {len(changes)} |"
            )
    return lines


def _verdicts(results: Sequence[Result]) -> list[str]:
    lines = [
        f"At a dose of 1 and a margin of {MARGIN:g}, set before. *Over labs*: the same verdict on the values of labs "
        f"that stay coherent (at most {COHERENCE_LOST:g} more incoherent); in the others a rate shows nothing.",
        "",
        "| intervention | labs: causal, not causal, not decided | over labs | coherent labs | effect beyond random "
        "in them | p (sign flips) |",
        "|---|---|---|---|---|---|",
    ]
    for name, tests in _tests(results):
        counts = Counter(test["verdict"]["verdict"] for test in tests)
        at_one = [test["doses"]["1"]["classes"] for test in tests]
        lost = [test["verdict"]["incoherent"] for test in tests]
        pairs = list(zip(at_one, lost, strict=True))
        effects = [classes[CLASS]["beyond"]["value"] for classes, share in pairs if share <= COHERENCE_LOST]
        incoherent = measurement([share for share in lost if share <= COHERENCE_LOST])
        over_labs = verdict(measurement(effects), incoherent)
        p_value = f"{sign_flip_test(effects):.3f}" if len(effects) > 1 else "-"
        lines.append(
            f"| {name} | {counts['causal']}, {counts['not causal']}, {counts['not decided']} "
            f"| **{over_labs['verdict']}** | {len(effects)} | {_over_labs(effects)} | {p_value} |"
        )
    return lines


def _domains(results: Sequence[Result]) -> list[str]:
    """Return the misaligned answer's probability in each domain (of skills, the right answer's), with the null's."""
    tests = _tests(results)
    lines = [f"| domain | answer | {' | '.join(name for name, _ in tests)} |", "|---" * (len(tests) + 2) + "|"]
    domains = results[0]["tests"][0]["doses"]["1"]["domains"]
    for domain, classes in domains.items():
        for answer in (CLASS, "right", "insecure"):
            if answer not in classes:
                continue
            cells = []
            for _, by_lab in tests:
                rates = [test["doses"]["1"]["domains"][domain][answer] for test in by_lab]
                null = np.mean([rate["null"] for rate in rates])
                cells.append(f"{np.mean([rate['value'] for rate in rates]):.3f} ({null:.3f})")
            lines.append(f"| {domain} | {answer} | {' | '.join(cells)} |")
    return lines


def _patches(results: Sequence[Result]) -> list[str]:
    """Return how the probes' loss changes with base's state at a layer: the whole state, or only its part inside V."""
    lines = [
        "Change of the loss (nats a token) and of the target token's probability on the probes; in brackets noise of "
        "the same size.",
        "",
        "| set | patched | layer | loss | probability |",
        "|---|---|---|---|---|",
    ]
    for name in results[0]["patch"]:
        for patched in ("whole", "subspace"):
            for layer in results[0]["patch"][name][patched]["windows"]:
                windows = [result["patch"][name][patched]["windows"][layer] for result in results]
                cells = []
                for quantity in ("loss", "probability"):
                    changes = [window[quantity]["change"] for window in windows]
                    noise = np.mean([change["null"] for change in changes])
                    cells.append(f"{_over_labs([change['value'] for change in changes])} ({noise:+.3f})")
                lines.append(f"| {name} | {patched} | {layer} | {cells[0]} | {cells[1]} |")
    return lines
