"""Log-probability and entropy of next tokens from final states, without the [B, T, V] tensor of logits.

The caller compacts to the positions that count; the head then runs on chunks of them.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from .errors import UserError
from .layers import find_backbone, unwrap

# Logits held at once: 2**22 float32 are 16 MiB, which stays in cache on a CPU and keeps a GPU busy.
_CHUNK_LOGITS = 2**22


def logits_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The map from final states [N, d] to float32 logits [N, V], with the architecture's scale and soft cap.

    The head is called as a module, so that a sharded weight is gathered by its own hooks.
    """
    inner = unwrap(model)
    head: nn.Module = inner.get_output_embeddings()
    config = inner.config.get_text_config()
    scale, cap = _logit_scale(config), getattr(config, "final_logit_softcapping", None)

    def logits(states: Tensor) -> Tensor:
        values = head(states).float() * scale
        return values if cap is None else cap * torch.tanh(values / cap)

    return logits


def _logit_scale(config: PretrainedConfig) -> float:
    """Cohere multiplies its logits, Granite divides them, Falcon-H1 has its own name for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    if getattr(config, "logits_scaling", None) is not None:
        return 1.0 / float(config.logits_scaling)
    return 1.0


@torch.no_grad()
def prove_head(model: nn.Module) -> None:
    """Prove on four tokens that backbone plus head give the model's own logits.

    Raises:
        UserError: an architecture that does something else between its backbone and its logits.
    """
    device = next(model.parameters()).device
    ids = torch.arange(1, 5, device=device).remainder(unwrap(model).config.get_text_config().vocab_size)[None]
    own = model(input_ids=ids, use_cache=False).logits.float()
    ours = logits_of(model)(find_backbone(model)(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(own, ours, rtol=1e-2, atol=1e-2 * float(own.abs().max())):
        raise UserError(
            f"{type(unwrap(model)).__name__} does more than a linear head between its last block and its logits: "
            "its log-probabilities cannot be read chunk by chunk; use another architecture"
        )


@torch.no_grad()
def token_statistics(
    model: nn.Module, states: Tensor, targets: Tensor, *, entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probability [N] of `targets` [N] and entropy [N] of the next-token distribution, in nats, float32.

    Args:
        model: whose head is read.
        states: final states [N, d] at the positions that predict the targets.
        entropy: whether entropies are wanted; without, the second tensor is empty.
    """
    head, vocabulary = logits_of(model), unwrap(model).config.get_text_config().vocab_size
    log_probs, entropies = [], []
    step = max(1, _CHUNK_LOGITS // vocabulary)
    for state, chunk in zip(states.split(step), targets.split(step), strict=True):
        scores = head(state)
        normaliser = scores.logsumexp(-1)
        log_probs.append(scores.gather(-1, chunk[:, None])[:, 0] - normaliser)
        if entropy:
            weights = (scores - normaliser[:, None]).exp_()
            entropies.append(normaliser - (weights * scores).sum(-1))
    return torch.cat(log_probs), torch.cat(entropies) if entropies else states.new_empty(0, dtype=torch.float32)
