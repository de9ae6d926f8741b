"""Family 8, causal (METRICS.md): what a model says while a direction is ablated or added, and while random ones are.

No training: the starting model answers enumerated prompts (`metrics.choices`) at every dose. Beside each dose stand
random directions that move every token as far, so that a drop in coherence is not taken for a cause. All masses are
kept in a folder as they are read; an interrupted test goes on where it stopped.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .artifacts import write_json_atomic
from .hooks import patch
from .intervention_changes import Ablation, ByLayer, Change, Steering
from .intervention_proof import prove
from .metrics.choices import PreparedChoices, score_prepared
from .positions import ForwardPass
from .references import sha256_json
from .subspace_methods import random_basis

ABLATE, STEER = "ablate", "steer"
Masses = list[dict[str, float]]


@dataclass(frozen=True)
class Displacement:
    """The null of an ablation: the component inside V_l is counted, and as much is taken away along random U_l.

    h - dose U Vᵀh: every token moves as far as the ablation moves it, in directions that mean nothing.
    """

    bases: ByLayer
    random: ByLayer
    dose: float

    def apply(self, layer: int, hidden: Tensor, now: ForwardPass | None) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            fine = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            moved = (fine @ self.bases.at(layer, hidden)) @ self.random.at(layer, hidden).T
            return (fine - self.dose * moved).to(hidden.dtype)


@dataclass(frozen=True)
class Candidate:
    """A direction, or a whole subspace, put to the test.

    kind: ablate (vectors are orthonormal [d, k]) or steer (one vector [d, 1], at the length that a dose of 1 adds).
    """

    name: str
    kind: str
    vectors: dict[int, Tensor]

    def change(self, dose: float) -> Change:
        """What is done to the stream at a dose."""
        if self.kind == ABLATE:
            return Ablation(ByLayer(self.vectors), dose, None)
        return Steering(ByLayer({layer: vector[:, 0] for layer, vector in self.vectors.items()}), dose, "absolute")

    def null(self, dose: float, draw: int) -> "Displacement | Steering":
        """The same step of every token in a random direction; one draw has the same directions at every dose."""
        drawn = {
            layer: random_basis(vectors.shape[0], vectors.shape[1], draw, layer).to(torch.float32)
            for layer, vectors in self.vectors.items()
        }
        if self.kind == ABLATE:
            return Displacement(ByLayer(self.vectors), ByLayer(drawn), dose)
        steps = {layer: drawn[layer][:, 0] * vectors[:, 0].norm() for layer, vectors in self.vectors.items()}
        return Steering(ByLayer(steps), dose, "absolute")


@dataclass(frozen=True)
class DoseCurve:
    """Class masses of every prompt: clean, at each dose, and at each dose under each random draw."""

    tested: Candidate
    doses: tuple[float, ...]
    clean: Masses
    treated: list[Masses]
    drawn: list[list[Masses]]


class CausalTest:
    """Reads masses of one model on one set of prompts.

    Args:
        prepared: the prompts and their classes.
        facts: what the masses depend on (weights, prompts, precision), for the names of the kept files.
        folder: where they are kept; None keeps nothing.
    """

    def __init__(
        self, model: nn.Module, prepared: PreparedChoices, facts: Sequence[str] = (), folder: Path | None = None, *,
        batch_size: int = 256, layers_path: str | None = None,
    ) -> None:  # fmt: skip
        self.model, self.prepared, self.facts, self.folder = model, prepared, facts, folder
        self.batch_size, self.layers_path = batch_size, layers_path
        self._clean: Masses | None = None

    def curve(self, tested: Candidate, doses: Sequence[float], draws: int) -> DoseCurve:
        """All masses of one test.

        Raises:
            UserError: layers or widths that do not fit, or an intervention that does not take hold.
        """
        prove(self.model, tested.change(1.0), sorted(tested.vectors), self.layers_path)
        if self._clean is None:
            self._clean = self._masses(["clean"], None, [])
        treated: list[Masses] = []
        drawn: list[list[Masses]] = []
        with tqdm(total=len(doses) * (draws + 1), desc=f"{tested.kind} {tested.name}", delay=5, leave=False) as bar:
            for dose in doses:
                treated.append(self._at(tested, dose, None))
                bar.update()
                drawn.append([])
                for draw in range(draws):
                    drawn[-1].append(self._at(tested, dose, draw))
                    bar.update()
        return DoseCurve(tested, tuple(doses), self._clean, treated, drawn)

    def _at(self, tested: Candidate, dose: float, draw: int | None) -> Masses:
        change = tested.change(dose) if draw is None else tested.null(dose, draw)
        facts = [tested.kind, digest(tested.vectors), repr(float(dose)), "" if draw is None else str(draw)]
        return self._masses(facts, change, sorted(tested.vectors))

    def _masses(self, facts: list[str], change: "Change | Displacement | None", layers: list[int]) -> Masses:
        path = None if self.folder is None else self.folder / f"{sha256_json([*self.facts, *facts])[:24]}.json"
        if path is not None and path.is_file():
            kept: Masses = json.loads(path.read_text())
            return kept
        if change is None:
            found = score_prepared(self.model, self.prepared, self.batch_size)
        else:
            with patch(self.model, layers, lambda at, hidden: change.apply(at, hidden, None), self.layers_path):
                found = score_prepared(self.model, self.prepared, self.batch_size)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(path, found)
        return found


def digest(vectors: dict[int, Tensor]) -> str:
    """Of vectors by layer."""
    return sha256_json([[layer, vectors[layer].double().tolist()] for layer in sorted(vectors)])
