"""TRL's SFTTrainer with a protection. `own_trainer.py` gives the same to any other transformers.Trainer."""

from pathlib import Path
from typing import Any, cast

from torch import nn
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import get_config_model_id

from ..analysis.errors import UserError
from ..analysis.models.layers import unwrap
from .protected_trainer import ProtectedTrainerMixin


class ProtectedSFTTrainer(ProtectedTrainerMixin, SFTTrainer):
    """TRL's SFTTrainer with the arguments `protection` and `documents`; at strength 0 it is TRL's, bit for bit."""

    args: SFTConfig

    def refuse_unsupported(self, *, task: bool) -> None:
        super().refuse_unsupported(task=task)
        if task and self.args.packing and self.args.packing_strategy != "bfd":
            raise UserError(
                f"packing_strategy {self.args.packing_strategy} cuts documents in two, so their references cannot be "
                "found: write packing_strategy bfd, or penalise anchors only"
            )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's card only for a starting model on the Hub; a local model's card says "None" in every sentence."""
        name = get_config_model_id(unwrap(cast(nn.Module, self.model)).config)
        if name and not Path(name).exists():
            super().create_model_card(*args, **kwargs)

    def checkpoint_state(self) -> dict[str, Any]:
        return {**super().checkpoint_state(), "num_tokens": self._total_train_tokens}

    def load_checkpoint_state(self, state: dict[str, Any]) -> None:
        super().load_checkpoint_state(state)
        # TRL starts this counter at 0 in a resumed run.
        self._total_train_tokens = state["num_tokens"]
