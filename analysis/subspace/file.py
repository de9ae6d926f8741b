"""A subspace that knows where it came from: bases, scales and provenance in one safetensors file."""

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
    """The facts a subspace depends on.

    source: the contrast: residuals, system_prompts or completions. layers_path: as given; None found them by shape.
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
    """Per layer l an orthonormal basis and the scale of the contrast that defined it.

    bases: {l: [d, k] float32}. scales: {l: s_l = E ||V^T r||^2 > 0}. base_gap: {l: [k] float32}, the coordinates of
    the mean step away from alignment, V^T mean(h^B - h^I) or V^T mean(h_misaligned - h_aligned), for `toward_base`.
    angles: {l: {other method: principal angles in degrees}}, "random" among them as the null.
    energies: {l: [k] float32}, E (v_j . r)^2, summing to s_l. null_energies, null_gaps: {l: [16, k]}, the same for the
    random bases of seeds 0-15.
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
        """Read a file written by `save`; UserError when it is absent, damaged or something else."""
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
        """Raise UserError saying which fact differs when this subspace does not belong to the given run."""
        built = self.provenance
        for fact, ours, theirs in (
            ("instruct weights", built.instruct_fingerprint, instruct_fingerprint),
            ("tokenizer", built.tokenizer_fingerprint, tokenizer_fingerprint),
            ("token role", built.role, role),
        ):
            if ours != theirs:
                raise UserError(
                    f"the subspace was built with {fact} {_short(ours)} but this run has {_short(theirs)}: "
                    "build the subspace again for this run, or use the run it was built for"
                )
        self._require_layers(layers)

    def restrict(self, layers: Sequence[int], rank: int) -> "Subspace":
        """The same subspace on fewer layers and its first `rank` directions, scales recomputed."""
        self._require_layers(layers)
        if not 1 <= rank <= self.provenance.rank:
            raise UserError(f"the subspace has rank {self.provenance.rank}: write a rank of 1-{self.provenance.rank}")
        if rank < self.provenance.rank and not self.energies:
            raise UserError("the subspace has no scale per direction: build it again to use a lower rank")
        chosen: dict[str, Any] = {
            name: {layer: values[layer][..., :rank].contiguous() for layer in layers} if values else values
            for name, values in {"bases": self.bases, "base_gap": self.base_gap, **self._per_column()}.items()
        }
        scales = {
            layer: self.scales[layer] if rank == self.provenance.rank else float(self.energies[layer][:rank].sum())
            for layer in layers
        }
        facts = dataclasses.replace(self.provenance, layers=tuple(layers), rank=rank)
        angles = {layer: self.angles[layer] for layer in layers if layer in self.angles}
        return Subspace(scales=scales, provenance=facts, angles=angles, **chosen)

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
    """The null: a random subspace of the same rank and layers.

    Args:
        subspace: what the null stands beside.
        seed: the draw; the same seed gives nested bases at every rank.
        scale: "given" keeps the subspace's s_l; "own" takes E ||V^T r||^2 of the random V over the same contrast.
        own_scales: own scales computed elsewhere; without them, those stored at build time (seeds 0-15).
    """
    if scale not in ("given", "own"):
        raise UserError(f"null scale {scale!r} is unknown: write given or own")
    rank, layers = subspace.provenance.rank, sorted(subspace.bases)
    stored = bool(subspace.null_energies) and 0 <= seed < NULL_SEEDS
    if scale == "own" and own_scales is None:
        if not stored:
            raise UserError(
                f"the null's own scale is stored for seeds 0-{NULL_SEEDS - 1}, not for {seed}: write --null_seed with "
                "one of them, or --null_scale given"
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
    """Compact text for a sorted list of layers: 0-3,7."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def to_float32(basis: Tensor) -> Tensor:
    """A basis as it is stored; rounding float64 columns keeps them orthonormal to about 1e-7."""
    return basis.to("cpu", torch.float32).contiguous()
