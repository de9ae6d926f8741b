"""Intervene on the residual stream while a model runs: ablate, steer, patch (see analysis/README.md).

    with ablate(model, {12: basis}):
        model.generate(**batch)

Interventions are context managers. They nest, also on the same layer (the outer one acts first). They are removed when
the context ends, also after an error. They never write in place, they pass gradients on, and they prove on entering
that they work (`proof.py`). A layer is the output of a decoder block; `EMBEDDING` (-1) is the stream that enters block
0. Bases and directions may be on any device and in any precision: sums are computed in float32 or better, and the
stream keeps its precision.

A model compiled by `torch.compile` ignores hooks unless `torch._dynamo.config.skip_nnmodule_hook_guards` is False. If
it ignores them, the model is refused. Blocks that are compiled separately work, and so does what `generate` compiles.

`positions` chooses the tokens that change:

- "all": all tokens, also padding, which nothing reads;
- "prompt" or "completion": told apart by the KV cache of `generate` (the first call is the prompt);
- `Columns`: by column of the padded batch, with or without a KV cache;
- a function from a `ForwardPass` to bool [B, T].
"""

from ..models.hooks import EMBEDDING
from .apply import ablate, patch_states, read_states, steer
from .changes import DonorStates
from .positions import Columns, ForwardPass, Positions

__all__ = [
    "EMBEDDING", "Columns", "DonorStates", "ForwardPass", "Positions", "ablate", "patch_states", "read_states", "steer",
]  # fmt: skip
