"""Build the alignment subspace: directions in which an instruct model differs from base, or from its misaligned self.

    holdfast subspace --config recipe.yaml

Methods (arXiv 2507.03662, sections 4.3 and 4.4, and trainer/protections/README.md):

- contrastive: needs only the instruct model. It takes paired differences under aligned and misaligned system prompts,
  or on chosen and rejected completions.
- difference_in_means, svd: residuals h^instruct - h^base on identical token ids.
- shared: directions that several domains have in common.
- random: random directions, as the null.
"""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..models.layers import parse_layers
from ..models.load import check_compatible, load_config, load_tokenizer, model_fingerprint, tokenizer_fingerprint
from ..models.render import ROLES
from . import methods
from .contrast import is_completions, shipped_contrast
from .file import NULL_SEEDS, Provenance, Subspace, to_float32
from .methods import METHODS, Moments
from .moments import ContrastMoments, SubspaceRequest, measure_moments

_DISAGREEMENT_DEGREES = 60.0

logger = logging.getLogger(__name__)


def build_subspace(request: SubspaceRequest) -> Subspace:
    """Build the requested subspace, with its angles to every other method that the given models and rows allow.

    Raises:
        UserError: an impossible request: an unknown method or role, no base model for a method that needs one, a rank
            or layer out of range, base and instruct of different shape or vocabulary, no rows, or pairs whose tokens
            do not correspond.
    """
    layers, contrast = check_request(request)
    return _assemble(request, layers, contrast, measure_moments(request, layers, contrast))


def check_request(request: SubspaceRequest) -> tuple[list[int], Sequence[dict[str, Any]] | None]:
    """Check a request, and return its layers and its contrast. Loads no weights.

    Raises:
        UserError: any request that `build_subspace` refuses before it reads activations.
    """
    if request.method not in METHODS:
        raise UserError(f"subspace method {request.method!r} is unknown: write one of {', '.join(METHODS)}")
    if request.role not in ROLES:
        raise UserError(f"token role {request.role!r} is unknown: write one of {', '.join(ROLES)}")
    if request.method in ("difference_in_means", "svd", "shared") and request.base_path is None:
        raise UserError(f"subspace method {request.method} needs a base model: pass one, or use method contrastive")
    if request.method == "difference_in_means" and request.rank != 1:
        raise UserError(f"difference_in_means has rank 1, not {request.rank}: write rank 1, or use method svd")
    if request.centred and request.method != "svd":
        raise UserError(f"centred belongs to method svd, not {request.method}: leave it out, or use method svd")
    if request.method == "shared" and len(request.domains) < 2:
        raise UserError(
            f"shared: {len(request.domains)} domain given; pass rows of at least two domains, or use method svd"
        )
    if request.contrast is not None and not request.contrast:
        raise UserError("the contrast is empty: pass at least one pair of system prompts or completions")
    needs_rows = request.base_path is not None or not is_completions(request.contrast)
    if needs_rows and not request.rows and not any(request.domains.values()):
        raise UserError("there are no probe rows: pass conversations to measure the contrast on")
    config = load_config(request.instruct_path, request.load)
    if request.base_path is not None:
        check_compatible(load_config(request.base_path, request.load), config)
    text = config.get_text_config()
    layers = parse_layers(request.layers, text.num_hidden_layers, "--subspace_layers")
    if not 1 <= request.rank <= text.hidden_size:
        raise UserError(f"rank {request.rank} is impossible: write 1-{text.hidden_size} (the width)")
    shipped = request.contrast is None and (request.method == "contrastive" or request.base_path is None)
    return layers, shipped_contrast() if shipped else request.contrast


def _assemble(
    request: SubspaceRequest, layers: list[int], contrast: Sequence[dict[str, Any]] | None, all_moments: ContrastMoments
) -> Subspace:
    """Compute bases, scales, nulls and angles from the moments."""
    columns: dict[str, dict[int, Tensor]] = {
        name: {} for name in ("bases", "base_gap", "energies", "null_energies", "null_gaps")
    }
    scales, angles = {}, {}
    for layer in layers:
        moments, basis = (
            all_moments.whole(request.method, layer),
            to_float32(_basis(request.method, request, layer, all_moments)),
        )
        nulls = [methods.random_basis(moments.width, request.rank, seed, layer) for seed in range(NULL_SEEDS)]
        columns["bases"][layer] = basis
        columns["energies"][layer] = moments.energies(basis).float().cpu()
        columns["base_gap"][layer] = _gap(moments, basis)
        columns["null_energies"][layer] = torch.stack([moments.energies(null).float().cpu() for null in nulls])
        columns["null_gaps"][layer] = torch.stack([_gap(moments, null) for null in nulls])
        scales[layer] = float(moments.energies(basis).sum())
        if not (math.isfinite(scales[layer]) and scales[layer] > 0):
            raise UserError(
                f"{request.method}: the contrast has size {scales[layer]} inside the subspace at layer {layer}, so the "
                "penalty would have no scale; pass models or prompts that differ there"
            )
        angles[layer] = _angles(request, layer, basis, all_moments)
    _warn_disagreement(request.method, angles)
    source = "residuals"
    if all_moments.source(request.method) is all_moments.contrasted:
        source = "completions" if is_completions(contrast) else "system_prompts"
    n_tokens = all_moments.whole(request.method, layers[0]).count
    provenance = _provenance(request, layers, contrast, n_tokens, source)
    return Subspace(scales=scales, provenance=provenance, angles=angles, **columns)


def _gap(moments: Moments, basis: Tensor) -> Tensor:
    """Return the coordinates [k] of the mean step away from alignment. The differences point the other way."""
    return -(basis.to(moments.device, torch.float64).T @ moments.mean).float().cpu()


def _basis(method: str, request: SubspaceRequest, layer: int, all_moments: ContrastMoments) -> Tensor:
    """Return a method's basis [d, k], float64."""
    moments = all_moments.whole(method, layer)
    if method == "contrastive":
        return methods.contrastive_basis(moments, request.rank)
    if method == "difference_in_means":
        return methods.mean_direction(moments, method)
    if method == "svd":
        return methods.svd_basis(moments, request.rank, request.centred)
    if method == "shared":
        return methods.shared_basis(all_moments.domains(layer), request.rank)
    return methods.random_basis(moments.width, request.rank, request.seed, layer)


def _angles(
    request: SubspaceRequest, layer: int, basis: Tensor, all_moments: ContrastMoments
) -> dict[str, list[float]]:
    """Return the principal angles to every other possible method. "random" shows the angles of unrelated subspaces."""
    possible = {
        "contrastive": bool(all_moments.contrasted),
        "difference_in_means": bool(all_moments.residuals),
        "svd": bool(all_moments.residuals),
        "shared": len(all_moments.domains(layer)) > 1,
        "random": True,
    }
    angles = {}
    for other in METHODS:
        if possible[other] and other != request.method:
            try:
                angles[other] = methods.principal_angles(basis, _basis(other, request, layer, all_moments))
            except UserError as error:
                # The other method cannot have this rank on these rows. Only the requested method must have it.
                logger.info("no angle to %s at layer %d: %s", other, layer, error)
    return angles


def _warn_disagreement(method: str, angles: dict[int, dict[str, list[float]]]) -> None:
    for other in METHODS:
        far = [layer for layer, by_method in angles.items() if by_method.get(other, [0.0])[0] > _DISAGREEMENT_DEGREES]
        if far and "random" not in (other, method):
            logger.warning(
                "subspace: %s and %s are more than %.0f degrees apart in layers %s", method, other,
                _DISAGREEMENT_DEGREES, far,
            )  # fmt: skip


def _provenance(
    request: SubspaceRequest, layers: list[int], contrast: Sequence[dict[str, Any]] | None, n_tokens: int, source: str
) -> Provenance:
    data = json.dumps([list(request.rows), list(contrast or ()), asdict(request)["domains"]], sort_keys=True)
    rows = list(request.rows) or [row for group in request.domains.values() for row in group]
    return Provenance(
        method=request.method,
        rank=request.rank,
        layers=tuple(layers),
        role=request.role,
        centred=request.centred,
        seed=request.seed,
        instruct_fingerprint=model_fingerprint(request.instruct_path),
        base_fingerprint=None if request.base_path is None else model_fingerprint(request.base_path),
        tokenizer_fingerprint=tokenizer_fingerprint(load_tokenizer(request.instruct_path, request.load)),
        data_sha256=hashlib.sha256(data.encode()).hexdigest(),
        n_rows=len(contrast or ()) if source == "completions" else len(rows),
        n_tokens=n_tokens,
        holdfast_version=version("holdfast"),
        source=source,
        layers_path=request.load.layers_path,
    )
