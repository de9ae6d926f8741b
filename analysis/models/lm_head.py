"""Log-probability and entropy of next tokens from final states, without the [B, T, V] tensor of logits.

The caller compacts to the positions that count; the head then runs on chunks of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..errors import UserError
from .layers import find_backbone, unwrap

# Logits held at once: 2**24 float32 are 64 MiB, about 110 positions of a large vocabulary. With a quarter of that a CPU
# spends twice the time, since the head's weights are read from memory anew for each chunk.
_CHUNK_LOGITS = 2**24
# On a CPU they are then summed up in parts that stay in its cache: a quarter of the time.
_CACHED_LOGITS = 2**19

Logits = Callable[[Tensor], Tensor]


def logits_of(model: nn.Module) -> Logits:
    """The map from final states [N, d] to float32 logits [N, V], with the architecture's scale and soft cap.

    The head is called as a module, so that a sharded weight is gathered by its own hooks.
    """
    inner = unwrap(model)
    head: nn.Module = inner.get_output_embeddings()
    scale, cap = _logit_shape(inner.config.get_text_config())
    return lambda states: _shaped(head(states), scale, cap)


def _logit_shape(config: PretrainedConfig) -> tuple[float, float]:
    """The factor on a head's output, and its soft cap (0: none)."""
    # Gemma's name; RecurrentGemma and xLSTM have their own.
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return _logit_scale(config), next((float(cap) for name in caps if (cap := getattr(config, name, None))), 0.0)


def _shaped(values: Tensor, scale: float, cap: float) -> Tensor:
    # A factor of 1 would copy all logits.
    values = values.float() if scale == 1.0 else values.float() * scale
    return cap * torch.tanh(values / cap) if cap else values


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
    own = model(input_ids=ids, use_cache=False).logits
    ours = logits_of(model)(find_backbone(model)(input_ids=ids, use_cache=False).last_hidden_state)
    # Half-precision models shape their logits in half precision, which is rounded to under a hundredth.
    tolerance = 1e-4 if own.dtype == torch.float32 else 1e-2
    if not torch.allclose(own.float(), ours, rtol=tolerance, atol=tolerance * float(own.abs().max())):
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
    step = max(1, _CHUNK_LOGITS // vocabulary)
    chunks = zip(states.split(step), targets.split(step), strict=True)
    # No name for the logits here: they are to be gone before the next ones are made, in the same memory.
    found = [_reduced(head(state), chunk, entropy) for state, chunk in chunks]
    return torch.cat([log_probs for log_probs, _ in found]), torch.cat([entropies for _, entropies in found])


def _reduced(logits: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
    """Log-probability [n] of the targets and, if wanted, entropy [n] from logits [n, V], which are used up.

    In as few passes as there can be: they would cost a third of the product that makes the logits.
    """
    log_probs, entropies = [], []
    part = max(1, _CACHED_LOGITS // logits.shape[-1]) if logits.device.type == "cpu" else max(1, len(logits))
    for scores, wanted in zip(logits.split(part), targets.split(part), strict=True):
        scores -= scores.amax(-1, keepdim=True)
        weights = scores.exp()
        total = weights.sum(-1)
        normaliser = total.log()
        log_probs.append(scores.gather(-1, wanted[:, None])[:, 0] - normaliser)
        if entropy:
            entropies.append(normaliser - torch.linalg.vecdot(weights, scores) / total)
    return torch.cat(log_probs), torch.cat(entropies) if entropies else logits.new_empty(0)


@dataclass(frozen=True)
class StoredHead:
    """An LM head kept without its model, called like `logits_of`: weight [V, d] and bias [V] (or none) in its dtype."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    cap: float

    @classmethod
    def of(cls, model: nn.Module) -> "StoredHead":
        """A copy of a model's head on the CPU; an adapter on the head is merged into the model first."""
        head = unwrap(model).get_output_embeddings()
        if not isinstance(head, nn.Linear) and isinstance(model, PeftModel):
            head = unwrap(model.merge_and_unload()).get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UserError(
                f"{type(head).__name__} is not a linear LM head, so divergence cannot keep it: leave it out"
            )
        bias = None if head.bias is None else head.bias.detach().cpu().clone()
        return cls(head.weight.detach().cpu().clone(), bias, *_logit_shape(unwrap(model).config.get_text_config()))

    def __call__(self, states: Tensor) -> Tensor:
        return _shaped(nn.functional.linear(states, self.weight, self.bias), self.scale, self.cap)

    def to(self, device: torch.device) -> "StoredHead":
        bias = None if self.bias is None else self.bias.to(device)
        return StoredHead(self.weight.to(device), bias, self.scale, self.cap)


@torch.no_grad()
def divergences(
    logits: Logits, states: Tensor, others: Mapping[str, tuple[Logits, Tensor]], device: torch.device
) -> dict[str, Tensor]:
    """KL(own || other) [N] in nats for each of the others, float32 on the CPU; N positions in chunks.

    Args:
        logits: the own head, called alike often on every rank.
        states: own final states [N, d]; those of the others are [N, d] too.
    """
    found: dict[str, list[Tensor]] = {name: [torch.zeros(0)] for name in others}
    # The first position alone, which tells how wide the vocabulary is.
    start, step = 0, 1
    while start < len(states):
        part = slice(start, start + step)
        own = logits(states[part].to(device)).log_softmax(-1)
        for name, (head, theirs) in others.items():
            other = head(theirs[part].to(device)).log_softmax(-1)
            found[name].append((own.exp() * (own - other)).sum(-1).cpu())
        start += len(own)
        step = max(1, _CHUNK_LOGITS // own.shape[-1])
    return {name: torch.cat(parts) for name, parts in found.items()}


@torch.no_grad()
def top_tokens(logits: Logits, states: Tensor, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The `count` likeliest next tokens after each of N states [N, d]: ids [N, count] and probabilities, on the CPU."""
    chances, ids = logits(states.to(device)).softmax(-1).topk(count)
    return ids.cpu(), chances.cpu()
