"""After training, project adapters back onto the directions that alignment changed (SafeLoRA, arXiv 2405.16833).

For each adapted module, c = ‖P ΔW‖ / ‖ΔW‖ is the cosine of ΔW = scaling · B A with its projection P ΔW. If c is below
the threshold, B becomes P B. P = UUᵀ projects onto the first directions of the module's alignment difference.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..base import Protection
from ..host import Host
from .alignment_weights import AlignedAdapter, aligned_adapters

logger = logging.get_logger(__name__)


class SafeLoraProtection(Protection):
    """Plain training until the last step. Then the adapters are projected, before the final model is saved.

    Earlier checkpoints hold the adapters as they were trained. Adapters of modules that alignment did not change are
    kept.

    Args:
        threshold: adapters with a cosine below it are projected, in 0..1. 0 is plain training.
        rank: directions per module.
        base_model: loads the base model.
    """

    name = "safe_lora"

    def __init__(self, threshold: float, rank: int, base_model: Callable[[], PreTrainedModel]) -> None:
        self.active = threshold > 0
        self.threshold, self.rank, self._base_model = threshold, rank, base_model
        self._adapters: list[AlignedAdapter] = []
        self._projected = 0

    def prepare(self, trainer: Host, model: nn.Module) -> None:
        if not self._adapters:
            self._adapters = aligned_adapters(self.name, trainer, model, self._base_model, self.rank)

    @torch.no_grad()
    def finish(self, trainer: Host, model: nn.Module) -> None:
        """Project the adapters, and log the counts as `safe_lora_projected` and `safe_lora_modules`."""
        self._projected = projected = sum(self._project(adapter) for adapter in self._adapters)
        if trainer.accelerator.is_main_process:
            logger.warning(f"holdfast: safe_lora projected {projected} of {len(self._adapters)} adapted modules")
        trainer.log({"safe_lora_projected": projected, "safe_lora_modules": len(self._adapters)})

    def _project(self, adapter: AlignedAdapter) -> bool:
        """Change B to P B if the module's cosine is below the threshold, and return whether it is."""
        inside, outside = adapter.parts(adapter.down, adapter.up)
        # A zero adapter has no cosine, and nothing to project.
        if not inside + outside > 0 or (inside / (inside + outside)).sqrt() >= self.threshold:
            return False
        up = adapter.up.to(adapter.basis.dtype)
        adapter.up.copy_(adapter.basis @ (adapter.basis.T @ up))
        return True

    def replaced_weights(self) -> bool:
        return self._projected > 0

    def facts(self) -> dict[str, Any]:
        return {"protection": self.name, "safe_lora_threshold": self.threshold, "alignment_rank": self.rank}
