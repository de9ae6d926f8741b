"""The measure plan: what to measure of a checkpoint, and which reference models to compare it with."""

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
    """What to measure, and which reference models to compare with.

    instruct_path: the model that training started from. Its tokenizer renders all rows. base_path: the base model;
        None makes every result that needs it null, with that reason.
    probe_sets: conversations by set name, read by all families but `choices`. choices: rows of `metrics.choices`.
    families: names from `registry.FAMILIES`; empty means all that apply.
    formulas: "corrected", or "paper" to compute the published formulas of arXiv 2507.03662 where they differ (see
        analysis/metrics/README.md).
    subspace: the alignment subspace, or None. layers: the layers at which directions are read, as for `parse_layers`.
    role: the token role that is pooled and projected; None takes the subspace's role, or completion without one.
    batch_size: rows per forward pass. choices_batch_size: listed completions per forward pass, for `choices`.
    max_length: the longest row, in tokens. long_rows: "truncate" cuts longer rows, "drop" leaves them out.
    dtype, device, load: how every model is loaded; device None is the CPU. seed: for intervals and nulls.
    references: folder of the store that keeps the references' readouts; None keeps them in memory only.
    store_limit_gb: the size limit of the store, in 10^9 bytes.
    control_sets: names of probe sets that are benign controls: directions shared with them are a null.
    gradient_layer, gradient_weight: where gradients are read, as `block` and `weight` of `read_gradients`.
    patching_rows: rows per probe set for patching, few because each row costs two forward passes per layer.
    data_parallel: True lets several ranks, each with a whole model, divide the references' rows among them. False
        leaves the references to the main rank.
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
