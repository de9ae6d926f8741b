"""What to measure of a checkpoint, and against which references."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..metrics.choices import ChoiceRow
from ..models.load import LoadOptions
from ..models.render import Conversation
from ..subspace.file import Subspace

FORMULAS = ("corrected", "paper")
STORE_LIMIT_GB = 50.0
PATCHING_ROWS = 16


@dataclass(frozen=True)
class MeasurePlan:
    """What to measure, and against which references.

    instruct_path: the model that training started from; its tokenizer renders everything. base_path: None leaves what
    needs base null, with that reason. probe_sets: conversations by name, for all families but choices. choices: rows of
    `metrics.choices`. families: names of `families.FAMILIES`; none are all that apply. formulas: "paper" follows
    arXiv 2507.03662 where METRICS.md corrects it. role: whose tokens are pooled and projected; None takes the
    subspace's, or completion. long_rows: "truncate" cuts rows to max_length tokens, "drop" leaves longer ones out.
    references: folder of the store that keeps the references' readings; None keeps them in memory alone.
    store_limit_gb: its bound, in 10^9 bytes. control_sets: names of probe sets whose sharing of directions means
    nothing. gradient_layer, gradient_weight: where gradients are read, as for `read_gradients`. patching_rows: of each
    set, as each costs two passes a layer. load: how every model is loaded. data_parallel: whether several ranks
    share the references' rows out (each holds a whole model), instead of leaving them to the main one.
    """

    instruct_path: str
    base_path: str | None = None
    probe_sets: Mapping[str, Sequence[Conversation]] = field(default_factory=dict)
    choices: Sequence[ChoiceRow] = ()
    families: tuple[str, ...] = ()
    formulas: str = "corrected"
    subspace: Subspace | None = None
    layers: str = "all"
    role: str | None = None
    batch_size: int = 16
    choices_batch_size: int = 256
    max_length: int | None = None
    long_rows: str = "truncate"
    dtype: str = "float32"
    device: str | None = None
    seed: int = 0
    references: Path | None = None
    store_limit_gb: float = STORE_LIMIT_GB
    control_sets: tuple[str, ...] = ()
    gradient_layer: int | None = None
    gradient_weight: str | None = None
    patching_rows: int = PATCHING_ROWS
    load: LoadOptions = LoadOptions()
    data_parallel: bool = False
