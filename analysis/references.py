"""The references, instruct and base: read once, one model after the other, and kept under what they depend on."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from .lm_head import StoredHead, prove_head
from .metrics.divergence import keep_positions
from .models import load_model, model_fingerprint
from .plan import MeasurePlan
from .probes import Rendered, document_key, role_mask
from .ranks import is_main, main_first, whole_models
from .readout import Readout, read


@dataclass(frozen=True)
class Reference:
    """One reference model's readings by probe set, and its LM head where divergence needs it."""

    readings: dict[str, Readout]
    head: StoredHead | None


class ProbeReader:
    """Reads probe sets with any model in the same way, and the references once.

    Args:
        rows: rendered probe sets by name. layers, role: what is pooled and projected. padding: a token id to pad with.
    """

    def __init__(
        self, plan: MeasurePlan, rows: Mapping[str, list[Rendered]], layers: list[int], role: str, padding: int
    ) -> None:
        self.plan, self.rows, self.layers, self.role, self.padding = plan, rows, layers, role, padding
        wanted = "divergence" in plan.families
        self.kept = {name: keep_positions(found, plan.max_length) for name, found in rows.items()} if wanted else {}

    def read(self, model: nn.Module, name: str) -> Readout:
        """One forward pass over a probe set."""
        plan, projecting = self.plan, "projection" in self.plan.families
        return read(
            model,
            self.rows[name],
            layers=self.layers if projecting else [],
            role=self.role,
            subspace=plan.subspace if projecting else None,
            keep=self.kept[name].positions if self.kept else None,
            batch_size=plan.batch_size,
            max_length=plan.max_length,
            padding=self.padding,
            label=name,
        )

    def references(self) -> dict[str, Reference]:
        """ "instruct" and, where the plan names one, "base". Of several ranks the main one reads and writes first."""
        paths = {"instruct": self.plan.instruct_path}
        if self.plan.base_path is not None:
            paths["base"] = self.plan.base_path
        # Without a folder there is nothing to take from the main rank, and no reason to wait for it.
        folder = self.plan.references
        facts = [str(folder), paths, [self._key("", name) for name in self.rows]]
        with main_first(f"references {json.dumps(facts)}") if folder is not None else nullcontext():
            return {name: self._reference(path) for name, path in paths.items()}

    def _reference(self, path: str) -> Reference:
        """Readings of every probe set by one reference model, from the store where it has them."""
        if not self.rows:
            return Reference({}, None)
        head_file, files = self._files(path)
        if files and all(file.is_file() for file in (*files.values(), *head_file)):
            readings = {name: Readout.load(file) for name, file in files.items()}
            return Reference(readings, StoredHead.load(head_file[0]) if head_file else None)
        with whole_models():
            model = load_model(path, dtype=self.plan.dtype, device=self.plan.device, options=self.plan.load)
        prove_head(model)
        reference = Reference(
            {name: self.read(model, name) for name in self.rows}, StoredHead.of(model) if self.kept else None
        )
        # Ranks that do not share the main one's disk come here too; one writer a file is enough.
        if files and is_main():
            for name, file in files.items():
                reference.readings[name].save(file)
            if reference.head is not None:
                reference.head.save(head_file[0])
        return reference

    def _files(self, path: str) -> tuple[list[Path], dict[str, Path]]:
        """Where the head (if it is kept) and the readings of a model lie; nothing without a store."""
        folder = self.plan.references
        if folder is None:
            return [], {}
        fingerprint = model_fingerprint(path)
        head = hashlib.sha256(f"{fingerprint} {self.plan.dtype}".encode()).hexdigest()
        files = {name: folder / f"{self._key(fingerprint, name)}.safetensors" for name in self.rows}
        return [folder / f"{head}.head.safetensors"] if self.kept else [], files

    def _key(self, fingerprint: str, name: str) -> str:
        plan, bases = self.plan, hashlib.sha256()
        for layer, basis in sorted(plan.subspace.bases.items()) if plan.subspace is not None else ():
            bases.update(f"{layer} {tuple(basis.shape)}".encode() + basis.numpy().tobytes())
        data = [
            [document_key(row.input_ids), row.completion_mask, role_mask(row, self.role)] for row in self.rows[name]
        ]
        kept = self.kept[name].positions if self.kept else None
        options = [self.layers, self.role, plan.max_length, plan.dtype, sorted(plan.families), kept]
        if plan.load.attn_implementation is not None:
            options.append(plan.load.attn_implementation)
        return hashlib.sha256(json.dumps([fingerprint, data, options, bases.hexdigest()]).encode()).hexdigest()
