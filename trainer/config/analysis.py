"""The flags of `holdfast analyze` and `watch`, and of what training measures on each saved checkpoint."""

from dataclasses import dataclass

from ...analysis.flags import option, require, sources
from ...analysis.measure.plan import FORMULAS, PATCHING_ROWS, STORE_LIMIT_GB
from ...analysis.measure.registry import FAMILIES


@dataclass
class AnalysisArguments:
    """What is measured, on which checkpoints, and what is kept of the references."""

    _argument_group_name = "analysis"

    checkpoints: list[str] | None = option(
        None,
        "Folders or Hub names (name@revision) that analyze measures, full models or LoRA. Default: every checkpoint "
        "and the final model of the output folder.",
    )
    families: list[str] | None = option(
        None,
        "Families that analyze and watch measure. Default: all (choices where --choices_dataset is given).",
        *FAMILIES,
    )
    formulas: str = option(
        "corrected", "paper follows arXiv 2507.03662 where Holdfast corrects it. Default: corrected.", *FORMULAS
    )
    probe_sets: dict[str, str] | str | None = option(
        None,
        "Several sets to measure on and compare: name -> source of rows (mapping or JSON), beside --probe_dataset. "
        "Sets are matched by line number. Source controlled:N is N pairs of prompts that differ in one word of intent, "
        "shuffled:<source> its completions after other rows' prompts. Default: none.",
    )
    analysis_families: list[str] | None = option(
        None, "Families measured while training. Default: behavior, projection, choices.", *FAMILIES
    )
    analysis_rows: int = option(200, "At most this many rows of each set. Default: 200.")
    analysis_batch_size: int = option(8, "Rows per forward while measuring. Default: 8.")
    analysis_during_training: bool = option(True, "Measure each checkpoint when it is saved. Default: true.")
    control_sets: list[str] | None = option(
        None, "Names of probe sets (benign ones) whose sharing of directions means nothing. Default: none."
    )
    gradient_layer: int | None = option(
        None, "Block whose attention output projection the gradients family differentiates. Default: the last."
    )
    gradient_weight: str | None = option(
        None, "Path of another linear layer in that block, like mlp.down_proj. Default: the attention's output."
    )
    patching_rows: int = option(
        PATCHING_ROWS, f"Rows of each set for patching, two passes a layer each. Default: {PATCHING_ROWS}."
    )
    store_dir: str | None = option(
        None,
        "Folder that keeps what the starting model and base show, for all analyses. Default: $HOLDFAST_CACHE/store, or "
        "~/.cache/holdfast/store.",
    )
    store_limit_gb: float = option(
        STORE_LIMIT_GB, f"Bound of that folder in 10^9 bytes; the longest unused go first. Default: {STORE_LIMIT_GB}."
    )
    device_map: str | None = option(
        None, "Spread one large model over all devices (auto, balanced, sequential) in analyze. Default: one device."
    )
    watch_interval: float = option(30.0, "Seconds between two looks of watch at the run. Default: 30.")

    def __post_init__(self) -> None:
        require(self.analysis_rows >= 1, "analysis_rows", self.analysis_rows, "at least 1")
        require(self.analysis_batch_size >= 1, "analysis_batch_size", self.analysis_batch_size, "at least 1")
        require(self.patching_rows >= 1, "patching_rows", self.patching_rows, "at least 1")
        require(self.store_limit_gb >= 0, "store_limit_gb", self.store_limit_gb, "0 or more")
        require(self.watch_interval > 0, "watch_interval", self.watch_interval, "more than 0 seconds")
        self.probe_sets = sources("probe_sets", self.probe_sets)

    @property
    def named_sets(self) -> dict[str, str]:
        """Source of rows by name of probe set."""
        return self.probe_sets if isinstance(self.probe_sets, dict) else {}
