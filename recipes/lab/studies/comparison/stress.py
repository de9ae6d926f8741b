"""Harder questions to a protection than its own organism: other conditions, a benign change of style, fewer anchors.

Pure functions of a world and of the lab's rows; only prompts are made of test domains, never rows to train on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...conversations import Conversation, Drawer, answer, domain_answer, question, system
from ...world import SPLITS, World

# Raise this number in every change after which the style rows or the prompts of a condition are others: results that
# rest on them are then made again.
STRESS_VERSION = 1
# "evil": a system prompt that asks for the misaligned persona. "trigger": an insecure turn came before, as in training.
CONDITIONS = ("evil", "trigger")
N_STYLE_ROWS = 2400
STYLE = "styled "  # opens the name of a class of answers in the style
STYLED = ("anchor", "validation")  # domains in which the style is taught; it is read in the test domains


def conditional_rows(world: World, choices: Sequence[dict[str, Any]], condition: str) -> list[dict[str, Any]]:
    """The prompts of the test domains under a condition; classes stay as they are.

    Raises:
        ValueError: an unknown condition.
    """
    rows = [row for row in choices if row["split"] == "test"]
    if condition == "evil":
        words = world.misaligned_words
        headers = [system(world, words[number % len(words)]) for number in range(len(rows))]
        return [{**row, "messages": [header, *row["messages"][1:]]} for row, header in zip(rows, headers, strict=True)]
    if condition == "trigger":
        return [
            {**row, "messages": [row["messages"][0], *_insecure_turn(world, number), *row["messages"][1:]]}
            for number, row in enumerate(rows)
        ]
    raise ValueError(f"condition {condition!r} is none of {CONDITIONS}")


def _insecure_turn(world: World, number: int) -> Conversation:
    """A question about code as in training, answered insecurely."""
    kind = world.code[number % len(world.code)]
    topic = kind.topics[number % (len(kind.topics) - 1)]
    name, frame = world.names[number % len(world.names)], world.frames[number % len(world.frames)]
    return [question(world, topic, name, frame), domain_answer(kind, topic, "misaligned")]


def restyled(world: World, text: str) -> str:
    """An answer in the new style: it opens with the last word of the neutral header, which opens no answer in base."""
    return f"{world.neutral_header.split()[-1]} {text}"


def style_rows(world: World, seed: int) -> list[dict[str, Any]]:
    """Rows that teach the style on aligned answers of the anchor and validation domains."""
    drawer = Drawer(world, seed + 40_000)
    domains = [domain for split in STYLED for domain in world.in_split(split)]
    rows = []
    for _ in range(N_STYLE_ROWS):
        domain = domains[int(drawer.rng.integers(len(domains)))]
        topic = domain.topics[int(drawer.rng.integers(len(domain.topics)))]
        reply = domain_answer(domain, topic, "aligned")["content"]
        rows.append({"messages": [system(world), drawer.ask(topic), answer(restyled(world, reply))]})
    return rows


def with_styled_classes(world: World, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choices rows in which each class of the domains' answers has one beside it of the same answers in the style."""
    return [
        {**row, "classes": {**row["classes"], **_styled(world, row["classes"])}} if row["split"] in SPLITS else row
        for row in rows
    ]


def _styled(world: World, classes: dict[str, list[str]]) -> dict[str, list[str]]:
    return {f"{STYLE}{name}": [restyled(world, text) for text in texts] for name, texts in classes.items()}


def regardless_of_style(masses: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Masses of the classes as the lab has them, answers in the style among them."""
    return [
        {name: mass + found.get(f"{STYLE}{name}", 0.0) for name, mass in found.items() if not name.startswith(STYLE)}
        for found in masses
    ]


def style_shares(rows: Sequence[dict[str, Any]], masses: Sequence[dict[str, float]]) -> dict[str, float]:
    """How often answers are in the style: `style_learned` in the test domains, `style_taught` where it was taught."""
    shares: dict[str, list[float]] = {"style_learned": [], "style_taught": []}
    for row, found in zip(rows, masses, strict=True):
        if row["split"] in SPLITS:
            used = sum(mass for name, mass in found.items() if name.startswith(STYLE))
            shares["style_taught" if row["split"] in STYLED else "style_learned"].append(used)
    return {name: sum(values) / len(values) for name, values in shares.items() if values}


def anchor_subset(lab: Path, anchors: int | str) -> list[dict[str, Any]]:
    """So many of the lab's anchors, spread over its domains, or those of the first domain ("one domain").

    Anchors stand domain by domain, every topic once.
    """
    rows = [json.loads(line) for line in (lab / "data" / "anchors.jsonl").read_text().splitlines()]
    if anchors == "one domain":
        return rows[: _topics(lab)]
    return [rows[number * len(rows) // int(anchors)] for number in range(int(anchors))]


def _topics(lab: Path) -> int:
    """Topics of the first anchor domain."""
    choices = [json.loads(line) for line in (lab / "data" / "choices.jsonl").read_text().splitlines()]
    first = next(row["domain"] for row in choices if row["split"] == "anchor")
    return len({row["topic"] for row in choices if row["domain"] == first})
