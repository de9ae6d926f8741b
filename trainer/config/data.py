"""Flags of the data: where the training rows, the anchors and the measured rows come from."""

from dataclasses import dataclass

from ...analysis.flags import option, require


@dataclass
class DataArguments:
    """The data sets of a run.

    Each source is a Hub name, a URL, a .jsonl/.json/.csv/.parquet file, or a folder of such files. A relative path
    starts at the folder that the command runs in, not at the recipe.
    """

    _argument_group_name = "data"

    train_dataset: str | None = option(None, "Training rows; train requires them. Default: none.")
    train_split: str = option("train", "Split of a Hub data set to train on. Default: train.")
    train_rows: int | None = option(None, "Use only the first N training rows. Default: all.")
    held_out_dataset: str | None = option(
        None,
        "Rows to measure and evaluate on that are not trained on. Duplicates with the training rows are reported. "
        "Default: none.",
    )
    held_out_rows: int = option(
        0,
        "Without --held_out_dataset: set aside this many rows of the training set, after de-duplication. Default: 0.",
    )
    anchor_dataset: str | None = option(
        None,
        "Ordinary prompts, with or without answers, on which the penalty holds the activations in place. "
        "Default: 64 prompts that ship with Holdfast.",
    )
    probe_dataset: str | None = option(
        None, "Rows on which checkpoints are measured. Default: the held-out rows, else training rows."
    )
    choices_dataset: str | None = option(
        None, "Prompts with listed classes of answers, whose probability is measured exactly. Default: none."
    )
    long_rows: str = option(
        "error",
        "What happens to a row of more than --max_length tokens. error: stop and name its file and line. truncate: cut "
        "its end. drop: leave it out; the number is printed. Default: error.",
        "error",
        "truncate",
        "drop",
    )

    def __post_init__(self) -> None:
        require(self.train_rows is None or self.train_rows >= 1, "train_rows", self.train_rows, "at least 1")
        require(self.held_out_rows >= 0, "held_out_rows", self.held_out_rows, "0 or more rows")
