"""The `holdfast` command: `holdfast <command> [--config recipe.yaml] [--flag value ...]`.

Errors a user can cause are one line on stderr and exit code 2, with nothing written; an interrupt is exit code 130.
Where a part could not be measured and the rest was, each such part is one line and the exit code is 3.
"""

import difflib
import importlib
import importlib.metadata
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..analysis.errors import UserError
from ..analysis.files.disk import disk_is_full


@dataclass(frozen=True)
class Command:
    """One command of `holdfast`.

    Attributes:
        text: what the command does, in a phrase.
        target: "module:function". It is imported when the command is called, so that `holdfast --help` and a mistyped
            command answer at once, and so that no package is imported by one below it. The function takes the flags
            and returns the exit code.
        models: whether the command loads models, whose progress bars are then kept out of logs.
    """

    text: str
    target: str
    models: bool = True


COMMANDS = {
    "quickstart": Command(
        "build the lab, fine-tune without and with protection, and print one table",
        "holdfast.recipes.lab.cli:quickstart_main",
        models=False,
    ),
    "lab": Command(
        "build the lab world: base, instruct, tokenizer and data", "holdfast.recipes.lab.cli:lab_main", models=False
    ),
    "subspace": Command("find the alignment subspace of a model", "holdfast.trainer.cli:subspace_main"),
    "train": Command("fine-tune, with or without protection", "holdfast.trainer.cli:train_main"),
    "sweep": Command(
        "compare protections: every setting at every seed, a frozen choice, then the test split",
        "holdfast.trainer.sweep.command:main",
    ),
    "analyze": Command("measure checkpoints", "holdfast.trainer.commands.analyze:main"),
    "watch": Command(
        "measure a run's checkpoints as they appear: holdfast watch <output_dir>",
        "holdfast.trainer.commands.watch:main",
    ),
    "intervene": Command(
        "is the subspace a cause? ablate, steer and patch the starting model, without training",
        "holdfast.trainer.commands.intervene:main",
    ),
    "generate": Command(
        "sample answers to question files, stored as they come", "holdfast.analysis.commands.generate:main"
    ),
    "judge": Command(
        "let a model score sampled answers: how often are they misaligned?",
        "holdfast.analysis.commands.judge:main",
        models=False,
    ),
    "export": Command(
        "write an ablation into the weights of an ordinary model folder", "holdfast.analysis.commands.export:main"
    ),
    "evaluate": Command(
        "named tasks of lm-evaluation-harness on a checkpoint", "holdfast.analysis.commands.evaluate:main"
    ),
    "compare": Command(
        "measured runs side by side: holdfast compare <output_dir> <other output_dir>",
        "holdfast.analysis.commands.compare:main",
        models=False,
    ),
}
USAGE = "usage: holdfast <command> [--config recipe.yaml] [--flag value ...]\n\n" + "\n".join(
    f"  {name:<12}{command.text}" for name, command in COMMANDS.items()
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
        from ..analysis.models.ranks import leave_group

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
    command = COMMANDS[name]
    if command.models:
        _quiet_bars()
    module, function = command.target.split(":")
    run: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), function)
    return run


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


def subspace_main(arguments: Sequence[str]) -> int:
    """Finds the alignment subspace of a model and writes it to its file."""
    from . import run
    from .config.parsing import parse

    print(f"subspace written to {run.subspace(parse(arguments))}")
    return 0


def train_main(arguments: Sequence[str]) -> int:
    """Fine-tunes, with or without protection; starts the processes that the flags ask for."""
    from . import run
    from .config.parsing import build, parse_given
    from .launch import launch, must_launch
    from .protected_trainer import NonFiniteLoss

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
