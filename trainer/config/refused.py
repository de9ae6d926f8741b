"""TRL's flags that would have no effect in a run of Holdfast. They are refused, since such a flag misleads."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...analysis.errors import UserError

_FULL_PRECISION = (
    "quantised weights are not supported (the penalty compares the model with the starting model exactly); write "
    "--dtype bfloat16 --use_peft true to save memory, or --deepspeed zero3"
)
_OWN_FLAGS = (
    "the model is loaded by --dtype, --attn_implementation, --model_revision and --trust_remote_code; write those"
)
_RENDERED = "rows are rendered once, by the tokenizer's own chat template; save the tokenizer with your template"

# From each flag to the reason that it has no effect and what to write instead.
QUANTIZATION = dict.fromkeys(
    ("load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
    _FULL_PRECISION,
)
NOT_READ = {
    "model_init_kwargs": _OWN_FLAGS,
    "chat_template_path": _RENDERED,
    "dataset_text_field": "rows are conversations (`messages`) or prompt and completion; rewrite them so",
    "dataset_kwargs": "rows are tokenised before TRL sees them; leave it out",
    "truncation_mode": "a long row can only be cut at its end; write --long_rows truncate, or drop",
    "assistant_only_loss": "--completion_only_loss covers every assistant turn; write that",
}


def refuse_overridden(arguments: Any, defaults: type, reasons: Mapping[str, str]) -> None:
    """Raise UserError for the first flag of `reasons` whose value is not TRL's default.

    Args:
        defaults: TRL's dataclass, which holds the defaults.
    """
    default_of = {field.name: field.default for field in dataclasses.fields(defaults)}
    for flag, reason in reasons.items():
        if getattr(arguments, flag) != default_of[flag]:
            raise UserError(f"--{flag}: {reason}")
