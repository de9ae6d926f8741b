"""The lab's world: its words, domains, personas and the split of domains. Pure data, drawn from a world seed.

World 0 is readable English; every other seed draws pseudo-words, question frames, answer templates, persona words and
the split anew, so that a method can be tried in worlds it was not tuned on.
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
