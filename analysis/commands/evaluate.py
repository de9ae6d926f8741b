"""`holdfast evaluate`: runs tasks of lm-evaluation-harness on a checkpoint, and adds the results to its metrics.

holdfast evaluate --model runs/insecure/final --tasks arc_easy hellaswag --output_dir runs/insecure
"""

import argparse
import difflib
import importlib.metadata
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.artifacts import check_writable, sha256_json
from ..flags import FlagParser
from ..measure.results import FOLDER, VIEW, ResultFiles
from ..models.load import load_model, load_tokenizer, model_fingerprint
from ..stats.intervals import Measurement, missing
from ..stats.summary import measurement

FAMILY = "evaluation"
_NORMAL = 1.959964


def main(argv: Sequence[str]) -> int:
    """Run tasks of lm-evaluation-harness, and write the results to the run's metrics. Raises UserError."""
    arguments = _read(argv)
    task_manager = _task_manager(arguments)
    name = arguments.model.resolve().name
    numbered = re.fullmatch(r"checkpoint-(\d+)", name)
    files = ResultFiles(arguments.output_dir, name, int(numbered[1]) if numbered else None)
    fingerprint, settings = model_fingerprint(arguments.model), _settings_hash(arguments)
    results, evaluated = _previous(arguments.output_dir / FOLDER / name / f"{FAMILY}.json", fingerprint)
    for task in dict.fromkeys(arguments.tasks):
        if evaluated.get(task, {}).get("how") != settings:
            new = measurements(_evaluate(arguments, task, task_manager))
            results, evaluated = {**results, **new}, {**evaluated, task: {"how": settings, "results": list(new)}}
            # Written after each task, because the next task may fail.
            files.write(FAMILY, results, json.dumps({"model": fingerprint, "asked": evaluated}))
        for result in evaluated[task]["results"]:
            for metric, value in results[result].items():
                print(f"{result} {metric} {_shown(value)}")
    print(f"measures written to {arguments.output_dir / VIEW}")
    return 0


def _previous(path: Path, fingerprint: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the earlier results for a model with this fingerprint; both mappings are empty if there are none.

    Returns:
        {task: {metric: measurement}}, and {task or group that was requested: {"how": hash of the settings, "results":
        tasks}}.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        key = json.loads(facts["key"])
        return (facts["results"], key["asked"]) if key["model"] == fingerprint else ({}, {})
    except (OSError, ValueError, KeyError, TypeError):
        return {}, {}


def measurements(output: Mapping[str, Any]) -> dict[str, dict[str, Measurement]]:
    """Turn the output of the harness into {task: {metric: measurement}}. Groups of tasks are among the tasks.

    If the harness gives a number for each row, the interval is computed from the rows (`stats.summary.measurement`).
    Otherwise it is value ± 1.96 standard errors of the harness. A filter other than "none" is part of the metric's
    name.
    """
    results: dict[str, dict[str, Measurement]] = {}
    for task, values in output["results"].items():
        n = _row_count(output, task)
        for name, value in values.items():
            metric, _, filter_name = name.partition(",")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not filter_name or metric.endswith("_stderr") or not is_number:
                continue
            title = metric if filter_name == "none" else f"{metric},{filter_name}"
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            rows = _row_values(output, task, metric, filter_name)
            results.setdefault(task, {})[title] = _measurement(float(value), stderr, rows, n)
    return results


def _measurement(value: float, harness_stderr: Any, rows: list[float], n: int) -> Measurement:
    """Build the measurement of a metric.

    Args:
        harness_stderr: the standard error of the harness, or anything else if it gives none.
        rows: the value of each row, or nothing if the harness gives none.
        n: number of rows.
    """
    if not math.isfinite(value):
        return missing("the harness gives no finite number", n)
    has_stderr = isinstance(harness_stderr, int | float) and math.isfinite(harness_stderr)
    stderr = float(harness_stderr) if has_stderr else None
    # A metric that is not the mean of its rows (a perplexity, a correlation) has only the harness's standard error.
    if rows and math.isclose(sum(rows) / len(rows), value, rel_tol=1e-9, abs_tol=1e-12):
        return {**measurement(rows, rate=min(rows) >= 0 and max(rows) <= 1), "stderr": stderr}
    if not stderr:
        return {"value": value, "n": n, "ci95": None, "reason": "the harness gives no standard error", "stderr": stderr}
    return {"value": value, "n": n, "ci95": [value - _NORMAL * stderr, value + _NORMAL * stderr], "stderr": stderr}


def _row_count(output: Mapping[str, Any], task: str) -> int:
    """Count the rows of a task, or of all tasks of a group."""
    counts = output.get("n-samples", {})
    subtasks = [task] if task in counts else output.get("group_subtasks", {}).get(task, [])
    return sum(
        counts[subtask]["effective"] if subtask in counts else _row_count(output, subtask) for subtask in subtasks
    )


def _row_values(output: Mapping[str, Any], task: str, metric: str, filter_name: str) -> list[float]:
    """Return the value of a metric for each row, or nothing if a row has no number."""
    rows = [row for row in output.get("samples", {}).get(task, []) if row.get("filter", "none") == filter_name]
    values = [row.get(metric) for row in rows]
    return [float(value) for value in values] if all(isinstance(value, int | float) for value in values) else []


def _read(argv: Sequence[str]) -> argparse.Namespace:
    parser = FlagParser("holdfast evaluate", "Run tasks of lm-evaluation-harness on a checkpoint of a run.")
    parser.add_argument("--model", type=Path, help="Folder of a checkpoint (required).")
    parser.add_argument("--tasks", nargs="+", help="Tasks, or groups of tasks, of lm-evaluation-harness (required).")
    parser.add_argument("--output_dir", type=Path, help="Folder of the run, which holds metrics.jsonl (required).")
    parser.add_argument("--tasks_path", type=Path, help="Folder with your own tasks (YAML). Default: none.")
    parser.add_argument("--limit", type=_count, help="Number of rows of each task, for a trial. Default: all.")
    parser.add_argument(
        "--num_fewshot",
        type=int,
        choices=range(0, 65),
        metavar="N",
        help="Number of examples in the prompt. Default: as the task says.",
    )
    parser.add_argument("--apply_chat_template", action="store_true", help="Use the chat format. Default: plain text.")
    parser.add_argument("--batch_size", type=_count, default=8, help="Rows in one forward pass. Default: 8.")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="Precision of the weights. Default: auto (as saved).",
    )
    parser.add_argument("--device", default="cpu", help="Device to run on, like cuda:0. Default: cpu.")
    arguments = parser.read(argv)
    for name, example in (("model", "runs/a/final"), ("tasks", "arc_easy"), ("output_dir", "runs/a")):
        if not getattr(arguments, name):
            raise UserError(f"evaluate needs --{name}; write it like --{name} {example}")
    if not arguments.model.is_dir():
        raise UserError(f"--model {arguments.model} is not a folder; name the folder of a checkpoint")
    if arguments.tasks_path is not None and not arguments.tasks_path.is_dir():
        raise UserError(
            f"--tasks_path {arguments.tasks_path} is not a folder; name the folder with the tasks' YAML files"
        )
    check_writable(arguments.output_dir, "--output_dir")
    return arguments


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _task_manager(arguments: argparse.Namespace) -> Any:
    """Return the task index of the harness.

    Raises:
        UserError: the harness is not installed, --tasks_path cannot be read, or the harness does not know a task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f'evaluate needs lm-evaluation-harness, which cannot be imported ({error}): pip install "holdfast[eval]"'
        ) from None
    try:
        task_manager = TaskManager(include_path=arguments.tasks_path)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"--tasks_path {arguments.tasks_path} could not be read: {error}") from error
    for task in arguments.tasks:
        if task not in task_manager.all_tasks:
            near = difflib.get_close_matches(task, task_manager.all_tasks, n=1, cutoff=0.0)[0]
            raise UserError(f"--tasks {task} is not known to lm-evaluation-harness; the nearest known one is {near}")
    return task_manager


def _settings_hash(arguments: argparse.Namespace) -> str:
    """Hash everything that a result depends on, except the model."""
    flags = [arguments.limit, arguments.num_fewshot, arguments.apply_chat_template, arguments.dtype]
    task_files = sorted(arguments.tasks_path.rglob("*.y*ml")) if arguments.tasks_path else []
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in task_files]
    return sha256_json([importlib.metadata.version("lm_eval"), flags, texts])


def _evaluate(arguments: argparse.Namespace, task: str, task_manager: Any) -> Mapping[str, Any]:
    """Run one task or group, and return the output of the harness. Raises UserError if it cannot be run."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    language_model = HFLM(
        pretrained=model, tokenizer=load_tokenizer(arguments.model), backend="causal", batch_size=arguments.batch_size
    )
    try:
        return simple_evaluate(
            model=language_model,
            tasks=[task],
            task_manager=task_manager,
            limit=arguments.limit,
            num_fewshot=arguments.num_fewshot,
            apply_chat_template=arguments.apply_chat_template,
            # Intervals come from the values of the rows; the harness's bootstrap serves metrics that are not means.
            log_samples=True,
        )
    except (OSError, ValueError, ImportError, NotImplementedError) as error:
        # The user can fix all of these: data that cannot be downloaded, a task that needs another package, or a task
        # that needs permission to run code.
        raise UserError(f"--tasks {task} could not be run: {str(error)[:300]}") from error


def _shown(value: Measurement) -> str:
    if value["value"] is None:
        return f"none ({value['reason']})"
    interval = value.get("ci95")
    return (
        f"{value['value']:.4g}" + (f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else "") + f" n {value['n']}"
    )
