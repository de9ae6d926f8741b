"""Start from weights beyond the starting model, further along the step from base to it (LoX, arXiv 2506.15606).

    W <- W_instruct + α · Δ_k,  Δ_k the best approximation of rank k to Δ = W_instruct − W_base

for every linear module of the decoder blocks. Embeddings, the LM head, norms, and experts stored in one tensor do not
change. The result is written once, as an ordinary model folder, so that an adapter is later loaded on the weights on
which it was trained.
"""

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ....analysis.errors import UserError
from ....analysis.files.artifacts import staged_directory, verify_manifest, write_json_atomic
from ....analysis.models.layers import find_layers, unwrap
from ....analysis.models.load import LoadOptions, load_model, load_tokenizer, model_fingerprint
from ..base import Protection
from ..host import Host
from .alignment_weights import difference, top_singular, weight_of

EXTRAPOLATED = "extrapolated"
PROVENANCE = "holdfast_extrapolated.json"


class ExtrapolateProtection(Protection):
    """Plain training from the folder that `write_extrapolated` makes. The model must have been loaded from that folder.

    Args:
        alpha: how far beyond the starting model to start, in units of Δ_k. 0 is plain training.
        rank: k, directions per module.
    """

    name = "extrapolate"

    def __init__(self, alpha: float, rank: int) -> None:
        self.active = alpha > 0
        self.alpha, self.rank = alpha, rank

    def start(self, trainer: Host, model: nn.Module) -> None:
        """Require that the model was loaded from the extrapolated weights."""
        written = Path(unwrap(model).name_or_path or "") / PROVENANCE
        facts = json.loads(written.read_text()) if written.is_file() else {}
        if (facts.get("alpha"), facts.get("rank")) != (self.alpha, self.rank):
            raise UserError(
                f"extrapolate: the model does not start from weights extrapolated by {self.alpha} at rank {self.rank}; "
                "load it from the folder that write_extrapolated makes"
            )

    def facts(self) -> dict[str, Any]:
        return {"protection": self.name, "extrapolate_alpha": self.alpha, "alignment_rank": self.rank}


def write_extrapolated(
    folder: Path, instruct: str, base: str, *, alpha: float, rank: int, options: LoadOptions,
    device: torch.device | str = "cpu",
) -> None:  # fmt: skip
    """Write the extrapolated model with its tokenizer, in the dtype of the saved starting model.

    A folder that holds the same extrapolated model already is kept.

    Args:
        folder: the folder of the model; the file PROVENANCE in it says how it was made.
        instruct, base: folders or Hub names.
        alpha, rank: see ExtrapolateProtection.
        options: how the models are loaded.
        device: device on which each module's difference is decomposed.

    Raises:
        UserError: the folder holds other content, or the weights of the two models cannot be compared or do not differ.
    """
    facts = {
        "instruct_fingerprint": model_fingerprint(instruct),
        "base_fingerprint": model_fingerprint(base),
        "alpha": alpha,
        "rank": rank,
    }
    if folder.exists():
        _require_same(folder, facts)
        return
    model, base_model = load_model(instruct, dtype="auto", options=options), load_model(base, options=options)
    assert isinstance(model, PreTrainedModel) and isinstance(base_model, PreTrainedModel)
    moved = extrapolate(model, base_model, alpha=alpha, rank=rank, device=device)
    with staged_directory(folder) as staging:
        model.save_pretrained(staging)
        load_tokenizer(instruct, options).save_pretrained(staging)
        made = {"instruct": instruct, "base": base, "modules": moved, "holdfast_version": version("holdfast")}
        write_json_atomic(staging / PROVENANCE, {**facts, **made})


def _require_same(folder: Path, facts: dict[str, Any]) -> None:
    """Raise UserError if the folder was made from other models or numbers, or has changed since."""
    verify_manifest(folder)
    written = folder / PROVENANCE
    before = json.loads(written.read_text()) if written.is_file() else {}
    for name, value in facts.items():
        if before.get(name) != value:
            raise UserError(
                f"{folder} was made with another {name} ({str(before.get(name))[:12]} then, {str(value)[:12]} now); "
                "remove it, or choose another --output_dir"
            )


@torch.no_grad()
def extrapolate(
    instruct: PreTrainedModel, base: PreTrainedModel, *, alpha: float, rank: int, device: torch.device | str = "cpu"
) -> int:
    """Change W to W + α Δ_k in place in the linear modules of the instruct model's blocks.

    Returns:
        The number of modules that differ from base.

    Raises:
        UserError: a module with another shape in base, or no module that differs.
    """
    moved = 0
    for name, module, base_module in _linear_pairs(instruct, base):
        delta = difference(module, base_module, name, device)
        if delta.any():
            left, values, right = top_singular(delta, rank)
            weight = weight_of(module)
            step = alpha * (left * values) @ right.T
            weight.copy_((weight.to(step.device, step.dtype) + step).to(weight.dtype))
            moved += 1
    if not moved:
        raise UserError(
            "extrapolate: base and starting model have the same weights in all linear modules of their blocks, so "
            "there is nothing to extrapolate; name the model before alignment with --base_model_name_or_path"
        )
    return moved


def _linear_pairs(instruct: PreTrainedModel, base: PreTrainedModel) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield the name, the module and the base model's module of every linear module in the blocks."""
    for number, (block, base_block) in enumerate(zip(find_layers(instruct), find_layers(base), strict=True)):
        base_modules = dict(base_block.named_modules())
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                base_module, name = base_modules.get(path), f"block {number}, {path}"
                if base_module is None or type(base_module) is not type(module):
                    raise UserError(f"extrapolate: base has no linear module at {name}; name the starting model's base")
                yield name, module, base_module
