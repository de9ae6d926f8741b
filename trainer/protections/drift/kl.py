"""KL divergence of next-token distributions from the starting model's (arXiv 2508.06249, 2506.11613).

    term = mean over tokens of KL(p_θ ‖ p_I)

The final states are read and kept (d numbers per token). The LM heads of both models compute logits from them for a few
positions at a time, and the backward pass computes these logits again, so that no [B, T, V] tensor is held.
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
# Logits computed at a time for each model: 64 MiB in float32.
_CHUNK = 1 << 24


class FinalStates:
    """Reads the input of the LM head: [B, T, d], after the final norm."""

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
        role: role of the tokens that count. At each such token, the distribution of the next token is compared.
        settings: see PenaltySettings.
        fingerprint: fingerprint of the starting model.
        anchors, task, reference_model, cache_dir: see DriftProtection.

    Raises:
        UserError: settings that cannot work together.
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
        """Return the anchors, which must be among the inputs."""
        assert self.anchors is not None
        return self.anchors

    def summed(self, trainer: Host, model: nn.Module, batch: Batch) -> Tensor:
        """Return the divergence on a batch of anchors, summed over the tokens that count."""
        reference_LBTk = self._references["anchors"](batch)
        seen = self._watch(trainer, model, batch)
        return self.sums(seen.stacked(), reference_LBTk, batch[PENALTY_MASK]).sum()

    def watcher(self, model: nn.Module) -> Watcher:
        return FinalStates(model)

    def sums(self, values_LBTk: Tensor, reference_LBTk: Tensor, mask_BT: Tensor) -> Tensor:
        assert self._model is not None and self._head is not None
        trained_Nd, start_Nd = (states[FINAL][mask_BT] for states in (values_LBTk, reference_LBTk))
        head, logits = self._head, logits_of(self._model)
        vocabulary = unwrap(self._model).config.get_text_config().vocab_size
        step = max(1, _CHUNK // vocabulary)
        total = values_LBTk.new_zeros((), dtype=torch.float32)
        for trained, start in zip(trained_Nd.split(step), start_Nd.to(trained_Nd.dtype).split(step), strict=True):

            def divergence(states: Tensor, start: Tensor = start) -> Tensor:
                log_p, log_q = logits(states).log_softmax(-1), head(start).log_softmax(-1)
                return (log_p.exp() * (log_p - log_q)).sum()

            total = total + checkpoint(divergence, trained, use_reentrant=False, preserve_rng_state=False)
        return total[None]

    def shifted(self, values_LBTk: Tensor) -> Tensor:
        """Return other states of the same length: the coordinates in another order."""
        return values_LBTk.roll(1, dims=-1)

    def cache_facts(self) -> dict[str, Any]:
        return {"stream": "final", "instruct": self._fingerprint}
