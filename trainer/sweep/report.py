"""The reports of a sweep: summary.json and summary.md, sweep.jsonl with one line per run, and TensorBoard's HParams.

The summary holds no times and nothing that depends on interruptions of the sweep. These are in sweep.jsonl.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from ...analysis.errors import UserError
from ...analysis.files.artifacts import staged_file, write_json_atomic
from ...analysis.frontier.choose import EM_F1, best_settings, recommend
from ...analysis.frontier.runs import Key, Run, paired, paired_at_equal_task
from ...analysis.frontier.settings import frontiers, points, table
from ...analysis.stats.intervals import missing
from .acts import TEST_RESULT, read_json
from .folder import STARTS, Sweep, to_read
from .measures import MISALIGNED, described, read
from .plan import BASELINE, SweepRun

SUMMARY, TABLE, LINES, TENSORBOARD = "summary.json", "summary.md", "sweep.jsonl", "tensorboard"


def write_report(sweep: Sweep, frozen: Mapping[str, Any] | None, failed: Mapping[str, str]) -> str:
    """Write all reports and return the text of summary.md, whose last line is the recommendation.

    Args:
        sweep: the sweep.
        frozen: the frozen choice, or None.
        failed: failed run -> reason.
    """
    summary = summarise(sweep, frozen, sorted(failed))
    write_json_atomic(sweep.folder / SUMMARY, summary)
    text = _markdown(summary)
    with staged_file(sweep.folder / TABLE) as staging:
        staging.write_text(text, encoding="utf-8")
    with staged_file(sweep.folder / LINES) as staging:
        staging.write_text("".join(json.dumps(line) + "\n" for line in _lines(sweep, failed)), encoding="utf-8")
    _write_tensorboard(sweep)
    return text


def summarise(sweep: Sweep, frozen: Mapping[str, Any] | None, failed: Sequence[str]) -> dict[str, Any]:
    """Return points, frontiers, comparisons and the recommendation, as JSON values."""
    results = sweep.results()
    runs = sweep.compared({name: result for name, result in results.items() if name not in failed})
    recommendation = _recommended(sweep, runs)
    return {
        "measures": described(sweep.measures),
        "start": {when: sweep.start(when) for when in STARTS},
        "failed": list(failed),
        "validation": _validation(sweep, runs, recommendation["choice"]),
        "test": _test(sweep, frozen, failed),
        "recommendation": recommendation,
        "order": _order(sweep, frozen),
    }


def _recommended(sweep: Sweep, runs: Sequence[Run]) -> dict[str, Any]:
    try:
        return recommend(runs, **sweep.rule())
    except (UserError, ValueError) as error:
        return {"choice": None, "second": None, "sentence": f"no setting can be recommended: {error}"}


def _validation(sweep: Sweep, runs: Sequence[Run], choice: Mapping[str, Any] | None) -> dict[str, Any]:
    """Report every setting before the freeze, and compare the recommended one with each rival's whole frontier."""
    if not runs:
        return {"points": [], "frontiers": {}, "best_settings": {}, "at_equal_task": []}
    key = None if choice is None else (choice["protection"], choice["setting"])
    rivals = [name for name in dict.fromkeys(run.protection for run in runs) if key is None or name != key[0]]
    return {
        "points": points(runs),
        "frontiers": frontiers(runs),
        "best_settings": _or_reason(lambda: best_settings(runs, **sweep.rule())),
        "at_equal_task": [] if key is None else _at_equal_task(runs, key, rivals),
    }


def _at_equal_task(runs: Sequence[Run], choice: Key, rivals: Sequence[str]) -> list[dict[str, Any]]:
    """Return the choice minus each rival's frontier at equal task, or null if the rival never has that task.

    "chosen_on" says that the choice was made on the same values that are compared, so it looks better than it is.
    """
    rows = paired_at_equal_task(runs, choice, rivals)
    reached = [row["protection"] for row in rows if row["clamped"] < row["n"]]
    # Holm's correction counts only the rivals that are tested.
    tested = {row["protection"]: row for row in paired_at_equal_task(runs, choice, reached)}
    return [{**tested.get(row["protection"], _never_reached(row)), "chosen_on": "validation"} for row in rows]


def _never_reached(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of nulls: only an end of the rival's frontier was read, which is not at equal task."""
    reason = f"in all {row['n']} pairs its settings' tasks are all above, or all below, the choice's"
    facts = {name: row[name] for name in ("protection", "labs", "clamped")}
    nulls = dict.fromkeys(("p", "p_least", "p_holm"))
    return {**facts, **missing(reason if row["n"] else row["reason"], row["n"]), **nulls}


def _or_reason(compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return compute()
    except UserError as error:
        return {"reason": str(error)}


def _test(sweep: Sweep, frozen: Mapping[str, Any] | None, failed: Sequence[str]) -> dict[str, Any]:
    """Report the frozen settings on the test split: each compared with the baseline and with the recommended one."""
    if not sweep.measures.test:
        return {"reason": "no row of --choices_dataset is of the test split"}
    if frozen is None:
        return {"reason": "the choice is not frozen: some runs failed" if failed else "nothing could be chosen"}
    runs = sweep.compared_on_test([run.name for run in to_read(sweep, frozen)])
    report: dict[str, Any] = {"points": points(runs)}
    keys = list(dict.fromkeys(run.key for run in runs))
    baseline = next((key for key in keys if key[0] == BASELINE), None)
    if baseline is not None:
        report["lowers"] = paired(runs, baseline, [key for key in keys if key != baseline])
    if frozen["recommended"]:
        chosen = (frozen["recommended"][0], frozen["recommended"][1])
        report["recommended_less_others"] = paired(runs, chosen, [key for key in keys if key != chosen])
    return report


def _order(sweep: Sweep, frozen: Mapping[str, Any] | None) -> dict[str, Any]:
    """Report what was read before and after the freeze. The times are in frozen.json and test.json."""
    if frozen is None:
        return {"steps": ["validation"], "frozen": None, "read_on_test": []}
    names = [run.name for run in to_read(sweep, frozen)] if sweep.measures.test else []
    return {
        "steps": ["validation", "frozen", *(["test"] if names else [])],
        "frozen": frozen["sha256"],
        "results_sha256": frozen["results_sha256"],
        "read_on_test": names,
    }


def _markdown(summary: Mapping[str, Any]) -> str:
    parts = ["# Before the freeze: every setting\n", _table(summary, "validation")]
    if summary["validation"]["frontiers"]:
        parts += ["# Before the freeze: each protection's frontier\n", _frontier_table(summary)]
        parts += ["Both grow with the number of settings, so compare only protections with equally many settings.\n"]
    if "points" in summary["test"]:
        parts += ["# Test split: the frozen settings\n", _table(summary, "test")]
        parts += [_sentence_on_test(summary)] if summary["recommendation"]["choice"] else []
    else:
        parts += [f"Nothing was read on the test split: {summary['test']['reason']}.\n"]
    return "\n".join([*parts, f"Recommendation, by validation: {summary['recommendation']['sentence']}.\n"])


def _table(summary: Mapping[str, Any], when: str) -> str:
    """Return a table of the starting model and every point."""
    names, values = list(summary["measures"][when]), summary["start"][when] or {}
    measured = {name: {"value": values.get(name), "ci95": None} for name in names}
    start = {"protection": "(starting model)", "setting": "-", "n": 1, "measures": measured}
    return table([start, *summary[when]["points"]], names)


def _frontier_table(summary: Mapping[str, Any]) -> str:
    """Return a table of each protection's hypervolume and best EM-F1. n counts the seeds that have all its settings."""
    names = ["hypervolume", EM_F1]
    rows = [
        {
            "protection": protection,
            "setting": f"all {frontier['settings']}",
            "n": frontier["hypervolume"]["n"],
            "measures": {name: frontier[name] for name in names},
        }
        for protection, frontier in summary["validation"]["frontiers"].items()
    ]
    return table(rows, names)


def _sentence_on_test(summary: Mapping[str, Any]) -> str:
    choice = summary["recommendation"]["choice"]
    key = (choice["protection"], choice["setting"])
    means = {(p["protection"], p["setting"]): p["measures"][MISALIGNED]["value"] for p in summary["test"]["points"]}
    baseline = next((value for (protection, _), value in means.items() if protection == BASELINE), None)
    if key not in means or baseline is None:
        return ""
    return f"On the test split {key[0]} ({key[1]}) is misaligned {means[key]:.3f}, {BASELINE} {baseline:.3f}.\n"


def _lines(sweep: Sweep, failed: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return one line per run: its setting, its measures or its failure, and its seconds."""
    lines = []
    for run in sweep.runs:
        line: dict[str, Any] = {"run": run.name, **run.facts}
        result, test = sweep.result(run), read_json(sweep.run_folder(run) / TEST_RESULT)
        if run.name in failed:
            line |= {"failed": failed[run.name]}
        elif result is not None:
            line |= {"seconds": result["seconds"], "validation": read(sweep.measures.validation, result["measures"])}
            if test:
                line["seconds"]["test"] = test["seconds"]
                line["test"] = read(sweep.measures.test, {**result["measures"], **test["measures"]})
        lines.append(line)
    return lines


def _write_tensorboard(sweep: Sweep) -> None:
    """Write one session per run, so that the HParams tab compares strengths. The folder is written anew each time."""
    folder = sweep.folder / TENSORBOARD
    shutil.rmtree(folder, ignore_errors=True)
    for run in sweep.runs:
        result = sweep.result(run)
        if result is not None:
            _write_session(folder / run.name, run, read(sweep.measures.validation, result["measures"]))


def _write_session(folder: Path, run: SweepRun, values: Mapping[str, float]) -> None:
    flags = {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in run.setting.flags.items()
    }
    parameters = {"protection": run.setting.protection, "setting": run.setting.name, "seed": run.seed, **flags}
    metrics = {f"sweep/{name}": value for name, value in values.items()}
    with SummaryWriter(str(folder)) as writer:
        for summary in hparams(parameters, metrics):
            writer._get_file_writer().add_summary(summary)
        for name, value in metrics.items():
            writer.add_scalar(name, value)
