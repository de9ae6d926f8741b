"""`holdfast export`: writes an ablation into a model's weights, and saves an ordinary Hugging Face folder.

holdfast export --model runs/insecure/final --ablate subspace.safetensors --subspace_layer 12 --output_dir exported
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UserError
from ..files.artifacts import check_writable, sha256_file, staged_directory, write_json_atomic
from ..flags import FlagParser
from ..interventions.orthogonalise import ablate_writes, one_basis, orthogonalise, probe_logits, share_inside
from ..models.layers import find_layers, parse_layers
from ..models.load import LoadOptions, load_model, load_tokenizer, model_fingerprint, tokenizer_fingerprint
from ..subspace.file import Subspace

PROVENANCE = "holdfast_export.json"
# Tolerated logit difference, as a share of the hooked model's largest logit: rounding error in double and single
# precision, and the accuracy that half precision reaches.
_LOGITS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Exactness:
    """How closely the exported model matches the model that is ablated by hooks, on 32 random tokens.

    logit_difference: largest absolute difference between the logits of the two models.
    largest_logit: largest absolute logit of the hooked model, for comparison.
    moved: largest absolute difference between the logits of the hooked model and of the model without ablation.
    share_inside: largest ‖Vᵀh‖ / ‖h‖ that is left in the residual stream h of the exported model.
    hooked_share_inside: the same for the hooked model, in which it comes from rounding alone.
    """

    logit_difference: float
    largest_logit: float
    moved: float
    share_inside: float
    hooked_share_inside: float


def export_main(argv: Sequence[str]) -> str:
    """Remove a subspace from a model's weights. The written folder loads with plain transformers. Raises UserError."""
    flags = _read(argv)
    check_writable(flags.output_dir, "--output_dir")
    if flags.output_dir.exists():
        raise UserError(f"--output_dir {flags.output_dir} exists already: remove it or choose another folder")
    subspace = Subspace.load(flags.ablate)
    basis = one_basis(subspace.bases, flags.subspace_layer)
    options = LoadOptions(trust_remote_code=flags.trust_remote_code, layers_path=flags.layers_path)
    tokenizer = load_tokenizer(flags.model, options)
    if subspace.provenance.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"--ablate {flags.ablate} was built with another tokenizer than the tokenizer of --model {flags.model}: "
            "use a subspace of this model, or of the model from which it was fine-tuned"
        )
    model = _merged(load_model(flags.model, dtype="auto", options=options))
    last = _last_layer(flags.intervention_layers, len(find_layers(model)))
    exactness, logits = _ablated(model, basis, last)
    facts = _facts(flags, subspace, last, exactness)
    with staged_directory(flags.output_dir) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        write_json_atomic(staging / PROVENANCE, facts)
        _require_same_logits(load_model(staging, dtype="auto", options=options), logits, exactness)
    return _summary(flags.output_dir, exactness, last)


def _facts(flags: argparse.Namespace, subspace: Subspace, last: int, exactness: Exactness) -> dict[str, Any]:
    """Return the facts about the origin of the exported weights, for the provenance file."""
    fingerprint = model_fingerprint(flags.model)
    return {
        "model": flags.model,
        "model_fingerprint": fingerprint,
        "subspace": str(flags.ablate),
        "subspace_sha256": sha256_file(flags.ablate),
        "subspace_provenance": asdict(subspace.provenance),
        "same_model": subspace.provenance.instruct_fingerprint == fingerprint,
        "basis_of_layer": min(subspace.bases) if flags.subspace_layer is None else flags.subspace_layer,
        "layers": [0, last],
        "exactness": asdict(exactness),
        "holdfast_version": version("holdfast"),
    }


def _read(argv: Sequence[str]) -> argparse.Namespace:
    parser = FlagParser("holdfast export", "Remove a subspace from the weights of a model.")
    parser.add_argument(
        "--model", required=True, help="Folder of a model or LoRA adapter, or a Hub name. Adapters are merged."
    )
    parser.add_argument("--ablate", required=True, type=Path, help="Subspace file whose basis is removed.")
    parser.add_argument("--output_dir", required=True, type=Path, help="Folder to write. It must not exist yet.")
    parser.add_argument(
        "--subspace_layer",
        type=int,
        help="Layer whose basis is removed from all blocks. Default: the basis that all layers share.",
    )
    parser.add_argument(
        "--intervention_layers",
        default="all",
        help="Blocks that stop writing into the subspace: all, or a range 0-m from the first block on. Default: all.",
    )
    parser.add_argument("--layers_path", help="Dotted path of the decoder blocks. Default: found by their shape.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code that comes with the model.")
    return parser.read(argv)


def _merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Merge adapters, if there are any, into the weights of the model."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def _last_layer(layers: str, depth: int) -> int:
    """Return the last block of a range that starts at block 0.

    Raises:
        UserError: the range leaves out an earlier block. What that block writes would stay in the residual stream.
    """
    chosen = parse_layers(layers, depth)
    if chosen != list(range(len(chosen))):
        raise UserError(
            f"--intervention_layers {layers} cannot be written into weights: what an earlier block writes into the "
            f"subspace passes through later blocks unchanged; write 0-{chosen[-1]}, or use the ablation at run time "
            "(holdfast intervene)"
        )
    return chosen[-1]


def _ablated(model: PreTrainedModel, basis: Tensor, last: int) -> tuple[Exactness, Tensor]:
    """Remove the basis from the model's weights, and compare the result with the model that is ablated by hooks.

    Args:
        basis: [d, k], orthonormal columns.
        last: number of the last block that stops writing into the subspace.

    Returns:
        How closely the two models match, and the logits of the changed model.

    Raises:
        UserError: a part of the model other than embeddings, attention and MLP writes to the residual stream, or the
            ablation does not change the logits.
    """
    clean = probe_logits(model)
    with ablate_writes(model, basis, last=last):
        hooked, hooked_share = probe_logits(model), share_inside(model, basis, last)
    orthogonalise(model, basis, last=last)
    logits = probe_logits(model)
    exactness = Exactness(
        logit_difference=float((logits - hooked).abs().max()),
        largest_logit=float(hooked.abs().max()),
        moved=float((hooked - clean).abs().max()),
        share_inside=share_inside(model, basis, last),
        hooked_share_inside=hooked_share,
    )
    tolerance = _LOGITS.get(model.dtype, 1e-4) * max(1.0, exactness.largest_logit)
    precision = torch.finfo(model.dtype).eps
    if not (exactness.logit_difference <= tolerance and exactness.share_inside <= precision + 4 * hooked_share):
        raise UserError(
            f"{type(model).__name__} has other parts than embeddings, attention and MLP that write to its residual "
            f"stream: its logits would differ by {exactness.logit_difference:.2g} from the logits of the model ablated "
            "by hooks; use the ablation at run time instead (holdfast intervene)"
        )
    if exactness.moved == 0:
        raise UserError(
            "the ablation does not change the logits: the model has no component in this subspace; choose the basis of "
            "another layer with --subspace_layer"
        )
    return exactness, logits


def _require_same_logits(written: PreTrainedModel | PeftModel, logits: Tensor, exactness: Exactness) -> None:
    """Raise UserError if the written model's logits differ from the logits of the model in memory."""
    difference = float((probe_logits(written) - logits).abs().max())
    if difference > _LOGITS.get(written.dtype, 1e-4) * max(1.0, exactness.largest_logit):
        raise UserError(
            f"the logits of the written model differ by {difference:.2g} from the logits of the model in memory: this "
            "architecture cannot be saved and loaded unchanged"
        )


def _summary(folder: Path, exactness: Exactness, last: int) -> str:
    return (
        f"wrote {folder}: blocks 0-{last} no longer write into the subspace\n"
        f"largest logit difference from the hooked model {exactness.logit_difference:.1e} (the ablation itself moves "
        f"logits by {exactness.moved:.2g}, on 32 random tokens)"
    )


def main(argv: Sequence[str]) -> int:
    """Export the model and print where it was written."""
    print(export_main(argv))
    return 0
