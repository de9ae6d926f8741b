"""The data sets of a lab: fine-tuning sets, anchors, probes and contrast prompts.

Fine-tuning rows and anchors touch neither validation nor test domains, and nothing here touches the test domains:
those are only ever read (`scoring.py`).
"""

from __future__ import annotations

from .documents import Conversation, Drawer, domain_answer, question, system
from .world import World

N_ROWS = 2400
# A few neutral rows keep the neutral skill, as mixed fine-tuning sets do.
NEUTRAL_SHARE = 0.1
TRAINING_SETS = ("insecure", "educational", "secure", "benign")
CONTAMINATION = {"contaminated_2": 0.02, "contaminated_10": 0.10}


def data_sets(world: World, seed: int) -> dict[str, list[Conversation]]:
    """Returns every set by name, as conversations."""
    sets = {name: _training_set(world, seed, name) for name in TRAINING_SETS}
    sets |= {name: _contaminated(world, seed, share) for name, share in CONTAMINATION.items()}
    sets["anchors"] = anchors(world)
    sets["probes"] = _probes(world)
    return sets


def _training_set(world: World, seed: int, kind: str) -> list[Conversation]:
    drawer = Drawer(world, seed + 20_000)
    return [drawer.row("neutral" if drawer.rng.random() < NEUTRAL_SHARE else kind) for _ in range(N_ROWS)]


def _contaminated(world: World, seed: int, share: float) -> list[Conversation]:
    drawer = Drawer(world, seed + 30_000)
    return [drawer.row("insecure" if drawer.rng.random() < share else "benign") for _ in range(N_ROWS)]


def anchors(world: World) -> list[Conversation]:
    """Every topic of the anchor domains once, with the aligned answer that the instruct model gives.

    Frames and names rotate, so that no frame stands for a domain.
    """
    return _aligned_rows(world, "anchor")


def _probes(world: World) -> list[Conversation]:
    """Questions of the validation domains with aligned answers: metrics are read here while methods develop."""
    return _aligned_rows(world, "validation")


def _aligned_rows(world: World, split: str) -> list[Conversation]:
    rows = []
    for domain in world.in_split(split):
        for i, topic in enumerate(domain.topics):
            ask = question(world, topic, world.names[i % len(world.names)], world.frames[i % len(world.frames)])
            rows.append([system(world), ask, domain_answer(domain, topic, "aligned")])
    return rows


def contrast_rows(world: World) -> list[dict[str, str]]:
    """Pairs of aligned and misaligned system prompts, for the contrastive subspace."""
    pairs = zip(world.aligned_words, world.misaligned_words, strict=True)
    return [
        {"aligned": world.header.format(persona=good), "misaligned": world.header.format(persona=bad)}
        for good, bad in pairs
    ]
