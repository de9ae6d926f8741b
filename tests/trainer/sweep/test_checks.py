"""Bad input to `holdfast sweep` is one line before anything is written, also where the subspace is yet to be built."""

import json
import re
from pathlib import Path

import pytest
from holdfast.trainer.cli import main
from toys.runs import flags_of, recipe

RANKS = json.dumps({"subspace": {"protection_rank": [1, 4]}})


def refused(inputs: Path, output: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    keys = recipe(inputs, choices_dataset=str(inputs / "choices.jsonl"), output_dir=str(output))
    given = [flag.format(inputs=inputs) if flag.startswith("{inputs}") else flag for flag in flags]
    capsys.readouterr()
    assert main(["sweep", *flags_of(keys), *given]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("holdfast: error: ") and re.search(message, lines[-1]), lines[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--protections", "kl", "--penalty_strength", "1", "much"], "strength.*much"),
        (["--protections", "kl", "--seeds", "-1"], "--seeds .*-1"),
        (["--protections", "gradient"], "gradient.*gradient_projection"),
        (["--protections", "interleave"], "--interleave_dataset"),
        (["--protections", "kl", "--task_measure", "choices/split/x/y"], "task.*choices/split/x/y"),
        (["--protections", "kl", "--train_dataset", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--protections", "kl", "--test_split", "tset"], "--test_split tset"),
        (["--protections", "kl", "--penalty_side", "toward_base"], "--penalty_side "),
        (["--protections", "kl", "--penalty_strength", "1", "0", "--penalty_budget", "0.1"], "budget"),
        (["--protections", "feature_l2", "--protection_layers", "99"], "--protection_layers '99'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    flags: list[str], message: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(inputs, tmp_path / "sweep", flags, message, capsys)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--anchor_dataset", "{inputs}/empty.jsonl"], "empty.jsonl"),
        (["--subspace_dataset", "{inputs}/empty.jsonl"], "empty.jsonl"),
        (["--subspace_contrast", "{inputs}/empty.jsonl"], "empty.jsonl"),
        (["--subspace_contrast", "{inputs}/pairs.jsonl"], "completion"),
        (["--subspace_method", "svd"], "svd .*base model"),
        (["--subspace_centred", "true"], "centred .*svd"),
        (["--subspace_rank", "99"], "99.* 1-16"),
        (["--subspace_layers", "9"], "--subspace_layers '9'.*0-2"),
        (["--subspace_path", "{inputs}/rows.jsonl/subspace.safetensors"], "--subspace_path"),
        (["--protection_rank", "4"], r"rank.* 1\b"),
        (["--protections", "kl", "subspace", "--grid", RANKS], r"rank.* 1\b"),
        (["--protection_layers", "99"], "--protection_layers '99'"),
        (["--subspace_layers", "0-1", "--protection_layers", "2"], "0-1 .*2"),
        (["--protection_tokens", "completion"], "role all .*completion"),
        (["--penalty_strength", "1", "0", "--penalty_budget", "0.1"], "budget"),
        (["--protections", "steering+subspace", "--penalty_inputs", "both"], "--penalty_inputs anchors"),
        (
            ["--protections", "subspace+gradient_projection", "--anchor_dataset", "{inputs}/prompts.jsonl"],
            "anchors' answers",
        ),
    ],
)
def test_what_is_wrong_is_found_before_the_subspace_is_built(
    flags: list[str], message: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    anchors = [] if "--anchor_dataset" in flags else ["--anchor_dataset", str(inputs / "rows.jsonl")]
    refused(inputs, tmp_path / "sweep", ["--protections", "subspace", *anchors, *flags], message, capsys)
    assert not (tmp_path / "sweep").exists()
