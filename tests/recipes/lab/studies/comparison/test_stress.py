"""The harder questions of the lab's comparison, read plainly from the world they are made of."""

import json
from pathlib import Path
from typing import Any

import pytest
from holdfast.recipes.lab.datasets import anchors
from holdfast.recipes.lab.scoring import choice_rows
from holdfast.recipes.lab.studies.comparison.stress import (
    CONDITIONS,
    N_STYLE_ROWS,
    anchor_subset,
    conditional_rows,
    regardless_of_style,
    style_rows,
    style_shares,
    with_styled_classes,
)
from holdfast.recipes.lab.world import Domain, World
from holdfast.recipes.lab.worlds import make_world
from toys.labs import frame_of, turns, words_of

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
    with pytest.raises(ValueError, match="'angry'"):
        conditional_rows(world, choice_rows(world), "angry")


# A benign change of style


def in_style(world: World, text: str) -> str:
    """The word before goes with no answer of the world's own."""
    return " ".join([world.neutral_header.split()[-1], *text.split()])


def test_no_answer_of_the_world_opens_with_the_style(world: World):
    answers = [text for domain in (*world.domains, *world.code) for text in (domain.aligned, domain.misaligned)]
    answers += [*world.plants.answers, *world.music.answers, world.music.new_answer]
    assert world.neutral_header.split()[-1] not in {text.split()[0] for text in answers}


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
        assert said == in_style(world, taught[topic].aligned.replace("{topic}", topic))
        seen.add(topic)
    assert seen == taught.keys()
    own = own_words(world)
    assert own >= {topic for domain in of_split(world, "test") for topic in domain.topics}
    assert not own & set().union(*map(words_of, rows))


def test_style_rows_follow_their_seed(world: World):
    assert style_rows(world, 3) == style_rows(world, 3) != style_rows(world, 4)


def test_every_class_of_the_domains_answers_has_one_in_the_style(world: World):
    rows = choice_rows(world)
    for row, found in zip(rows, with_styled_classes(world, rows), strict=True):
        assert {**found, "classes": None} == {**row, "classes": None}
        styled = {name: texts for name, texts in found["classes"].items() if name not in row["classes"]}
        assert {name: found["classes"][name] for name in row["classes"]} == row["classes"]
        if row["split"] not in ("anchor", "validation", "test"):
            assert styled == {}
            continue
        assert len(styled) == len(row["classes"])
        for name, texts in row["classes"].items():
            assert styled[f"styled {name}"] == [in_style(world, text) for text in texts]


def test_rates_count_an_answer_in_either_style_and_shares_say_how_often_the_new_one_is_used():
    rows = [{"split": "test"}, {"split": "test"}, {"split": "validation"}, {"split": "skill"}]
    masses = [
        {"aligned": 0.25, "misaligned": 0.125, "styled aligned": 0.5, "styled misaligned": 0.0, "incoherent": 0.125},
        {"aligned": 0.0, "misaligned": 0.25, "styled aligned": 0.0, "styled misaligned": 0.25, "incoherent": 0.5},
        {"aligned": 0.0, "misaligned": 0.0, "styled aligned": 1.0, "styled misaligned": 0.0, "incoherent": 0.0},
        {"right": 0.75, "incoherent": 0.25},
    ]
    assert regardless_of_style(masses) == [
        {"aligned": 0.75, "misaligned": 0.125, "incoherent": 0.125},
        {"aligned": 0.0, "misaligned": 0.5, "incoherent": 0.5},
        {"aligned": 1.0, "misaligned": 0.0, "incoherent": 0.0},
        {"right": 0.75, "incoherent": 0.25},
    ]
    assert style_shares(rows, masses) == {"style_learned": (0.5 + 0.25) / 2, "style_taught": 1.0}
    assert style_shares(rows[2:], masses[2:]) == {"style_taught": 1.0}


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
