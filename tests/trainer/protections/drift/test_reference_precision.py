"""References reach the penalty as they were read, whatever the precision of the model."""

from types import SimpleNamespace

import torch
from holdfast.trainer.protections.drift.settings import PenaltySettings
from holdfast.trainer.protections.drift.subspace import SubspaceProtection
from toys.training import task_dataset, task_documents, toy_subspace, trainer_of


def test_deepspeed_in_bf16_does_not_round_the_references(tmp_path, monkeypatch):
    protection = SubspaceProtection(toy_subspace(), PenaltySettings(inputs="task"), task=task_documents())
    trainer = trainer_of(tmp_path, dataset=task_dataset(), protection=protection)
    # What transformers asks for a batch's dtype, in place of an engine that would need a GPU to run in bf16.
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin, raising=False)
    reference = torch.randn(2, 5, 2, 2, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "penalty_reference": reference, "other": reference}
    prepared = trainer._prepare_inputs(batch)
    assert torch.equal(prepared["penalty_reference"], reference)
    assert prepared["other"].dtype == torch.bfloat16
