"""The `holdfast` command: `holdfast <command> [--config recipe.yaml] [--flag value ...]`.

Errors a user can cause are one line on stderr and exit code 2, with nothing written; an interrupt is exit code 130.
Where a part could not be measured and the rest was, each such part is one line and the exit code is 3.
"""

import difflib
import importlib.metadata
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..analysis.errors import UserError
from .disk import disk_is_full

if TYPE_CHECKING:
    from .measuring import Analyzed

PARTIAL = 3

COMMANDS = {
    "quickstart": "build the lab, fine-tune without and with protection, and print one table",
    "lab": "build the lab world: base, instruct, tokenizer and data",
    "subspace": "find the alignment subspace of a model",
    "train": "fine-tune, with or without protection",
    "sweep": "compare protections: every setting at every seed, a frozen choice, then the test split",
    "analyze": "measure checkpoints",
    "watch": "measure a run's checkpoints as they appear: holdfast watch <output_dir>",
    "intervene": "is the subspace a cause? ablate, steer and patch the starting model, without training",
    "generate": "sample answers to question files, stored as they come",
    "judge": "let a model score sampled answers: how often are they misaligned?",
    "export": "write an ablation into the weights of an ordinary model folder",
    "evaluate": "named tasks of lm-evaluation-harness on a checkpoint",
    "compare": "measured runs side by side: holdfast compare <output_dir> <other output_dir>",
}
USAGE = "usage: holdfast <command> [--config recipe.yaml] [--flag value ...]\n\n" + "\n".join(
    f"  {name:<12}{text}" for name, text in COMMANDS.items()
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 (loss not finite), 2 (bad input), 3 (in part), 130 (Ctrl-C)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE, "\n\nholdfast <command> --help lists the command's flags.")
        return 0
    if arguments == ["--version"]:
        print(importlib.metadata.version("holdfast"))
        return 0
    _quiet_libraries()
    code = _run(arguments)
    if "RANK" in os.environ:
        from ..analysis.ranks import leave_group

        leave_group()
    return code


def _run(arguments: Sequence[str]) -> int:
    try:
        return _command(arguments)(arguments[1:])
    except UserError as error:
        return _complain(str(error), 2)
    except KeyboardInterrupt as error:
        return _complain(str(error) or "interrupted", 130)
    except Exception as error:  # of any library that was writing; everything else keeps its traceback
        if not disk_is_full(error):
            raise
        return _complain(f"the disk is full ({error}); free some space and run again", 2)


def _command(arguments: Sequence[str]) -> Callable[[Sequence[str]], int]:
    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0] if name else "quickstart"
        raise UserError(f"{'unknown command ' + repr(name) if name else 'no command'}; try `holdfast {near}`")
    return {
        "quickstart": _quickstart,
        "lab": _lab,
        "subspace": _subspace,
        "train": _train,
        "sweep": _sweep,
        "analyze": _analyze,
        "watch": _watch,
        "intervene": _intervene,
        "generate": _generate,
        "judge": _judge,
        "export": _export,
        "evaluate": _evaluate,
        "compare": _compare,
    }[name]


def _complain(line: str, code: int) -> int:
    """Prints the one line, on one rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"holdfast: {line}" if code == 130 else f"holdfast: error: {line}", file=sys.stderr)
    return code


def _quiet_libraries() -> None:
    """Silences notices of other packages that a user can do nothing about (deprecations between them)."""
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    # Importing them sets loggers' levels, but leaves filters in place. PyTorch's own build with CUDA says on a machine
    # without a GPU that there is none.
    for name in ("DeepSpeed", "torch.utils.cpp_extension"):
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)


def _quiet_bars() -> None:
    """Weight-loading bars belong on a screen; in a log they would stand beside the one line of an error."""
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


# The commands import what they run: `holdfast --help` and a mistyped command answer at once.
def _quickstart(arguments: Sequence[str]) -> int:
    from ..recipes.lab.cli import quickstart_main

    return quickstart_main(list(arguments))


def _lab(arguments: Sequence[str]) -> int:
    from ..recipes.lab.cli import lab_main

    return lab_main(list(arguments))


def _subspace(arguments: Sequence[str]) -> int:
    from . import run
    from .parsing import parse

    _quiet_bars()
    print(f"subspace written to {run.subspace(parse(arguments))}")
    return 0


def _sweep(arguments: Sequence[str]) -> int:
    from .sweep import sweep_main

    _quiet_bars()
    text, failed = sweep_main(arguments)
    for name, reason in failed.items():
        print(f"holdfast: failed: {name}: {reason}", file=sys.stderr)
    print(text, end="")
    return PARTIAL if failed else 0


def _analyze(arguments: Sequence[str]) -> int:
    from .launch import launch, must_launch
    from .measuring import analyze, checked
    from .parsing import build, parse_values

    _quiet_bars()
    # A recipe's DeepSpeed belongs to its training.
    values = {**parse_values(arguments), "deepspeed": None}
    if must_launch(values):
        # One process checks everything first, so that a bad input is one line and not one per rank.
        _, readable = checked(build(values))
        return launch(arguments, values, "analyze") if readable else PARTIAL
    return _report(analyze(build(values)))


def _watch(arguments: Sequence[str]) -> int:
    from .watching import watch, watched

    _quiet_bars()
    return _report(watch(watched(arguments)))


def _intervene(arguments: Sequence[str]) -> int:
    from .intervening import intervene
    from .parsing import parse

    _quiet_bars()
    found = intervene(parse(arguments))
    for problem in found.problems:
        print(f"holdfast: not measured: {problem}", file=sys.stderr)
    print(f"{found.table}\n\nresults written to {found.path}")
    return PARTIAL if found.problems else 0


def _generate(arguments: Sequence[str]) -> int:
    from .generating import generate_main

    _quiet_bars()
    found = generate_main(arguments)
    for problem in found.problems:
        print(f"holdfast: not generated: {problem}", file=sys.stderr)
    print(f"{found.written} answers written to {found.path}, {found.there} of {found.asked} were there")
    return PARTIAL if found.problems else 0


def _judge(arguments: Sequence[str]) -> int:
    from .judging import judge_main

    return judge_main(arguments)


def _export(arguments: Sequence[str]) -> int:
    from .exporting import export_main

    _quiet_bars()
    print(export_main(arguments))
    return 0


def _evaluate(arguments: Sequence[str]) -> int:
    from .evaluating import evaluate_main

    _quiet_bars()
    return evaluate_main(arguments)


def _compare(arguments: Sequence[str]) -> int:
    from .comparing import compare_main

    print(compare_main(arguments), end="")
    return 0


def _report(found: "Analyzed") -> int:
    """Says what was measured and what was not, on the main rank, whose exit code then counts."""
    if os.environ.get("RANK", "0") != "0":
        return 0
    for problem in found.problems:
        print(f"holdfast: not measured: {problem}", file=sys.stderr)
    if found.metrics.is_file():
        print(f"measures written to {found.metrics}")
    return PARTIAL if found.problems else 0


def _train(arguments: Sequence[str]) -> int:
    from . import run
    from .launch import launch, must_launch
    from .parsing import build, parse_given
    from .protected_sft_trainer import NonFiniteLoss

    _quiet_bars()
    values, chosen = parse_given(arguments)
    if must_launch(values):
        # One process checks everything first, so that a bad input is one line and not one per rank. DeepSpeed is left
        # out of that: its set-up belongs to the ranks.
        run.check(replace(build({**values, "deepspeed": None}, chosen), given=values))
        return launch(arguments, values)
    try:
        result = run.train(build(values, chosen))
    except NonFiniteLoss as error:
        return _complain(str(error), 1)
    if os.environ.get("RANK", "0") == "0":
        print(f"model written to {result.final}")
        numbers = {name: value for name, value in vars(result).items() if isinstance(value, float)}
        print(", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
