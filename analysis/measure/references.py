"""Read the reference models, instruct and base, once: one model after the other. Keep their readings in the store."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..files.artifacts import sha256_json
from ..files.store import Store
from ..metrics.divergence import keep_positions
from ..models.layers import prove_layers
from ..models.lm_head import StoredHead, prove_head
from ..models.load import load_model, model_fingerprint
from ..models.ranks import gathered, is_main, main_first, whole_models
from ..models.render import Rendered, document_key, role_mask
from ..passes.kept_donor import KeptDonor
from ..passes.patching import patch_rows
from ..passes.readout import Readout, read
from .plan import MeasurePlan
from .registry import REGISTRY


@dataclass(frozen=True)
class Reference:
    """What is kept of one reference model.

    readings: its readout by probe set. head: its LM head, or None if no family needs it. donors: its states for
    patching, by probe set.
    """

    readings: dict[str, Readout]
    head: StoredHead | None
    donors: dict[str, KeptDonor] = field(default_factory=dict)


class ProbeReader:
    """Reads the probe sets with every model in the same way, and reads the references only once.

    Args:
        rows: rendered probe sets by name.
        depth: number of decoder blocks of the models; all layers are pooled.
        role: the token role that is pooled and projected.
        padding: a token id to pad with.
        families: the families to compute. They decide which parts are read.
    """

    def __init__(
        self,
        plan: MeasurePlan,
        rows: Mapping[str, list[Rendered]],
        depth: int,
        role: str,
        padding: int,
        families: tuple[str, ...],
    ) -> None:
        self.plan, self.rows, self.layers, self.role, self.padding = plan, rows, list(range(depth)), role, padding
        self.parts = {part for family in families for part in REGISTRY[family].reads}
        self.reads = any(REGISTRY[family].readings for family in families)
        self.kept = (
            {name: keep_positions(rendered, plan.max_length) for name, rendered in rows.items()}
            if "final" in self.parts
            else {}
        )
        self.patch_rows = {
            name: patch_rows(
                rendered[: plan.patching_rows], batch_size=plan.batch_size, max_length=plan.max_length, padding=padding
            )
            for name, rendered in (rows.items() if "donor" in self.parts else ())
        }
        self.store = None if plan.references is None else Store(plan.references, plan.store_limit_gb)
        self._fingerprints: dict[str, str] = {}

    def read(self, model: nn.Module, name: str, *, shared: bool = False) -> Readout:
        """Run one forward pass over a probe set. `shared` means the same as for `readout.read`."""
        plan = self.plan
        return read(
            model,
            self.rows[name],
            layers=self.layers if "pooled" in self.parts else [],
            role=self.role,
            subspace=plan.subspace if "projections" in self.parts else None,
            keep=self.kept[name].positions if self.kept else None,
            prompt_entropy=self._of_paper("prompt_entropy"),
            last_token=self._of_paper("last"),
            batch_size=plan.batch_size,
            max_length=plan.max_length,
            padding=self.padding,
            shared=shared,
            label=name,
        )

    def _of_paper(self, part: str) -> bool:
        """Return whether to read a part that only the paper's formulas use."""
        return self.plan.formulas == "paper" and part in self.parts

    def references(self) -> dict[str, Reference]:
        """Return the reference "instruct" and, if the plan names a base model, "base".

        The main rank reads and writes first, then the other ranks.
        """
        paths = {"instruct": self.plan.instruct_path}
        if self.plan.base_path is not None:
            paths["base"] = self.plan.base_path
        if not self.reads and not self.patch_rows:
            return {name: Reference({}, None) for name in paths}
        # Without a store folder a rank gets nothing from the main rank, and has no reason to wait for it.
        folder = self.plan.references
        facts = [str(folder), paths, [self.data_hash(name) for name in self.rows], sorted(self.parts)]
        at_once = folder is None or self.plan.data_parallel
        with nullcontext() if at_once else main_first(f"references {json.dumps(facts)}"):
            return {name: self._reference(path, donor=name == "base") for name, path in paths.items()}

    def _reference(self, path: str, donor: bool) -> Reference:
        """Return one reference model's readings of every probe set.

        The model is loaded only if the store lacks some of them, and is released afterwards.
        """
        store, fingerprint = self.store, self.fingerprint(path)
        keys = {name: self._key(fingerprint, name) for name in self.rows} if self.reads else {}
        head_key = sha256_json(["head", fingerprint, self.plan.dtype])
        stored = {name: store.get(key) for name, key in keys.items()} if store is not None else {}
        readings = {name: Readout.of_tensors(tensors) for name, tensors in stored.items() if tensors is not None}
        stored_head = store.get(head_key) if store is not None and self.kept else None
        head = None if stored_head is None else head_of(stored_head)
        donors = self._stored_donors(fingerprint) if donor else {}
        complete = len(readings) == len(keys) and (head is not None or not self.kept)
        complete = complete and (not donor or len(donors) == len(self.patch_rows))
        # Ranks that divide the rows must agree on whether there is something to read.
        if all(gathered(complete)) if self.plan.data_parallel else complete:
            return Reference(readings, head, donors)
        with whole_models():
            model = load_model(path, dtype=self.plan.dtype, device=self.plan.device, options=self.plan.load)
        prove_head(model)
        # Checkpoints have the shape of the references, so this proves their layers too.
        prove_layers(model)
        # Ranks that do not share the main rank's disk come here too. One rank that writes is enough.
        writes = store if store is not None and is_main() else None
        for name, key in keys.items():
            if name not in readings or self.plan.data_parallel:
                readings[name] = self.read(model, name, shared=self.plan.data_parallel)
                if writes is not None:
                    writes.put(key, readings[name].tensors())
        if self.kept and head is None:
            head = StoredHead.of(model)
            if writes is not None:
                writes.put(head_key, head_tensors(head))
        for name, rows in self.patch_rows.items() if donor else ():
            donors[name] = KeptDonor.of(model, rows, self.layers)
            if writes is not None:
                writes.put(self._donor_key(fingerprint, name), donors[name].tensors())
        return Reference({name: readings[name] for name in keys}, head, donors)

    def _donor_key(self, fingerprint: str, name: str) -> str:
        rows = self.patch_rows[name]
        data = [rows.batches, [[row.input_ids, row.positions, row.targets] for row in rows.rows]]
        return sha256_json(["donor", fingerprint, data, self.layers, self.loading()])

    def _stored_donors(self, fingerprint: str) -> dict[str, KeptDonor]:
        """Return base's states for patching, for the probe sets that have an entry in the store."""
        if self.store is None:
            return {}
        stored = {name: self.store.get(self._donor_key(fingerprint, name)) for name in self.patch_rows}
        return {name: KeptDonor.of_tensors(tensors) for name, tensors in stored.items() if tensors is not None}

    def fingerprint(self, path: str) -> str:
        """Return the `model_fingerprint` of a reference. Its files are read only once."""
        if path not in self._fingerprints:
            self._fingerprints[path] = model_fingerprint(path)
        return self._fingerprints[path]

    def data_hash(self, name: str) -> str:
        """Hash a probe set as the models read it: token ids, completions, tokens of the role, the length limit."""
        rows = [
            [document_key(row.input_ids), row.completion_mask, role_mask(row, self.role)] for row in self.rows[name]
        ]
        return sha256_json([rows, self.plan.max_length])

    def loading(self) -> list[Any]:
        """Return the loading options that can change a model's numbers."""
        return [self.plan.dtype, self.plan.load.attn_implementation, self.plan.load.layers_path]

    def _key(self, fingerprint: str, name: str) -> str:
        """Return the store key of one model's readout: a hash of weights, data, positions, layers and options."""
        kept = self.kept[name].positions if self.kept else None
        pooled = self.layers if "pooled" in self.parts else []
        bases = subspace_hash(self.plan) if "projections" in self.parts else None
        options = [
            pooled,
            self.role,
            kept,
            bases,
            self._of_paper("prompt_entropy"),
            self._of_paper("last"),
            self.loading(),
        ]
        return sha256_json([fingerprint, self.data_hash(name), options])


def subspace_hash(plan: MeasurePlan) -> str | None:
    """Return a hash of the bases and scales of the plan's subspace, or None if the plan has no subspace."""
    if plan.subspace is None:
        return None
    digest = hashlib.sha256()
    for layer, basis in sorted(plan.subspace.bases.items()):
        digest.update(
            f"{layer} {tuple(basis.shape)} {plan.subspace.scales[layer]!r}".encode() + basis.numpy().tobytes()
        )
    return digest.hexdigest()


def head_tensors(head: StoredHead) -> dict[str, Tensor]:
    """Return an LM head as the named tensors that the store keeps."""
    shape = torch.tensor([head.scale, head.cap], dtype=torch.float64)
    return {"weight": head.weight, "shape": shape, **({} if head.bias is None else {"bias": head.bias})}


def head_of(tensors: Mapping[str, Tensor]) -> StoredHead:
    """Make an LM head from its `head_tensors`."""
    return StoredHead(tensors["weight"], tensors.get("bias"), *tensors["shape"].tolist())
