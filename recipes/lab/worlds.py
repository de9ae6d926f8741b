"""The world of a world seed: seed 0 is English, and every other world is drawn from pseudo-words."""

from __future__ import annotations

import numpy as np

from .english import english_world
from .world import Domain, Skill, World


def make_world(seed: int) -> World:
    """Return the world of a world seed."""
    return english_world() if seed == 0 else _drawn_world(seed)


class _Lexicon:
    """Draws pseudo-words, never the same word twice."""

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
    """Draw an answer template of 6 to 8 words; templates share some words. The topic comes after the first two."""
    n_words = int(rng.integers(5, 8))
    words = [lexicon.word() if i < 2 or rng.random() < 0.4 else str(rng.choice(shared)) for i in range(n_words)]
    words.insert(int(rng.integers(2, n_words)), "{topic}")
    return " ".join([*words, "."])


def _rotated(template: str) -> str:
    """Return the template with its last word first: a format that base never uses, made of words that base knows."""
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
