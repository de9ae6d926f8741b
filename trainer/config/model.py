"""Flags of the model: the starting model, its base model, and LoRA."""

from dataclasses import dataclass

import trl

from ...analysis.errors import UserError
from ...analysis.flags import mapping, option, require
from .refused import QUANTIZATION, refuse_overridden


def _pattern(flag: str, value: dict[str, int] | str | None) -> dict[str, int] | None:
    """Reads a module-name pattern -> integer mapping, given as a mapping or as JSON text."""
    example = '{"layers.0.self_attn.v_proj": 8}'
    found = mapping(flag, value, example)
    if found is None:
        return None
    if not isinstance(found, dict) or not all(isinstance(number, int) and number > 0 for number in found.values()):
        raise UserError(f"--{flag} must map module names to positive integers, like {example}")
    return found


@dataclass
class ModelArguments(trl.ModelConfig):
    """The starting (instruct) model, its optional base, and LoRA."""

    _argument_group_name = "model"

    base_model_name_or_path: str | None = option(
        None,
        "Folder or Hub name of the base model the starting model was aligned from. Needed only by the subspace methods "
        "difference_in_means, svd and shared, and by the measures that compare with base. Default: none.",
    )
    layers_path: str | None = option(
        None, "Dotted path of the decoder blocks, where they are not found by shape. Default: found by shape."
    )
    lora_alpha_pattern: dict[str, int] | str | None = option(
        None, "LoRA alpha by module-name pattern (mapping or JSON), over --lora_alpha. Default: none."
    )
    lora_rank_pattern: dict[str, int] | str | None = option(
        None, "LoRA rank by module-name pattern (mapping or JSON), over --lora_r. Default: none."
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
        """Folder or Hub name of the model to start from, with its revision as `analysis.models` reads it."""
        name = str(self.model_name_or_path)
        return name if self.model_revision == "main" else f"{name}@{self.model_revision}"
