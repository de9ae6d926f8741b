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

from ..files.artifacts import sha256_json, write_json_atomic
from ..metrics.choices import PreparedChoices, score_prepared
from ..models.hooks import patch
from ..subspace.methods import random_basis
from .changes import Ablation, ByLayer, Change, Steering
from .positions import ForwardPass
from .proof import prove

ABLATE, STEER = "ablate", "steer"
# Part of the names of kept masses: raised when a random direction's step is made in another way.
_STEPS = "steps 2"
Masses = list[dict[str, float]]


class RecordingAblation:
    """An ablation that keeps the coordinates it took away: per layer, one tensor [B, T, k] for each pass of the model.

    At layer l they are those of the stream as the lower layers' ablation left it.
    """

    def __init__(self, bases: ByLayer, dose: float) -> None:
        self.bases, self.ablation = bases, Ablation(bases, dose, None)
        self.taken: dict[int, list[Tensor]] = {}

    def apply(self, layer: int, hidden: Tensor, now: ForwardPass | None) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            fine = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            self.taken.setdefault(layer, []).append((fine @ self.bases.at(layer, hidden)).cpu())
        return self.ablation.apply(layer, hidden, now)


class Displacement:
    """The null of an ablation: at every layer each token moves as far as the ablation moved it, along random U_l.

    h - dose U c, c being what the ablation took away there (`RecordingAblation`) in the same passes, in the same order.
    """

    def __init__(self, taken: dict[int, list[Tensor]], random: ByLayer, dose: float) -> None:
        self.taken, self.random, self.dose = taken, random, dose
        self._passes = dict.fromkeys(taken, 0)

    def apply(self, layer: int, hidden: Tensor, now: ForwardPass | None) -> Tensor:
        taken = self.taken[layer][self._passes[layer]]
        self._passes[layer] += 1
        with torch.autocast(hidden.device.type, enabled=False):
            fine = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            step = taken.to(fine.device, fine.dtype) @ self.random.at(layer, hidden).T
            return (fine - self.dose * step).to(hidden.dtype)


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

    def null(self, dose: float, draw: int, taken: dict[int, list[Tensor]]) -> "Displacement | Steering":
        """The same step of every token in a random direction; one draw has the same directions at every dose.

        Args:
            taken: what the ablation took away at this dose (`RecordingAblation`); of no use to a steering.
        """
        drawn = {
            layer: random_basis(vectors.shape[0], vectors.shape[1], draw, layer).to(torch.float32)
            for layer, vectors in self.vectors.items()
        }
        if self.kind == ABLATE:
            return Displacement(taken, ByLayer(drawn), dose)
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
                found = self._at(tested, dose, draws, bar)
                treated.append(found[0])
                drawn.append(found[1:])
        return DoseCurve(tested, tuple(doses), self._clean, treated, drawn)

    def _at(self, tested: Candidate, dose: float, draws: int, bar: tqdm) -> list[Masses]:
        """Masses under the candidate, then under each random draw."""
        facts = [_STEPS, tested.kind, digest(tested.vectors), repr(float(dose))]
        layers, recorded = sorted(tested.vectors), RecordingAblation(ByLayer(tested.vectors), dose)
        # What the ablation takes away is kept in memory alone: a draw that is missing on disk needs it again.
        absent = any(self._kept([*facts, str(draw)]) is None for draw in range(draws))
        change = recorded if tested.kind == ABLATE else tested.change(dose)
        found = [self._masses([*facts, ""], change, layers, anew=absent and tested.kind == ABLATE)]
        bar.update()
        for draw in range(draws):
            found.append(self._masses([*facts, str(draw)], tested.null(dose, draw, recorded.taken), layers))
            bar.update()
        return found

    def _kept(self, facts: list[str]) -> Path | None:
        """The file of these masses, if it is there."""
        path = self._path(facts)
        return path if path is not None and path.is_file() else None

    def _path(self, facts: list[str]) -> Path | None:
        return None if self.folder is None else self.folder / f"{sha256_json([*self.facts, *facts])[:24]}.json"

    def _masses(
        self,
        facts: list[str],
        change: "Change | RecordingAblation | Displacement | None",
        layers: list[int],
        anew: bool = False,
    ) -> Masses:
        path, there = self._path(facts), self._kept(facts)
        if there is not None and not anew:
            kept: Masses = json.loads(there.read_text())
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
