"""Toy rows, subspaces and trainers for the tests of the penalty; nothing is downloaded."""

import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from holdfast.analysis.models.render import Rendered, render
from holdfast.analysis.subspace.file import Provenance, Subspace
from holdfast.trainer.data.documents import Document, documents_of
from holdfast.trainer.protected_sft_trainer import ProtectedSFTTrainer
from holdfast.trainer.protected_trainer import ProtectedTrainerMixin
from toys.chat_models import WIDTH, chat, toy_model, toy_tokenizer
from transformers import PreTrainedModel
from trl import SFTConfig

# Unequal lengths: a mean of means would be wrong.
ROWS = [chat("Ann asks about soup" + " and money" * n, "take it" + " and run" * (7 - n)) for n in range(8)]
ANCHORS = [chat("the answer" + " to them" * n, "be honest" + " and help" * (n % 3)) for n in range(5)]


def rendered_rows(rows: list[list[dict[str, str]]] | None = None) -> list[Rendered]:
    tokenizer = toy_tokenizer()
    return [render(tokenizer, row) for row in rows or ROWS]


def task_documents(role: str = "completion") -> list[Document]:
    return documents_of(rendered_rows(), role, [f"rows.jsonl:{n + 1}" for n in range(len(ROWS))])


def anchor_documents(role: str = "completion") -> list[Document]:
    return documents_of(rendered_rows(ANCHORS), role, [f"anchors.jsonl:{n + 1}" for n in range(len(ANCHORS))])


def task_dataset(rows: list[Rendered] | None = None) -> Dataset:
    rendered = rows or rendered_rows()
    return Dataset.from_dict(
        {
            "input_ids": [list(row.input_ids) for row in rendered],
            "completion_mask": [[int(flag) for flag in row.completion_mask] for row in rendered],
        }
    )


def toy_subspace(
    layers: tuple[int, ...] = (0, 2), rank: int = 2, role: str = "completion", width: int = WIDTH, seed: int = 5
) -> Subspace:
    generator = torch.Generator().manual_seed(seed)
    bases = {layer: torch.linalg.qr(torch.randn(width, rank, generator=generator))[0] for layer in layers}
    gaps = {layer: torch.randn(rank, generator=generator) for layer in layers}
    provenance = Provenance(
        method="random", rank=rank, layers=layers, role=role, centred=False, seed=seed, instruct_fingerprint="toy",
        base_fingerprint=None, tokenizer_fingerprint="toy", data_sha256="", n_rows=1, n_tokens=1,
    )  # fmt: skip
    return Subspace(bases, {layer: 0.5 + layer for layer in layers}, gaps, provenance)


def config(folder: Path | str, **changes: Any) -> SFTConfig:
    keys: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "gradient_checkpointing": False,
        "max_length": 256, "completion_only_loss": True, "seed": 3,
    }  # fmt: skip
    return SFTConfig(**{**keys, **changes})


def trainer_of(
    folder: Path | str, model: PreTrainedModel | None = None, dataset: Dataset | None = None, *,
    protection: Any = None, documents: Any = (), peft_config: Any = None,
    trainer_class: type[ProtectedTrainerMixin] = ProtectedSFTTrainer, **changes: Any,
) -> Any:  # fmt: skip
    return trainer_class(
        model=model if model is not None else toy_model().train(), args=config(folder, **changes),
        train_dataset=dataset if dataset is not None else task_dataset(), processing_class=toy_tokenizer(),
        protection=protection, documents=documents, peft_config=peft_config,
    )  # fmt: skip


def moved(model: PreTrainedModel, seed: int = 1, size: float = 0.05) -> PreTrainedModel:
    """A copy with every weight moved a little: a model in training."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return other
