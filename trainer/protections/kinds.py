"""Every protection by its name: what it is, what it needs, and the flags that it reads.

`trainer.inputs.protection` makes a protection from the flags. Several names joined by + act together:
`protection: steering+interleave`.
"""

import difflib
from dataclasses import dataclass

from ...analysis.errors import UserError


@dataclass(frozen=True)
class Kind:
    """One protection: what it is in a phrase, and what it needs.

    Attributes:
        subspace: an alignment subspace.
        drift: it is a term that compares with the starting model, on task rows or anchors. own_rows: but it reads
            neither task rows nor anchors.
        anchors: it reads the anchors whatever `penalty_inputs` says. answers: and their answers, unless
            `safe_gradient_loss` is a divergence.
        base: the base model.
        lora: low-rank adapters.
        flags: the flags that it reads; it is made with the defaults of all others.
    """

    what: str
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
        """Whether it is a term that `penalty_strength` weighs."""
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
    "random_subspace": Kind("the same in a random subspace, the null", subspace=True, drift=True,
        flags=(*_TERM, *_ROWS, *_SIDE, *_BASIS, "null_seed", "null_scale"),
    ),
    "kl": Kind("KL divergence to the starting model", drift=True, flags=(*_TERM, *_ROWS)),
    "feature_l2": Kind("drift of the whole stream behind every fifth block (LDIFS)", drift=True,
        flags=(*_TERM, *_ROWS, "protection_layers"),
    ),
    "interleave": Kind("safe rows mixed into the training rows",
        flags=("interleave_dataset", "interleave_share"),
    ),
    "inoculation": Kind("a system prompt in training that asks for the behaviour",
        flags=("inoculation_prompt",),
    ),
    "ablation": Kind("the subspace removed from the stream while training (CAFT)", subspace=True, flags=_BASIS
    ),
    "steering": Kind("a step away from alignment added while training (preventative)", subspace=True,
        flags=(*_BASIS, "steering_alpha"),
    ),
    "gradient_projection": Kind("what goes against the anchors taken out of each step's gradient (SafeGrad)",
        anchors=True, answers=True,
        flags=("safe_gradient_weight", "safe_gradient_loss", "anchor_batch_size", "anchor_every"),
    ),
    "null_space": Kind("LoRA kept away from the anchors' principal inputs to each module", anchors=True, lora=True,
        flags=("null_space_energy", "protection_tokens", "anchor_batch_size"),
    ),
    "adapter_drift": Kind("penalty on adapters outside of what alignment changed in the weights (AsFT)", base=True,
        lora=True, flags=("penalty_strength", "alignment_rank"),
    ),
    "safe_lora": Kind("adapters projected onto what alignment changed, after training (SafeLoRA)", base=True, lora=True,
        flags=("safe_lora_threshold", "alignment_rank"),
    ),
    "extrapolate": Kind("a start further from base than the starting model (LoX)", base=True,
        flags=("extrapolate_alpha", "alignment_rank"),
    ),
    "prefix_anchor": Kind("drift of the template prefix's keys and values (TReFT)", drift=True, own_rows=True,
        flags=(*_TERM, "protection_layers"),
    ),
    "early_stop": Kind("training ended where the anchors' drift in the subspace passes a limit", subspace=True,
        anchors=True,
        flags=(
            "early_stop_limit", "early_stop_every", *_SIDE, *_BASIS, "protection_tokens", "reference",
            "anchor_batch_size",
        ),
    ),
}  # fmt: skip


def parts_of(name: str) -> list[str]:
    """The protections that a name stands for: "steering+interleave" -> both.

    Raises:
        UserError: an unknown name, one that stands twice, or protections that cannot act together.
    """
    parts = name.split("+")
    for part in parts:
        if part not in KINDS:
            near = difflib.get_close_matches(part, KINDS, n=1, cutoff=0.0)[0]
            raise UserError(f"--protection {part!r} is unknown; the nearest is {near} of {', '.join(KINDS)}")
    together = [part for part in parts if part != "none"] if len(parts) > 1 else parts
    terms = [part for part in together if KINDS[part].weighted]
    if len(set(parts)) < len(parts) or len(together) < len(parts):
        raise UserError(f"--protection {name} names one twice, or none beside others; name each once")
    if len(terms) > 1:
        raise UserError(f"--protection {name}: {' and '.join(terms)} share the flags penalty_*; choose one of them")
    if "random_subspace" in parts and sum(KINDS[part].subspace for part in parts) > 1:
        raise UserError(f"--protection {name}: random_subspace takes the place of the subspace; leave the other out")
    return parts


def kinds_of(name: str) -> list[Kind]:
    """What the protections of a name need. Raises UserError as `parts_of`."""
    return [KINDS[part] for part in parts_of(name)]


def flags_read_by(name: str) -> set[str]:
    """The flags that a part of the protection reads. Raises UserError as `parts_of`."""
    return {knob for kind in kinds_of(name) for knob in kind.flags}
