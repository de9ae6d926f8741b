"""The client of chat servers: what it asks, what it takes from a reply, and that every failure is a reason."""

import builtins
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
from holdfast.analysis.answers.chat_server import GIVE_UP, ChatServer, NoReply
from holdfast.analysis.answers.pacing import Pace, concurrently
from holdfast.analysis.errors import UserError
from toys.chat_models import toy_model, toy_tokenizer
from toys.judge_server import Fault, JudgeServer, by_text, model_says

KEY = "sk-very-secret-1234"
ASK = [{"role": "user", "content": "how good is this"}]
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 3, "seed": 5}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def server():
    with JudgeServer(lambda messages: [{"7": 0.5, "8": 0.25, "no": 0.25}, {" fine": 1.0}]) as running:
        yield running


def client(server, **changes):
    return ChatServer(server.url, "judge", **{"timeout": 5, "max_retries": 2, **changes})


def test_answers_are_sampled_as_asked_and_the_key_goes_to_the_server_alone(server):
    assert client(server).complete(ASK, n=3, **SAMPLING) == ["7 fine"] * 3
    (body,) = server.asked
    assert {name: body[name] for name in SAMPLING} == SAMPLING
    assert (body["model"], body["messages"], body["n"]) == ("judge", ASK, 3)
    assert server.keys == [f"Bearer {KEY}"]


def test_a_server_that_gives_one_answer_at_a_time_is_asked_again_with_other_seeds(server):
    server.choices = 1
    assert client(server).complete(ASK, n=3, **SAMPLING) == ["7 fine"] * 3
    assert [(body["n"], body["seed"]) for body in server.asked] == [(3, 5), (2, 6), (1, 7)]


def test_first_token_probabilities_are_the_models():
    model, tokenizer = toy_model(), toy_tokenizer()
    ids = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        expected = by_text(model(ids).logits[0, -1].softmax(-1).tolist(), tokenizer)
    with JudgeServer(model_says(model, tokenizer)) as server:
        found = client(server).first_token_probabilities(ASK, top_logprobs=5)
    top = sorted(expected, key=lambda text: -expected[text])[:5]
    assert found == pytest.approx({text: expected[text] for text in top}, rel=1e-5)


def test_a_token_that_was_said_counts_though_it_is_not_among_the_top(server):
    body = (
        '{"choices": [{"message": {"content": "9"}, "logprobs": {"content": [{"token": "9", "logprob": -1.5, '
        '"top_logprobs": [{"token": "8", "logprob": -1.0}, {"token": "8", "logprob": -2.0}]}]}}]}'
    )
    server.faults.append(Fault(body=body))
    found = client(server).first_token_probabilities(ASK)
    assert found == pytest.approx({"9": 0.22313016, "8": 0.36787944 + 0.13533528})


@pytest.mark.parametrize(
    "fault",
    [Fault(500), Fault(429, headers={"Retry-After": "0.2"}), Fault(503, body="<html>busy</html>"), Fault(delay=3)],
    ids=["500", "429", "not JSON", "slow"],
)
def test_what_passes_is_tried_again(server, fault):
    server.faults.extend([fault, fault])
    assert client(server, timeout=1.5).reply(ASK, max_tokens=2).text == "7 fine"
    assert len(server.asked) == 3


def test_a_server_says_when_to_come_again(server):
    server.faults.append(Fault(429, headers={"Retry-After": "1.5"}))
    client(server).reply(ASK, max_tokens=2)
    assert server.times[1] - server.times[0] >= 1.5


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(500), "500"),
        (Fault(429), "429"),
        (Fault(delay=1), "0.3 s"),
        (Fault(body='{"choices": [{"message"'), "chat completion"),
        (Fault(body='{"choices": []}'), "chat completion"),
        (Fault(body="[1, 2]"), "chat completion"),
        (Fault(body='{"choices": [{"message": {"content": 7}}]}'), "chat completion"),
        (Fault(body='{"choices": [{"message": {"content": "a"}, "logprobs": {"content": [{}]}}]}'), "chat completion"),
        (Fault(400, body='{"error": {"message": "too long"}}'), "400"),
    ],
)
def test_a_failure_is_a_reason(server, fault, said):
    server.faults.append(fault)
    asking = client(server, timeout=0.3 if fault.delay else 5, max_retries=0)
    with pytest.raises(NoReply, match=re.escape(said)) as caught:
        asking.reply(ASK, max_tokens=2)
    assert said in str(caught.value)
    server.faults.append(fault)
    assert asking.complete(ASK, n=2, **SAMPLING) == [None, None]
    assert asking.failures == {str(caught.value): 2}


def test_no_log_probabilities_are_a_failure_and_never_an_empty_result(server):
    server.logprobs = False
    with pytest.raises(NoReply, match="log-probabilities"):
        client(server).reply(ASK, max_tokens=2, top_logprobs=20)
    assert client(server).first_token_probabilities(ASK) is None


def test_a_server_that_is_down_is_not_asked_forever(server):
    url = server.url
    server._server.server_close()
    asking = ChatServer(url, "judge", timeout=1, max_retries=0)
    assert [asking.complete(ASK, n=1, **SAMPLING) for _ in range(GIVE_UP + 3)] == [[None]] * (GIVE_UP + 3)
    assert asking.failures == {
        "no connection to the server": GIVE_UP, f"not asked: the server failed {GIVE_UP} times in a row": 3,
    }  # fmt: skip


def test_failures_that_are_not_in_a_row_do_not_stop_it(server):
    asking = client(server, max_retries=0)
    for _ in range(GIVE_UP + 2):
        server.faults.append(Fault(500))
        asking.complete(ASK, n=1, **SAMPLING)
        assert asking.complete(ASK, n=1, **SAMPLING) == ["7 fine"]


@pytest.mark.parametrize(("status", "said"), [(401, "$OPENAI_API_KEY"), (403, "key"), (404, "'judge'")])
def test_a_refused_key_or_an_unknown_model_ends_everything_in_one_line_without_the_key(server, status, said, caplog):
    caplog.set_level(logging.DEBUG)
    server.faults.append(Fault(status, body=f'{{"error": {{"message": "no {KEY}\\nhere"}}}}'))
    with pytest.raises(UserError, match=str(status)) as caught:
        client(server).complete(ASK, n=1, **SAMPLING)
    assert said in str(caught.value) and KEY not in str(caught.value) and "\n" not in str(caught.value)
    assert KEY not in caplog.text and KEY not in repr(caught.value)


def test_no_key_is_one_line_unless_none_is_wanted(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        client(server)
    assert client(server, key_variable="").complete(ASK, n=1, **SAMPLING) == ["7 fine"]
    assert server.keys == ["Bearer none"]
    monkeypatch.setenv("OTHER", "line\nbreak")
    with pytest.raises(UserError, match=r"\$OTHER") as caught:
        client(server, key_variable="OTHER")
    assert "break" not in str(caught.value)


def test_another_servers_key_is_not_sent(server, monkeypatch):
    monkeypatch.setenv("OTHER", "other-key")
    client(server, key_variable="OTHER").complete(ASK, n=1, **SAMPLING)
    assert server.keys == ["Bearer other-key"]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a/v1", "", "http://", "http://a:99999/v1", "http://[/v1"])
def test_an_address_that_is_none_is_one_line(url):
    with pytest.raises(UserError, match="http://localhost:8000/v1"):
        ChatServer(url, "judge")


def test_a_key_in_the_address_is_refused_and_not_repeated():
    for url in (f"http://me:{KEY}@host/v1", f"http://host/v1?key={KEY}"):
        with pytest.raises(UserError, match="environment") as caught:
            ChatServer(url, "judge")
        assert KEY not in str(caught.value)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest):
        if name == "openai":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r'pip install "holdfast\[judge\]"'):
        ChatServer("http://localhost:1/v1", "judge")


def test_attempts_keep_the_pace_retries_among_them(server, monkeypatch):
    waits = []
    clock = types.SimpleNamespace(monotonic=lambda: 100.0, sleep=waits.append)
    monkeypatch.setattr("holdfast.analysis.answers.pacing.time", clock)
    server.faults.extend([Fault(500, headers={"retry-after-ms": "1"})] * 2)
    asking = client(server, requests_per_minute=300)
    assert len(list(concurrently(lambda _: asking.reply(ASK, max_tokens=1), range(4), workers=4))) == 4
    assert len(server.times) == 6
    assert sorted(waits) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf")])
def test_a_pace_must_be_above_zero(limit):
    with pytest.raises(UserError, match=r"requests per minute .*0"):
        Pace(limit)


def test_many_are_asked_at_once_and_each_result_keeps_its_number():
    together = threading.Barrier(3, timeout=5)
    found = dict(concurrently(lambda item: (together.wait(), item * item)[1], [1, 2, 3], workers=3))
    assert found == {0: 1, 1: 4, 2: 9}


def test_an_error_in_one_ends_all():
    seen = []

    def ask(item):
        seen.append(item)
        if item == 3:
            raise UserError("the key is refused")
        time.sleep(0.05)

    with pytest.raises(UserError, match="the key is refused"):
        list(concurrently(ask, range(1000), workers=2))
    assert len(seen) < 100


def test_an_interrupt_does_not_wait_for_requests_under_way():
    code = (
        "import signal, time; from holdfast.analysis.answers.pacing import concurrently\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored by what a shell runs in its background
        "print('ready', flush=True); list(concurrently(lambda _: time.sleep(60), range(4)))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    # Half of what one of its requests takes.
    assert process.wait(timeout=30) != 0
