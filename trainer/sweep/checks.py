"""Check a sweep's subspace and each of its settings before anything is written or trained."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...analysis.files.artifacts import check_writable
from ...analysis.models.forward import select
from ...analysis.models.load import load_config, model_fingerprint, tokenizer_fingerprint
from ...analysis.models.render import render
from ...analysis.subspace.build import check_request
from ...analysis.subspace.contrast import paired_selections, require_tokens
from ...analysis.subspace.file import NULL_SEEDS, Provenance, Subspace
from ...analysis.subspace.methods import random_basis
from ...analysis.subspace.moments import SubspaceRequest
from ..config.parsing import Arguments
from ..data.documents import Document, documents_of
from ..data.rows import RenderedRows
from ..inputs.checks import check_epochs, check_steps
from ..inputs.protection import Materials, protection_of
from ..inputs.subspace_request import subspace_request
from ..inputs.training import TrainingInputs, load_inputs, load_options, read_starting_model
from ..protections.kinds import kinds_of
from ..run_folder import REFERENCES

# Flags of a setting that change which rows `load_inputs` reads, or which part of the subspace.
_READ_BY = (
    "protection", "penalty_inputs", "protection_tokens", "protection_layers", "protection_rank", "interleave_dataset",
    "interleave_share", "inoculation_prompt", "null_seed", "null_scale",
)  # fmt: skip


def reads_subspace(protection: str) -> bool:
    """Return whether a protection acts in the alignment subspace."""
    return any(kind.subspace for kind in kinds_of(protection))


def check_settings(settings: Sequence[Arguments], subspace: Path) -> TrainingInputs:
    """Read the inputs of all settings, once for settings that read the same, and make their protections.

    No weights are loaded.

    Args:
        settings: arguments of a run of each setting.
        subspace: path where the subspace is, or will be built.

    Returns:
        The inputs of the first setting.

    Raises:
        UserError: whatever a run, or building the subspace, would refuse.
    """
    groups: dict[tuple[Any, ...], list[Arguments]] = {}
    for arguments in settings:
        groups.setdefault(_reading(arguments), []).append(arguments)
    first: TrainingInputs | None = None
    with _subspace_to_read(settings, subspace) as path:
        for group in groups.values():
            inputs = load_inputs(_reading_at(group[0], path))
            first = first or inputs
            for arguments in group:
                check_steps(arguments.training, len(inputs.train.rendered))
                check_epochs(arguments, len(inputs.train.rendered))
                _make_protection(arguments, inputs)
    assert first is not None  # the baseline is always among the settings
    return first


def _reading(arguments: Arguments) -> tuple[Any, ...]:
    """Return the values that decide what `load_inputs` reads."""
    return (arguments.training.max_length, *(getattr(arguments.protection, name) for name in _READ_BY))


def _reading_at(arguments: Arguments, path: Path) -> Arguments:
    return replace(arguments, subspace=replace(arguments.subspace, subspace_path=str(path)))


@contextmanager
def _subspace_to_read(settings: Sequence[Arguments], subspace: Path) -> Iterator[Path]:
    """Yield the path of the subspace or, until it is built, of a temporary file with the same facts."""
    if subspace.is_file() or not any(reads_subspace(arguments.protection.protection) for arguments in settings):
        yield subspace
        return
    check_writable(subspace.parent, "the folder of --subspace_path")
    planned = _planned(settings[0])
    with tempfile.TemporaryDirectory(prefix="holdfast-") as folder:
        path = Path(folder) / "planned.safetensors"
        planned.save(path)
        yield path


def _planned(arguments: Arguments) -> Subspace:
    """Make a subspace with the facts that the flags request, and with random directions.

    Raises:
        UserError: a subspace that cannot be built from these flags, models and rows.
    """
    flags, model = arguments.subspace, arguments.model
    tokenizer, config = read_starting_model(arguments)
    request = subspace_request(arguments)
    layers, contrast = check_request(request)
    _require_rows(request, tokenizer, contrast)
    text, rank = config.get_text_config(), flags.subspace_rank
    provenance = Provenance(
        method=flags.subspace_method, rank=rank, layers=tuple(layers), role=flags.subspace_positions,
        centred=flags.subspace_centred, seed=flags.subspace_seed, data_sha256="", n_rows=0, n_tokens=0,
        instruct_fingerprint=model_fingerprint(model.starting_model),
        base_fingerprint=model_fingerprint(model.base_model_name_or_path) if model.base_model_name_or_path else None,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer), layers_path=model.layers_path,
    )  # fmt: skip
    ones, nulls = torch.ones(rank), torch.ones(NULL_SEEDS, rank)
    return Subspace(
        bases={layer: random_basis(text.hidden_size, rank, 0, layer).float() for layer in layers},
        scales=dict.fromkeys(layers, float(rank)),
        base_gap={layer: ones.clone() for layer in layers},
        provenance=provenance,
        energies={layer: ones.clone() for layer in layers},
        null_energies={layer: nulls.clone() for layer in layers},
        null_gaps={layer: nulls.clone() for layer in layers},
    )


def _require_rows(
    request: SubspaceRequest, tokenizer: PreTrainedTokenizerBase, contrast: Sequence[dict[str, Any]] | None
) -> None:
    """Raise UserError for rows on which the contrast, or the base model, cannot be read."""
    groups = {"": request.rows, **request.domains}
    paired_selections(tokenizer, groups, contrast, request.role, request.max_length)
    for conversations in groups.values() if request.base_path else ():
        rendered = [render(tokenizer, messages) for messages in conversations]
        require_tokens([select(row, request.role, request.max_length) for row in rendered], request.role)


def _make_protection(arguments: Arguments, inputs: TrainingInputs) -> None:
    """Raise UserError for flags that the protection refuses when it is made."""

    def documents(rows: RenderedRows | None) -> Callable[[str], list[Document]]:
        return lambda role: documents_of(rows.rendered, role) if rows is not None else []

    model = arguments.model
    config = load_config(model.starting_model, load_options(arguments)).get_text_config()
    materials = Materials(
        flags=replace(arguments.protection, reference="auto"),  # a frozen reference would load a second model
        subspace=inputs.subspace,
        task=documents(inputs.train),
        anchors=documents(inputs.anchors),
        starting_model=_no_model,
        base_model=_no_model,
        cache_dir=arguments.output_dir / REFERENCES,
        seed=arguments.training.seed,
        layers_path=model.layers_path,
        fingerprint=inputs.facts["starting weights"],
        base_fingerprint=model_fingerprint(model.base_model_name_or_path) if model.base_model_name_or_path else None,
        depth=config.num_hidden_layers,
    )
    protection_of(materials)


def _no_model() -> PreTrainedModel:
    raise AssertionError("no protection reads a model before training begins")
