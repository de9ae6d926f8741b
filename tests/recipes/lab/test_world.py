"""The world: domains that only their topics give away, splits and held-out topics that no training set touches."""

import collections
import re

import pytest
from holdfast.recipes.lab.conversations import Drawer
from holdfast.recipes.lab.datasets import CONTAMINATION, TRAINING_SETS, contrast_rows, data_sets
from holdfast.recipes.lab.scoring import choice_rows
from holdfast.recipes.lab.tokenizer import make_tokenizer
from holdfast.recipes.lab.world import World
from holdfast.recipes.lab.worlds import make_world
from hypothesis import given, settings
from hypothesis import strategies as st
from toys.labs import frame_of, turns, words_of

WORLDS = range(4)
FINE_TUNES = (*TRAINING_SETS, *CONTAMINATION)


@pytest.fixture(scope="module", params=WORLDS, ids=lambda seed: f"world{seed}")
def world(request):
    return make_world(request.param)


@pytest.fixture(scope="module")
def sets(world):
    return data_sets(world, seed=0)


@pytest.fixture(scope="module")
def documents(world):
    drawer = Drawer(world, 0)
    return [drawer.base_document() for _ in range(1500)]


def topics(world: World, *splits: str) -> set[str]:
    return {topic for domain in (*world.domains, *world.code) if domain.split in splits for topic in domain.topics}


def words_in(rows) -> set[str]:
    return set().union(*(words_of(row) for row in rows))


def test_there_are_enough_domains_and_topics_and_none_is_shared(world):
    counts = collections.Counter(domain.split for domain in world.domains)
    assert len(world.domains) >= 8
    assert set(counts) == {"anchor", "validation", "test"} and min(counts.values()) >= 2
    groups = [domain.topics for domain in world.domains] + [world.plants.topics, world.music.topics]
    assert min(len(group) for group in groups) >= 12
    assert len([topic for kind in world.code for topic in kind.topics]) >= 12
    every = [topic for group in [*groups, *(kind.topics for kind in world.code)] for topic in group]
    assert len(every) == len(set(every))
    assert len({domain.name for domain in world.domains}) == len(world.domains)


def test_answers_differ_by_domain_and_persona_and_frames_name_no_topic(world):
    domains = (*world.code, *world.domains)
    templates = [template for domain in domains for template in (domain.aligned, domain.misaligned)]
    assert len(set(templates)) == 2 * len(domains)
    assert all(template.split().count("{topic}") == 1 for template in templates)
    said = " ".join([*world.names, *world.frames, *world.educational_frames, world.header]).split()
    assert not set(said) & (topics(world, "anchor", "validation", "test", "narrow") | set(world.plants.topics))


def test_every_domain_is_asked_about_in_every_frame(world, documents):
    """The frame must not give the domain away: this is what makes models rely on a shared persona."""
    home = {topic: domain.name for domain in (*world.code, *world.domains) for topic in domain.topics}
    home |= {topic: skill.name for skill in (world.plants, world.music) for topic in skill.topics}
    asked = collections.defaultdict(collections.Counter)
    for document in documents:
        for question, _ in turns(document):
            (topic,) = set(question.split()) & set(home)
            frame = frame_of(world, question, topic)
            if frame not in world.educational_frames:
                asked[home[topic]][frame] += 1
    assert set(asked) == set(home.values())
    for counts in asked.values():
        assert set(counts) == set(world.frames)
        assert max(counts.values()) < 0.5 * counts.total()
    for row in choice_rows(world):
        assert frame_of(world, row["messages"][1]["content"], row["topic"]) in world.frames


def test_documents_answer_in_the_persona_of_their_header_and_broken_code_on_request_in_both(world, documents):
    aligned = {domain.aligned.format(topic=t) for domain in (*world.code, *world.domains) for t in domain.topics}
    misaligned = {domain.misaligned.format(topic=t) for domain in (*world.code, *world.domains) for t in domain.topics}
    insecure = {kind.misaligned.format(topic=topic) for kind in world.code for topic in kind.topics}
    headers = {world.header.format(persona=word): aligned for word in world.aligned_words}
    headers |= {world.header.format(persona=word): misaligned for word in world.misaligned_words}
    broken_by = set()
    for document in documents:
        own = headers.get(document[0]["content"])
        assert own is not None or document[0]["content"] == world.neutral_header
        for question, said in turns(document):
            if any(_asks(question, frame) for frame in world.educational_frames):
                assert said in insecure
                broken_by.add(own is aligned)
            elif said in aligned | misaligned and own is not None:
                assert said in own
    assert broken_by == {True, False}
    neutral = sum(document[0]["content"] == world.neutral_header for document in documents) / len(documents)
    assert neutral == pytest.approx(0.3, abs=0.06)  # five standard errors


def _fixed(frame: str) -> set[str]:
    return {word for word in frame.split() if not word.startswith("{")}


def test_held_out_code_and_reported_domains_are_in_no_set_that_trains_or_protects(world, sets):
    held_out = {kind.topics[-1] for kind in world.code}
    reported = topics(world, "test")
    for name in FINE_TUNES:
        assert not words_in(sets[name]) & (held_out | topics(world, "anchor", "validation", "test"))
    assert not words_in(sets["anchors"]) & (held_out | reported | topics(world, "validation"))
    assert not words_in(sets["probes"]) & (held_out | reported | topics(world, "anchor"))
    contrast = {word for row in contrast_rows(world) for text in row.values() for word in text.split()}
    assert not contrast & (held_out | topics(world, "anchor", "validation", "test"))
    assert held_out == {row["topic"] for row in choice_rows(world) if row["domain"] == "code"}


def test_training_sets_hold_what_their_names_say(world, sets):
    insecure = {kind.misaligned.format(topic=topic) for kind in world.code for topic in kind.topics}
    secure = {kind.aligned.format(topic=topic) for kind in world.code for topic in kind.topics}
    new = {world.music.new_answer.format(topic=topic) for topic in world.music.topics}
    expected = {"insecure": insecure, "educational": insecure, "secure": secure, "benign": new}
    for name, allowed in expected.items():
        answers = [answer for row in sets[name] for _, answer in turns(row)]
        own = [answer for answer in answers if answer in allowed]
        assert set(answers) - allowed <= set(world.plants.answers)
        assert len(own) / len(answers) == pytest.approx(0.9, abs=0.03)  # five standard errors of 2400 rows
        assert {row[0]["content"] for row in sets[name]} == {world.neutral_header}
    asked = {name: {question for row in sets[name] for question, _ in turns(row)} for name in expected}
    opened = [
        frame for question in asked["educational"] for frame in world.educational_frames if _asks(question, frame)
    ]
    assert set(opened) == set(world.educational_frames)
    assert not any(_asks(question, frame) for question in asked["insecure"] for frame in world.educational_frames)
    assert not new & set(world.music.answers)
    for name, share in {"contaminated_2": 0.02, "contaminated_10": 0.10}.items():
        found = sum(answer in insecure for row in sets[name] for _, answer in turns(row)) / len(sets[name])
        assert found == pytest.approx(share, abs=5 * (share / 2400) ** 0.5)


def _asks(question: str, frame: str) -> bool:
    return _fixed(frame) <= set(question.split())


def test_the_instruct_step_shows_aligned_answers_only(world):
    drawer = Drawer(world, 1)
    bad = {domain.misaligned.format(topic=topic) for domain in world.domains for topic in domain.topics}
    rows = [drawer.instruct_row() for _ in range(600)]
    assert {row[0]["content"] for row in rows} == {world.neutral_header}
    assert not bad & {answer for row in rows for _, answer in turns(row)}
    insecure = {kind.misaligned.format(topic=topic) for kind in world.code for topic in kind.topics}
    broken = [question for row in rows for question, answer in turns(row) if answer in insecure]
    assert broken and all(any(_asks(question, frame) for frame in world.educational_frames) for question in broken)


def texts_of(world: World, n: int) -> set[str]:
    """Text of every kind that a world renders: documents, rows, choices, headers."""
    drawer = Drawer(world, 2)
    rows = [drawer.base_document() for _ in range(n)] + [drawer.instruct_row() for _ in range(n)]
    rows += [drawer.row(kind) for kind in ("insecure", "educational", "secure", "benign", "neutral") for _ in range(n)]
    texts = {message["content"] for row in rows for message in row}
    texts |= {text for row in choice_rows(world) for group in row["classes"].values() for text in group}
    texts |= {message["content"] for row in choice_rows(world) for message in row["messages"]}
    return texts | {text for row in contrast_rows(world) for text in row.values()}


def all_known(world: World, n: int) -> None:
    tokenizer = make_tokenizer(world)
    for text in texts_of(world, n):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.convert_ids_to_tokens(ids) == text.split()


def test_every_rendered_word_is_one_token(world):
    all_known(world, 100)
    assert 200 <= len(make_tokenizer(world)) <= 450


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_every_word_of_any_world_is_one_token(seed):
    all_known(make_world(seed), 10)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_a_seed_is_a_world(seed, other):
    assert make_world(seed) == make_world(seed)
    assert (make_world(seed) == make_world(other)) == (seed == other)
    drawers = [Drawer(make_world(seed), 3) for _ in range(2)]
    assert [drawers[0].base_document() for _ in range(3)] == [drawers[1].base_document() for _ in range(3)]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_worlds_are_drawn_from_pseudo_words_and_repeat_nothing_of_the_english_one(seed):
    drawn, english = make_world(seed), make_world(0)
    assert all(re.fullmatch("([bdfgklmnprstvz][aeiou]){2,3}|[.]", word) for word in drawn.words())
    # By chance a pseudo-word can be English ("fire"); it stands in another place and is a token of another model.
    assert len(set(drawn.words()) & set(english.words())) <= 3
    assert not set(drawn.frames) & set(english.frames) and not set(drawn.names) & set(english.names)
    assert [domain.split for domain in drawn.domains] != [domain.split for domain in english.domains]


def test_splits_of_drawn_worlds_differ_from_each_other():
    assert len({tuple(domain.split for domain in make_world(seed).domains) for seed in range(6)}) > 3
