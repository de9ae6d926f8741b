"""Where answers come from: a model loaded here, perhaps under an intervention, or a server with OpenAI's interface."""

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
from ..answers.records import Answer, AnswerRequest, answered, prompt_facts
from ..answers.sample import Sampling, sample_answers
from ..errors import UserError
from ..files.artifacts import sha256_file
from ..interventions.apply import ablate, steer
from ..models.layers import parse_layers
from ..models.load import LoadOptions, load_config, load_model, load_tokenizer, model_fingerprint, tokenizer_fingerprint
from ..subspace.file import Subspace

Batches = Iterator[list[Answer]]


class AnswerSource(Protocol):
    """What answers can be had from. arm: the facts that decide an answer beside its prompt, all JSON."""

    arm: dict[str, Any]

    def batches(self, asked: Sequence[AnswerRequest]) -> AbstractContextManager[Batches]:
        """The answers as they come, some perhaps missing. Raises UserError on entering, before any work."""

    def problems(self) -> list[str]:
        """Why answers are missing, one line each."""


class ModelHere:
    """A folder or Hub model loaded on this machine."""

    def __init__(self, flags: argparse.Namespace, sampling: Sampling) -> None:
        """Reads all but the weights. Raises UserError."""
        self._flags, self._sampling = flags, sampling
        self._options = LoadOptions(
            flags.attn_implementation, flags.trust_remote_code, flags.layers_path, flags.device_map
        )
        self._dtype: str = flags.dtype or "auto"
        self._tokenizer = load_tokenizer(flags.model, self._options)
        self._interventions = {
            what: _Intervention(what, flags, tokenizer_fingerprint(self._tokenizer))
            for what in ("ablate", "steer")
            if getattr(flags, what) is not None
        }
        self.arm = {
            "model": model_fingerprint(flags.model),
            "tokenizer": tokenizer_fingerprint(self._tokenizer),
            "dtype": self._resolved_dtype(),
            **asdict(sampling),
            **{what: one.facts for what, one in self._interventions.items()},
            # Draws other samples than batches do.
            **({"continuous_batching": True} if flags.continuous_batching else {}),
        }

    def _resolved_dtype(self) -> str:
        if self._dtype != "auto":
            return self._dtype
        return str(load_config(self._flags.model, self._options).dtype or "float32").removeprefix("torch.")

    @contextmanager
    def batches(self, asked: Sequence[AnswerRequest]) -> Iterator[Batches]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(self._flags.model, dtype=self._dtype, device=device, options=self._options)
        provenance = {"arm": self.arm, "model": str(self._flags.model), "holdfast": version("holdfast")}
        with ExitStack() as stack:
            for one in self._interventions.values():
                stack.enter_context(one.on(model))
            sample = sample_continuously if self._flags.continuous_batching else sample_answers
            yield sample(model, self._tokenizer, asked, self._sampling, provenance, self._flags.batch_size)

    def problems(self) -> list[str]:
        return []


class _Intervention:
    """`--ablate` or `--steer`: what is done with the directions of a subspace file."""

    def __init__(self, what: str, flags: argparse.Namespace, tokenizer: str) -> None:
        path = getattr(flags, what)
        subspace = Subspace.load(path)
        if subspace.provenance.tokenizer_fingerprint != tokenizer:
            raise UserError(
                f"--{what} {path} was built with another tokenizer than that of --model {flags.model}: use a subspace "
                "of this model or of the one it was tuned from"
            )
        asked = flags.intervention_layers
        layers = sorted(subspace.bases) if asked is None else parse_layers(asked, max(subspace.bases) + 1)
        self._bases = subspace.restrict(layers, subspace.provenance.rank).bases
        self._what, self._flags = what, flags
        self._directions = _toward_base(subspace, layers, path) if what == "steer" else {}
        size = {"dose": flags.dose} if what == "ablate" else {"alpha": flags.alpha, "unit": flags.steer_unit}
        self.facts = {"subspace": sha256_file(path), "layers": layers, **size}

    def on(self, model: nn.Module) -> AbstractContextManager[None]:
        """The intervention on a model."""
        path = self._flags.layers_path
        if self._what == "ablate":
            return ablate(model, self._bases, dose=self._flags.dose, layers_path=path)
        unit = self._flags.steer_unit
        return steer(model, self._directions, self._flags.alpha, unit=unit, layers_path=path)


def _toward_base(subspace: Subspace, layers: Sequence[int], path: object) -> dict[int, Tensor]:
    """Per layer [d], the mean step away from alignment inside the subspace."""
    if subspace.base_gap is None:
        raise UserError(
            f"--steer {path} does not say which way leads away from alignment (method {subspace.provenance.method}): "
            "use a subspace of method contrastive, difference_in_means or svd"
        )
    return {layer: subspace.bases[layer] @ subspace.base_gap[layer] for layer in layers}


class ModelOnServer:
    """A model behind OpenAI's chat completions; several requests are under way at a time."""

    def __init__(self, flags: argparse.Namespace, sampling: Sampling) -> None:
        """Asks nothing yet. Raises UserError."""
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
    def batches(self, asked: Sequence[AnswerRequest]) -> Iterator[Batches]:
        pool = ThreadPoolExecutor(self._flags.concurrency)
        try:
            under_way = [pool.submit(self._ask, part) for part in _requests(asked, self._flags.batch_size)]
            yield (_result(future) for future in as_completed(under_way))
        finally:
            # What has not begun is not asked; what is under way ends by its time limit.
            pool.shutdown(cancel_futures=True)

    def _ask(self, part: list[AnswerRequest]) -> list[Answer]:
        """One request for several samples of one prompt."""
        sampling, prompt = self._sampling, part[0].prompt
        facts = json.dumps([sampling.seed, *prompt_facts(prompt), part[0].sample])
        texts = self._server.complete(
            prompt.messages,
            n=len(part),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            seed=int.from_bytes(hashlib.sha256(facts.encode()).digest()[:3], "big"),
        )
        provenance = {"arm": self.arm, "model": self._flags.generate_model, "holdfast": version("holdfast")}
        return [
            answered(one, text, "unknown", provenance)
            for one, text in zip(part, texts, strict=True)
            if text is not None
        ]

    def problems(self) -> list[str]:
        return [f"{count} answers: {reason}" for reason, count in self._server.failures.most_common()]


def _result(future: Future[list[Answer]]) -> list[Answer]:
    return future.result()


def _requests(asked: Sequence[AnswerRequest], batch_size: int) -> list[list[AnswerRequest]]:
    """Samples of one prompt together, at most batch_size."""
    groups = [list(group) for _, group in groupby(asked, key=lambda one: id(one.prompt))]
    return [group[at : at + batch_size] for group in groups for at in range(0, len(group), batch_size)]
