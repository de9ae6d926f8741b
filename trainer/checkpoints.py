"""Write checkpoints that are whole or absent: staged, checksummed once every process is done, then renamed.

The stock Trainer writes straight into `checkpoint-N` and also resumes from a half-written folder; DeepSpeed's states
are unpickled when they are loaded. So a resume here reads only files that a manifest lists with their checksums.
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
        """Return JSON values that a checkpoint keeps beside the Trainer's own state."""
        return {}

    def load_checkpoint_state(self, state: dict[str, Any]) -> None:
        """Restore `checkpoint_state`, or refuse to resume (UserError)."""

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
        except Exception as error:  # from any library that writes; every error but a full disk keeps its traceback
            if disk_is_full(error):
                raise UserError(f"{run / name} could not be written ({error}): free some space and resume") from error
            raise
        finally:
            self._staging, self.args.push_to_hub = None, push
            # Whatever the error (tokenizers raises a bare Exception on a full disk), nothing half-written stays.
            if not whole and self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        if push:
            self._push_from_checkpoint(str(run / name))

    def _finish_staging(self, run: Path, staged: Path) -> None:
        """Once every process has written its files: write state and manifest, rename, then remove older checkpoints."""
        if self.state.best_global_step:
            best = run / f"checkpoint-{self.state.best_global_step}"
            # The stock code saw only the staging folder.
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
        """Keep `save_total_limit` checkpoints of the run, always including the newest and the best.

        The stock code also counts and removes folders that a user made, such as `checkpoint-best`.
        """
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if not limit or limit < 0:
            return
        checkpoints = numbered_checkpoints(run)
        kept = [path for path in checkpoints if path == newest or (best and path.name == Path(best).name)]
        older = sorted((path for path in checkpoints if path not in kept), key=lambda path: path.stat().st_mtime)
        for path in older[: max(0, len(checkpoints) - max(limit, len(kept)))]:
            shutil.rmtree(path, ignore_errors=True)

    def verified_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Return the checkpoint to resume from, once its manifest is verified, or None.

        Args:
            resume_from_checkpoint: a folder, True for the newest checkpoint of the run, or None.

        Raises:
            UserError: on all processes, for a checkpoint that is missing, incomplete or changed.
        """
        folder_and_problem: list[str | None] = [None, None]
        if resume_from_checkpoint and self.accelerator.is_main_process:
            try:
                folder_and_problem[0] = self._verify(resume_from_checkpoint)
            except UserError as error:
                folder_and_problem[1] = str(error)
        # One process reads the files; all processes must do the same afterwards.
        folder, problem = broadcast_object_list(folder_and_problem)
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
            raise UserError(f"cannot resume: {where}; name a checkpoint that a run of holdfast wrote, or start anew")
        verify_manifest(Path(folder))
        return folder

    def resume_state(self, folder: str) -> None:
        """Read and restore the `checkpoint_state` of a verified checkpoint."""
        path = Path(folder) / STATE
        if not path.is_file():
            raise UserError(
                f"cannot resume: {folder} holds no {STATE}; name a checkpoint-N folder of a run of holdfast"
            )
        self.load_checkpoint_state(json.loads(path.read_text()))


def numbered_checkpoints(run: Path) -> list[Path]:
    """Return the `checkpoint-N` folders of a run in the order of N; `checkpoint-best` and the like are the user's."""
    suffixes = {path: path.name.removeprefix("checkpoint-") for path in run.glob("checkpoint-*") if path.is_dir()}
    numbered = [path for path, suffix in suffixes.items() if suffix.isascii() and suffix.isdecimal()]
    return sorted(numbered, key=lambda path: int(suffixes[path]))
