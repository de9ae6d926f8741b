"""`holdfast evaluate`: run named tasks of lm-evaluation-harness on a checkpoint, beside its other metrics.

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
    """`holdfast evaluate`: tasks of lm-evaluation-harness, into the run's metrics. Raises UserError."""
    arguments = _read(argv)
    known = _known_tasks(arguments)
    name = arguments.model.resolve().name
    numbered = re.fullmatch(r"checkpoint-(\d+)", name)
    files = ResultFiles(arguments.output_dir, name, int(numbered[1]) if numbered else None)
    fingerprint, how = model_fingerprint(arguments.model), _how(arguments)
    results, asked = _before(arguments.output_dir / FOLDER / name / f"{FAMILY}.json", fingerprint)
    for task in dict.fromkeys(arguments.tasks):
        if asked.get(task, {}).get("how") != how:
            found = measurements(_evaluated(arguments, task, known))
            results, asked = {**results, **found}, {**asked, task: {"how": how, "results": list(found)}}
            # After each task: the next may not be possible.
            files.write(FAMILY, results, json.dumps({"model": fingerprint, "asked": asked}))
        for each in asked[task]["results"]:
            for metric, value in results[each].items():
                print(f"{each} {metric} {_shown(value)}")
    print(f"measures written to {arguments.output_dir / VIEW}")
    return 0


def _before(path: Path, fingerprint: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was measured of this very model: {task: {metric: …}}, and {asked for: {"how", "results": tasks}}."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        key = json.loads(facts["key"])
        return (facts["results"], key["asked"]) if key["model"] == fingerprint else ({}, {})
    except (OSError, ValueError, KeyError, TypeError):
        return {}, {}


def measurements(found: Mapping[str, Any]) -> dict[str, dict[str, Measurement]]:
    """{task: {metric: measurement}} of what the harness returns; groups of tasks are among them.

    The interval is that of the rows (`stats.measurement`) where the harness gives a number for each,
    else its standard error's, value ± 1.96 errors. A filter that is not "none" is part of the metric's name.
    """
    results: dict[str, dict[str, Measurement]] = {}
    for task, values in found["results"].items():
        n = _rows(found, task)
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if not kind or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            title = metric if kind == "none" else f"{metric},{kind}"
            error = values.get(f"{metric}_stderr,{kind}")
            rows = _of_rows(found, task, metric, kind)
            results.setdefault(task, {})[title] = _measurement(float(value), error, rows, n)
    return results


def _measurement(value: float, error: Any, rows: list[float], n: int) -> Measurement:
    if not math.isfinite(value):
        return missing("the harness gives no finite number", n)
    known = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
    # A metric that is not the mean of its rows (a perplexity, a correlation) has the harness's error alone.
    if rows and math.isclose(sum(rows) / len(rows), value, rel_tol=1e-9, abs_tol=1e-12):
        return {**measurement(rows, rate=min(rows) >= 0 and max(rows) <= 1), "stderr": known}
    if not known:
        return {"value": value, "n": n, "ci95": None, "reason": "the harness gives no standard error", "stderr": known}
    return {"value": value, "n": n, "ci95": [value - _NORMAL * known, value + _NORMAL * known], "stderr": known}


def _rows(found: Mapping[str, Any], task: str) -> int:
    """Rows of a task, or of all tasks of a group."""
    counts = found.get("n-samples", {})
    inside = [task] if task in counts else found.get("group_subtasks", {}).get(task, [])
    return sum(counts[each]["effective"] if each in counts else _rows(found, each) for each in inside)


def _of_rows(found: Mapping[str, Any], task: str, metric: str, kind: str) -> list[float]:
    rows = [row for row in found.get("samples", {}).get(task, []) if row.get("filter", "none") == kind]
    values = [row.get(metric) for row in rows]
    return [float(value) for value in values] if all(isinstance(value, int | float) for value in values) else []


def _read(argv: Sequence[str]) -> argparse.Namespace:
    parser = FlagParser("holdfast evaluate", main.__doc__)
    parser.add_argument("--model", type=Path, help="Folder of a checkpoint (required).")
    parser.add_argument("--tasks", nargs="+", help="Tasks or groups of lm-evaluation-harness (required).")
    parser.add_argument("--output_dir", type=Path, help="Folder of the run, where metrics.jsonl lies (required).")
    parser.add_argument("--tasks_path", type=Path, help="Folder with tasks of your own (YAML). Default: none.")
    parser.add_argument("--limit", type=_count, help="Rows of each task, for a trial. Default: all.")
    parser.add_argument("--num_fewshot", type=int, choices=range(0, 65), metavar="N", help="Default: each task's own.")
    parser.add_argument("--apply_chat_template", action="store_true", help="Ask as in a chat. Default: plain text.")
    parser.add_argument("--batch_size", type=_count, default=8, help="Rows at a time. Default: 8.")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument("--device", default="cpu", help="Like cuda:0. Default: cpu.")
    arguments = parser.read(argv)
    for name, example in (("model", "runs/a/final"), ("tasks", "arc_easy"), ("output_dir", "runs/a")):
        if not getattr(arguments, name):
            raise UserError(f"evaluate needs --{name}; write it like --{name} {example}")
    if not arguments.model.is_dir():
        raise UserError(f"--model {arguments.model} is not a folder; name the folder of a checkpoint")
    if arguments.tasks_path is not None and not arguments.tasks_path.is_dir():
        raise UserError(f"--tasks_path {arguments.tasks_path} is not a folder; name one with the tasks' YAML files")
    check_writable(arguments.output_dir, "--output_dir")
    return arguments


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _known_tasks(arguments: argparse.Namespace) -> Any:
    """The harness's index of tasks. Raises UserError: not installed, or a task that it does not know."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f'evaluate needs lm-evaluation-harness, which cannot be imported ({error}): pip install "holdfast[eval]"'
        ) from None
    try:
        known = TaskManager(include_path=arguments.tasks_path)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"--tasks_path {arguments.tasks_path} could not be read: {error}") from error
    for task in arguments.tasks:
        if task not in known.all_tasks:
            near = difflib.get_close_matches(task, known.all_tasks, n=1, cutoff=0.0)[0]
            raise UserError(f"--tasks {task} is not known to lm-evaluation-harness; the nearest known one is {near}")
    return known


def _how(arguments: argparse.Namespace) -> str:
    """Hash of what a result depends on beside the model."""
    flags = [arguments.limit, arguments.num_fewshot, arguments.apply_chat_template, arguments.dtype]
    own = sorted(arguments.tasks_path.rglob("*.y*ml")) if arguments.tasks_path else []
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in own]
    return sha256_json([importlib.metadata.version("lm_eval"), flags, texts])


def _evaluated(arguments: argparse.Namespace, task: str, known: Any) -> Mapping[str, Any]:
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
            task_manager=known,
            limit=arguments.limit,
            num_fewshot=arguments.num_fewshot,
            apply_chat_template=arguments.apply_chat_template,
            # The rows' own numbers give the intervals; the harness's bootstrap is for what is no mean.
            log_samples=True,
        )
    except (OSError, ValueError, ImportError, NotImplementedError) as error:
        # Data that cannot be fetched, a task that needs another package or leave to run code: all the user's to mend.
        raise UserError(f"--tasks {task} could not be run: {str(error)[:300]}") from error


def _shown(value: Measurement) -> str:
    if value["value"] is None:
        return f"none ({value['reason']})"
    interval = value.get("ci95")
    return (
        f"{value['value']:.4g}" + (f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else "") + f" n {value['n']}"
    )
