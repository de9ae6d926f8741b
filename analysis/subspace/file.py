"""The subspace file: bases, scales and provenance of an alignment subspace in one safetensors file.

subspace = Subspace.load("runs/mine/subspace.safetensors")
subspace.bases[12]  # [width, rank]
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..files.artifacts import staged_file
from .methods import random_basis

CONVENTION = "output of decoder block l (0-based) before the final norm, by forward hook"
NULL_SEEDS = 16
_FORMAT = "holdfast_subspace_1"


@dataclass(frozen=True)
class Provenance:
    """The facts on which a subspace depends.

    source: the kind of contrast: residuals, system_prompts or completions. layers_path: the path of the decoder blocks
    as the user gave it; None if they were found by shape.
    """

    method: str
    rank: int
    layers: tuple[int, ...]
    role: str
    centred: bool
    seed: int
    instruct_fingerprint: str
    base_fingerprint: str | None
    tokenizer_fingerprint: str
    data_sha256: str
    n_rows: int
    n_tokens: int
    convention: str = CONVENTION
    holdfast_version: str = ""
    source: str = "residuals"
    layers_path: str | None = None


@dataclass(frozen=True)
class Subspace:
    """For each layer l, an orthonormal basis V and the scale of the contrast that defined it.

    bases: {l: [d, k] float32}. scales: {l: s_l = E ||V^T r||^2 > 0}. base_gap: {l: [k] float32}, the coordinates of
    the mean step away from alignment, V^T mean(h^B - h^I) or V^T mean(h_misaligned - h_aligned), for `toward_base`.
    angles: {l: {other method: principal angles in degrees}}, with "random" as the null.
    energies: {l: [k] float32}, E (v_j . r)^2, which sum to s_l. null_energies, null_gaps: {l: [16, k]}, energies and
    base gaps of the random bases of seeds 0-15.
    """

    bases: dict[int, Tensor]
    scales: dict[int, float]
    base_gap: dict[int, Tensor] | None
    provenance: Provenance
    angles: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    energies: dict[int, Tensor] = field(default_factory=dict)
    null_energies: dict[int, Tensor] = field(default_factory=dict)
    null_gaps: dict[int, Tensor] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        groups = {"bases": self.bases, "base_gap": self.base_gap or {}, **self._per_column()}
        tensors = {
            f"{name}.{layer}": value.detach().cpu().contiguous()
            for name, values in groups.items()
            for layer, value in values.items()
        }
        facts = {
            "provenance": dataclasses.asdict(self.provenance),
            "scales": {str(layer): scale for layer, scale in self.scales.items()},
            "angles": {str(layer): angles for layer, angles in self.angles.items()},
        }
        with staged_file(Path(path)) as staging:
            save_file(tensors, staging, metadata={"format": "pt", _FORMAT: json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> "Subspace":
        """Read a file written by `save`.

        Raises:
            UserError: a file that is absent, damaged, or not a subspace.
        """
        try:
            with safe_open(path, framework="pt") as stored:
                facts = json.loads((stored.metadata() or {})[_FORMAT])
                tensors: dict[str, dict[int, Tensor]] = {}
                for key in stored.keys():  # noqa: SIM118 (safe_open is not iterable)
                    name, layer = key.rsplit(".", 1)
                    tensors.setdefault(name, {})[int(layer)] = stored.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"subspace {path} could not be read ({error}): build it with `holdfast subspace`"
            ) from error
        except KeyError as error:
            raise UserError(f"{path} is not a subspace file: build one with `holdfast subspace`") from error
        provenance = {**facts["provenance"], "layers": tuple(facts["provenance"]["layers"])}
        return cls(
            scales={int(layer): scale for layer, scale in facts["scales"].items()},
            provenance=Provenance(**provenance),
            angles={int(layer): angles for layer, angles in facts["angles"].items()},
            bases=tensors.pop("bases"),
            base_gap=tensors.pop("base_gap", None),
            **tensors,
        )

    def check(self, *, instruct_fingerprint: str, tokenizer_fingerprint: str, role: str, layers: Sequence[int]) -> None:
        """Check that the subspace belongs to a run: the same instruct weights, tokenizer and role, and these layers.

        Raises:
            UserError: a fact that differs, by name.
        """
        built = self.provenance
        for fact, built_with, of_run in (
            ("instruct weights", built.instruct_fingerprint, instruct_fingerprint),
            ("tokenizer", built.tokenizer_fingerprint, tokenizer_fingerprint),
            ("token role", built.role, role),
        ):
            if built_with != of_run:
                raise UserError(
                    f"the subspace was built with {fact} {_short(built_with)} but this run has {_short(of_run)}: "
                    "build the subspace again for this run, or use the run that it was built for"
                )
        self._require_layers(layers)

    def restrict(self, layers: Sequence[int], rank: int) -> "Subspace":
        """Return the subspace on fewer layers, with its first `rank` directions and recomputed scales.

        Raises:
            UserError: a layer or rank that the subspace does not have, or a lower rank than it has scales for.
        """
        self._require_layers(layers)
        if not 1 <= rank <= self.provenance.rank:
            raise UserError(f"the subspace has rank {self.provenance.rank}: write a rank of 1-{self.provenance.rank}")
        if rank < self.provenance.rank and not self.energies:
            raise UserError("the subspace has no scale per direction: build it again to use a lower rank")
        restricted: dict[str, Any] = {
            name: {layer: values[layer][..., :rank].contiguous() for layer in layers} if values else values
            for name, values in {"bases": self.bases, "base_gap": self.base_gap, **self._per_column()}.items()
        }
        scales = {
            layer: self.scales[layer] if rank == self.provenance.rank else float(self.energies[layer][:rank].sum())
            for layer in layers
        }
        facts = dataclasses.replace(self.provenance, layers=tuple(layers), rank=rank)
        angles = {layer: self.angles[layer] for layer in layers if layer in self.angles}
        return Subspace(scales=scales, provenance=facts, angles=angles, **restricted)

    def _per_column(self) -> dict[str, dict[int, Tensor]]:
        return {"energies": self.energies, "null_energies": self.null_energies, "null_gaps": self.null_gaps}

    def _require_layers(self, layers: Sequence[int]) -> None:
        absent = sorted(set(layers) - set(self.bases))
        if absent or not layers:
            raise UserError(
                f"the subspace was built with layers {_ranges(sorted(self.bases))} but this run has "
                f"{_ranges(sorted(layers)) or 'none'}: choose among its layers, or build the subspace again"
            )


def random_like(
    subspace: Subspace, seed: int, scale: str = "given", own_scales: dict[int, float] | None = None
) -> Subspace:
    """Return a random subspace of the same rank and layers, as a null.

    Args:
        subspace: the subspace whose null is made.
        seed: the draw. The bases of one seed are nested over ranks.
        scale: "given" keeps the scales s_l of the subspace; "own" takes E ||V^T r||^2 of the random V over the same
            contrast.
        own_scales: scales for "own" that were computed elsewhere; None takes those stored at build time (seeds 0-15).

    Raises:
        UserError: an unknown scale, or "own" for a seed whose scales are not stored.
    """
    if scale not in ("given", "own"):
        raise UserError(f"null scale {scale!r} is unknown: write given or own")
    rank, layers = subspace.provenance.rank, sorted(subspace.bases)
    stored = bool(subspace.null_energies) and 0 <= seed < NULL_SEEDS
    if scale == "own" and own_scales is None:
        if not stored:
            raise UserError(
                f"the null's own scale is stored for seeds 0-{NULL_SEEDS - 1}, not for {seed}: write --null_seed with "
                "one of these seeds, or --null_scale given"
            )
        own_scales = {layer: float(subspace.null_energies[layer][seed].sum()) for layer in layers}
    bases = {layer: random_basis(subspace.bases[layer].shape[0], rank, seed, layer).float() for layer in layers}
    return Subspace(
        bases=bases,
        scales=dict(subspace.scales) if own_scales is None or scale == "given" else own_scales,
        base_gap={layer: subspace.null_gaps[layer][seed] for layer in layers} if stored else None,
        provenance=dataclasses.replace(subspace.provenance, method="random", seed=seed),
        energies={layer: subspace.null_energies[layer][seed] for layer in layers} if stored and scale == "own" else {},
    )


def _short(fact: str) -> str:
    return f"{fact[:12]}…" if len(fact) == 64 else fact


def _ranges(layers: list[int]) -> str:
    """Return a compact text for a sorted list of layers, such as "0-3,7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def to_float32(basis: Tensor) -> Tensor:
    """Return a basis as it is stored. The rounding of float64 columns keeps them orthonormal to about 1e-7."""
    return basis.to("cpu", torch.float32).contiguous()
