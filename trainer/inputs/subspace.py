"""Load the subspace that a run reads, and check that it fits the flags and the model."""

from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ...analysis.errors import UserError
from ...analysis.models.layers import parse_layers
from ...analysis.models.load import model_fingerprint, tokenizer_fingerprint
from ...analysis.subspace.file import Subspace, random_like
from ..config.parsing import Arguments
from ..protections.kinds import kinds_of, parts_of


def subspace_path(arguments: Arguments) -> Path:
    """Return the path of the subspace's file."""
    path = Path(arguments.subspace.subspace_path or arguments.output_dir / "subspace.safetensors")
    return path.expanduser()


def whole_subspace(
    arguments: Arguments,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    role: str | None = None,
    layers: list[int] | None = None,
) -> Subspace:
    """Load the subspace as it was built, with all its layers and directions.

    Args:
        role: token role that the subspace must have; None accepts its own role.
        layers: layers that the subspace must have; None accepts its own layers.

    Raises:
        UserError: the file does not exist, or its subspace is of another model, of other blocks, or was built in
            another way than the flags say.
    """
    path = subspace_path(arguments)
    if not path.is_file():
        raise UserError(
            f"subspace {path} does not exist; name an existing file with --subspace_path, or build it: `holdfast "
            "subspace` with the same recipe"
        )
    subspace = Subspace.load(path)
    _check_layers_path(subspace, arguments)
    subspace.check(
        instruct_fingerprint=model_fingerprint(arguments.model.starting_model),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        role=role or subspace.provenance.role,
        layers=sorted(subspace.bases) if layers is None else layers,
    )
    _check_built(subspace, path, arguments, config.get_text_config().num_hidden_layers)
    return subspace


def load_subspace(
    arguments: Arguments, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> Subspace | None:
    """Return the subspace of the protection, cut to `--protection_layers` and `--protection_rank`.

    For random_subspace it is random. It is None if no part of the protection needs a subspace.

    Raises:
        UserError: as `whole_subspace`, or for layers or a rank that the subspace does not have.
    """
    flags = arguments.protection.as_read()
    kinds = [kind for kind in kinds_of(flags.protection) if kind.subspace]
    if not kinds:
        return None
    # Ablation and steering act on all tokens; --protection_tokens is then for another part, such as kl.
    role = flags.protection_tokens if any("protection_tokens" in kind.flags for kind in kinds) else None
    layers = None
    if flags.protection_layers is not None:
        layers = parse_layers(
            flags.protection_layers, config.get_text_config().num_hidden_layers, "--protection_layers"
        )
    subspace = whole_subspace(arguments, tokenizer, config, role, layers)
    subspace = subspace.restrict(layers or sorted(subspace.bases), flags.protection_rank or subspace.provenance.rank)
    if "random_subspace" in parts_of(flags.protection):
        return random_like(subspace, flags.null_seed, flags.null_scale)
    return subspace


def _check_built(subspace: Subspace, path: Path, arguments: Arguments, depth: int) -> None:
    """Raise UserError if a flag that was given differs from how the subspace was built."""
    facts = subspace.provenance
    built_with = {
        "subspace_method": facts.method, "subspace_rank": facts.rank, "subspace_layers": list(facts.layers),
        "subspace_positions": facts.role, "subspace_centred": facts.centred, "subspace_seed": facts.seed,
    }  # fmt: skip
    for flag, built in built_with.items():
        value = arguments.given[flag]
        wanted = parse_layers(value, depth, f"--{flag}") if value and flag == "subspace_layers" else value
        if value is not None and wanted != built:
            raise UserError(
                f"--{flag} is {value}, but the subspace {path} was built with {built}; leave the flag out, or name "
                "another subspace with --subspace_path"
            )


def _check_layers_path(subspace: Subspace, arguments: Arguments) -> None:
    """Raise UserError if the subspace was read at other decoder blocks than this run's."""
    built, current = subspace.provenance.layers_path, arguments.model.layers_path
    if built != current:
        raise UserError(
            f"the subspace was built with layers_path {built or 'found by shape'} but this run has "
            f"{current or 'none given'}: write the same --layers_path, or build the subspace again"
        )
