"""Two rows, the second padded on the left, and what a model makes of them: logits, residual streams, tokens."""

import numpy as np
import torch
from holdfast.analysis.models.hooks import capture
from torch import nn
from toys.chat_models import DEPTH, WIDTH

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 30, 31, 32, 33]])
MASK = (IDS != 0).long()
REAL = MASK.bool()


def basis(rank: int = 2, seed: int = 0) -> torch.Tensor:
    """A random orthonormal basis [WIDTH, rank]."""
    drawn = np.random.default_rng(seed).standard_normal((WIDTH, rank))
    return torch.from_numpy(np.linalg.qr(drawn)[0]).float()


def logits(model: nn.Module) -> torch.Tensor:
    """[tokens, V] of the tokens that are not padding."""
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits[REAL]


def streams(model: nn.Module, layers=range(DEPTH)) -> dict[int, np.ndarray]:
    """[tokens, WIDTH] by layer, of the tokens that are not padding, in float64."""
    with torch.no_grad(), capture(model, layers) as seen:
        model(input_ids=IDS, attention_mask=MASK, use_cache=False)
        return {layer: hidden[REAL].double().numpy() for layer, hidden in seen.items()}


def generated(model: nn.Module, steps: int, **flags) -> torch.Tensor:
    """Greedy tokens [2, steps]."""
    settings = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, **flags}
    # No end of text: the rows are to have one length.
    return model.generate(input_ids=IDS, attention_mask=MASK, eos_token_id=None, **settings)[:, IDS.shape[1] :]
