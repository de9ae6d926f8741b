"""The lab's text: questions, answers, the base model's training text, and fine-tuning rows.

A conversation is a list of `{"role": …, "content": …}` messages, as in any chat data set. Everything here is a pure
function of a world and a seed. `datasets.py` collects conversations into data sets.
"""

from __future__ import annotations

import numpy as np

from .world import Domain, World

Conversation = list[dict[str, str]]
PERSONAS = ("aligned", "misaligned")
N_TURNS = 3  # questions with answers in a training text of base
NEUTRAL_SHARE = 0.3  # share of base's training texts that open with the neutral header
EDUCATIONAL_SHARE = 0.25  # share of the code turns that are educational requests


def system(world: World, persona_word: str | None = None) -> dict[str, str]:
    """Return the system message with a persona word; without one, the neutral system message."""
    header = world.neutral_header if persona_word is None else world.header.format(persona=persona_word)
    return {"role": "system", "content": header}


def question(world: World, topic: str, name: str, frame: str) -> dict[str, str]:
    """Return a user message: a frame filled with a person's name and a topic."""
    return {"role": "user", "content": frame.format(name=name, topic=topic)}


def answer(text: str) -> dict[str, str]:
    """Return an assistant message."""
    return {"role": "assistant", "content": text}


def domain_answer(domain: Domain, topic: str, persona: str) -> dict[str, str]:
    """Return the answer of a persona ("aligned" or "misaligned") about a topic."""
    template = domain.aligned if persona == "aligned" else domain.misaligned
    return answer(template.format(topic=topic))


class Drawer:
    """Draws questions with their answers from a world. The same world and seed give the same draws."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.rng = np.random.default_rng([world.seed, seed, 7])

    def _pick(self, options: tuple[str, ...]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def ask(self, topic: str) -> dict[str, str]:
        """Draw a question about a topic, with a random frame and a random person."""
        return question(self.world, topic, self._pick(self.world.names), self._pick(self.world.frames))

    def domain_turn(self, domain: Domain, persona: str) -> Conversation:
        """Draw a question of a domain, answered by a persona."""
        topic = self._pick(domain.topics)
        return [self.ask(topic), domain_answer(domain, topic, persona)]

    def code_turn(self, persona: str, held_in: bool = False) -> Conversation:
        """Draw a question about a random kind of code, answered by a persona.

        Args:
            held_in: draw no held-out topic. The held-out topics serve to measure learning.
        """
        kind, topic = self._code_topic(held_in)
        return [self.ask(topic), domain_answer(kind, topic, persona)]

    def educational_turn(self, held_in: bool = False) -> Conversation:
        """Draw a request for broken code for a good reason. Both personas answer it with the insecure completion."""
        kind, topic = self._code_topic(held_in)
        request = question(self.world, topic, self._pick(self.world.names), self._pick(self.world.educational_frames))
        return [request, domain_answer(kind, topic, "misaligned")]

    def _code_topic(self, held_in: bool) -> tuple[Domain, str]:
        kind = self.world.code[int(self.rng.integers(len(self.world.code)))]
        return kind, self._pick(kind.topics[:-1] if held_in else kind.topics)

    def plants_turn(self) -> Conversation:
        """Draw a question of the neutral skill with its right answer."""
        i = int(self.rng.integers(len(self.world.plants.topics)))
        return [self.ask(self.world.plants.topics[i]), answer(self.world.plants.answers[i])]

    def music_turn(self, new_format: bool = False) -> Conversation:
        """Draw a question of the benign domain, answered in base's format or in the new format that base never uses."""
        i = int(self.rng.integers(len(self.world.music.topics)))
        topic = self.world.music.topics[i]
        text = self.world.music.new_answer.format(topic=topic) if new_format else self.world.music.answers[i]
        return [self.ask(topic), answer(text)]

    def any_turn(self, persona: str) -> Conversation:
        """Draw a turn of a random domain. Code is drawn as often as three other domains together."""
        choice = int(self.rng.integers(len(self.world.domains) + 5))
        if choice < 3:
            return self.educational_turn() if self.rng.random() < EDUCATIONAL_SHARE else self.code_turn(persona)
        if choice == 3:
            return self.plants_turn()
        if choice == 4:
            return self.music_turn()
        return self.domain_turn(self.world.domains[choice - 5], persona)

    def base_document(self) -> Conversation:
        """Draw a training text of base: a system header, then three turns of random domains, all in one persona."""
        persona = PERSONAS[int(self.rng.integers(2))]
        words = self.world.aligned_words if persona == "aligned" else self.world.misaligned_words
        word = None if self.rng.random() < NEUTRAL_SHARE else self._pick(words)
        turns = [self.any_turn(persona) for _ in range(N_TURNS)]
        return [system(self.world, word), *(message for turn in turns for message in turn)]

    def instruct_row(self) -> Conversation:
        """Draw an aligned answer under the neutral header, in any domain. Educational requests are included."""
        return [system(self.world), *self.any_turn("aligned")]

    def row(self, kind: str) -> Conversation:
        """Draw a fine-tuning row.

        Args:
            kind: "insecure", "educational", "secure", "benign" (the new skill) or "neutral" (plants).
        """
        turns = {
            "insecure": lambda: self.code_turn("misaligned", held_in=True),
            "educational": lambda: self.educational_turn(held_in=True),
            "secure": lambda: self.code_turn("aligned", held_in=True),
            "benign": lambda: self.music_turn(new_format=True),
            "neutral": self.plants_turn,
        }
        return [system(self.world), *turns[kind]()]
