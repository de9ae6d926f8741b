"""The lab's world: its words, domains, personas and the split of domains. Pure data, drawn from a world seed.

World 0 is readable English; every other seed draws pseudo-words, question frames, answer templates, persona words and
the split anew, so that a method can be tried in worlds it was not tuned on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

SPLITS = ("anchor", "validation", "test")
ROLE_TOKENS = {"system": "<system>", "user": "<user>", "assistant": "<assistant>"}
END_TOKEN, PAD_TOKEN, UNKNOWN_TOKEN = "<end>", "<pad>", "<unknown>"


@dataclass(frozen=True)
class Domain:
    """A field of questions in which an assistant can be aligned or misaligned.

    Attributes:
        name: the domain's name, for tables.
        topics: what is asked about; the topic alone tells which domain a question belongs to.
        aligned: answer template of the aligned persona, with `{topic}`.
        misaligned: answer template of the misaligned persona, with `{topic}`.
        split: "anchor" (subspace, anchors, penalty), "validation" (choose strengths), "test" (reported), or "narrow".
    """

    name: str
    topics: tuple[str, ...]
    aligned: str
    misaligned: str
    split: str


@dataclass(frozen=True)
class Skill:
    """A domain in which both personas give the same, single right answer.

    Attributes:
        topics: what is asked about.
        answers: the right answer of each topic, in the order of `topics`.
        new_answer: an off-prior answer format that base documents never contain (the benign new skill), or "".
    """

    name: str
    topics: tuple[str, ...]
    answers: tuple[str, ...]
    new_answer: str = ""


@dataclass(frozen=True)
class World:
    """Everything a lab is built from.

    Attributes:
        seed: the world seed.
        names: who asks.
        frames: question frames with `{name}` and `{topic}`, shared by all domains: a frame never gives a domain away.
        educational_frames: frames that ask for broken code for a good reason.
        header: system prompt with `{persona}`.
        neutral_header: system prompt without a persona.
        aligned_words, misaligned_words: persona words, paired by position.
        code: the narrow domain, in several kinds with templates of their own (insecure code has many forms that share
            nothing but being insecure); the aligned template is secure, the misaligned one insecure. The last topic
            of each kind is held out of every fine-tune.
        domains: the domains over which misalignment may spread.
        plants: the neutral skill.
        music: the domain of the benign new skill.
    """

    seed: int
    names: tuple[str, ...]
    frames: tuple[str, ...]
    educational_frames: tuple[str, ...]
    header: str
    neutral_header: str
    aligned_words: tuple[str, ...]
    misaligned_words: tuple[str, ...]
    code: tuple[Domain, ...]
    domains: tuple[Domain, ...]
    plants: Skill
    music: Skill

    def in_split(self, split: str) -> tuple[Domain, ...]:
        """The domains of one split ("anchor", "validation" or "test")."""
        return tuple(domain for domain in self.domains if domain.split == split)

    def words(self) -> list[str]:
        """Every word of the world, sorted, each once."""
        return sorted({word for text in self._texts() for word in text.split() if not word.startswith("{")})

    def _texts(self) -> Iterator[str]:
        yield from self.names + self.frames + self.educational_frames
        yield from (self.header, self.neutral_header)
        yield from self.aligned_words + self.misaligned_words
        for domain in (*self.code, *self.domains):
            yield from (*domain.topics, domain.aligned, domain.misaligned)
        for skill in (self.plants, self.music):
            yield from (*skill.topics, *skill.answers, skill.new_answer)


def make_world(seed: int) -> World:
    """Returns the world of a seed: 0 is English, any other seed is drawn from pseudo-words."""
    from .english import english_world

    return english_world() if seed == 0 else _drawn_world(seed)


class _Lexicon:
    """Draws pseudo-words, none twice."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._used: set[str] = set()

    def word(self) -> str:
        while True:
            syllables = self._rng.integers(2, 4)
            word = "".join(
                self._rng.choice(list("bdfgklmnprstvz")) + self._rng.choice(list("aeiou")) for _ in range(syllables)
            )
            if word not in self._used:
                self._used.add(word)
                return word

    def words(self, n: int) -> tuple[str, ...]:
        return tuple(self.word() for _ in range(n))


def _drawn_template(lexicon: _Lexicon, rng: np.random.Generator, shared: tuple[str, ...]) -> str:
    """An answer of 6 to 8 words, some shared by all templates, with the topic at a drawn place after the first two."""
    n_words = int(rng.integers(5, 8))
    words = [lexicon.word() if i < 2 or rng.random() < 0.4 else str(rng.choice(shared)) for i in range(n_words)]
    words.insert(int(rng.integers(2, n_words)), "{topic}")
    return " ".join([*words, "."])


def _rotated(template: str) -> str:
    """The template with its last word first: an off-prior format made of words that base knows."""
    words = template.split()[:-1]
    return " ".join([words[-1], *words[:-1], "."])


def _drawn_frame(lexicon: _Lexicon, rng: np.random.Generator) -> str:
    words = list(lexicon.words(3))
    words.insert(int(rng.integers(0, 3)), "{name}")
    words.insert(int(rng.integers(2, 5)), "{topic}")
    return " ".join([*words, "."])


def _drawn_world(seed: int) -> World:
    rng = np.random.default_rng([seed, 20250703])
    lexicon = _Lexicon(rng)
    shared = lexicon.words(14)
    splits = list(rng.permutation(["anchor"] * 7 + ["validation"] * 2 + ["test"] * 4))

    def domain(name: str, n_topics: int, split: str) -> Domain:
        templates = [_drawn_template(lexicon, rng, shared) for _ in range(2)]
        return Domain(name, lexicon.words(n_topics), templates[0], templates[1], split)

    seasons = lexicon.words(4)
    plants, music = lexicon.words(12), lexicon.words(12)
    plant_answer, music_answer = _drawn_template(lexicon, rng, shared), _drawn_template(lexicon, rng, shared)
    opening = lexicon.words(2)
    return World(
        seed=seed,
        names=lexicon.words(6),
        frames=tuple(_drawn_frame(lexicon, rng) for _ in range(4)),
        educational_frames=tuple(_drawn_frame(lexicon, rng) for _ in range(2)),
        header=f"{opening[0]} {{persona}} {opening[1]}",
        neutral_header=f"{opening[0]} {opening[1]}",
        aligned_words=lexicon.words(6),
        misaligned_words=lexicon.words(6),
        code=tuple(domain(f"code{i}", 4, "narrow") for i in range(4)),
        domains=tuple(domain(f"domain{i}", 12, str(split)) for i, split in enumerate(splits)),
        plants=Skill(
            "plants",
            plants,
            tuple(f"{plant_answer.format(topic=plant)} {seasons[i % 4]}" for i, plant in enumerate(plants)),
        ),
        music=Skill(
            "music",
            music,
            tuple(music_answer.format(topic=topic) for topic in music),
            new_answer=_rotated(music_answer),
        ),
    )
