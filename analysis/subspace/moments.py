"""Run the passes for a subspace: moments of contrast differences and of residuals, by group of rows and by layer.

Models are loaded one after the other. The activations of the instruct model are kept on disk until base has run.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..models.forward import Selection, length_batches, pad_id, select, selected_states
from ..models.layers import prove_layers
from ..models.load import LoadOptions, load_model, load_tokenizer
from ..models.render import Conversation, render
from . import contrast as contrasts
from .methods import Moments, merge

_ROWS = ""
LayerMoments = dict[int, Moments]


@dataclass(frozen=True)
class SubspaceRequest:
    """What to build a subspace from.

    rows: probe conversations, for contrasts of system prompts and for residuals. domains: rows by domain, for `shared`;
    if there are no `rows`, the other methods use the rows of all domains. contrast: pairs of system prompts
    {"aligned": str, "misaligned": str}, or of messages {"prompt", "chosen", "rejected"}; None takes the shipped system
    prompts if the method is contrastive or there is no base. role: the token role whose tokens are read (prompt,
    completion, last_prompt, all). max_length: rows are cut to this many tokens. device: None is the CPU. load: how both
    models are loaded.
    """

    instruct_path: str
    base_path: str | None = None
    rows: Sequence[Conversation] = ()
    contrast: Sequence[dict[str, Any]] | None = None
    domains: dict[str, Sequence[Conversation]] = field(default_factory=dict)
    method: str = "contrastive"
    rank: int = 1
    layers: str = "all"
    role: str = "completion"
    centred: bool = False
    seed: int = 0
    dtype: str = "float32"
    device: str | None = None
    batch_size: int = 16
    max_length: int | None = None
    load: LoadOptions = LoadOptions()


@dataclass(frozen=True)
class ContrastMoments:
    """Moments by group of rows and layer, of the contrast's differences and of the residuals instruct - base.

    The group "" holds the probe rows. The other groups are domains.
    """

    contrasted: dict[str, LayerMoments]
    residuals: dict[str, LayerMoments]

    def source(self, method: str) -> dict[str, LayerMoments]:
        """Return a method's moments: the contrast for `contrastive` or without a base, otherwise the residuals."""
        return self.contrasted if method == "contrastive" or not self.residuals else self.residuals

    def whole(self, method: str, layer: int) -> Moments:
        """Return the moments of the probe rows, or of all domains together if there are no probe rows."""
        groups = self.source(method)
        return groups[_ROWS][layer] if _ROWS in groups else merge(group[layer] for group in groups.values())

    def domains(self, layer: int) -> dict[str, Moments]:
        """Return the moments of each domain."""
        groups = self.source("shared")
        return {name: group[layer] for name, group in groups.items() if name != _ROWS}


def measure_moments(
    request: SubspaceRequest, layers: list[int], contrast: Sequence[dict[str, Any]] | None
) -> ContrastMoments:
    """Run the instruct model (on both sides of the contrast and on the rows), then base, and return the moments."""
    tokenizer = load_tokenizer(request.instruct_path, request.load)
    padding = pad_id(tokenizer)
    groups = {_ROWS: request.rows, **request.domains} if request.rows else dict(request.domains)
    pairs = contrasts.paired_selections(tokenizer, groups, contrast, request.role, request.max_length)
    selected: dict[str, list[Selection]] = {}
    if request.base_path is not None:
        for name, rows in groups.items():
            selections = [select(render(tokenizer, row), request.role, request.max_length) for row in rows]
            selected[name] = contrasts.require_tokens(selections, request.role)
    with tempfile.TemporaryDirectory(prefix="holdfast-") as folder:
        contrasted = _instruct_pass(request, layers, pairs, selected, padding, Path(folder))
        residuals = _base_pass(request, layers, selected, padding, Path(folder)) if selected else {}
    return ContrastMoments(contrasted, residuals)


def _instruct_pass(
    request: SubspaceRequest,
    layers: list[int],
    pairs: dict[str, contrasts.PairedSelections],
    selected: dict[str, list[Selection]],
    padding: int,
    folder: Path,
) -> dict[str, LayerMoments]:
    model = load_model(request.instruct_path, dtype=request.dtype, device=request.device, options=request.load)
    prove_layers(model)
    contrasted = {}
    for name, sides in pairs.items():
        differences = contrasts.paired_differences(model, sides, layers, request.batch_size, padding)
        contrasted[name] = _accumulate(differences)
    for group, rows in enumerate(selected.values()):
        batches = length_batches([len(row.input_ids) for row in rows], request.batch_size)
        for number, (_, states) in enumerate(selected_states(model, rows, layers, batches, padding, "instruct")):
            tensors = {str(layer): h.contiguous() for layer, h in states.items()}
            save_file(tensors, folder / f"{group}-{number}.safetensors")
    return contrasted


def _base_pass(
    request: SubspaceRequest, layers: list[int], selected: dict[str, list[Selection]], padding: int, folder: Path
) -> dict[str, LayerMoments]:
    assert request.base_path is not None
    model = load_model(request.base_path, dtype=request.dtype, device=request.device, options=request.load)
    return {
        name: _accumulate(_residuals(model, rows, layers, request.batch_size, padding, folder, group))
        for group, (name, rows) in enumerate(selected.items())
    }


def _residuals(
    base: nn.Module,
    rows: list[Selection],
    layers: list[int],
    batch_size: int,
    padding: int,
    folder: Path,
    group: int,
) -> Iterator[dict[int, Tensor]]:
    """Yield h^instruct - h^base [N, d] per layer, batch by batch, from the stored states of instruct."""
    batches = length_batches([len(row.input_ids) for row in rows], batch_size)
    for number, (_, states) in enumerate(selected_states(base, rows, layers, batches, padding, "base")):
        instruct = load_file(folder / f"{group}-{number}.safetensors")
        yield {layer: instruct[str(layer)].to(h.device).double() - h.double() for layer, h in states.items()}


def _accumulate(differences: Iterator[dict[int, Tensor]]) -> LayerMoments:
    moments: LayerMoments = {}
    for batch in differences:
        for layer, rows in batch.items():
            moments.setdefault(layer, Moments(rows.shape[1], rows.device)).add(rows)
    return moments
