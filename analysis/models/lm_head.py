"""Compute log-probability and entropy of next tokens from final states, without the [B, T, V] tensor of logits.

The caller selects the final states of the positions that it needs. The LM head then runs on chunks of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..errors import UserError
from .layers import find_backbone, unwrap

# Number of logits in memory at once: 2**24 float32 are 64 MiB, about 110 positions of a large vocabulary. With a fourth
# of this number a CPU takes twice the time, because each chunk reads the head's weights from memory again.
_CHUNK_LOGITS = 2**24
# On a CPU the logits are then reduced in parts that fit into its cache, which takes a quarter of the time.
_CACHED_LOGITS = 2**19

Logits = Callable[[Tensor], Tensor]


def logits_of(model: nn.Module) -> Logits:
    """Return the function from final states [N, d] to float32 logits [N, V], with the architecture's scale and cap.

    The head is called as a module, so that its hooks gather a sharded weight.
    """
    inner = unwrap(model)
    head: nn.Module = inner.get_output_embeddings()
    scale, cap = _logit_shape(inner.config.get_text_config())
    return lambda states: _shaped(head(states), scale, cap)


def _logit_shape(config: PretrainedConfig) -> tuple[float, float]:
    """Return the factor on a head's output, and its soft cap (0 if there is none)."""
    # The names used by Gemma, by RecurrentGemma and by xLSTM.
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return _logit_scale(config), next((float(cap) for name in caps if (cap := getattr(config, name, None))), 0.0)


def _shaped(values: Tensor, scale: float, cap: float) -> Tensor:
    # Multiplying by 1 would only copy all logits.
    values = values.float() if scale == 1.0 else values.float() * scale
    return cap * torch.tanh(values / cap) if cap else values


def _logit_scale(config: PretrainedConfig) -> float:
    """Return the factor on the logits: Cohere multiplies them, Granite divides them, Falcon-H1 uses another name."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    if getattr(config, "logits_scaling", None) is not None:
        return 1.0 / float(config.logits_scaling)
    return 1.0


@torch.no_grad()
def prove_head(model: nn.Module) -> None:
    """Prove on four tokens that the backbone followed by `logits_of` gives the model's logits.

    Raises:
        UserError: an architecture that computes something else between its backbone and its logits.
    """
    device = next(model.parameters()).device
    ids = torch.arange(1, 5, device=device).remainder(unwrap(model).config.get_text_config().vocab_size)[None]
    expected = model(input_ids=ids, use_cache=False).logits
    computed = logits_of(model)(find_backbone(model)(input_ids=ids, use_cache=False).last_hidden_state)
    # Half-precision models scale and cap their logits in half precision, with rounding errors below a hundredth.
    tolerance = 1e-4 if expected.dtype == torch.float32 else 1e-2
    if not torch.allclose(expected.float(), computed, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
        raise UserError(
            f"{type(unwrap(model)).__name__} does more than a linear head between its last block and its logits: "
            "its log-probabilities cannot be read chunk by chunk; use another architecture"
        )


@torch.no_grad()
def token_statistics(
    model: nn.Module, states: Tensor, targets: Tensor, *, entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the log-probability [N] of `targets` [N] and the next-token entropy [N], in nats, float32.

    Args:
        model: the model whose LM head is used.
        states: final states [N, d] at the positions that predict the targets.
        entropy: whether to compute entropies; if False, the second tensor is empty.
    """
    head, vocabulary = logits_of(model), unwrap(model).config.get_text_config().vocab_size
    step = max(1, _CHUNK_LOGITS // vocabulary)
    chunks = zip(states.split(step), targets.split(step), strict=True)
    # The logits get no name here, so that they are freed before the next chunk's logits take the same memory.
    parts = [_reduced(head(state), chunk, entropy) for state, chunk in chunks]
    return torch.cat([log_probs for log_probs, _ in parts]), torch.cat([entropies for _, entropies in parts])


def _reduced(logits: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
    """Return the log-probability [n] of the targets and the entropy [n] (empty if not requested) from logits [n, V].

    The logits are overwritten. The function makes as few passes over them as possible, because these passes would cost
    a third of the matrix product that makes the logits.
    """
    log_probs, entropies = [], []
    part = max(1, _CACHED_LOGITS // logits.shape[-1]) if logits.device.type == "cpu" else max(1, len(logits))
    for scores, target in zip(logits.split(part), targets.split(part), strict=True):
        scores -= scores.amax(-1, keepdim=True)
        weights = scores.exp()
        total = weights.sum(-1)
        normaliser = total.log()
        log_probs.append(scores.gather(-1, target[:, None])[:, 0] - normaliser)
        if entropy:
            entropies.append(normaliser - torch.linalg.vecdot(weights, scores) / total)
    return torch.cat(log_probs), torch.cat(entropies) if entropies else logits.new_empty(0)


@dataclass(frozen=True)
class StoredHead:
    """An LM head without its model, called like the function from `logits_of`.

    weight: [V, d] in the head's dtype. bias: [V], or None. scale: factor on the output. cap: soft cap, 0 for none.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    cap: float

    @classmethod
    def of(cls, model: nn.Module) -> "StoredHead":
        """Copy a model's head to the CPU. An adapter on the head is merged into the model first.

        Raises:
            UserError: a head that is not a linear layer.
        """
        head = unwrap(model).get_output_embeddings()
        if not isinstance(head, nn.Linear) and isinstance(model, PeftModel):
            head = unwrap(model.merge_and_unload()).get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UserError(
                f"{type(head).__name__} is not a linear LM head, so the family divergence cannot keep it: leave "
                "divergence out of --families"
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
    """Return KL(model || other) [N] in nats for each of the other models, float32 on the CPU, chunk by chunk.

    Args:
        logits: the model's head. Every rank calls it equally often.
        states: the model's final states [N, d].
        others: the head and the final states [N, d] of each other model.
        device: where the heads run.
    """
    chunks: dict[str, list[Tensor]] = {name: [torch.zeros(0)] for name in others}
    # The first chunk is a single position, which shows the size of the vocabulary.
    start, step = 0, 1
    while start < len(states):
        part = slice(start, start + step)
        log_probs = logits(states[part].to(device)).log_softmax(-1)
        for name, (head, other_states) in others.items():
            other = head(other_states[part].to(device)).log_softmax(-1)
            chunks[name].append((log_probs.exp() * (log_probs - other)).sum(-1).cpu())
        start += len(log_probs)
        step = max(1, _CHUNK_LOGITS // log_probs.shape[-1])
    return {name: torch.cat(parts) for name, parts in chunks.items()}


@torch.no_grad()
def top_tokens(logits: Logits, states: Tensor, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the `count` most probable next tokens after each of N states [N, d], on the CPU.

    Returns:
        Token ids [N, count] and their probabilities [N, count].
    """
    probabilities, ids = logits(states.to(device)).softmax(-1).topk(count)
    return ids.cpu(), probabilities.cpu()
