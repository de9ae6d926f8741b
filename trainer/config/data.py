"""Flags of the data: where training rows, anchors and measured rows come from."""

from dataclasses import dataclass

from ...analysis.flags import option, require


@dataclass
class DataArguments:
    """The sets. Each source is a Hub name, a URL, a .jsonl/.json/.csv/.parquet file, or a folder of such files.

    Relative paths are relative to the folder the command is run in, not to the recipe.
    """

    _argument_group_name = "data"

    train_dataset: str | None = option(None, "Training rows (required by train). Default: none.")
    train_split: str = option("train", "Split of a Hub data set to train on. Default: train.")
    train_rows: int | None = option(None, "Use only the first N training rows. Default: all.")
    held_out_dataset: str | None = option(
        None, "Rows to measure and evaluate on, apart from training. Duplicates with it are reported. Default: none."
    )
    held_out_rows: int = option(
        0, "Set aside this many rows of the training set, after de-duplication, when no --held_out_dataset. Default: 0."
    )
    anchor_dataset: str | None = option(
        None,
        "Ordinary prompts, with or without answers, whose activations the penalty holds in place. "
        "Default: 64 prompts that ship with Holdfast.",
    )
    probe_dataset: str | None = option(
        None,
        "Rows on which checkpoints are measured. Default: the held-out rows, else training rows.",
    )
    choices_dataset: str | None = option(
        None, "Prompts with enumerated answer classes, whose probability mass is measured exactly. Default: none."
    )
    long_rows: str = option(
        "error",
        "What to do with a row longer than --max_length tokens: stop with its file and line, cut its end, or leave it "
        "out (counted and printed). Default: error.",
        "error",
        "truncate",
        "drop",
    )

    def __post_init__(self) -> None:
        require(self.train_rows is None or self.train_rows >= 1, "train_rows", self.train_rows, "at least 1")
        require(self.held_out_rows >= 0, "held_out_rows", self.held_out_rows, "0 or more rows")
