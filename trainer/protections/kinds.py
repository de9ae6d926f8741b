"""The table of all protections: a description of each, what it needs, and the flags that it reads.

`trainer/inputs/protection.py` makes the protections from the flags. Names joined by + act together:
`protection: steering+interleave`. A new protection needs one line in `KINDS`; see the README in this folder.
"""

import difflib
from dataclasses import dataclass

from ...analysis.errors import UserError


@dataclass(frozen=True)
class Kind:
    """What one protection is and what it needs.

    Attributes:
        description: a phrase for the help of `--protection`.
        subspace: it needs an alignment subspace.
        drift: it penalises distance from the starting model, on task rows or anchors.
        own_rows: it builds its own inputs, so it reads neither task rows nor anchors.
        anchors: it reads the anchors whatever `penalty_inputs` is.
        answers: it also reads the answers of the anchors, unless `safe_gradient_loss` is a divergence.
        base: it needs the base model.
        lora: it needs low-rank adapters.
        flags: the flags that it reads. All other flags have their defaults when it is made.
    """

    description: str
    subspace: bool = False
    drift: bool = False
    own_rows: bool = False
    anchors: bool = False
    answers: bool = False
    base: bool = False
    lora: bool = False
    flags: tuple[str, ...] = ()

    @property
    def weighted(self) -> bool:
        """Whether it adds a term to the loss that `penalty_strength` weights."""
        return "penalty_strength" in self.flags


_TERM = (
    "penalty_strength", "penalty_budget", "penalty_warmup", "penalty_warmup_strength", "reference", "anchor_every"
)  # fmt: skip
_ROWS = ("penalty_inputs", "penalty_task_weight", "protection_tokens", "anchor_batch_size")
_SIDE = ("penalty_side", "penalty_margin")
_BASIS = ("protection_rank", "protection_layers")

KINDS: dict[str, Kind] = {
    "none": Kind("plain SFT"),
    "subspace": Kind("penalty on drift in the alignment subspace", subspace=True, drift=True,
        flags=(*_TERM, *_ROWS, *_SIDE, *_BASIS),
    ),
    "random_subspace": Kind("the same penalty in a random subspace, the null", subspace=True, drift=True,
        flags=(*_TERM, *_ROWS, *_SIDE, *_BASIS, "null_seed", "null_scale"),
    ),
    "kl": Kind("penalty on the KL divergence from the starting model", drift=True, flags=(*_TERM, *_ROWS)),
    "feature_l2": Kind("penalty on drift of the whole residual stream after every fifth block (LDIFS)", drift=True,
        flags=(*_TERM, *_ROWS, "protection_layers"),
    ),
    "interleave": Kind("safe rows mixed into the training rows",
        flags=("interleave_dataset", "interleave_share"),
    ),
    "inoculation": Kind("a system prompt, in training only, that asks for the behaviour of the rows",
        flags=("inoculation_prompt",),
    ),
    "ablation": Kind("the subspace removed from the residual stream during training (CAFT)", subspace=True,
        flags=_BASIS,
    ),
    "steering": Kind("a step away from alignment added to the residual stream during training (preventative)",
        subspace=True, flags=(*_BASIS, "steering_alpha"),
    ),
    "gradient_projection": Kind("the part of each step's gradient that raises the anchors' loss removed (SafeGrad)",
        anchors=True, answers=True,
        flags=("safe_gradient_weight", "safe_gradient_loss", "anchor_batch_size", "anchor_every"),
    ),
    "null_space": Kind("LoRA kept out of the principal inputs that the anchors give to each module", anchors=True,
        lora=True, flags=("null_space_energy", "protection_tokens", "anchor_batch_size"),
    ),
    "adapter_drift": Kind("penalty on the part of adapters outside the weight changes of alignment (AsFT)", base=True,
        lora=True, flags=("penalty_strength", "alignment_rank"),
    ),
    "safe_lora": Kind("adapters projected, after training, onto the weight changes of alignment (SafeLoRA)", base=True,
        lora=True,
        flags=("safe_lora_threshold", "alignment_rank"),
    ),
    "extrapolate": Kind("training starts from weights further away from base (LoX)", base=True,
        flags=("extrapolate_alpha", "alignment_rank"),
    ),
    "prefix_anchor": Kind("penalty on changes of the keys and values of the template's prefix (TReFT)", drift=True,
        own_rows=True, flags=(*_TERM, "protection_layers"),
    ),
    "early_stop": Kind("training ends when the anchors' drift in the subspace passes a limit", subspace=True,
        anchors=True,
        flags=(
            "early_stop_limit", "early_stop_every", *_SIDE, *_BASIS, "protection_tokens", "reference",
            "anchor_batch_size",
        ),
    ),
}  # fmt: skip


def parts_of(name: str) -> list[str]:
    """Split a name at its + signs: "steering+interleave" -> ["steering", "interleave"].

    Raises:
        UserError: a name that is unknown or stands twice, or protections that cannot act together.
    """
    parts = name.split("+")
    for part in parts:
        if part not in KINDS:
            near = difflib.get_close_matches(part, KINDS, n=1, cutoff=0.0)[0]
            raise UserError(f"--protection {part!r} is unknown; the nearest is {near} of {', '.join(KINDS)}")
    together = [part for part in parts if part != "none"] if len(parts) > 1 else parts
    terms = [part for part in together if KINDS[part].weighted]
    if len(set(parts)) < len(parts) or len(together) < len(parts):
        raise UserError(f"--protection {name} names a protection twice, or none beside others; name each once")
    if len(terms) > 1:
        raise UserError(f"--protection {name}: {' and '.join(terms)} share the flags penalty_*; choose one of them")
    if "random_subspace" in parts and sum(KINDS[part].subspace for part in parts) > 1:
        raise UserError(f"--protection {name}: random_subspace takes the place of the subspace; leave the other out")
    return parts


def kinds_of(name: str) -> list[Kind]:
    """Return the kinds of the protections in a name. Raises UserError as `parts_of` does."""
    return [KINDS[part] for part in parts_of(name)]


def flags_read_by(name: str) -> set[str]:
    """Return the flags that any part of the protection reads. Raises UserError as `parts_of` does."""
    return {flag for kind in kinds_of(name) for flag in kind.flags}
