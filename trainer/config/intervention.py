"""The flags of `holdfast intervene`."""

import math
from dataclasses import dataclass, field

from ...analysis.errors import UserError
from ...analysis.flags import option, require
from ...analysis.metrics.causal import MARGIN

INTERVENTIONS = ("ablate", "steer", "patch")


def _doses(default: tuple[float, ...], text: str) -> list[float]:
    doses: list[float] = field(default_factory=lambda: list(default), metadata={"help": text})
    return doses


@dataclass
class InterventionArguments:
    """Which interventions test the subspace in the starting model, at which doses, and how many random directions."""

    _argument_group_name = "intervene"

    interventions: list[str] = field(
        default_factory=lambda: list(INTERVENTIONS),
        metadata={
            "help": "What is done to the starting model. ablate: remove the subspace. steer: move along the contrast's "
            "mean step inside it. patch: put in base's coordinates, which needs the base model. "
            f"Default: {' '.join(INTERVENTIONS)}.",
            "choices": list(INTERVENTIONS),
        },
    )
    ablation_doses: list[float] = _doses(
        (0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
        "Shares of the component inside the subspace that ablation removes. The list must contain 1. "
        "Default: 0.25 0.5 0.75 1 1.5 2.",
    )
    steering_doses: list[float] = _doses(
        (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0),
        "Lengths of the steering step away from alignment, in units of the contrast's mean step; negative doses go "
        "toward alignment. The list must contain 1. Default: -2 -1 -0.5 0.5 1 2.",
    )
    intervention_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Layers that are steered, one at a time. Default: the middle layer of the subspace."},
    )
    intervention_draws: int = option(
        20, "Number of random directions that are tested beside every dose, at least 2. Default: 20."
    )
    intervention_directions: int = option(
        1, "How many first directions of the subspace are tested alone, beside the whole subspace. Default: 1."
    )
    intervention_rows: int | None = option(
        None, "Number of prompts of --choices_dataset that are read, evenly spread over the set. Default: all."
    )
    intervention_class: str = option("misaligned", "Class of answers that the verdict is about. Default: misaligned.")
    causal_margin: float = option(
        MARGIN, f"Largest change of a probability that does not matter to the verdict. Default: {MARGIN}."
    )

    def __post_init__(self) -> None:
        require(self.intervention_draws >= 2, "intervention_draws", self.intervention_draws, "at least 2")
        require(self.intervention_directions >= 0, "intervention_directions", self.intervention_directions, "0 or more")
        require(
            self.intervention_rows is None or self.intervention_rows >= 1,
            "intervention_rows", self.intervention_rows, "at least 1",
        )  # fmt: skip
        require(self.causal_margin > 0, "causal_margin", self.causal_margin, "more than 0")
        require(bool(self.interventions), "interventions", self.interventions, f"some of {', '.join(INTERVENTIONS)}")
        for flag in ("ablation_doses", "steering_doses"):
            doses = getattr(self, flag)
            non_finite = [dose for dose in doses if not math.isfinite(dose)]
            if non_finite:
                raise UserError(f"--{flag} has {non_finite[0]}, which is no dose; write finite numbers")
            require(1.0 in doses, flag, " ".join(map(str, doses)), "a list that holds 1, where the verdict is read")
