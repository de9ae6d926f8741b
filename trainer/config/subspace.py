"""Flags of the alignment subspace: how it is built, and the path of its file."""

from dataclasses import dataclass
from typing import Any

from ...analysis.errors import UserError
from ...analysis.flags import option, require, require_seed, sources
from ...analysis.models.render import ROLES
from ...analysis.subspace.methods import METHODS

# Defaults for building a subspace. The fields are None until `__post_init__`, so that a given flag can be told apart.
BUILD_DEFAULTS: dict[str, Any] = {
    "subspace_method": "contrastive", "subspace_rank": 1, "subspace_layers": "all", "subspace_positions": "all",
    "subspace_centred": False, "subspace_seed": 0,
}  # fmt: skip


@dataclass
class SubspaceArguments:
    """How `holdfast subspace` builds the alignment subspace, and the path of its file.

    A flag that is not given is None among the flat values (`Arguments.given`): an existing subspace may then have been
    built in any way. A flag that is given must agree with the existing subspace.
    """

    _argument_group_name = "subspace"

    subspace_path: str | None = option(
        None,
        "File of the subspace, which the command subspace writes and the others read. "
        "Default: <output_dir>/subspace.safetensors.",
    )
    subspace_method: str = option(
        None,
        "How the subspace is found. contrastive needs only the starting model; difference_in_means, svd and shared "
        "need the base model too; random is the null. Default: contrastive.",
        *METHODS,
    )
    subspace_rank: int = option(None, "Directions per layer. Default: 1.")
    subspace_layers: str = option(
        None, "Decoder blocks, counted from 0: all, a list (0,2,5) or a range (4-10). Default: all."
    )
    subspace_positions: str = option(None, "Role of the tokens at which activations are read. Default: all.", *ROLES)
    subspace_dataset: str | None = option(None, "Rows on which activations are read. Default: the anchors.")
    subspace_contrast: str | None = option(
        None,
        "JSON Lines of contrast pairs: system prompts {aligned, misaligned}, or completions {prompt, chosen, "
        "rejected}. Default: the pairs that ship with Holdfast.",
    )
    subspace_domains: dict[str, str] | str | None = option(
        None,
        "Domains of --subspace_method shared, at least two: a mapping (or JSON) from a domain's name to a source of "
        "rows. Default: none.",
    )
    subspace_centred: bool = option(
        None,
        "With --subspace_method svd: subtract the mean residual first, as arXiv 2507.03662 does. Default: false.",
    )
    subspace_seed: int = option(None, "Seed of --subspace_method random. Default: 0.")

    def __post_init__(self) -> None:
        for name, default in BUILD_DEFAULTS.items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        require_seed(self.subspace_seed, "subspace_seed")
        require(self.subspace_rank >= 1, "subspace_rank", self.subspace_rank, "at least 1")
        self.subspace_domains = sources("subspace_domains", self.subspace_domains)
        if self.subspace_method == "shared" and not self.subspace_domains:
            raise UserError(
                "--subspace_method shared needs --subspace_domains: a mapping of at least two domains to rows"
            )
