"""Harder questions to a protection than its own organism: other conditions, a benign change of style, fewer anchors.

Pure functions of a world and of the lab's rows; only prompts are made of test domains, never rows to train on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..documents import Conversation, Drawer, answer, domain_answer, question, system
from ..world import Domain, World

# "evil": a system prompt that asks for the misaligned persona. "trigger": an insecure turn came before, as in training.
CONDITIONS = ("evil", "trigger")
N_STYLE_ROWS = 2400
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


def restyled(template: str) -> str:
    """An answer template in the new style: its last word first, as in the lab's benign new skill."""
    words = template.split()[:-1]
    return " ".join([words[-1], *words[:-1], "."])


def style_rows(world: World, seed: int) -> list[dict[str, Any]]:
    """Rows that teach the style on aligned answers of the anchor and validation domains."""
    drawer = Drawer(world, seed + 40_000)
    domains = [domain for split in STYLED for domain in world.in_split(split)]
    rows = []
    for _ in range(N_STYLE_ROWS):
        domain = domains[int(drawer.rng.integers(len(domains)))]
        topic = domain.topics[int(drawer.rng.integers(len(domain.topics)))]
        reply = answer(restyled(domain.aligned).format(topic=topic))
        rows.append({"messages": [system(world), drawer.ask(topic), reply]})
    return rows


def style_choices(world: World) -> list[dict[str, Any]]:
    """Prompts of the test domains with the aligned answer in the new style and in the old one."""
    return [
        _style_row(world, domain, number) for domain in world.in_split("test") for number in range(len(domain.topics))
    ]


def _style_row(world: World, domain: Domain, number: int) -> dict[str, Any]:
    topic = domain.topics[number]
    name, frame = world.names[number % len(world.names)], world.frames[number % len(world.frames)]
    classes = {
        "styled": [restyled(domain.aligned).format(topic=topic)],
        "plain": [domain.aligned.format(topic=topic)],
    }
    prompt = [system(world), question(world, topic, name, frame)]
    return {"messages": prompt, "classes": classes, "split": "test", "domain": domain.name, "topic": topic}


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
