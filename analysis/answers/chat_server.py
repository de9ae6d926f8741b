"""A client of any server that speaks OpenAI's chat completions (vLLM, SGLang, OpenAI, …): answers and probabilities.

Transport, retries and back-off are the `openai` package's. What is added: failures become reasons that can be counted,
a server that has failed many times in a row is not asked again, and the key is never in any message.
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

# So many requests in a row, each with all its retries, say that the server is down.
GIVE_UP = 8
_SHOWN = 160  # characters of a server's own words


class Unanswered(Exception):
    """A request that got no usable reply; its text is the reason, the same for all requests of one kind."""


@dataclass(frozen=True)
class Reply:
    """What a server said once.

    text: the answer, None where the server gave none. tokens: its first tokens as text. first: probability of each
    token that could have been the first, among those the server showed; None where it showed none.
    """

    text: str | None
    tokens: tuple[str, ...] = ()
    first: dict[str, float] | None = None


class ChatServer:
    """One model of one server. Safe to call from many threads.

    Attributes:
        failures: answers that `complete` and `first_token_probabilities` did not get, by reason.

    Args:
        url: the address up to and with /v1. model: the name the server gives it.
        key_variable: environment variable with the key, read nowhere else; "" for a server that wants none.
        requests_per_minute: attempts, retries among them, are spread so as not to exceed it; None has no limit.
        timeout: seconds without a byte from the server before an attempt counts as failed.
        max_retries: further attempts after a timeout, a lost connection, 408, 409, 429 or 5xx, with growing pauses or
            the server's Retry-After (up to two minutes).

    Raises:
        UserError: no such package, no key, an address that is none or holds a secret.
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
            raise UserError(f"no model was named for {url}; write the name that the server gives it")
        self.url, self.model, self.timeout, self.key_variable = url, model, timeout, key_variable
        self.failures: Counter[str] = Counter()
        self._key = _key(key_variable, url)
        self._in_a_row, self._lock = 0, threading.Lock()
        pace = Pace(requests_per_minute)
        self._client = openai.OpenAI(
            base_url=url,
            # A server that wants no key ignores what it gets, and the package sends something always.
            api_key=self._key or "none",
            timeout=timeout,
            max_retries=max_retries,
            # On each attempt, so that retries are paced too.
            http_client=openai.DefaultHttpxClient(event_hooks={"request": [lambda request: pace.wait()]}),
        )

    def complete(
        self, messages: Messages, *, n: int, temperature: float, top_p: float, max_tokens: int, seed: int | None
    ) -> list[str | None]:
        """n sampled answers; None where the server gave no text, or none at all (see `failures`).

        A server that returns fewer than n is asked again for the rest, with another seed.

        Raises:
            UserError: the server refuses the key or does not know the model.
        """
        texts: list[str | None] = []
        while len(texts) < n:
            body = {"n": n - len(texts), "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
            try:
                choices = self._choices(messages, body | ({} if seed is None else {"seed": seed + len(texts)}))
            except Unanswered as reason:
                self._count(reason, n - len(texts))
                return texts + [None] * (n - len(texts))
            texts += [choice.text for choice in choices[: n - len(texts)]]
        return texts

    def reply(self, messages: Messages, *, max_tokens: int, top_logprobs: int | None = None) -> Reply:
        """The answer at temperature 0, with its first token's probabilities when `top_logprobs` of them are asked for.

        Raises:
            Unanswered: no usable reply, and why.
            UserError: the server refuses the key or does not know the model.
        """
        body: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens}
        if top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": top_logprobs}
        return self._choices(messages, body)[0]

    def first_token_probabilities(self, messages: Messages, top_logprobs: int = 20) -> dict[str, float] | None:
        """{token: probability} of the answer's first token, the most probable ones; None without a usable reply.

        Raises:
            UserError: the server refuses the key or does not know the model.
        """
        try:
            return self.reply(messages, max_tokens=1, top_logprobs=top_logprobs).first
        except Unanswered as reason:
            self._count(reason, 1)
            return None

    def _count(self, reason: Unanswered, answers: int) -> None:
        with self._lock:
            self.failures[str(reason)] += answers

    def _choices(self, messages: Messages, body: dict[str, Any]) -> list[Reply]:
        with self._lock:
            if self._in_a_row >= GIVE_UP:
                raise Unanswered(f"not asked: the server failed {GIVE_UP} times in a row")
        try:
            choices = self._ask(messages, body)
            if "logprobs" in body and choices[0].text and choices[0].first is None:
                raise _Failed("the server returned no log-probabilities")
        except _Failed as failed:
            with self._lock:
                self._in_a_row += 1
            raise Unanswered(str(failed)) from None
        with self._lock:
            self._in_a_row = 0
        return choices

    def _ask(self, messages: Messages, body: dict[str, Any]) -> list[Reply]:
        """One request with its retries."""
        openai = _package()
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=self.model, messages=[dict(message) for message in messages], **body
            )
            return [_read(choice) for choice in _chosen(raw.text)]
        except openai.APITimeoutError:
            raise _Failed(f"no reply within {self.timeout:g} s") from None
        except openai.APIConnectionError:
            raise _Failed("no connection to the server") from None
        except openai.APIStatusError as error:
            raise self._refusal(error.status_code, error.message) from None
        except (KeyError, TypeError, ValueError, AttributeError):
            raise _Failed("the reply is not a chat completion") from None

    def _refusal(self, status: int, words: str) -> Exception:
        said = self._without_key(words)
        if status in (401, 403):
            where = f"the key in ${self.key_variable}" if self.key_variable else "requests without a key"
            return UserError(f"{self.url} refuses {where} ({status}: {said}); set a key that it accepts")
        if status == 404:
            return UserError(
                f"{self.url} has no chat completions of a model {self.model!r} (404: {said}); check the address, which "
                "usually ends in /v1, and the model's name"
            )
        if status == 429:
            return _Failed("too many requests (429)")
        if status >= 500:
            return _Failed(f"an error of the server ({status})")
        return Unanswered(f"the server refused the request ({status}: {said})")

    def _without_key(self, words: str) -> str:
        """A server's words on one line; some repeat the key they were sent."""
        said = " ".join(str(words).split())
        return (said.replace(self._key, "[key]") if self._key else said)[:_SHOWN]


class _Failed(Exception):
    """A failure that may be the server's being down."""


def _package() -> Any:
    try:
        import openai
    except ImportError:
        raise UserError(
            'asking a server needs the package openai, which is not installed: pip install "holdfast[judge]"'
        ) from None
    return openai


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise UserError("the server's address cannot be read; write it like http://localhost:8000/v1") from None
    if parts.username is not None or parts.password is not None or parts.query:
        raise UserError("the server's address holds a user, a key or a query; keys come from the environment alone")
    if not known:
        raise UserError(f"the server's address is {url!r}; write it like http://localhost:8000/v1")


def _key(variable: str, url: str) -> str | None:
    if not variable:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f'no key for {url}: set the environment variable {variable}, or name none, "", if the server wants no key'
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the key in ${variable} holds characters that no key has; set it again")
    return key


def _chosen(text: str) -> list[Any]:
    choices = json.loads(text)["choices"]
    if not isinstance(choices, list) or not choices:
        raise ValueError("no choices")
    return choices


def _read(choice: Any) -> Reply:
    """A choice of the reply. Raises KeyError, TypeError, ValueError or AttributeError where it is none."""
    text = choice["message"].get("content")
    if text is not None and not isinstance(text, str):
        raise ValueError("content is no text")
    positions = (choice.get("logprobs") or {}).get("content") or []
    if not positions:
        return Reply(text)
    first: dict[str, float] = {}
    shown = positions[0].get("top_logprobs") or []
    said = [] if positions[0]["token"] in [each["token"] for each in shown] else [positions[0]]
    for each in [*shown, *said]:
        probability = math.exp(min(float(each["logprob"]), 0.0))
        if math.isnan(probability):
            raise ValueError("a log-probability is no number")
        # Tokens that differ in bytes may read the same.
        first[str(each["token"])] = first.get(str(each["token"]), 0.0) + probability
    return Reply(text, tuple(str(position["token"]) for position in positions), first)
