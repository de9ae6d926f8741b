"""The subspace that a run reads: where it lies, and whether it is the one that the flags and the model speak of."""

from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ...analysis.errors import UserError
from ...analysis.models.layers import parse_layers
from ...analysis.models.load import model_fingerprint, tokenizer_fingerprint
from ...analysis.subspace.file import Subspace, random_like
from ..config.parsing import Arguments
from ..protections.kinds import kinds_of, parts_of


def subspace_path(arguments: Arguments) -> Path:
    """Where the subspace is written and read."""
    path = Path(arguments.subspace.subspace_path or arguments.output_dir / "subspace.safetensors")
    return path.expanduser()


def whole_subspace(
    arguments: Arguments,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    role: str | None = None,
    layers: list[int] | None = None,
) -> Subspace:
    """The subspace that is there, as it was built.

    Args:
        role, layers: which it must have; None: its own.

    Raises:
        UserError: there is none, or one of another model, of other blocks, or built in another way than the flags say.
    """
    path = subspace_path(arguments)
    if not path.is_file():
        raise UserError(
            f"subspace {path} does not exist; name the one you have with --subspace_path, or build one: `holdfast "
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
    """The subspace of the penalty, cut to the layers and rank asked for. Raises UserError as `whole_subspace`."""
    asked = arguments.protection.as_read()
    kinds = [kind for kind in kinds_of(asked.protection) if kind.subspace]
    if not kinds:
        return None
    # Ablation and steering act on all tokens: a role is then that of another part, such as kl.
    role = asked.protection_tokens if any("protection_tokens" in kind.flags for kind in kinds) else None
    layers = None
    if asked.protection_layers is not None:
        layers = parse_layers(
            asked.protection_layers, config.get_text_config().num_hidden_layers, "--protection_layers"
        )
    subspace = whole_subspace(arguments, tokenizer, config, role, layers)
    subspace = subspace.restrict(layers or sorted(subspace.bases), asked.protection_rank or subspace.provenance.rank)
    if "random_subspace" in parts_of(asked.protection):
        return random_like(subspace, asked.null_seed, asked.null_scale)
    return subspace


def _check_built(subspace: Subspace, path: Path, arguments: Arguments, depth: int) -> None:
    """Raises UserError where the flags say that the subspace was built in another way than it was."""
    facts = subspace.provenance
    built = {
        "subspace_method": facts.method, "subspace_rank": facts.rank, "subspace_layers": list(facts.layers),
        "subspace_positions": facts.role, "subspace_centred": facts.centred, "subspace_seed": facts.seed,
    }  # fmt: skip
    for flag, there in built.items():
        asked = arguments.given[flag]
        wanted = parse_layers(asked, depth, f"--{flag}") if asked and flag == "subspace_layers" else asked
        if asked is not None and wanted != there:
            raise UserError(
                f"--{flag} is {asked}, and the subspace {path} was built with {there}; leave the flag out, or name "
                "another one with --subspace_path"
            )


def _check_layers_path(subspace: Subspace, arguments: Arguments) -> None:
    """Raises UserError where the subspace was read at other blocks than this run's."""
    built, given = subspace.provenance.layers_path, arguments.model.layers_path
    if built != given:
        raise UserError(
            f"the subspace was built with layers_path {built or 'found by shape'} but this run has "
            f"{given or 'none given'}: write the same, or build the subspace again"
        )
