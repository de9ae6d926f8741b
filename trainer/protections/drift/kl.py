"""KL divergence to the starting model (arXiv 2508.06249, 2506.11613), of next-token distributions.

    term = mean over tokens of KL(p_θ ‖ p_I)

Final states are watched and kept (d numbers a token); both heads make the logits from them, some positions at a time,
and the backward pass makes them again, so that no [B, T, V] is held.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ....analysis.errors import UserError
from ....analysis.models.forward import Batch
from ....analysis.models.layers import find_backbone, unwrap
from ....analysis.models.lm_head import StoredHead, logits_of
from ...data.documents import PENALTY_MASK, Document, DocumentStore
from ..host import Host
from .settings import PenaltySettings
from .term import DriftProtection
from .watch import Projections, Watcher

FINAL = 0
# Logits made at a time, of each model: 64 MiB in float32.
_CHUNK = 1 << 24


class FinalStates:
    """Reads what the decoder hands to the LM head: [B, T, d], after the final norm."""

    def __init__(self, model: nn.Module) -> None:
        self.backbone = find_backbone(model)

    @contextmanager
    def watching(self) -> Iterator[Projections]:
        seen = Projections([FINAL])

        def take(_module: nn.Module, _args: object, output: Any) -> None:
            seen.take(FINAL, output.last_hidden_state)

        handle = self.backbone.register_forward_hook(take)
        try:
            yield seen
        finally:
            handle.remove()


class KLProtection(DriftProtection):
    """Penalise the divergence of next-token distributions from the starting model's.

    Args:
        role: whose positions count: at each of its tokens, the distribution of the next one.
        fingerprint: of the starting model. anchors, task, reference_model, cache_dir: see DriftProtection.
    """

    def __init__(
        self, role: str, settings: PenaltySettings, fingerprint: str, *, anchors: Sequence[Document] = (),
        task: Sequence[Document] = (), reference_model: PreTrainedModel | None = None, cache_dir: Path | None = None,
    ) -> None:  # fmt: skip
        self._fingerprint = fingerprint
        self._model: nn.Module | None = None
        self._head: StoredHead | None = None
        super().__init__(
            "kl", role, [FINAL], settings, anchors=anchors, task=task, reference_model=reference_model,
            cache_dir=cache_dir,
        )  # fmt: skip

    def prepare(self, trainer: Host, model: nn.Module) -> None:
        if is_deepspeed_zero3_enabled():
            raise UserError(
                "kl needs the whole LM head outside the forward pass, which ZeRO-3 shards: use zero2, or protection "
                "feature_l2 or subspace"
            )
        if self._head is None:
            head = unwrap(model).get_output_embeddings()
            if not isinstance(head, nn.Linear):
                raise UserError("kl reads a linear LM head; leave lm_head out of --lora_target_modules")
            if head.weight.requires_grad and trainer.state.global_step > 0:
                raise UserError(
                    "kl with a trained LM head cannot be resumed under DeepSpeed: the starting head is gone"
                )
            self._head = StoredHead.of(unwrap(model)).to(trainer.args.device)
        self._model = model
        super().prepare(trainer, model)

    @property
    def anchor_store(self) -> DocumentStore:
        """The anchors, which are among its inputs."""
        assert self.anchors is not None
        return self.anchors

    def summed(self, trainer: Host, model: nn.Module, batch: Batch) -> Tensor:
        """The divergence on a batch of the anchors, summed over the tokens that count."""
        reference_LBTk = self._references["anchors"](batch)
        seen = self._watch(trainer, model, batch)
        return self.sums(seen.stacked(), reference_LBTk, batch[PENALTY_MASK]).sum()

    def watcher(self, model: nn.Module) -> Watcher:
        return FinalStates(model)

    def sums(self, values_LBTk: Tensor, reference_LBTk: Tensor, mask_BT: Tensor) -> Tensor:
        assert self._model is not None and self._head is not None
        own, theirs = (states[FINAL][mask_BT] for states in (values_LBTk, reference_LBTk))
        head, logits = self._head, logits_of(self._model)
        vocabulary = unwrap(self._model).config.get_text_config().vocab_size
        step = max(1, _CHUNK // vocabulary)
        total = values_LBTk.new_zeros((), dtype=torch.float32)
        for ours, other in zip(own.split(step), theirs.to(own.dtype).split(step), strict=True):

            def divergence(states: Tensor, other: Tensor = other) -> Tensor:
                log_p, log_q = logits(states).log_softmax(-1), head(other).log_softmax(-1)
                return (log_p.exp() * (log_p - log_q)).sum()

            total = total + checkpoint(divergence, ours, use_reentrant=False, preserve_rng_state=False)
        return total[None]

    def shifted(self, values_LBTk: Tensor) -> Tensor:
        """Other states of the same length: their coordinates in another order."""
        return values_LBTk.roll(1, dims=-1)

    def what(self) -> dict[str, Any]:
        return {"stream": "final", "instruct": self._fingerprint}
