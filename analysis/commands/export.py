"""`holdfast export`: a model with an ablation written into its weights, as an ordinary Hugging Face folder.

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
# Of the hooked model's largest logit: exact up to rounding in float32, and as near as half precision comes.
_LOGITS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Exactness:
    """How near the exported model is to the hooked one, on 32 random tokens.

    logit_difference: the largest. largest_logit: what it is to be compared with. moved: the largest difference from
    the model without ablation. share_inside: the largest ‖Vᵀh‖ / ‖h‖ left in the residual stream; hooked_share_inside:
    the same in the hooked model, where rounding alone leaves it.
    """

    logit_difference: float
    largest_logit: float
    moved: float
    share_inside: float
    hooked_share_inside: float


def export_main(argv: Sequence[str]) -> str:
    """Take a subspace out of a model's weights for good. The folder loads with plain transformers. Raises UserError."""
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
            f"--ablate {flags.ablate} was built with another tokenizer than that of --model {flags.model}: use a "
            "subspace of this model or of the one it was tuned from"
        )
    model = _plain(load_model(flags.model, dtype="auto", options=options))
    last = _last_layer(flags.intervention_layers, len(find_layers(model)))
    exactness, logits = _ablated(model, basis, last)
    facts = _facts(flags, subspace, last, exactness)
    with staged_directory(flags.output_dir) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        write_json_atomic(staging / PROVENANCE, facts)
        _require_same(load_model(staging, dtype="auto", options=options), logits, exactness)
    return _summary(flags.output_dir, exactness, last)


def _facts(flags: argparse.Namespace, subspace: Subspace, last: int, exactness: Exactness) -> dict[str, Any]:
    """Where the exported weights came from."""
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
    parser = FlagParser("holdfast export", export_main.__doc__)
    parser.add_argument("--model", required=True, help="Model or LoRA folder, or a Hub name. Adapters are merged.")
    parser.add_argument("--ablate", required=True, type=Path, help="Subspace file whose basis is taken out.")
    parser.add_argument("--output_dir", required=True, type=Path, help="Folder to write; it must not exist.")
    parser.add_argument(
        "--subspace_layer",
        type=int,
        help="Layer whose basis is taken out of all blocks. Default: the one basis that all layers share.",
    )
    parser.add_argument(
        "--intervention_layers",
        default="all",
        help="Blocks that no longer write into the subspace, from the first on: all, or 0-m. Default: all.",
    )
    parser.add_argument("--layers_path", help="Dotted path of the decoder blocks. Default: found by shape.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code that comes with the model.")
    return parser.read(argv)


def _plain(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model with its adapters merged into its weights."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def _last_layer(layers: str, depth: int) -> int:
    """The last block of a range that starts at 0.

    Raises:
        UserError: a range that leaves out an earlier block: what that one wrote would stay in the stream.
    """
    chosen = parse_layers(layers, depth)
    if chosen != list(range(len(chosen))):
        raise UserError(
            f"--intervention_layers {layers} cannot be written into weights: what an earlier block wrote into the "
            f"subspace passes the later ones untouched; write 0-{chosen[-1]}, or use the ablation at run time "
            "(holdfast intervene)"
        )
    return chosen[-1]


def _ablated(model: PreTrainedModel, basis: Tensor, last: int) -> tuple[Exactness, Tensor]:
    """Take the basis out of the weights, and compare with the hooked model; also the new logits.

    Raises:
        UserError: a model of which another part writes to the residual stream.
    """
    clean = probe_logits(model)
    with ablate_writes(model, basis, last=last):
        hooked, hooked_share = probe_logits(model), share_inside(model, basis, last)
    orthogonalise(model, basis, last=last)
    logits = probe_logits(model)
    found = Exactness(
        logit_difference=float((logits - hooked).abs().max()),
        largest_logit=float(hooked.abs().max()),
        moved=float((hooked - clean).abs().max()),
        share_inside=share_inside(model, basis, last),
        hooked_share_inside=hooked_share,
    )
    tolerance = _LOGITS.get(model.dtype, 1e-4) * max(1.0, found.largest_logit)
    precision = torch.finfo(model.dtype).eps
    if not (found.logit_difference <= tolerance and found.share_inside <= precision + 4 * hooked_share):
        raise UserError(
            f"{type(model).__name__} writes to its residual stream by more than embeddings, attention and MLP: its "
            f"logits would differ by {found.logit_difference:.2g} from the hooked model's; use the ablation at run "
            "time instead (holdfast intervene)"
        )
    if found.moved == 0:
        raise UserError(
            "the ablation does not move the logits: the model holds nothing in this subspace; name another layer's "
            "basis with --subspace_layer"
        )
    return found, logits


def _require_same(written: PreTrainedModel | PeftModel, logits: Tensor, exactness: Exactness) -> None:
    """What was written has to say what the model in memory said."""
    off = float((probe_logits(written) - logits).abs().max())
    if off > _LOGITS.get(written.dtype, 1e-4) * max(1.0, exactness.largest_logit):
        raise UserError(f"the written model's logits are off by {off:.2g}: this architecture does not save as it loads")


def _summary(folder: Path, exactness: Exactness, last: int) -> str:
    return (
        f"wrote {folder}: blocks 0-{last} no longer write into the subspace\n"
        f"largest logit difference from the hooked model {exactness.logit_difference:.1e} (the ablation itself moves "
        f"logits by {exactness.moved:.2g}, on 32 random tokens)"
    )


def main(argv: Sequence[str]) -> int:
    """Exports the model and says where it lies."""
    print(export_main(argv))
    return 0
