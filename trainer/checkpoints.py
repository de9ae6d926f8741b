"""Checkpoints that are whole or absent: staged, checksummed once every process is done, then renamed.

The stock Trainer writes straight into `checkpoint-N` and resumes from a half-written one; DeepSpeed's states are
unpickled on loading. So a resume reads only what a manifest vouches for.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..analysis.errors import UserError
from ..analysis.files.artifacts import commit_directory, verify_manifest, write_json_atomic
from ..analysis.files.disk import disk_is_full

logger = logging.get_logger(__name__)

STATE = "holdfast_state.json"
STAGING = "staging"


class CheckpointMixin(Trainer):
    """Staged saving and verified resuming for any transformers.Trainer."""

    _staging: Path | None = None

    def checkpoint_state(self) -> dict[str, Any]:
        """JSON values kept in a checkpoint beside the Trainer's own."""
        return {}

    def load_checkpoint_state(self, state: dict[str, Any]) -> None:
        """Take `checkpoint_state` back, or refuse to resume (UserError)."""

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staging, push = run / STAGING, self.args.push_to_hub
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging, self.args.push_to_hub = staging, False
        whole = False
        try:
            super()._save_checkpoint(model, trial)
            self._finish_staging(run, staging / name)
            whole = True
        except Exception as error:  # of any library that was writing; all but a full disk keep their traceback
            if disk_is_full(error):
                raise UserError(f"{run / name} could not be written ({error}): free some space and resume") from error
            raise
        finally:
            self._staging, self.args.push_to_hub = None, push
            # Whatever went wrong (tokenizers raises a bare Exception on a full disk), nothing half-written stays.
            if not whole and self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        if push:
            self._push_from_checkpoint(str(run / name))

    def _finish_staging(self, run: Path, staged: Path) -> None:
        """Every process has written its files: state, manifest, rename, then the older checkpoints may go."""
        if self.state.best_global_step:
            best = run / f"checkpoint-{self.state.best_global_step}"
            # The stock code saw the staging folder only.
            if best.is_dir() or best.name == staged.name:
                self.state.best_model_checkpoint = str(best)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(staged / "trainer_state.json"))
            write_json_atomic(staged / STATE, self.checkpoint_state())
            commit_directory(staged, run / staged.name, staged.with_name(f"replaced-{staged.name}"))
            shutil.rmtree(staged.parent)
            self._remove_older(run, run / staged.name)
        self.accelerator.wait_for_everyone()

    def _remove_older(self, run: Path, newest: Path) -> None:
        """Keep `save_total_limit` checkpoints of the run, the newest and the best among them.

        The stock code also counts and removes folders that a user made, such as `checkpoint-best`.
        """
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if not limit or limit < 0:
            return
        found = numbered_checkpoints(run)
        kept = [path for path in found if path == newest or (best and path.name == Path(best).name)]
        older = sorted((path for path in found if path not in kept), key=lambda path: path.stat().st_mtime)
        for path in older[: max(0, len(found) - max(limit, len(kept)))]:
            shutil.rmtree(path, ignore_errors=True)

    def verified_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The checkpoint to resume from, its manifest verified: a folder, True for the newest of the run, or None.

        Raises:
            UserError (on all processes): a checkpoint that is missing, incomplete or changed.
        """
        found: list[str | None] = [None, None]
        if resume_from_checkpoint and self.accelerator.is_main_process:
            try:
                found[0] = self._verify(resume_from_checkpoint)
            except UserError as error:
                found[1] = str(error)
        # One process reads the files; all of them must agree on what comes next.
        folder, problem = broadcast_object_list(found)
        if problem is not None:
            raise UserError(problem)
        return folder

    def _verify(self, resume_from_checkpoint: str | bool) -> str:
        run = str(self.args.output_dir)
        folder = str(resume_from_checkpoint)
        if resume_from_checkpoint is True:
            folder = (get_last_checkpoint(run) if Path(run).is_dir() else None) or ""
        if not Path(folder).is_dir() or not folder:
            where = f"{run} holds no checkpoint" if resume_from_checkpoint is True else f"{folder} is not a folder"
            raise UserError(f"cannot resume: {where}; name one that a run of holdfast wrote, or start anew")
        verify_manifest(Path(folder))
        return folder

    def resume_state(self, folder: str) -> None:
        """Read `checkpoint_state` of a verified checkpoint."""
        path = Path(folder) / STATE
        if not path.is_file():
            raise UserError(
                f"cannot resume: {folder} holds no {STATE}; name a checkpoint-N folder of a run of holdfast"
            )
        self.load_checkpoint_state(json.loads(path.read_text()))


def numbered_checkpoints(run: Path) -> list[Path]:
    """The `checkpoint-N` folders of a run by their number; `checkpoint-best` and the like are a user's own."""
    found = {path: path.name.removeprefix("checkpoint-") for path in run.glob("checkpoint-*") if path.is_dir()}
    numbered = [path for path, number in found.items() if number.isascii() and number.isdecimal()]
    return sorted(numbered, key=lambda path: int(found[path]))
