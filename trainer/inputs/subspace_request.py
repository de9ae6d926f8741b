"""Turn the flags into the request from which `analysis.subspace.build` builds the alignment subspace."""

from ...analysis.subspace.moments import SubspaceRequest
from ..config.parsing import Arguments
from ..data.contrast import load_contrast
from ..data.rows import load_rows
from .training import anchor_rows, load_options


def subspace_request(arguments: Arguments) -> SubspaceRequest:
    """Read the rows that the flags name, and return the request. Raises UserError for sets that cannot be read."""
    flags = arguments.subspace
    rows = load_rows(flags.subspace_dataset, prompts=True) if flags.subspace_dataset else anchor_rows(arguments)
    domains = flags.subspace_domains if isinstance(flags.subspace_domains, dict) else {}
    return SubspaceRequest(
        instruct_path=arguments.model.starting_model,
        base_path=arguments.model.base_model_name_or_path,
        rows=[row.messages for row in rows],
        contrast=load_contrast(flags.subspace_contrast) if flags.subspace_contrast else None,
        domains={name: [row.messages for row in load_rows(source, prompts=True)] for name, source in domains.items()},
        method=flags.subspace_method,
        rank=flags.subspace_rank,
        layers=flags.subspace_layers,
        role=flags.subspace_positions,
        centred=flags.subspace_centred,
        seed=flags.subspace_seed,
        dtype=arguments.model.dtype or "float32",
        device=str(arguments.training.device),
        batch_size=arguments.analysis.analysis_batch_size,
        max_length=arguments.training.max_length,
        load=load_options(arguments),
    )
