"""Flags of measuring: for `holdfast analyze`, `holdfast watch`, and training, which measures its checkpoints."""

from dataclasses import dataclass

from ...analysis.flags import option, require, sources
from ...analysis.measure.plan import FORMULAS, PATCHING_ROWS, STORE_LIMIT_GB
from ...analysis.measure.registry import FAMILIES


@dataclass
class AnalysisArguments:
    """Which measures are taken, on which checkpoints and rows, and where the references' results are kept."""

    _argument_group_name = "analysis"

    checkpoints: list[str] | None = option(
        None,
        "Checkpoints that analyze measures: folders or Hub names (name@revision), full models or LoRA adapters. "
        "Default: every checkpoint and the final model of the output folder.",
    )
    families: list[str] | None = option(
        None,
        "Families of measures that analyze and watch compute. Default: all (choices only with --choices_dataset).",
        *FAMILIES,
    )
    formulas: str = option(
        "corrected",
        "Formulas of the measures. paper computes what arXiv 2507.03662 published where Holdfast corrects it. "
        "Default: corrected.",
        *FORMULAS,
    )
    probe_sets: dict[str, str] | str | None = option(
        None,
        "Several sets to measure on and compare, beside --probe_dataset: a mapping (or JSON) from a name to a source "
        "of rows. Sets are matched by line number. The source controlled:N makes N pairs of prompts that differ in one "
        "word of intent; shuffled:<source> puts the source's completions after the prompts of other rows. "
        "Default: none.",
    )
    analysis_families: list[str] | None = option(
        None,
        "Families of measures that training computes. Default: behavior, projection, and choices with "
        "--choices_dataset.",
        *FAMILIES,
    )
    analysis_rows: int = option(200, "Largest number of rows measured of each set. Default: 200.")
    analysis_batch_size: int = option(8, "Rows per forward pass while measuring. Default: 8.")
    analysis_during_training: bool = option(True, "Measure each checkpoint when it is saved. Default: true.")
    control_sets: list[str] | None = option(
        None, "Names of benign probe sets: directions that others share with them mean nothing. Default: none."
    )
    gradient_layer: int | None = option(
        None, "Decoder block whose attention output projection the gradients family differentiates. Default: the last."
    )
    gradient_weight: str | None = option(
        None,
        "Another linear layer of that block to differentiate, by its path, like mlp.down_proj. Default: the attention "
        "output projection.",
    )
    patching_rows: int = option(
        PATCHING_ROWS,
        f"Rows of each set for the patching family; each takes two passes per layer. Default: {PATCHING_ROWS}.",
    )
    store_dir: str | None = option(
        None,
        "Folder that keeps the results of the starting model and of base for all analyses. Default: "
        "$HOLDFAST_CACHE/store, or ~/.cache/holdfast/store.",
    )
    store_limit_gb: float = option(
        STORE_LIMIT_GB,
        "Largest size of that folder, in 10^9 bytes; files unused for longest are deleted first. "
        f"Default: {STORE_LIMIT_GB}.",
    )
    device_map: str | None = option(
        None, "Spread one large model over all devices in analyze: auto, balanced, sequential. Default: one device."
    )
    watch_interval: float = option(30.0, "Seconds that watch waits between two looks at the run. Default: 30.")

    def __post_init__(self) -> None:
        require(self.analysis_rows >= 1, "analysis_rows", self.analysis_rows, "at least 1")
        require(self.analysis_batch_size >= 1, "analysis_batch_size", self.analysis_batch_size, "at least 1")
        require(self.patching_rows >= 1, "patching_rows", self.patching_rows, "at least 1")
        require(self.store_limit_gb >= 0, "store_limit_gb", self.store_limit_gb, "0 or more")
        require(self.watch_interval > 0, "watch_interval", self.watch_interval, "more than 0 seconds")
        self.probe_sets = sources("probe_sets", self.probe_sets)

    @property
    def named_sets(self) -> dict[str, str]:
        """Return the source of rows of each probe set, by the set's name."""
        return self.probe_sets if isinstance(self.probe_sets, dict) else {}
