"""The penalty on a subspace that was built, not made up: 0 at the starting model and 1 at base, end to end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from holdfast.analysis.models.render import Conversation, render
from holdfast.analysis.subspace.build import build_subspace
from holdfast.analysis.subspace.file import Subspace
from holdfast.analysis.subspace.moments import SubspaceRequest
from holdfast.trainer.data.documents import documents_of
from holdfast.trainer.protections.drift.settings import PenaltySettings
from holdfast.trainer.protections.drift.subspace import SubspaceProtection
from toys.chat_models import save_toy, toy_model, toy_tokenizer
from toys.training import ROWS, task_dataset, trainer_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Instruct and base: models of one shape with other weights."""
    folder = tmp_path_factory.mktemp("models")
    return {name: save_toy(folder / name, toy_model(seed=seed)) for name, seed in (("instruct", 0), ("base", 1))}


def penalty_at(folder: Path, seed: int, subspace: Subspace, rows: Sequence[Conversation], **settings: Any) -> float:
    """What a trainer that starts at the model of that seed logs in its first step, read on the given rows."""
    rendered = [render(toy_tokenizer(), row) for row in rows]
    documents = documents_of(rendered, subspace.provenance.role)
    protection = SubspaceProtection(
        subspace, PenaltySettings(reference="frozen", anchor_batch_size=len(rows), **settings),
        anchors=documents, task=documents, reference_model=toy_model(),
    )  # fmt: skip
    trainer = trainer_of(
        folder, toy_model(seed=seed).train(), task_dataset(rendered), protection=protection, learning_rate=0.0,
        max_steps=1, per_device_train_batch_size=len(rows),
    )  # fmt: skip
    trainer.train()
    return trainer.state.log_history[0]["penalty"]


@pytest.mark.parametrize(
    ("method", "rank", "role", "inputs"),
    [
        ("difference_in_means", 1, "completion", "task"),
        ("svd", 3, "completion", "task"),
        ("svd", 3, "prompt", "anchors"),
        ("svd", 2, "last_prompt", "both"),
        ("shared", 2, "all", "anchors"),
        ("random", 4, "all", "task"),
    ],
)
def test_the_penalty_is_0_at_instruct_and_1_at_base(
    folders: dict[str, str], tmp_path: Path, method: str, rank: int, role: str, inputs: str
) -> None:
    subspace = build_subspace(
        SubspaceRequest(
            instruct_path=folders["instruct"], base_path=folders["base"], rows=ROWS, method=method, rank=rank,
            role=role, domains={"few": ROWS[:3], "many": ROWS[3:]} if method == "shared" else {},
        )
    )  # fmt: skip
    subspace.save(tmp_path / "subspace.safetensors")
    read = Subspace.load(tmp_path / "subspace.safetensors")
    assert penalty_at(tmp_path, 0, read, ROWS, inputs=inputs) == 0.0
    assert penalty_at(tmp_path, 1, read, ROWS, inputs=inputs) == pytest.approx(1.0, rel=1e-5)


def test_fewer_layers_and_directions_keep_the_scale(folders: dict[str, str], tmp_path: Path) -> None:
    request = SubspaceRequest(folders["instruct"], folders["base"], rows=ROWS, method="svd", rank=4)
    fewer = build_subspace(request).restrict([1], 2)
    assert penalty_at(tmp_path, 1, fewer, ROWS, inputs="task") == pytest.approx(1.0, rel=1e-5)


def test_toward_base_is_nearly_1_at_base_along_the_mean_difference(folders: dict[str, str], tmp_path: Path) -> None:
    """At rank 1 along the mean the way to base is the direction itself: all but drift the other way is counted."""
    request = SubspaceRequest(folders["instruct"], folders["base"], rows=ROWS, method="difference_in_means")
    found = penalty_at(tmp_path, 1, build_subspace(request), ROWS, inputs="task", side="toward_base")
    assert 0.9 < found <= 1.0 + 1e-6
