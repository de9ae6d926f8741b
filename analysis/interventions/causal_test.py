"""The causal test: the model's answers while a direction is ablated or added, and while random directions are.

`holdfast intervene` uses it; `metrics.causal` turns its results into verdicts. Nothing is trained: the starting model
answers prompts with listed answers (`metrics.choices`) at every dose. For each dose there are random directions that
move every token equally far, so that a drop in coherence is not mistaken for a cause. The probability masses of answers
are written to a folder as they are read. An interrupted test continues where it stopped.
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
# Part of the names of the files of masses. Raise the number when the step in a random direction is made differently.
_STEPS = "steps 2"
Masses = list[dict[str, float]]


class RecordingAblation:
    """An ablation that records the coordinates that it removes: per layer, a tensor [B, T, k] for each forward pass.

    The coordinates at layer l are those of the stream after the ablation of the lower layers.
    """

    def __init__(self, bases: ByLayer, dose: float) -> None:
        self.bases, self.ablation = bases, Ablation(bases, dose, None)
        self.taken: dict[int, list[Tensor]] = {}

    def apply(self, layer: int, hidden: Tensor, call: ForwardPass | None) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            fine = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            self.taken.setdefault(layer, []).append((fine @ self.bases.at(layer, hidden)).cpu())
        return self.ablation.apply(layer, hidden, call)


class Displacement:
    """The null of an ablation: at every layer, each token moves as far as the ablation moved it, along random U_l.

    The stream becomes h - dose U c, where c are the coordinates that the ablation removed at this layer
    (`RecordingAblation`), in the same forward passes and in the same order.
    """

    def __init__(self, taken: dict[int, list[Tensor]], random: ByLayer, dose: float) -> None:
        self.taken, self.random, self.dose = taken, random, dose
        self._passes = dict.fromkeys(taken, 0)

    def apply(self, layer: int, hidden: Tensor, call: ForwardPass | None) -> Tensor:
        taken = self.taken[layer][self._passes[layer]]
        self._passes[layer] += 1
        with torch.autocast(hidden.device.type, enabled=False):
            fine = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            step = taken.to(fine.device, fine.dtype) @ self.random.at(layer, hidden).T
            return (fine - self.dose * step).to(hidden.dtype)


@dataclass(frozen=True)
class Candidate:
    """A direction or a whole subspace to be tested.

    kind: "ablate" (the vectors are orthonormal [d, k]) or "steer" (a vector [d, 1], as long as the step of dose 1).
    vectors: by layer.
    """

    name: str
    kind: str
    vectors: dict[int, Tensor]

    def change(self, dose: float) -> Change:
        """Return the change that the candidate makes to the stream at a dose."""
        if self.kind == ABLATE:
            return Ablation(ByLayer(self.vectors), dose, None)
        return Steering(ByLayer({layer: vector[:, 0] for layer, vector in self.vectors.items()}), dose, "absolute")

    def null(self, dose: float, draw: int, taken: dict[int, list[Tensor]]) -> "Displacement | Steering":
        """Return the change that moves every token equally far in a random direction.

        A draw has the same directions at every dose.

        Args:
            draw: number of the draw; it is the seed of its random directions.
            taken: the coordinates that the ablation removed at this dose (`RecordingAblation`); not used for steering.
        """
        random = {
            layer: random_basis(vectors.shape[0], vectors.shape[1], draw, layer).to(torch.float32)
            for layer, vectors in self.vectors.items()
        }
        if self.kind == ABLATE:
            return Displacement(taken, ByLayer(random), dose)
        steps = {layer: random[layer][:, 0] * vectors[:, 0].norm() for layer, vectors in self.vectors.items()}
        return Steering(ByLayer(steps), dose, "absolute")


@dataclass(frozen=True)
class DoseCurve:
    """The masses of the classes of answers for every prompt.

    tested: the direction or subspace. clean: without an intervention. treated: at each dose. drawn: at each dose, with
    each random draw.
    """

    tested: Candidate
    doses: tuple[float, ...]
    clean: Masses
    treated: list[Masses]
    drawn: list[list[Masses]]


class CausalTest:
    """Reads the masses of one model on one set of prompts.

    Args:
        prepared: the prompts and their classes of answers.
        facts: everything that the masses depend on (weights, prompts, precision), for the names of their files.
        folder: the folder that keeps the masses; None keeps nothing.
        batch_size: completions per forward pass.
        layers_path: dotted path of the decoder blocks; None finds them by shape.
    """

    def __init__(
        self, model: nn.Module, prepared: PreparedChoices, facts: Sequence[str] = (), folder: Path | None = None, *,
        batch_size: int = 256, layers_path: str | None = None,
    ) -> None:  # fmt: skip
        self.model, self.prepared, self.facts, self.folder = model, prepared, facts, folder
        self.batch_size, self.layers_path = batch_size, layers_path
        self._clean: Masses | None = None

    def curve(self, tested: Candidate, doses: Sequence[float], draws: int) -> DoseCurve:
        """Return all masses of one test.

        Args:
            tested: the direction or subspace to test.
            doses: the doses at which it is tested.
            draws: number of random draws for each dose.

        Raises:
            UserError: layers or widths that do not fit the model, or an intervention that has no effect.
        """
        prove(self.model, tested.change(1.0), sorted(tested.vectors), self.layers_path)
        if self._clean is None:
            self._clean = self._masses(["clean"], None, [])
        treated: list[Masses] = []
        drawn: list[list[Masses]] = []
        with tqdm(total=len(doses) * (draws + 1), desc=f"{tested.kind} {tested.name}", delay=5, leave=False) as bar:
            for dose in doses:
                masses = self._at_dose(tested, dose, draws, bar)
                treated.append(masses[0])
                drawn.append(masses[1:])
        return DoseCurve(tested, tuple(doses), self._clean, treated, drawn)

    def _at_dose(self, tested: Candidate, dose: float, draws: int, bar: tqdm) -> list[Masses]:
        """Return the masses with the candidate, then with each random draw."""
        facts = [_STEPS, tested.kind, digest(tested.vectors), repr(float(dose))]
        layers, recording = sorted(tested.vectors), RecordingAblation(ByLayer(tested.vectors), dose)
        # The removed coordinates are only in memory. If the file of a draw is missing, they must be computed again.
        absent = any(self._existing_file([*facts, str(draw)]) is None for draw in range(draws))
        change = recording if tested.kind == ABLATE else tested.change(dose)
        masses = [self._masses([*facts, ""], change, layers, again=absent and tested.kind == ABLATE)]
        bar.update()
        for draw in range(draws):
            masses.append(self._masses([*facts, str(draw)], tested.null(dose, draw, recording.taken), layers))
            bar.update()
        return masses

    def _existing_file(self, facts: list[str]) -> Path | None:
        """Return the file of these masses, or None if there is no such file."""
        path = self._path(facts)
        return path if path is not None and path.is_file() else None

    def _path(self, facts: list[str]) -> Path | None:
        return None if self.folder is None else self.folder / f"{sha256_json([*self.facts, *facts])[:24]}.json"

    def _masses(
        self,
        facts: list[str],
        change: "Change | RecordingAblation | Displacement | None",
        layers: list[int],
        again: bool = False,
    ) -> Masses:
        """Return the masses under a change, from their file if it exists and `again` is False."""
        path, existing = self._path(facts), self._existing_file(facts)
        if existing is not None and not again:
            stored: Masses = json.loads(existing.read_text())
            return stored
        if change is None:
            masses = score_prepared(self.model, self.prepared, self.batch_size)
        else:
            with patch(self.model, layers, lambda layer, hidden: change.apply(layer, hidden, None), self.layers_path):
                masses = score_prepared(self.model, self.prepared, self.batch_size)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(path, masses)
        return masses


def digest(vectors: dict[int, Tensor]) -> str:
    """Return a hash of vectors by layer."""
    return sha256_json([[layer, vectors[layer].double().tolist()] for layer in sorted(vectors)])
