"""Random tiny models of the architectures that Holdfast promises to handle; nothing is downloaded."""

from typing import Any

import torch
from toys.chat_models import DEPTH, WIDTH
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_TEXT: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": DEPTH,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3, "initializer_range": 0.3, "tie_word_embeddings": False,
}  # fmt: skip
_VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
           "image_size": 28, "patch_size": 14}  # fmt: skip

# What each architecture needs beside the common shape. The soft caps are small enough to bend these models' logits.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 6},
    "gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 6, "tie_word_embeddings": True},
    "gemma3_text": {"final_logit_softcapping": 2.0, "sliding_window": 6},
    # As published from 4B up: the text model inside one that also sees.
    "gemma3": {"text_config": _TEXT, "vision_config": _VISION, "mm_tokens_per_image": 4, "boi_token_index": 316,
               "eoi_token_index": 317, "image_token_index": 318},
    "phi3": {},
    "olmo2": {},
    "gpt_neox": {},
    "mixtral": {**_EXPERTS},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {**_EXPERTS},
    "llama4_text": {**_EXPERTS, "intermediate_size_mlp": 24},
}  # fmt: skip


def architecture(kind: str, seed: int = 0) -> PreTrainedModel:
    """A random causal LM of three blocks and width 16, float32, in eval mode."""
    torch.manual_seed(seed)
    given = ARCHITECTURES[kind]
    config = AutoConfig.for_model(kind, **(given if "text_config" in given else {**_TEXT, **given}))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
