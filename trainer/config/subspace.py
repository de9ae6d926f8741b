"""Flags of the alignment subspace: how it is built and where it lies."""

from dataclasses import dataclass
from typing import Any

from ...analysis.errors import UserError
from ...analysis.flags import option, require, require_seed, sources
from ...analysis.models.render import ROLES
from ...analysis.subspace.methods import METHODS

# How the subspace is built where nothing is said.
BUILT: dict[str, Any] = {
    "subspace_method": "contrastive", "subspace_rank": 1, "subspace_layers": "all", "subspace_positions": "all",
    "subspace_centred": False, "subspace_seed": 0,
}  # fmt: skip


@dataclass
class SubspaceArguments:
    """How the alignment subspace is built (`holdfast subspace`) and where it lies.

    What is not given is None among the flat values: a subspace that is there may have been built in any way.
    """

    _argument_group_name = "subspace"

    subspace_path: str | None = option(
        None, "Where subspace writes and train reads the subspace. Default: <output_dir>/subspace.safetensors."
    )
    subspace_method: str = option(
        None,
        "contrastive needs only the starting model; difference_in_means, svd and shared need the base too; random is "
        "the null. Default: contrastive.",
        *METHODS,
    )
    subspace_rank: int = option(None, "Directions per layer. Default: 1.")
    subspace_layers: str = option(None, "Decoder blocks from 0: all, a list (0,2,5) or a range (4-10). Default: all.")
    subspace_positions: str = option(None, "Token role the activations are read at. Default: all.", *ROLES)
    subspace_dataset: str | None = option(None, "Rows the activations are read on. Default: the anchors.")
    subspace_contrast: str | None = option(
        None,
        "JSON Lines of contrast pairs: system prompts {aligned, misaligned}, or completions {prompt, chosen, "
        "rejected}. Default: the pairs that ship with Holdfast.",
    )
    subspace_domains: dict[str, str] | str | None = option(
        None, "For shared: domain name -> source of rows (mapping or JSON). Default: none."
    )
    subspace_centred: bool = option(
        None, "For svd: subtract the mean residual first, as the paper did. Default: false."
    )
    subspace_seed: int = option(None, "Seed of the random method. Default: 0.")

    def __post_init__(self) -> None:
        for name, usual in BUILT.items():
            if getattr(self, name) is None:
                setattr(self, name, usual)
        require_seed(self.subspace_seed, "subspace_seed")
        require(self.subspace_rank >= 1, "subspace_rank", self.subspace_rank, "at least 1")
        self.subspace_domains = sources("subspace_domains", self.subspace_domains)
        if self.subspace_method == "shared" and not self.subspace_domains:
            raise UserError(
                "--subspace_method shared needs --subspace_domains: a mapping of at least two domains to rows"
            )
