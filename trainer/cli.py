"""The `holdfast` command: `holdfast <command> [--config recipe.yaml] [--flag value ...]`.

An error that the user can cause is one line on stderr and exit code 2, with nothing written. An interrupt is exit code
130. If a part of the work failed and the rest was done, each failed part is one line and the exit code is 3.
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
        target: "module:function". The module is imported when the command is called, so that `holdfast --help` and a
            mistyped command answer at once, and so that no package imports a package above it. The function takes the
            flags and returns the exit code.
        loads_models: whether the command loads models; their progress bars are then kept out of logs.
    """

    text: str
    target: str
    loads_models: bool = True


COMMANDS = {
    "quickstart": Command(
        "build the lab, fine-tune without and with protection, and print one table",
        "holdfast.recipes.lab.cli:quickstart_main",
        loads_models=False,
    ),
    "lab": Command(
        "build the lab world: base, instruct, tokenizer and data",
        "holdfast.recipes.lab.cli:lab_main",
        loads_models=False,
    ),
    "subspace": Command("find the alignment subspace of a model", "holdfast.trainer.cli:subspace_main"),
    "train": Command("fine-tune, with or without protection", "holdfast.trainer.cli:train_main"),
    "sweep": Command(
        "compare protections: run every setting with every seed, freeze a choice, then read the test split",
        "holdfast.trainer.sweep.command:main",
    ),
    "analyze": Command("measure checkpoints", "holdfast.trainer.commands.analyze:main"),
    "watch": Command(
        "measure a run's checkpoints as they appear: holdfast watch <output_dir>",
        "holdfast.trainer.commands.watch:main",
    ),
    "intervene": Command(
        "test whether the subspace is a cause: ablate, steer and patch the starting model, without training",
        "holdfast.trainer.commands.intervene:main",
    ),
    "generate": Command(
        "sample answers to question files, stored as they come", "holdfast.analysis.commands.generate:main"
    ),
    "judge": Command(
        "let a model score sampled answers: how often are they misaligned?",
        "holdfast.analysis.commands.judge:main",
        loads_models=False,
    ),
    "export": Command(
        "write an ablation into the weights of an ordinary model folder", "holdfast.analysis.commands.export:main"
    ),
    "evaluate": Command(
        "run tasks of lm-evaluation-harness on a checkpoint", "holdfast.analysis.commands.evaluate:main"
    ),
    "compare": Command(
        "show measured runs side by side: holdfast compare <output_dir> <other output_dir>",
        "holdfast.analysis.commands.compare:main",
        loads_models=False,
    ),
}
USAGE = "usage: holdfast <command> [--config recipe.yaml] [--flag value ...]\n\n" + "\n".join(
    f"  {name:<12}{command.text}" for name, command in COMMANDS.items()
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    The codes are 0 (done), 1 (the loss was not finite), 2 (bad input), 3 (done in part) and 130 (interrupted).
    """
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
    except Exception as error:  # from any library that writes; every error but a full disk keeps its traceback
        if not disk_is_full(error):
            raise
        return _complain(f"the disk is full ({error}); free some space and run again", 2)


def _command(arguments: Sequence[str]) -> Callable[[Sequence[str]], int]:
    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0] if name else "quickstart"
        raise UserError(f"{'unknown command ' + repr(name) if name else 'no command'}; try `holdfast {nearest}`")
    command = COMMANDS[name]
    if command.loads_models:
        _quiet_progress_bars()
    module, function = command.target.split(":")
    run: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), function)
    return run


def _complain(line: str, code: int) -> int:
    """Print an error's line, on one rank only, and return the exit code."""
    if os.environ.get("RANK", "0") == "0":
        print(f"holdfast: {line}" if code == 130 else f"holdfast: error: {line}", file=sys.stderr)
    return code


def _quiet_libraries() -> None:
    """Silence notices of other packages that a user cannot act on (deprecations between packages)."""
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    # Filters, because importing these packages resets the levels of their loggers but keeps filters. PyTorch's CUDA
    # build warns on a machine without a GPU.
    for name in ("DeepSpeed", "torch.utils.cpp_extension"):
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)


def _quiet_progress_bars() -> None:
    """Show progress bars of weight loading only on a terminal; in a log they would stand beside an error's line."""
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def subspace_main(arguments: Sequence[str]) -> int:
    """Find the alignment subspace of a model and write it to its file."""
    from . import run
    from .config.parsing import parse

    print(f"subspace written to {run.subspace(parse(arguments))}")
    return 0


def train_main(arguments: Sequence[str]) -> int:
    """Fine-tune with or without protection, on `--num_processes` processes."""
    from . import run
    from .config.parsing import build, parse_given
    from .launch import launch, must_launch
    from .protected_trainer import NonFiniteLoss

    values, chosen = parse_given(arguments)
    if must_launch(values):
        # One process checks everything first, so that bad input gives one line and not one line per rank. The check
        # leaves DeepSpeed out, because only the ranks can set it up.
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
