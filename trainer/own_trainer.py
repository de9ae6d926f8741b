"""The penalty for a trainer of one's own: a mixin over any transformers.Trainer, and the protection it is given.

class MyTrainer(ProtectedTrainerMixin, transformers.Trainer):
    pass

protection = load_protection("subspace.safetensors", "model", tokenizer, strength=1.0)
MyTrainer(model=model, args=args, train_dataset=rows, protection=protection).train()
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..analysis.models.load import model_fingerprint, tokenizer_fingerprint
from ..analysis.subspace.file import Subspace
from .data.documents import documents_of
from .data.rows import SHIPPED_ANCHORS, load_rows, render_rows
from .protected_trainer import ProtectedTrainerMixin
from .protections.drift.settings import PenaltySettings
from .protections.drift.subspace import SubspaceProtection

__all__ = ["ProtectedTrainerMixin", "load_protection"]


def load_protection(
    subspace: str | Path, model: str | Path, tokenizer: PreTrainedTokenizerBase, *, anchors: str | Path | None = None,
    max_length: int = 2048, cache_dir: Path | None = None, layers_path: str | None = None, **settings: Any,
) -> SubspaceProtection:  # fmt: skip
    """The penalty on anchors in a subspace that `holdfast subspace` wrote.

    Args:
        subspace: its file.
        model: folder or Hub name of the model that training starts from, and the subspace was built from.
        anchors: rows whose activations are held in place (as `--anchor_dataset`); None takes those that are shipped.
        max_length: longer anchors are cut to it, in tokens.
        cache_dir: where the anchors' references are kept; a full fine-tune without one cannot be resumed.
        layers_path: the decoder blocks' path, where they are not found by shape.
        settings: those of PenaltySettings.

    Raises:
        UserError: a subspace of another model or tokenizer, anchors that cannot be read, settings out of range.
    """
    found = Subspace.load(Path(subspace))
    role = found.provenance.role
    found.check(
        instruct_fingerprint=model_fingerprint(model), tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        role=role, layers=sorted(found.bases),
    )  # fmt: skip
    rows = load_rows(str(anchors or SHIPPED_ANCHORS), prompts=True)
    rendered = render_rows(tokenizer, rows, max_length=max_length, long_rows="truncate")
    documents = documents_of(rendered.rendered, role, [row.source for row in rendered.rows])
    return SubspaceProtection(
        found, PenaltySettings(**settings), anchors=documents, cache_dir=cache_dir, layers_path=layers_path
    )
