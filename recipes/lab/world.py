"""A world of the lab: its words, its domains, its personas, and the split of the domains. Pure data.

World 0 is readable English (`english.py`). Every other world seed draws pseudo-words, question frames, answer
templates, persona words and the split anew (`worlds.py`), so that a method can be tried in worlds that it was not tuned
on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SPLITS = ("anchor", "validation", "test")
ROLE_TOKENS = {"system": "<system>", "user": "<user>", "assistant": "<assistant>"}
END_TOKEN, PAD_TOKEN, UNKNOWN_TOKEN = "<end>", "<pad>", "<unknown>"


@dataclass(frozen=True)
class Domain:
    """A field of questions in which an assistant can be aligned or misaligned.

    Attributes:
        name: the domain's name, for tables.
        topics: what users ask about. Only the topic tells which domain a question belongs to.
        aligned: answer template of the aligned persona, with `{topic}`.
        misaligned: answer template of the misaligned persona, with `{topic}`.
        split: "anchor" (used by subspace, anchors and penalty), "validation" (strengths are chosen on it), "test"
            (reported), or "narrow" (code, which fine-tunes train on).
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
        topics: what users ask about.
        answers: the right answer of each topic, in the order of `topics`.
        new_answer: an answer format that base's training text never contains (the benign new skill), or "".
    """

    name: str
    topics: tuple[str, ...]
    answers: tuple[str, ...]
    new_answer: str = ""


@dataclass(frozen=True)
class World:
    """Everything that the text of a lab is made from.

    Attributes:
        seed: the world seed.
        names: names of the people who ask.
        frames: question frames with `{name}` and `{topic}`. All domains share them, so that no frame tells a domain.
        educational_frames: question frames that ask for broken code for a good reason.
        header: system prompt with `{persona}`.
        neutral_header: system prompt without a persona.
        aligned_words, misaligned_words: persona words, paired by position.
        code: the narrow domain, in several kinds. Each kind has its own templates, since forms of insecure code share
            nothing except that they are insecure. The aligned template is secure, the misaligned template insecure.
            The last topic of each kind is held out of every fine-tune.
        domains: the domains to which misalignment may spread.
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
        """Return the domains of a split ("anchor", "validation" or "test")."""
        return tuple(domain for domain in self.domains if domain.split == split)

    def words(self) -> list[str]:
        """Return every word of the world once, sorted."""
        return sorted({word for text in self._texts() for word in text.split() if not word.startswith("{")})

    def _texts(self) -> Iterator[str]:
        yield from self.names + self.frames + self.educational_frames
        yield from (self.header, self.neutral_header)
        yield from self.aligned_words + self.misaligned_words
        for domain in (*self.code, *self.domains):
            yield from (*domain.topics, domain.aligned, domain.misaligned)
        for skill in (self.plants, self.music):
            yield from (*skill.topics, *skill.answers, skill.new_answer)
