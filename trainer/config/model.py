"""Flags of the model: the starting model, its base model, and LoRA. TRL's `ModelConfig` flags are among them."""

from dataclasses import dataclass

import trl

from ...analysis.errors import UserError
from ...analysis.flags import mapping, option, require
from .refused import QUANTIZATION, refuse_overridden


def _pattern(flag: str, value: dict[str, int] | str | None) -> dict[str, int] | None:
    """Read a mapping from a pattern of module names to an integer, given as a mapping or as JSON text."""
    example = '{"layers.0.self_attn.v_proj": 8}'
    pattern = mapping(flag, value, example)
    if pattern is None:
        return None
    if not isinstance(pattern, dict) or not all(isinstance(number, int) and number > 0 for number in pattern.values()):
        raise UserError(f"--{flag} must map module names to positive integers, like {example}")
    return pattern


@dataclass
class ModelArguments(trl.ModelConfig):
    """The starting (instruct) model, its optional base model, and LoRA."""

    _argument_group_name = "model"

    base_model_name_or_path: str | None = option(
        None,
        "Folder or Hub name of the base model that the starting model was aligned from. Needed by the subspace methods "
        "difference_in_means, svd and shared, by --penalty_side reversion, by the protections extrapolate, "
        "adapter_drift and safe_lora, and by the measures that compare with base. Default: none.",
    )
    layers_path: str | None = option(
        None,
        "Dotted path of the decoder blocks in the model, for a model whose blocks cannot be found by their shape. "
        "Default: found by shape.",
    )
    lora_alpha_pattern: dict[str, int] | str | None = option(
        None,
        "LoRA alpha of the modules whose name matches a pattern (mapping or JSON), in place of --lora_alpha. "
        "Default: none.",
    )
    lora_rank_pattern: dict[str, int] | str | None = option(
        None,
        "LoRA rank of the modules whose name matches a pattern (mapping or JSON), in place of --lora_r. Default: none.",
    )

    def __post_init__(self) -> None:
        refuse_overridden(self, trl.ModelConfig, QUANTIZATION)
        super().__post_init__()
        # TRL unwraps a list of one, and PEFT takes text for a regular expression.
        if isinstance(self.lora_target_modules, str) and self.lora_target_modules != "all-linear":
            self.lora_target_modules = [self.lora_target_modules]
        require(self.lora_r >= 1, "lora_r", self.lora_r, "at least 1")
        self.lora_alpha_pattern = _pattern("lora_alpha_pattern", self.lora_alpha_pattern)
        self.lora_rank_pattern = _pattern("lora_rank_pattern", self.lora_rank_pattern)

    @property
    def starting_model(self) -> str:
        """Return the folder or Hub name of the starting model, with its revision as `analysis.models.load` reads it."""
        name = str(self.model_name_or_path)
        return name if self.model_revision == "main" else f"{name}@{self.model_revision}"
