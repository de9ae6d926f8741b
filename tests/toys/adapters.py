"""LoRA on the toy model, and plain math of the protections that hold it to the directions of alignment."""

import copy
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from toys.chat_models import toy_model
from toys.plain_math import plain_cross_entropy, sgd_step
from toys.training import moved, task_documents


def lora_model(**changes: Any) -> nn.Module:
    """LoRA of rank 4 on every linear module, with `changes` of its LoraConfig. Every call makes the same weights."""
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    return get_peft_model(toy_model(), LoraConfig(**settings))


def model_of(lora: bool, **changes: Any) -> nn.Module:
    """The toy model with LoRA, or to be trained in full."""
    return lora_model(**changes) if lora else toy_model()


def moved_lora_model(**changes: Any) -> nn.Module:
    """LoRA of scaling 2 whose B is away from zero, so that a term on B A has a gradient from the start."""
    model = lora_model(**{"lora_alpha": 8, **changes})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def base_model() -> nn.Module:
    """A base model for the toy model: every weight differs a little."""
    return moved(toy_model(), seed=2)


def adapted(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """A and B by the plain module's name."""
    parameters = dict(model.named_parameters())
    downs = {name: p for name, p in parameters.items() if "lora_A" in name}
    return {
        name.removeprefix("base_model.model.").split(".lora_A")[0]: (p, parameters[name.replace("lora_A", "lora_B")])
        for name, p in downs.items()
    }


def numpy_projectors(rank: int = 3, instruct: nn.Module | None = None, base: nn.Module | None = None):
    """P = U Uᵀ of every 2-D weight's difference, by numpy's SVD in float64; no entry where nothing differs."""
    instruct_weights = dict((instruct or toy_model()).named_parameters())
    projectors: dict[str, np.ndarray] = {}
    for name, weight in (base or base_model()).named_parameters():
        delta = (instruct_weights[name] - weight).detach().double().numpy()
        if delta.ndim == 2 and delta.any():
            left = np.linalg.svd(delta)[0][:, :rank]
            projectors[name.removesuffix(".weight")] = left @ left.T
    return projectors


def plain_drift_term(model: nn.Module, projectors: dict[str, np.ndarray], scaling: float = 2.0) -> torch.Tensor:
    """Σ ‖(I − P) s B A‖²_F with every matrix written out."""
    total = torch.zeros((), dtype=torch.float64)
    for name, (down, up) in adapted(model).items():
        if name in projectors:
            rest = torch.eye(up.shape[0], dtype=torch.float64) - torch.from_numpy(projectors[name])
            total = total + (rest @ (scaling * up.double() @ down.double())).square().sum()
    return total


def plain_drift_training(
    model: nn.Module, projectors: dict[str, np.ndarray], strength: float, *, rate: float = 0.02, steps: int = 3
) -> nn.Module:
    """Full-batch SGD on cross-entropy + strength x term; returns the trained float64 copy."""
    trained = copy.deepcopy(model).double()
    for _ in range(steps):
        loss = plain_cross_entropy(trained, task_documents()) + strength * plain_drift_term(trained, projectors)
        sgd_step(trained, loss, rate)
    return trained
