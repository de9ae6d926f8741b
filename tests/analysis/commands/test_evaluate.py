"""`holdfast evaluate`: the harness's results become measurements with n and interval; an obstacle is one line."""

import builtins
import importlib.util
import json
import math

import pytest
from holdfast.analysis.commands.evaluate import main as evaluate_main
from holdfast.analysis.commands.evaluate import measurements
from holdfast.analysis.errors import UserError
from scipy.stats import binom
from toys.chat_models import save_toy, toy_model
from toys.labs import wilson_interval

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason='lm-evaluation-harness is absent: pip install "holdfast[eval]"'
)


def found(results, samples=None, n=None, **more):
    """What the harness returns, as far as it is read."""
    counts = {task: {"original": 99, "effective": rows} for task, rows in (n or {}).items()}
    return {"results": results, "samples": samples or {}, "n-samples": counts, **more}


def test_a_rate_has_the_interval_of_its_rows():
    samples = {"quiz": [{"filter": "none", "acc": float(row < 3)} for row in range(10)]}
    result = {"quiz": {"alias": "quiz", "acc,none": 0.3, "acc_stderr,none": 0.15275}}
    (value,) = measurements(found(result, samples, {"quiz": 10}))["quiz"].values()
    assert (value["value"], value["n"], value["stderr"]) == (0.3, 10, 0.15275)
    # Few answers: the bounds at which 3 or more, 3 or fewer, happen in 6.5% and in 5%; Wilson's lie just inside.
    low, high = value["ci95"]
    assert binom.sf(2, 10, low) == pytest.approx(0.065) and binom.cdf(3, 10, high) == pytest.approx(0.05)
    assert value["ci95"] == pytest.approx(list(wilson_interval(3, 10, 1.959964)), abs=0.012)


def test_no_hit_at_all_still_has_an_interval():
    samples = {"quiz": [{"acc": 0.0}] * 20}
    value = measurements(found({"quiz": {"acc,none": 0.0, "acc_stderr,none": 0.0}}, samples, {"quiz": 20}))["quiz"][
        "acc"
    ]
    assert value["ci95"][0] == 0 and 0.1 < value["ci95"][1] < 0.25


def test_what_is_no_mean_of_rows_takes_the_harness_error():
    result = {"text": {"perplexity,none": 12.0, "perplexity_stderr,none": 0.5}}
    samples = {"text": [{"perplexity": [-3.0, 2]}, {"perplexity": [-1.0, 2]}]}
    value = measurements(found(result, samples, {"text": 40}))["text"]["perplexity"]
    assert value["ci95"] == pytest.approx([12 - 0.98, 12 + 0.98], abs=1e-4) and value["n"] == 40


def test_without_an_error_the_interval_is_null_with_a_reason():
    result = {"text": {"bleu,none": 3.0, "bleu_stderr,none": "N/A", "other,none": math.nan, "sample_len": 4}}
    values = measurements(found(result, n={"text": 7}))["text"]
    assert values["bleu"]["ci95"] is None and "no standard error" in values["bleu"]["reason"]
    assert values["other"]["value"] is None and set(values) == {"bleu", "other"}
    json.dumps(values, allow_nan=False)


def test_filters_are_told_apart_and_groups_count_their_tasks():
    result = {
        "both": {"acc,none": 0.5, "acc_stderr,none": 0.1},
        "a": {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.2, "exact_match,loose": 0.5},
    }
    samples = {
        "a": [{"filter": kind, "exact_match": hit} for kind, hits in (("strict", (1, 0, 0, 0)),) for hit in hits]
    }
    values = measurements(found(result, samples, {"a": 4, "b": 6}, group_subtasks={"both": ["a", "b"]}))
    assert values["both"]["acc"]["n"] == 10
    assert values["a"]["exact_match,strict"]["ci95"] is not None and values["a"]["exact_match,loose"]["ci95"] is None


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return save_toy(tmp_path / "final", toy_model())


def test_without_the_harness_one_line_says_what_to_install(model, monkeypatch, tmp_path):
    real = builtins.__import__

    def absent(name, *rest):
        if name.startswith("lm_eval"):
            raise ImportError("No module named 'lm_eval'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r'pip install "holdfast\[eval\]"'):
        evaluate_main(["--model", str(model), "--tasks", "arc_easy", "--output_dir", "run"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--model"),
        (["--model", "final"], "--tasks"),
        (["--model", "final", "--tasks", "a"], "--output_dir"),
        (["--model", "none", "--tasks", "a", "--output_dir", "run"], "--model none"),
        (["--model", "final", "--tasks", "a", "--output_dir", "run", "--limit", "0"], "--limit.*'0'"),
        (["--model", "final", "--tasks", "a", "--output_dir", "run", "--limits", "3"], "--limit"),
        (["--model", "final", "--tasks", "a", "--output_dir", "run", "--tasks_path", "none"], "--tasks_path none"),
        (
            ["--model", "final", "--tasks", "a", "--output_dir", "final/config.json/x"],
            "--output_dir 'final/config.json/x'",
        ),
    ],
)
def test_bad_input_is_one_line(model, flags, said):
    with pytest.raises(UserError, match=said):
        evaluate_main(flags)


def write_task(folder, rows):
    (folder / "tasks").mkdir()
    lines = (json.dumps({"question": f"the answer to {n}", "right": n % 2}) for n in range(rows))
    (folder / "tasks" / "rows.json").write_text("\n".join(lines))
    (folder / "tasks" / "quiz.yaml").write_text(
        f"""
task: holdfast_quiz
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "tasks" / "rows.json"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["be honest", "take it and run"]
doc_to_target: "{{{{right}}}}"
metric_list: [{{metric: acc}}]
"""
    )


@needs_harness
def test_a_task_of_ones_own_stands_in_metrics_jsonl_and_is_not_run_twice(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_task(tmp_path, 10)
    flags = ["--model", "final", "--tasks", "holdfast_quiz", "--tasks_path", "tasks", "--output_dir", "run"]
    assert evaluate_main(flags) == 0
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    value = json.loads(line)["evaluation"]["holdfast_quiz"]["acc"]
    # Whichever answer a model prefers, it is right for one half of the rows, unless it prefers by the question.
    assert value["n"] == 10 and 0 <= value["value"] <= 1 and value["ci95"][0] < value["value"] < value["ci95"][1]
    monkeypatch.setattr("holdfast.analysis.commands.evaluate._evaluate", None)
    assert evaluate_main(flags) == 0
    assert f"holdfast_quiz acc {value['value']:.4g} [" in capsys.readouterr().out


@needs_harness
def test_a_task_that_is_not_known_names_the_nearest(model, tmp_path):
    write_task(tmp_path, 2)
    with pytest.raises(UserError, match="holdfast_quiz"):
        evaluate_main(["--model", "final", "--tasks", "holdfast_quizz", "--tasks_path", "tasks", "--output_dir", "run"])
    assert not (tmp_path / "run").exists()


@needs_harness
def test_data_that_cannot_be_fetched_is_one_line(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_task(tmp_path, 2)
    (tmp_path / "tasks" / "rows.json").unlink()
    with pytest.raises(UserError, match="--tasks holdfast_quiz"):
        evaluate_main(["--model", "final", "--tasks", "holdfast_quiz", "--tasks_path", "tasks", "--output_dir", "run"])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
