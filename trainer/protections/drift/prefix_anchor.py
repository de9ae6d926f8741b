"""Penalise changes of the keys and values of the template's prefix (TReFT, arXiv 2606.06667).

    term = mean over blocks, over {keys, values} and over the prefix's tokens of ‖x^θ - x^I‖² / ‖x^I‖²

x is the output of a block's key or value projection, before any norm or rotation. Every row begins with the prefix: the
system turn and role tokens that the chat template puts first. Attention only looks back, so the prefix has the same
keys and values in all rows. The whole cost is one short forward and backward pass on the prefix per optimiser step.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ....analysis.errors import UserError
from ....analysis.models.layers import find_layers, unwrap
from ...data.documents import Document
from ..host import Host
from .settings import PenaltySettings
from .term import DriftProtection
from .watch import Projections, Watcher

_KEYS, _VALUES = "k_proj", "v_proj"
_MOST = 0.9  # share of the training rows


class KeysAndValues:
    """Reads the outputs of the key and value projections of some blocks, side by side [B, T, 2 d_kv], with adapters.

    Raises:
        UserError: a layer that the model does not have, or a block without exactly one k_proj and one v_proj.
    """

    def __init__(self, model: nn.Module, layers: list[int], layers_path: str | None) -> None:
        blocks = find_layers(model, layers_path)
        if not 0 <= layers[0] <= layers[-1] < len(blocks):
            raise UserError(f"penalty layers {layers} are out of range: the model has layers 0-{len(blocks) - 1}")
        self.layers = layers
        kind = type(unwrap(model)).__name__
        self.projections = {layer: _projections(blocks[layer], f"layer {layer} of {kind}") for layer in layers}

    @contextmanager
    def watching(self) -> Iterator[Projections]:
        """Fill the yielded Projections at each forward pass of the model, and remove the hooks at the end."""
        seen = Projections(self.layers)
        halves: dict[tuple[int, int], Tensor] = {}

        def take(_module: nn.Module, _args: object, output: Tensor, *, layer: int, half: int) -> None:
            halves[layer, half] = output.to(torch.promote_types(output.dtype, torch.float32))
            if (layer, 1 - half) in halves:
                seen.take(layer, torch.cat([halves.pop((layer, 0)), halves.pop((layer, 1))], dim=-1))

        handles = [
            module.register_forward_hook(partial(take, layer=layer, half=half))
            for layer, pair in self.projections.items()
            for half, module in enumerate(pair)
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def _projections(block: nn.Module, where: str) -> tuple[nn.Module, nn.Module]:
    """Return the key and the value projection of a block, or LoRA's wrappers of them."""
    projections: dict[str, list[nn.Module]] = {_KEYS: [], _VALUES: []}
    for name, module in block.named_modules():
        last = name.rpartition(".")[2]
        if last in projections:
            projections[last].append(module)
    if [len(modules) for modules in projections.values()] != [1, 1]:
        # Modules of any type: GPT-2's fused projection is no nn.Linear.
        matrices = {
            name.rpartition(".")[2] for name, module in block.named_modules()
            if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.dim() == 2
        }  # fmt: skip
        raise UserError(
            f"prefix_anchor reads a k_proj and a v_proj, and {where} has {', '.join(sorted(matrices))}; use protection "
            "feature_l2 or subspace, or leave the layer out of --protection_layers"
        )
    return projections[_KEYS][0], projections[_VALUES][0]


class PrefixAnchorProtection(DriftProtection):
    """Penalise the relative change of the prefix's keys and values.

    Args:
        prefix: token ids that every training row begins with; see `common_prefix`.
        layers: blocks whose keys and values are held.
        settings: see PenaltySettings. Inputs, side and anchor_batch_size have no effect.
        fingerprint: fingerprint of the starting model.
        of_most: number of tokens that most rows begin with; see `shared_by_most`.
        reference_model, cache_dir: see DriftProtection.
        layers_path: path of the decoder blocks, if they are not found by shape.

    Raises:
        UserError: an empty prefix.
    """

    def __init__(
        self, prefix: Sequence[int], layers: list[int], settings: PenaltySettings, fingerprint: str, *,
        of_most: int = 0, reference_model: PreTrainedModel | None = None, cache_dir: Path | None = None,
        layers_path: str | None = None,
    ) -> None:  # fmt: skip
        if not prefix:
            raise UserError(
                "prefix_anchor holds what all training rows begin with, and they have no first token in common; use a "
                "chat template that begins with one, or protection feature_l2 or subspace"
            )
        self._fingerprint, self._layers_path = fingerprint, layers_path
        self._prefix_tokens, self._of_most = len(prefix), of_most
        super().__init__(
            "prefix_anchor", "all", sorted(layers),
            replace(settings, inputs="anchors", side="both", anchor_batch_size=1),
            anchors=[Document(tuple(prefix), (True,) * len(prefix), "the template's prefix")],
            reference_model=reference_model, cache_dir=cache_dir,
        )  # fmt: skip

    def watcher(self, model: nn.Module) -> Watcher:
        return KeysAndValues(model, self.layers, self._layers_path)

    def start(self, trainer: Host, model: nn.Module) -> None:
        """Print how many tokens are held, because one row with another beginning leaves few of them."""
        if trainer.accelerator.is_main_process:
            print(f"prefix_anchor: holds the first {self._prefix_tokens} tokens, which all training rows begin with")
            if self._of_most > 2 * self._prefix_tokens:  # a smaller surplus is what questions happen to begin with
                print(
                    f"prefix_anchor: {_MOST:.0%} of the rows begin with the same {self._of_most} tokens; to hold all "
                    "of them, give the other rows the same system turn, or leave them out"
                )
        try:
            super().start(trainer, model)
        except UserError as error:
            checkpointing = trainer.args.gradient_checkpointing_kwargs
            if not (isinstance(checkpointing, dict) and checkpointing.get("use_reentrant")):
                raise
            raise UserError(
                "prefix_anchor reads inside the decoder blocks, where re-entrant gradient checkpointing leaves no "
                "graph; write --gradient_checkpointing_kwargs '{\"use_reentrant\": false}', or turn checkpointing off"
            ) from error

    def _draw_anchors(self, trainer: Host, turn: int, micro_batches: int) -> None:
        super()._draw_anchors(trainer, turn, 1)

    def separate_pass(self, trainer: Host, model: nn.Module) -> Tensor | None:
        """Run the pass once per optimiser step, because the prefix is the same in every micro-batch."""
        return super().separate_pass(trainer, model) if self._micro == 0 else None

    def sums(self, values_LBTk: Tensor, reference_LBTk: Tensor, mask_BT: Tensor) -> Tensor:
        trained, start = (x.unflatten(-1, (2, -1)) for x in (values_LBTk, reference_LBTk))
        relative_LBT2 = (trained - start).square().sum(-1) / start.square().sum(-1)
        return relative_LBT2.mean(-1)[:, mask_BT].sum(-1)

    def shifted(self, values_LBTk: Tensor) -> Tensor:
        """Return the keys and values with the opposite sign."""
        return -values_LBTk

    def cache_facts(self) -> dict[str, Any]:
        return {
            "stream": "keys and values", "layers": self.layers, "instruct": self._fingerprint,
            "layers_path": self._layers_path,
        }  # fmt: skip


def _prompts(rows: Sequence[Document]) -> list[tuple[int, ...]]:
    """Return the token ids before each row's completion. A row without a completion is all prompt."""
    return [tuple(row.input_ids[: row.mask.index(True)] if any(row.mask) else row.input_ids) for row in rows]


def shared_by_most(rows: Sequence[Document]) -> int:
    """Count the tokens with which at least nine of ten prompts begin alike.

    Args:
        rows: as in `common_prefix`.
    """
    prompts, length = _prompts(rows), 0
    needed = _MOST * len(prompts)
    while prompts:
        following = Counter(prompt[length] for prompt in prompts if len(prompt) > length)
        token, count = following.most_common(1)[0] if following else (None, 0)
        if count < needed:
            break
        prompts = [prompt for prompt in prompts if len(prompt) > length and prompt[length] == token]
        length += 1
    return length


def common_prefix(rows: Sequence[Document]) -> tuple[int, ...]:
    """Return the longest common beginning of the rows' prompts, as token ids.

    Args:
        rows: rows with the mask of the completion role. A row without a completion is all prompt.
    """
    prompts = _prompts(rows)
    if not prompts:
        return ()
    # All prompts share what the first and the last prompt in sorted order share.
    pairs = zip(min(prompts), max(prompts), strict=False)
    return tuple(token for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
