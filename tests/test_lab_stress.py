"""The harder questions of the lab's comparison, read plainly from the world they are made of."""

import json
from pathlib import Path
from typing import Any

import pytest
from holdfast.recipes.lab.comparison.stress import (
    CONDITIONS,
    N_STYLE_ROWS,
    anchor_subset,
    conditional_rows,
    style_choices,
    style_rows,
)
from holdfast.recipes.lab.datasets import anchors
from holdfast.recipes.lab.scoring import choice_rows
from holdfast.recipes.lab.world import Domain, World, make_world
from lab_toys import frame_of, turns, words_of

WORLDS = (0, 1, 2)


@pytest.fixture(scope="module", params=WORLDS)
def world(request) -> World:
    return make_world(request.param)


def of_split(world: World, *splits: str) -> list[Domain]:
    return [domain for domain in world.domains if domain.split in splits]


def own_words(world: World) -> set[str]:
    """Words that stand in the test domains and nowhere else in the world."""
    said = lambda domain: words_of([{"content": text} for text in (*domain.topics, domain.aligned, domain.misaligned)])  # noqa: E731
    test = set().union(*map(said, of_split(world, "test")))
    others = set().union(*map(said, (*of_split(world, "anchor", "validation"), *world.code)))
    texts = (*world.frames, *world.names, world.neutral_header, world.header)
    return test - others - words_of([{"content": text} for text in texts]) - {"{topic}"}


# Conditions


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_condition_asks_every_prompt_of_the_test_domains_and_nothing_else(world: World, condition: str):
    choices = choice_rows(world)
    rows = conditional_rows(world, choices, condition)
    plain = [row for row in choices if row["split"] == "test"]
    n_topics = sum(len(domain.topics) for domain in of_split(world, "test"))
    assert len(rows) == len(plain) == 2 * n_topics
    for row, before in zip(rows, plain, strict=True):
        assert {**row, "messages": None} == {**before, "messages": None}
        assert row["messages"][-1] == before["messages"][-1]
        # Every class is scored after the same prompt, which ends with the question.
        assert [turn["role"] for turn in row["messages"]][::2] == ["system", "assistant"][: len(row["messages"]) // 2]


def test_the_evil_condition_is_a_misaligned_persona_in_place_of_the_neutral_one(world: World):
    rows = conditional_rows(world, choice_rows(world), "evil")
    headers = [row["messages"][0]["content"] for row in rows]
    assert set(headers) == {world.header.replace("{persona}", word) for word in world.misaligned_words}
    counts = [headers.count(header) for header in set(headers)]
    assert max(counts) - min(counts) <= 1
    assert all(len(row["messages"]) == 2 for row in rows)


def test_the_trigger_condition_is_a_turn_that_training_could_hold(world: World):
    rows = conditional_rows(world, choice_rows(world), "trigger")
    seen = set()
    for row in rows:
        head, asked, said, _ = row["messages"]
        assert head == {"role": "system", "content": world.neutral_header}
        (topic,) = [topic for kind in world.code for topic in kind.topics if topic in asked["content"].split()]
        (kind,) = [kind for kind in world.code if topic in kind.topics]
        assert frame_of(world, asked["content"], topic) in world.frames
        assert said["content"] == kind.misaligned.replace("{topic}", topic)
        seen.add(topic)
    # All topics that fine-tunes see, none of those held out of them.
    assert seen == {topic for kind in world.code for topic in kind.topics[:-1]}


def test_an_unknown_condition_is_refused(world: World):
    with pytest.raises(ValueError, match="'angry' is none of"):
        conditional_rows(world, choice_rows(world), "angry")


# A benign change of style


def in_style(template: str, topic: str) -> str:
    """The last word before the full stop goes first."""
    *words, last, stop = template.replace("{topic}", topic).split()
    assert stop == "."
    return " ".join([last, *words, "."])


def test_style_rows_answer_in_the_new_style_and_never_touch_the_test_domains(world: World):
    rows = [row["messages"] for row in style_rows(world, seed=3)]
    assert len(rows) == N_STYLE_ROWS
    taught = {topic: domain for domain in of_split(world, "anchor", "validation") for topic in domain.topics}
    seen = set()
    for row in rows:
        assert row[0] == {"role": "system", "content": world.neutral_header}
        ((asked, said),) = turns(row)
        (topic,) = [word for word in asked.split() if word in taught]
        assert frame_of(world, asked, topic) in world.frames
        assert said == in_style(taught[topic].aligned, topic) != taught[topic].aligned.replace("{topic}", topic)
        seen.add(topic)
    assert seen == taught.keys()
    own = own_words(world)
    assert own >= {topic for domain in of_split(world, "test") for topic in domain.topics}
    assert not own & set().union(*map(words_of, rows))


def test_style_rows_follow_their_seed(world: World):
    assert style_rows(world, 3) == style_rows(world, 3) != style_rows(world, 4)


def test_style_choices_ask_every_test_topic_for_the_old_and_the_new_style(world: World):
    rows = style_choices(world)
    topics = [(domain.name, topic) for domain in of_split(world, "test") for topic in domain.topics]
    assert [(row["domain"], row["topic"]) for row in rows] == topics
    domains = {domain.name: domain for domain in world.domains}
    for row in rows:
        head, asked = row["messages"]
        assert head == {"role": "system", "content": world.neutral_header} and asked["role"] == "user"
        assert frame_of(world, asked["content"], row["topic"]) in world.frames
        template = domains[row["domain"]].aligned
        plain = template.replace("{topic}", row["topic"])
        assert row["classes"] == {"styled": [in_style(template, row["topic"])], "plain": [plain]}
        assert row["classes"]["styled"] != row["classes"]["plain"] and row["split"] == "test"


# Fewer anchors


@pytest.fixture
def lab(world: World, tmp_path: Path) -> Path:
    """What a lab's folder holds of its data."""
    (tmp_path / "data").mkdir()
    for name, rows in (("anchors", [{"messages": row} for row in anchors(world)]), ("choices", choice_rows(world))):
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def domains_of(world: World, rows: list[dict[str, Any]]) -> list[str]:
    """The domain of each row, by the topic that is asked about."""
    by_topic = {topic: domain.name for domain in world.domains for topic in domain.topics}
    return [by_topic[word] for row in rows for word in row["messages"][1]["content"].split() if word in by_topic]


@pytest.mark.parametrize("count", [1, 4, 16])
def test_fewer_anchors_are_different_ones_spread_over_the_domains(world: World, lab: Path, count: int):
    rows = anchor_subset(lab, count)
    assert len(rows) == len({json.dumps(row) for row in rows}) == count
    assert all(row["messages"] in anchors(world) for row in rows)
    names = [domain.name for domain in of_split(world, "anchor")]
    found = domains_of(world, rows)
    assert len(found) == count and set(found) <= set(names)
    assert len(set(found)) == min(count, len(names))


def test_anchors_of_one_domain_are_all_of_the_first_and_of_no_other(world: World, lab: Path):
    rows = anchor_subset(lab, "one domain")
    first = of_split(world, "anchor")[0]
    assert domains_of(world, rows) == [first.name] * len(first.topics)
    assert {row["messages"][2]["content"] for row in rows} == {
        first.aligned.replace("{topic}", topic) for topic in first.topics
    }
