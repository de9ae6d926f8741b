"""A client for servers with OpenAI's chat completions (vLLM, SGLang, OpenAI, …): answers and token probabilities.

The `openai` package does the transport, the retries and the back-off. This client adds three things: failures become
reasons that can be counted, a server that has failed many times in a row is not asked again, and no message contains
the key. Usage:

    server = ChatServer("http://localhost:8000/v1", "my-model", key_variable="")
    reply = server.reply([{"role": "user", "content": "Hello"}], max_tokens=8)
"""

import json
import math
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..errors import UserError
from .pacing import Pace

Messages = Sequence[Mapping[str, str]]

# Stop after this many consecutive failed requests, each with all its retries: the server is down.
GIVE_UP = 8
_SHOWN = 160  # characters of a server's error message that are shown


class NoReply(Exception):
    """A request got no usable reply. The text is the reason, which is the same for all failures of one kind."""


@dataclass(frozen=True)
class Reply:
    """A reply of a server.

    text: the answer, or None if the server gave no text.
    tokens: the tokens of the answer as text; empty if the server returned no log-probabilities.
    first: {token: probability} of the candidates for the first token that the server returned, or None if it returned
        none.
    """

    text: str | None
    tokens: tuple[str, ...] = ()
    first: dict[str, float] | None = None


class ChatServer:
    """A model on a server. Its methods may be called from many threads.

    Attributes:
        failures: {reason: number of answers that `complete` and `first_token_probabilities` did not get}.

    Args:
        url: the address, up to and including /v1.
        model: the name that the server gives the model.
        key_variable: environment variable that holds the key, the only place where it is read; "" for a server that
            needs no key.
        requests_per_minute: limit on attempts, including retries, which are spread evenly; None sets no limit.
        timeout: seconds without a byte from the server after which an attempt fails.
        max_retries: further attempts after a timeout, a lost connection, or status 408, 409, 429 or 5xx, with growing
            pauses or the server's Retry-After (up to two minutes).

    Raises:
        UserError: the `openai` package or the key is missing, or the address is invalid or contains a secret.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        requests_per_minute: float | None = None,
        timeout: float = 60,
        max_retries: int = 5,
    ) -> None:
        openai = _package()
        _check_address(url)
        if not model:
            raise UserError(f"no model was named for {url}; write the name that the server gives the model")
        self.url, self.model, self.timeout, self.key_variable = url, model, timeout, key_variable
        self.failures: Counter[str] = Counter()
        self._key = _key(key_variable, url)
        self._consecutive_failures, self._lock = 0, threading.Lock()
        pace = Pace(requests_per_minute)
        self._client = openai.OpenAI(
            base_url=url,
            # The package always sends a key; a server that needs none ignores it.
            api_key=self._key or "none",
            timeout=timeout,
            max_retries=max_retries,
            # The hook runs on each attempt, so retries are paced too.
            http_client=openai.DefaultHttpxClient(event_hooks={"request": [lambda request: pace.wait()]}),
        )

    def complete(
        self, messages: Messages, *, n: int, temperature: float, top_p: float, max_tokens: int, seed: int | None
    ) -> list[str | None]:
        """Sample n answers. An answer is None if the server gave no text or failed (see `failures`).

        A server that returns fewer than n answers is asked again for the rest, with another seed.

        Raises:
            UserError: the server refuses the key or does not know the model.
        """
        texts: list[str | None] = []
        while len(texts) < n:
            body = {"n": n - len(texts), "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
            try:
                choices = self._choices(messages, body | ({} if seed is None else {"seed": seed + len(texts)}))
            except NoReply as reason:
                self._count(reason, n - len(texts))
                return texts + [None] * (n - len(texts))
            texts += [choice.text for choice in choices[: n - len(texts)]]
        return texts

    def reply(self, messages: Messages, *, max_tokens: int, top_logprobs: int | None = None) -> Reply:
        """Ask for the answer at temperature 0.

        Args:
            top_logprobs: number of candidates for the first token whose probabilities are requested; None requests
                none.

        Raises:
            NoReply: the server gave no usable reply; the text says why.
            UserError: the server refuses the key or does not know the model.
        """
        body: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens}
        if top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": top_logprobs}
        return self._choices(messages, body)[0]

    def first_token_probabilities(self, messages: Messages, top_logprobs: int = 20) -> dict[str, float] | None:
        """Return {token: probability} of the likeliest first tokens, or None if there is no usable reply.

        Raises:
            UserError: the server refuses the key or does not know the model.
        """
        try:
            return self.reply(messages, max_tokens=1, top_logprobs=top_logprobs).first
        except NoReply as reason:
            self._count(reason, 1)
            return None

    def _count(self, reason: NoReply, answers: int) -> None:
        with self._lock:
            self.failures[str(reason)] += answers

    def _choices(self, messages: Messages, body: dict[str, Any]) -> list[Reply]:
        """Ask with retries, unless the server is down. Raises NoReply or UserError."""
        with self._lock:
            if self._consecutive_failures >= GIVE_UP:
                raise NoReply(f"not asked: the server failed {GIVE_UP} times in a row")
        try:
            choices = self._ask(messages, body)
            if "logprobs" in body and choices[0].text and choices[0].first is None:
                raise _ServerFailure("the server returned no log-probabilities")
        except _ServerFailure as failure:
            with self._lock:
                self._consecutive_failures += 1
            raise NoReply(str(failure)) from None
        with self._lock:
            self._consecutive_failures = 0
        return choices

    def _ask(self, messages: Messages, body: dict[str, Any]) -> list[Reply]:
        """Send one request, with its retries."""
        openai = _package()
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=self.model, messages=[dict(message) for message in messages], **body
            )
            return [_parse_choice(choice) for choice in _choices(raw.text)]
        except openai.APITimeoutError:
            raise _ServerFailure(f"no reply within {self.timeout:g} s") from None
        except openai.APIConnectionError:
            raise _ServerFailure("no connection to the server") from None
        except openai.APIStatusError as error:
            raise self._status_error(error.status_code, error.message) from None
        except (KeyError, TypeError, ValueError, AttributeError):
            raise _ServerFailure("the reply is not a chat completion") from None

    def _status_error(self, status: int, message: str) -> Exception:
        """Return the exception for an HTTP status: UserError, _ServerFailure, or NoReply."""
        shown = self._without_key(message)
        if status in (401, 403):
            where = f"the key in ${self.key_variable}" if self.key_variable else "requests without a key"
            return UserError(f"{self.url} refuses {where} ({status}: {shown}); set a key that it accepts")
        if status == 404:
            return UserError(
                f"{self.url} has no chat completions of a model {self.model!r} (404: {shown}); check the address, "
                "which usually ends in /v1, and the model's name"
            )
        if status == 429:
            return _ServerFailure("too many requests (429)")
        if status >= 500:
            return _ServerFailure(f"an error of the server ({status})")
        return NoReply(f"the server refused the request ({status}: {shown})")

    def _without_key(self, message: str) -> str:
        """Return a server's message on one line and without the key, because some servers repeat the key."""
        line = " ".join(str(message).split())
        return (line.replace(self._key, "[key]") if self._key else line)[:_SHOWN]


class _ServerFailure(Exception):
    """A failure that may mean that the server is down."""


def _package() -> Any:
    try:
        import openai
    except ImportError:
        raise UserError(
            'asking a server requires the package openai, which is not installed: pip install "holdfast[judge]"'
        ) from None
    return openai


def _check_address(url: str) -> None:
    """Raise UserError for an address that is invalid or contains a secret, which the error does not repeat."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise UserError("the server's address cannot be read; write it like http://localhost:8000/v1") from None
    if parts.username is not None or parts.password is not None or parts.query:
        raise UserError("the server's address holds a user, a key or a query; keys are read from the environment only")
    if not valid:
        raise UserError(f"the server's address is {url!r}; write it like http://localhost:8000/v1")


def _key(variable: str, url: str) -> str | None:
    """Read the key from the environment; None if the variable's name is empty. Raises UserError."""
    if not variable:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f'no key for {url}: set the environment variable {variable}, or name no variable, "", if the server needs '
            "no key"
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the key in ${variable} holds characters that cannot be part of a key; set it again")
    return key


def _choices(text: str) -> list[Any]:
    """Return the choices of a chat completion. Raises KeyError, TypeError or ValueError for anything else."""
    choices = json.loads(text)["choices"]
    if not isinstance(choices, list) or not choices:
        raise ValueError("no choices")
    return choices


def _parse_choice(choice: Any) -> Reply:
    """Parse a choice of a chat completion. Raises KeyError, TypeError, ValueError or AttributeError if malformed."""
    text = choice["message"].get("content")
    if text is not None and not isinstance(text, str):
        raise ValueError("content is not text")
    positions = (choice.get("logprobs") or {}).get("content") or []
    if not positions:
        return Reply(text)
    first: dict[str, float] = {}
    candidates = positions[0].get("top_logprobs") or []
    # The sampled token may be missing from the likeliest ones.
    sampled = [] if positions[0]["token"] in [candidate["token"] for candidate in candidates] else [positions[0]]
    for candidate in [*candidates, *sampled]:
        probability = math.exp(min(float(candidate["logprob"]), 0.0))
        if math.isnan(probability):
            raise ValueError("a log-probability is not a number")
        # Tokens that differ in their bytes may have the same text.
        first[str(candidate["token"])] = first.get(str(candidate["token"]), 0.0) + probability
    return Reply(text, tuple(str(position["token"]) for position in positions), first)
