"""What the flags ask to be built: the request from which `analysis.subspace` builds the alignment subspace."""

from ...analysis.subspace.moments import SubspaceRequest
from ..config.parsing import Arguments
from ..data.contrast import load_contrast
from ..data.rows import load_rows
from .training import anchor_rows, load_options


def subspace_request(arguments: Arguments) -> SubspaceRequest:
    """What the flags ask to be built, its rows read. Raises UserError for sets that cannot be read."""
    asked = arguments.subspace
    rows = load_rows(asked.subspace_dataset, prompts=True) if asked.subspace_dataset else anchor_rows(arguments)
    domains = asked.subspace_domains if isinstance(asked.subspace_domains, dict) else {}
    return SubspaceRequest(
        instruct_path=arguments.model.starting_model,
        base_path=arguments.model.base_model_name_or_path,
        rows=[row.messages for row in rows],
        contrast=load_contrast(asked.subspace_contrast) if asked.subspace_contrast else None,
        domains={name: [row.messages for row in load_rows(source, prompts=True)] for name, source in domains.items()},
        method=asked.subspace_method,
        rank=asked.subspace_rank,
        layers=asked.subspace_layers,
        role=asked.subspace_positions,
        centred=asked.subspace_centred,
        seed=asked.subspace_seed,
        dtype=arguments.model.dtype or "float32",
        device=str(arguments.training.device),
        batch_size=arguments.analysis.analysis_batch_size,
        max_length=arguments.training.max_length,
        load=load_options(arguments),
    )
