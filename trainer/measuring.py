"""What is measured of a run, from its arguments: the plan shared by `holdfast analyze` and the training callback."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..analysis.artifacts import check_writable
from ..analysis.errors import UserError
from ..analysis.measure import Measurer, check_checkpoint, measure_checkpoint
from ..analysis.models import model_fingerprint, tokenizer_fingerprint
from ..analysis.plan import MeasurePlan
from ..analysis.probes import Conversation
from ..analysis.subspace import Subspace
from .data import Row, load_rows
from .inputs import load_choices, load_options, read_starting_model, subspace_path, training_rows
from .parsing import Arguments

# divergence costs passes of the references' heads for every checkpoint, so it is measured when asked for.
DEFAULT_FAMILIES = ("behavior", "projection", "choices")


def measurer(arguments: Arguments) -> Measurer:
    """A measurer of the run's probe sets, choices and subspace. Loads no weights; raises UserError for bad input."""
    tokenizer, _ = read_starting_model(arguments)
    subspace, choices = _subspace(arguments, tokenizer), arguments.data.choices_dataset
    plan = MeasurePlan(
        instruct_path=arguments.model.starting_model,
        base_path=arguments.model.base_model_name_or_path,
        probe_sets=_probe_sets(arguments),
        choices=load_choices(choices) if choices else (),
        families=tuple(arguments.analysis.analysis_families or DEFAULT_FAMILIES),
        subspace=subspace,
        layers=",".join(map(str, sorted(subspace.bases))) if subspace else "all",
        batch_size=arguments.analysis.analysis_batch_size,
        max_length=arguments.training.max_length,
        dtype=arguments.model.dtype or "auto",
        device=str(arguments.training.device),
        seed=arguments.training.seed,
        references=arguments.output_dir / "references",
        load=load_options(arguments),
    )
    return Measurer(plan, tokenizer)


def analyze(arguments: Arguments) -> Path:
    """Measures base (where named), the starting model and every checkpoint of the run into <output_dir>/metrics.jsonl.

    Raises UserError when there is nothing to measure, or a checkpoint cannot be read.
    """
    check_writable(arguments.output_dir, "--output_dir")
    found = _checkpoints(arguments)
    measure = measurer(arguments)
    models: dict[str, tuple[str, int | None]] = {"instruct": (arguments.model.starting_model, 0)}
    if arguments.model.base_model_name_or_path:
        models["base"] = (arguments.model.base_model_name_or_path, None)
    for name, folder in _names(found).items():
        check_checkpoint(folder, measure.plan)
        models[name] = (str(folder), None)
    for name, (path, step) in models.items():
        print(f"measuring {name}")
        measure_checkpoint(measure, path, arguments.output_dir, name, step)
    return arguments.output_dir / "metrics.jsonl"


def _names(found: Sequence[Path]) -> dict[str, Path]:
    """A name for each checkpoint's results: its folder's, with the parent's before it where that is taken."""
    taken = Counter(path.resolve().name for path in found) + Counter(("instruct", "base"))
    names: dict[str, Path] = {}
    for path in map(Path.resolve, found):
        name = path.name if taken[path.name] == 1 else f"{path.parent.name}-{path.name}"
        if name in names or name in ("instruct", "base"):
            raise UserError(
                f"--analysis_checkpoints {path} has the results' name of another ({name}); measure it in a command of "
                "its own, with another --output_dir"
            )
        names[name] = path
    return names


def _checkpoints(arguments: Arguments) -> list[Path]:
    named = arguments.analysis.analysis_checkpoints
    if named:
        absent = [name for name in named if not Path(name).is_dir()]
        if absent:
            raise UserError(f"--analysis_checkpoints {absent[0]} is not a folder; name checkpoint folders")
        return [Path(name) for name in named]
    run = arguments.output_dir
    numbered = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    found = sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")))
    found += [run / "final"] if (run / "final").is_dir() else []
    if not found:
        raise UserError(
            f"--output_dir {run} holds no checkpoint; train first, or name some with --analysis_checkpoints"
        )
    return found


def _probe_sets(arguments: Arguments) -> Mapping[str, Sequence[Conversation]]:
    sets: dict[str, list[Row]] = {}
    if arguments.data.probe_dataset:
        sets["probes"] = load_rows(arguments.data.probe_dataset, prompts=True)
    if arguments.data.train_dataset:
        train, held_out = training_rows(arguments)
        if held_out:
            sets["held_out"] = held_out
        elif not sets:
            sets["train"] = train
    rows = arguments.analysis.analysis_rows
    return {name: [row.messages for row in found[:rows]] for name, found in sets.items()}


def _subspace(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> Subspace | None:
    """The subspace as it was built, whole: an unprotected run and a null are read along the same directions."""
    path = subspace_path(arguments)
    if not path.is_file():
        return None
    found = Subspace.load(path)
    found.check(
        instruct_fingerprint=model_fingerprint(arguments.model.starting_model),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        role=found.provenance.role,
        layers=sorted(found.bases),
    )
    return found
