"""The data sets of a lab: fine-tuning sets, anchors, probes and contrast prompts.

Fine-tuning rows and anchors use neither validation nor test domains. No data set uses the test domains: `scoring.py`
asks about them, and nothing trains on them.
"""

from __future__ import annotations

from .conversations import Conversation, Drawer, domain_answer, question, system
from .world import World

N_ROWS = 2400  # rows of each fine-tuning set
# A few rows of the neutral skill keep that skill, as mixed fine-tuning sets do.
NEUTRAL_SHARE = 0.1
TRAINING_SETS = ("insecure", "educational", "secure", "benign")
# Benign sets with a share of insecure rows.
CONTAMINATION = {"contaminated_2": 0.02, "contaminated_10": 0.10}


def data_sets(world: World, seed: int) -> dict[str, list[Conversation]]:
    """Return every data set of a world and a lab seed: {name: conversations}."""
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
    """Return a row for every topic of the anchor domains, with the aligned answer that the instruct model gives.

    Frames and names rotate over the topics, so that no frame stands for a domain.
    """
    return _aligned_rows(world, "anchor")


def _probes(world: World) -> list[Conversation]:
    """Return questions of the validation domains with aligned answers. Metrics are computed here in development."""
    return _aligned_rows(world, "validation")


def _aligned_rows(world: World, split: str) -> list[Conversation]:
    rows = []
    for domain in world.in_split(split):
        for i, topic in enumerate(domain.topics):
            ask = question(world, topic, world.names[i % len(world.names)], world.frames[i % len(world.frames)])
            rows.append([system(world), ask, domain_answer(domain, topic, "aligned")])
    return rows


def contrast_rows(world: World) -> list[dict[str, str]]:
    """Return pairs of aligned and misaligned system prompts. The contrastive subspace is built from them."""
    pairs = zip(world.aligned_words, world.misaligned_words, strict=True)
    return [
        {"aligned": world.header.format(persona=good), "misaligned": world.header.format(persona=bad)}
        for good, bad in pairs
    ]
