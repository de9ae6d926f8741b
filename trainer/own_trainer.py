"""The penalty for your own trainer: a mixin over any transformers.Trainer, and the protection to give to it.

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
    """Make the penalty on anchors in a subspace that `holdfast subspace` wrote.

    Args:
        subspace: file of the subspace.
        model: folder or Hub name of the model that training starts from; the subspace must be of this model.
        tokenizer: tokenizer of the model.
        anchors: rows on which the activations are held in place (as `--anchor_dataset`); None for the anchors that ship
            with Holdfast.
        max_length: longest anchor in tokens; longer anchors are cut.
        cache_dir: folder for the anchors' references; without it a full fine-tune cannot be resumed.
        layers_path: path of the decoder blocks, if they cannot be found by shape.
        settings: settings of the penalty, the fields of `PenaltySettings`.

    Raises:
        UserError: a subspace of another model or tokenizer, anchors that cannot be read, settings out of range.
    """
    loaded = Subspace.load(Path(subspace))
    role = loaded.provenance.role
    loaded.check(
        instruct_fingerprint=model_fingerprint(model), tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        role=role, layers=sorted(loaded.bases),
    )  # fmt: skip
    rows = load_rows(str(anchors or SHIPPED_ANCHORS), prompts=True)
    rendered = render_rows(tokenizer, rows, max_length=max_length, long_rows="truncate")
    documents = documents_of(rendered.rendered, role, [row.source for row in rendered.rows])
    return SubspaceProtection(
        loaded, PenaltySettings(**settings), anchors=documents, cache_dir=cache_dir, layers_path=layers_path
    )
