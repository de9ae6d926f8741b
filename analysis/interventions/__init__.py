"""Intervene on the residual stream while a model runs: ablate, steer, patch (METRICS.md families 7 and 8).

    with ablate(model, {12: basis}):
        model.generate(**batch)

Interventions are context managers. They nest, also on one layer (the outer one acts first), are removed whatever
happens, never write in place, pass gradients on, and prove themselves on entering (`intervention_proof`). Layers are
decoder blocks' outputs; `hooks.EMBEDDING` (-1) is the stream that enters block 0. Bases and directions may lie on any
device and in any precision: sums run in float32 or better, and the stream keeps its own precision. A compiled model
passes hooks by unless `torch._dynamo.config.skip_nnmodule_hook_guards` is False, and is refused where it does; blocks
compiled one by one, and what `generate` compiles itself, work.

`positions` says which tokens change: "all" (padding too, which nothing reads); "prompt" or "completion", told apart
by the KV cache of `generate` (the first call is the prompt); `Columns`, by column of the padded batch, with or without
a cache; or a callable of the `ForwardPass` giving bool [B, T].
"""

from ..models.hooks import EMBEDDING
from .apply import ablate, patch_states, read_states, steer
from .changes import DonorStates
from .positions import Columns, ForwardPass, Positions

__all__ = [
    "EMBEDDING", "Columns", "DonorStates", "ForwardPass", "Positions", "ablate", "patch_states", "read_states", "steer",
]  # fmt: skip
