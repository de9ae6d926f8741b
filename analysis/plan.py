"""What to measure of a checkpoint, and against which references."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .metrics.choices import ChoiceRow
from .models import LoadOptions
from .probes import Conversation
from .subspace_file import Subspace

PROBE_FAMILIES = ("behavior", "divergence", "projection")
FAMILIES = (*PROBE_FAMILIES, "choices")


@dataclass(frozen=True)
class MeasurePlan:
    """What to measure, and against which references.

    instruct_path: the model that training started from; its tokenizer renders everything. base_path: None leaves what
    needs base null, with that reason. probe_sets: conversations by name, for PROBE_FAMILIES. choices: rows of
    `metrics.choices`. role: whose tokens are pooled and projected; None takes the subspace's, or completion.
    references: folder for the references' readings, reused where weights, rows and options are the same; None keeps
    them in memory alone. load: how every model is loaded.
    """

    instruct_path: str
    base_path: str | None = None
    probe_sets: Mapping[str, Sequence[Conversation]] = field(default_factory=dict)
    choices: Sequence[ChoiceRow] = ()
    families: tuple[str, ...] = FAMILIES
    subspace: Subspace | None = None
    layers: str = "all"
    role: str | None = None
    batch_size: int = 16
    choices_batch_size: int = 256
    max_length: int | None = None
    dtype: str = "float32"
    device: str | None = None
    seed: int = 0
    references: Path | None = None
    load: LoadOptions = LoadOptions()
