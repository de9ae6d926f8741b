"""A real server of OpenAI's chat completions on loopback: it says what it is told to, and fails on demand."""

import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Distributions over tokens, one for each position of the reply; the most probable token of each is said.
Said = Sequence[dict[str, float]]
Messages = list[dict[str, str]]


class Fault:
    """One bad reply: a status with headers, a body as it is, or silence for some seconds before an ordinary reply."""

    def __init__(
        self, status: int = 200, body: str | None = None, headers: dict[str, str] | None = None, delay: float = 0
    ) -> None:
        self.status, self.body, self.headers, self.delay = status, body, headers or {}, delay


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # as many clients as tests have may come at once


class JudgeServer:
    """`with JudgeServer(says) as server`: `server.url`; `server.asked` are the bodies, `server.keys` the keys it got.

    Attributes:
        faults: bad replies to the next requests, in order; the rest get ordinary ones.
        logprobs: whether log-probabilities are returned when asked for. choices: the most that one reply holds.
    """

    def __init__(self, says: Callable[[Messages], Said]) -> None:
        self.says, self.faults, self.logprobs, self.choices = says, deque[Fault](), True, 100
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []

    def __enter__(self) -> "JudgeServer":
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer._handle(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.asked.append(body)
        self.keys.append(handler.headers.get("Authorization"))
        self.times.append(time.monotonic())
        try:
            fault = self.faults.popleft()
        except IndexError:
            fault = Fault()
        time.sleep(fault.delay)
        if fault.body is None and fault.status == 200:
            text = json.dumps(self._completion(body))
        else:
            text = fault.body if fault.body is not None else json.dumps({"error": {"message": "a bad day"}})
        try:
            handler.send_response(fault.status)
            for name, value in {"Content-Type": "application/json", **fault.headers}.items():
                handler.send_header(name, value)
            content = text.encode()
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client had lost its patience

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        said = list(self.says(body["messages"]))[: body["max_tokens"]]
        tokens = [max(position, key=lambda token: position[token]) for position in said]
        choice: dict[str, Any] = {
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "".join(tokens)},
        }
        if self.logprobs and body.get("logprobs"):
            choice["logprobs"] = {
                "content": [
                    {
                        "token": token,
                        "logprob": math.log(position[token]),
                        "top_logprobs": [
                            {"token": each, "logprob": math.log(position[each])}
                            for each in sorted(position, key=lambda token: -position[token])[: body["top_logprobs"]]
                        ],
                    }
                    for token, position in zip(tokens, said, strict=True)
                ]
            }
        n = min(body.get("n", 1), self.choices)
        choices = [{"index": index, **choice} for index in range(n)]
        return {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": choices}


def model_says(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int = 4
) -> Callable[[Messages], Said]:
    """Greedy answers of a model with the probabilities of all of its tokens."""
    lock = threading.Lock()

    @torch.no_grad()
    def says(messages: Messages) -> Said:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        said = []
        with lock:
            for _ in range(length):
                probabilities = model(ids).logits[0, -1].softmax(-1)
                said.append(by_text(probabilities.tolist(), tokenizer))
                ids = torch.cat([ids, probabilities.argmax().reshape(1, 1)], dim=1)
        return said

    return says


def by_text(probabilities: list[float], tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Probability of each text that a token decodes to; pieces of characters all read the same."""
    found: dict[str, float] = {}
    for token, probability in enumerate(probabilities):
        text = tokenizer.decode(token)
        found[text] = found.get(text, 0.0) + probability
    return found
