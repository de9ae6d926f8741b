"""The sources of sampled answers: a model loaded on this machine, or a server with OpenAI's interface.

An intervention (`--ablate`, `--steer`) can be applied to a model on this machine. Usage:

    source = ServerModel(flags, sampling) if flags.generate_url else LocalModel(flags, sampling)
    with source.batches(requests) as batches:
        for answers in batches:
            ...
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..answers.chat_server import ChatServer
from ..answers.continuous import sample_continuously
from ..answers.records import Answer, AnswerRequest, answer_to, prompt_facts
from ..answers.sample import Sampling, sample_answers
from ..errors import UserError
from ..files.artifacts import sha256_file
from ..interventions.apply import ablate, steer
from ..models.layers import parse_layers
from ..models.load import LoadOptions, load_config, load_model, load_tokenizer, model_fingerprint, tokenizer_fingerprint
from ..subspace.file import Subspace

Batches = Iterator[list[Answer]]


class AnswerSource(Protocol):
    """A source of answers. arm: the facts that decide an answer besides its prompt, as JSON values."""

    arm: dict[str, Any]

    def batches(self, requests: Sequence[AnswerRequest]) -> AbstractContextManager[Batches]:
        """Yield the answers as they come; some may be missing. Raises UserError on entering, before any work."""

    def problems(self) -> list[str]:
        """Return the reasons why answers are missing, one line each."""


class LocalModel:
    """A model from a folder or the Hub, loaded on this machine."""

    def __init__(self, flags: argparse.Namespace, sampling: Sampling) -> None:
        """Read everything except the weights. Raises UserError."""
        self._flags, self._sampling = flags, sampling
        self._options = LoadOptions(
            flags.attn_implementation, flags.trust_remote_code, flags.layers_path, flags.device_map
        )
        self._dtype: str = flags.dtype or "auto"
        self._tokenizer = load_tokenizer(flags.model, self._options)
        self._interventions = {
            name: _Intervention(name, flags, tokenizer_fingerprint(self._tokenizer))
            for name in ("ablate", "steer")
            if getattr(flags, name) is not None
        }
        self.arm = {
            "model": model_fingerprint(flags.model),
            "tokenizer": tokenizer_fingerprint(self._tokenizer),
            "dtype": self._resolved_dtype(),
            **asdict(sampling),
            **{name: intervention.facts for name, intervention in self._interventions.items()},
            # Continuous batching draws other samples than plain batches.
            **({"continuous_batching": True} if flags.continuous_batching else {}),
        }

    def _resolved_dtype(self) -> str:
        if self._dtype != "auto":
            return self._dtype
        return str(load_config(self._flags.model, self._options).dtype or "float32").removeprefix("torch.")

    @contextmanager
    def batches(self, requests: Sequence[AnswerRequest]) -> Iterator[Batches]:
        """Load the model, apply the interventions, and yield the answers. Raises UserError."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(self._flags.model, dtype=self._dtype, device=device, options=self._options)
        provenance = {"arm": self.arm, "model": str(self._flags.model), "holdfast": version("holdfast")}
        with ExitStack() as stack:
            for intervention in self._interventions.values():
                stack.enter_context(intervention.on(model))
            sample = sample_continuously if self._flags.continuous_batching else sample_answers
            yield sample(model, self._tokenizer, requests, self._sampling, provenance, self._flags.batch_size)

    def problems(self) -> list[str]:
        """Return no reasons: no answers are missing."""
        return []


class _Intervention:
    """The intervention of `--ablate` or `--steer`, with the directions of a subspace file.

    Attributes:
        facts: the facts that identify the intervention, as JSON values.
    """

    def __init__(self, name: str, flags: argparse.Namespace, tokenizer: str) -> None:
        """Read the subspace file.

        Args:
            name: "ablate" or "steer".
            tokenizer: fingerprint of the model's tokenizer.

        Raises:
            UserError: the subspace does not fit the tokenizer, or lacks the layers or the direction.
        """
        path = getattr(flags, name)
        subspace = Subspace.load(path)
        if subspace.provenance.tokenizer_fingerprint != tokenizer:
            raise UserError(
                f"--{name} {path} was built with another tokenizer than the tokenizer of --model {flags.model}: use a "
                "subspace of this model, or of the model from which it was fine-tuned"
            )
        spec = flags.intervention_layers
        layers = sorted(subspace.bases) if spec is None else parse_layers(spec, max(subspace.bases) + 1)
        self._bases = subspace.restrict(layers, subspace.provenance.rank).bases
        self._name, self._flags = name, flags
        self._directions = _directions_to_base(subspace, layers, path) if name == "steer" else {}
        size = {"dose": flags.dose} if name == "ablate" else {"alpha": flags.alpha, "unit": flags.steer_unit}
        self.facts = {"subspace": sha256_file(path), "layers": layers, **size}

    def on(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context manager that applies the intervention to a model."""
        layers_path = self._flags.layers_path
        if self._name == "ablate":
            return ablate(model, self._bases, dose=self._flags.dose, layers_path=layers_path)
        unit = self._flags.steer_unit
        return steer(model, self._directions, self._flags.alpha, unit=unit, layers_path=layers_path)


def _directions_to_base(subspace: Subspace, layers: Sequence[int], path: object) -> dict[int, Tensor]:
    """Return {layer: [d]}, the mean step inside the subspace that leads away from alignment.

    Raises:
        UserError: the subspace file, named by `path`, has no such step.
    """
    if subspace.base_gap is None:
        raise UserError(
            f"--steer {path} does not say which way leads away from alignment (method {subspace.provenance.method}): "
            "use a subspace of method contrastive, difference_in_means or svd"
        )
    return {layer: subspace.bases[layer] @ subspace.base_gap[layer] for layer in layers}


class ServerModel:
    """A model on a server with OpenAI's chat completions. Several requests are sent at the same time."""

    def __init__(self, flags: argparse.Namespace, sampling: Sampling) -> None:
        """Create the client, without sending a request. Raises UserError."""
        self._flags, self._sampling = flags, sampling
        self._server = ChatServer(
            flags.generate_url,
            flags.generate_model,
            key_variable=flags.generate_key_variable,
            requests_per_minute=flags.requests_per_minute,
            timeout=flags.generate_timeout,
        )
        self.arm = {"model": flags.generate_model, "server": flags.generate_url, **asdict(sampling)}

    @contextmanager
    def batches(self, requests: Sequence[AnswerRequest]) -> Iterator[Batches]:
        """Send the requests and yield the answers as they come."""
        pool = ThreadPoolExecutor(self._flags.concurrency)
        try:
            futures = [pool.submit(self._ask, batch) for batch in _same_prompt(requests, self._flags.batch_size)]
            yield (_result(future) for future in as_completed(futures))
        finally:
            # Requests that have not started are cancelled. Requests that have started end by their time limit.
            pool.shutdown(cancel_futures=True)

    def _ask(self, batch: list[AnswerRequest]) -> list[Answer]:
        """Send one request to the server for several samples of one prompt."""
        sampling, prompt = self._sampling, batch[0].prompt
        facts = json.dumps([sampling.seed, *prompt_facts(prompt), batch[0].sample])
        texts = self._server.complete(
            prompt.messages,
            n=len(batch),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            seed=int.from_bytes(hashlib.sha256(facts.encode()).digest()[:3], "big"),
        )
        provenance = {"arm": self.arm, "model": self._flags.generate_model, "holdfast": version("holdfast")}
        return [
            answer_to(request, text, "unknown", provenance)
            for request, text in zip(batch, texts, strict=True)
            if text is not None
        ]

    def problems(self) -> list[str]:
        """Return the number of missing answers for each reason, most frequent first."""
        return [f"{count} answers: {reason}" for reason, count in self._server.failures.most_common()]


def _result(future: Future[list[Answer]]) -> list[Answer]:
    return future.result()


def _same_prompt(requests: Sequence[AnswerRequest], batch_size: int) -> list[list[AnswerRequest]]:
    """Split requests into batches of at most batch_size, each for samples of one prompt."""
    groups = [list(group) for _, group in groupby(requests, key=lambda request: id(request.prompt))]
    return [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]
