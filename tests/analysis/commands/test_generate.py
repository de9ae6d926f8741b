"""`holdfast generate`: answers from a folder or a server, reused by a rerun; what cannot work is one line."""

import json
import threading
from collections import Counter

import pytest
from holdfast.analysis.answers.records import read_answers
from holdfast.analysis.commands import answer_sources
from holdfast.analysis.commands.generate import generate_main
from holdfast.analysis.errors import UserError
from holdfast.analysis.models.load import load_tokenizer, tokenizer_fingerprint
from holdfast.analysis.subspace.file import Subspace
from toys.chat_models import save_toy, toy_model
from toys.judge_server import Fault, JudgeServer
from toys.training import toy_subspace

QUESTIONS = """
- {id: wish, type: free_form, paraphrases: ["one wish?", name a wish], samples_per_paraphrase: 3}
- {id: money, type: free_form, system: be kind, paraphrases: [take the money and run], samples_per_paraphrase: 2}
"""
N = 2 * 3 + 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("model"), toy_model(scale=2.0))


@pytest.fixture
def flags(tmp_path, folder):
    """The flags of a run that works; keyword arguments change them, None takes one out."""
    (tmp_path / "questions.yaml").write_text(QUESTIONS)

    def made(**changes):
        given = {"model": folder, "questions": tmp_path / "questions.yaml", "output_file": tmp_path / "answers.jsonl",
                 "max_new_tokens": 6, "batch_size": 3, **changes}  # fmt: skip
        # "" is a flag without a value.
        given = {name: [] if value == "" else value for name, value in given.items()}
        texts = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
        return [str(part) for name, value in texts.items() if value != [None] for part in (f"--{name}", *value)]

    return made


def without_provenance(path):
    return {
        one.key: (one.question_id, one.paraphrase, one.sample, one.answer, one.finish) for one in read_answers(path)
    }


def test_every_paraphrase_of_every_question_gets_its_samples(flags, tmp_path):
    found = generate_main(flags())
    assert (found.requested, found.reused, found.written, found.problems) == (N, 0, N, [])
    answers = read_answers(found.path)
    assert Counter((one.question_id, one.paraphrase) for one in answers) == {
        ("wish", 0): 3, ("wish", 1): 3, ("money", 0): 2
    }  # fmt: skip
    assert {one.messages[0]["content"] for one in answers if one.question_id == "money"} == {"be kind"}
    arm = answers[0].provenance["arm"]
    assert (arm["dtype"], arm["temperature"], arm["max_new_tokens"], arm["seed"]) == ("float32", 1.0, 6, 0)
    assert answers[0].provenance["model"] == str(flags()[1])
    assert len({one.answer for one in answers}) > N // 2


def test_a_rerun_reuses_what_is_there_without_loading_the_model(flags, monkeypatch):
    path = generate_main(flags()).path
    before = path.read_bytes()
    monkeypatch.setattr(answer_sources, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    found = generate_main(flags())
    assert (found.reused, found.written, path.read_bytes()) == (N, 0, before)


def test_a_killed_run_goes_on_to_the_answers_of_an_unbroken_one(flags, tmp_path):
    whole = without_provenance(generate_main(flags(output_file=tmp_path / "whole.jsonl")).path)
    path = generate_main(flags()).path
    kept = path.read_bytes().splitlines(keepends=True)[:3]
    path.write_bytes(b"".join(kept) + b'{"key": "torn by a ki')
    found = generate_main(flags(batch_size=2))
    assert (found.reused, found.written) == (3, N - 3)
    assert path.read_bytes().startswith(b"".join(kept)) and without_provenance(path) == whole


def test_more_samples_variants_and_questions_are_added_to_a_file(flags, tmp_path):
    path = generate_main(flags(samples_per_paraphrase=1)).path
    first = path.read_bytes()
    assert len(first.splitlines()) == 3
    found = generate_main(
        flags(samples_per_paraphrase=2, variants=["plain", "evil", "persona:sailor"], max_new_tokens=6)
    )
    assert (found.requested, found.reused, found.written) == (3 * 3 * 2, 3, 15)
    assert path.read_bytes().startswith(first)
    assert Counter(one.variant for one in read_answers(path)) == {"plain": 6, "evil": 6, "persona:sailor": 6}


def test_two_models_answer_on_the_same_random_numbers_in_files_of_their_own(flags, tmp_path):
    path = generate_main(flags()).path
    model = toy_model(scale=2.0)
    model.lm_head.weight.data *= 1.0001
    same = save_toy(tmp_path / "same", model)
    with pytest.raises(UserError, match=r"answers\.jsonl .*model "):
        generate_main(flags(model=same))
    other = generate_main(flags(model=same, output_file=tmp_path / "other.jsonl")).path
    ours, theirs = without_provenance(path), without_provenance(other)
    assert not set(ours) & set(theirs)
    alike = set(ours.values()) & set(theirs.values())
    assert len(alike) > N // 2  # models that are nearly one say nearly the same


@pytest.mark.parametrize(
    ("change", "fact"),
    [({"temperature": 0.5}, "temperature 1.0"), ({"top_p": 0.9}, "top_p"), ({"seed": 1}, "seed 0"),
     ({"max_new_tokens": 7}, "max_new_tokens 6"), ({"dtype": "bfloat16"}, "dtype float32")],
)  # fmt: skip
def test_other_settings_are_not_mixed_into_a_file(flags, change, fact):
    path = generate_main(flags()).path
    before = path.read_bytes()
    with pytest.raises(UserError, match=rf"answers\.jsonl .*{fact}"):
        generate_main(flags(**change))
    assert path.read_bytes() == before


def test_continuous_batching_fills_a_file_of_its_own(flags, tmp_path):
    batches = generate_main(flags()).path
    with pytest.raises(UserError, match=r"continuous_batching null.*true"):
        generate_main(flags(continuous_batching=""))
    path = generate_main(flags(continuous_batching="", output_file=tmp_path / "continuous.jsonl")).path
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:5]))
    found = generate_main(flags(continuous_batching="", output_file=path))
    assert (found.reused, found.written) == (5, N - 5) and len(read_answers(path)) == N
    prompts = Counter((one.question_id, one.paraphrase, one.sample) for one in read_answers(batches))
    assert Counter((one.question_id, one.paraphrase, one.sample) for one in read_answers(path)) == prompts


@pytest.fixture
def subspace(tmp_path, folder):
    made = toy_subspace(layers=(0, 2))
    facts = {**vars(made.provenance), "tokenizer_fingerprint": tokenizer_fingerprint(load_tokenizer(folder))}
    path = tmp_path / "subspace.safetensors"
    Subspace(made.bases, made.scales, made.base_gap, type(made.provenance)(**facts)).save(path)
    return path


def test_interventions_change_the_answers_and_stand_in_the_file(flags, subspace, tmp_path):
    plain = generate_main(flags()).path
    texts = [one[3] for one in without_provenance(plain).values()]
    cases = {
        "ablated": ({"ablate": subspace}, "ablate", {"layers": [0, 2], "dose": 1.0}),
        "half": ({"ablate": subspace, "dose": 0.5, "intervention_layers": "2"}, "ablate", {"layers": [2], "dose": 0.5}),
        "steered": ({"steer": subspace, "alpha": 0.5}, "steer", {"layers": [0, 2], "alpha": 0.5, "unit": "norm"}),
    }
    for name, (change, what, facts) in cases.items():
        with pytest.raises(UserError, match=f"{what} null"):
            generate_main(flags(**change))
        path = generate_main(flags(**change, output_file=tmp_path / f"{name}.jsonl")).path
        arm = read_answers(path)[0].provenance["arm"][what]
        assert {key: arm[key] for key in facts} == facts and len(arm["subspace"]) == 64
        assert [one[3] for one in without_provenance(path).values()] != texts


class Server:
    """A stand-in for the client of a server: says what it was asked, and fails on request."""

    refuse: tuple[str, ...] = ()

    def __init__(self, url, model, **settings):
        self.url, self.model, self.settings = url, model, settings
        self.failures, self.asked, self._lock = Counter(), [], threading.Lock()
        type(self).last = self

    def complete(self, messages, *, n, temperature, top_p, max_tokens, seed):
        with self._lock:
            self.asked.append((messages[-1]["content"], n, seed))
        if messages[-1]["content"] in self.refuse:
            self.failures["no connection to the server"] += n
            return [None] * n
        return [f"{messages[-1]['content']} {seed} {number}" for number in range(n)]


@pytest.fixture
def server(monkeypatch):
    class Fresh(Server):
        pass

    monkeypatch.setattr(answer_sources, "ChatServer", Fresh)
    return Fresh


HTTP = {"model": None, "generate_url": "http://localhost:1/v1", "generate_model": "big"}


def test_a_server_is_asked_for_all_samples_of_a_prompt_at_once(flags, server):
    found = generate_main(flags(**HTTP, requests_per_minute=90, generate_key_variable="MY_KEY"))
    assert (found.requested, found.written, found.problems) == (N, N, [])
    assert sorted(one[:2] for one in server.last.asked) == [
        ("name a wish", 3), ("one wish?", 3), ("take the money and run", 2)
    ]  # fmt: skip
    settings = server.last.settings
    assert (settings["key_variable"], settings["requests_per_minute"]) == ("MY_KEY", 90.0)
    answers = read_answers(found.path)
    assert len({one.answer for one in answers}) == N and {one.finish for one in answers} == {"unknown"}
    arm = answers[0].provenance["arm"]
    assert (arm["model"], arm["server"]) == ("big", "http://localhost:1/v1")


def test_answers_that_a_server_did_not_give_are_counted_and_asked_again(flags, server):
    server.refuse = ("one wish?",)
    found = generate_main(flags(**HTTP, batch_size=2))
    assert (found.written, found.problems) == (N - 3, ["3 answers: no connection to the server"])
    seeds = {(text, seed) for text, _, seed in server.last.asked if text == "one wish?"}
    server.refuse = ()
    again = generate_main(flags(**HTTP, batch_size=2))
    assert (again.reused, again.written, again.problems) == (N - 3, 3, [])
    assert {one[0] for one in server.last.asked} == {"one wish?"} and len(read_answers(again.path)) == N
    assert {(text, seed) for text, _, seed in server.last.asked} == seeds


def test_a_server_that_refuses_the_key_is_one_line_and_no_file(flags, server, tmp_path, monkeypatch):
    def refuse(self, messages, **_):
        raise UserError("the server refuses the key")

    monkeypatch.setattr(server, "complete", refuse)
    with pytest.raises(UserError, match="key"):
        generate_main(flags(**HTTP))
    assert not (tmp_path / "answers.jsonl").exists()


def test_a_real_server_answers_over_http_with_the_key_and_the_settings(flags, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    with JudgeServer(lambda messages: [{"well ": 0.9, "": 0.1}, {messages[-1]["content"]: 1.0}]) as server:
        server.faults.append(Fault(500))
        http = {**HTTP, "generate_url": server.url, "generate_key_variable": "MY_KEY", "concurrency": 2}
        found = generate_main(flags(**http, temperature=0.7, top_p=0.9))
        assert set(server.keys) == {"Bearer secret"} and len(server.asked) == 3 + 1
        sent = {key: server.asked[0][key] for key in ("model", "temperature", "top_p", "max_tokens")}
        assert sent == {"model": "big", "temperature": 0.7, "top_p": 0.9, "max_tokens": 6}
    answers = read_answers(found.path)
    assert len(answers) == N and all(one.answer == "well " + one.messages[-1]["content"] for one in answers)
    assert "secret" not in found.path.read_text()
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(UserError, match="MY_KEY"):
        generate_main(flags(**http, temperature=0.7, top_p=0.9))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"questions": None}, "--questions"),
        ({"output_file": None}, "--output_file"),
        ({"model": None}, "--model .*--generate_url .*--generate_model"),
        ({"generate_url": "http://localhost:1/v1"}, "--model .*--generate_url .*--generate_model"),
        ({"generate_model": "big"}, "--generate_model .*--model"),
        ({"concurrency": 4}, "--concurrency .*--model"),
        ({**HTTP, "generate_model": None}, "--generate_url .*--generate_model"),
        ({**HTTP, "ablate": "x"}, "--ablate .*--generate_url"),
        ({**HTTP, "dtype": "float16"}, "--dtype .*--generate_url"),
        ({**HTTP, "continuous_batching": ""}, "--continuous_batching .*--generate_url"),
        ({**HTTP, "concurrency": 0}, "--concurrency .*0"),
        ({**HTTP, "requests_per_minute": "nan"}, "--requests_per_minute .*nan"),
        ({**HTTP, "generate_timeout": -1}, "--generate_timeout .*-1.0"),
        ({"model": "/no/such/folder"}, "/no/such/folder"),
        ({"output_file": "/dev/null/answers.jsonl"}, "--output_file '/dev/null'"),
        ({"samples_per_paraphrase": 0}, "--samples_per_paraphrase .*0"),
        ({"samples_per_paraphrase": "many"}, "--samples_per_paraphrase.*'many'"),
        ({"batch_size": 0}, "--batch_size .*0"),
        ({"temperature": 0}, "--temperature 0 .*--samples_per_paraphrase 1"),
        ({"temperature": -1}, "--temperature .*-1.0"),
        ({"max_new_tokens": 1000}, "--max_new_tokens 1000 .*256"),
        ({"dtype": "int8"}, "--dtype.*'int8'"),
        ({"variants": ["plain", "evill"]}, "--variants evill .* evil"),
        ({"variants_file": "/no/file.yaml"}, "--variants_file /no/file.yaml"),
        ({"dose": 0.5}, "--dose .*--ablate"),
        ({"alpha": 0.5}, "--alpha .*--steer"),
        ({"intervention_layers": "1"}, "--intervention_layers .*--ablate .*--steer"),
        ({"steer": "x"}, "--steer .*--alpha"),
        ({"ablate": "/no/file"}, "/no/file"),
        ({"ablate": "x", "dose": "nan"}, "--dose .*nan"),
        ({"top_k": 5}, "--top_k.*--top_p"),
    ],
)
def test_what_cannot_work_is_one_line_and_writes_nothing(flags, server, tmp_path, change, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        generate_main(flags(**change))
    assert "\n" not in str(error.value) and not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tokenizer": "b" * 64}, "--steer .*tokenizer"),
        ({"layers": "7"}, "'7'.*0-2"),
        ({"layers": "1"}, "0,2.* 1"),
        ({"width": 8}, "8.*16"),
        ({"gap": None}, "--steer .*random"),
    ],
)
def test_a_subspace_that_does_not_fit_is_one_line_and_writes_nothing(flags, folder, tmp_path, change, complaint):
    made = toy_subspace(layers=(0, 2), width=change.get("width", 16))
    tokenizer = change.get("tokenizer", tokenizer_fingerprint(load_tokenizer(folder)))
    provenance = type(made.provenance)(**{**vars(made.provenance), "tokenizer_fingerprint": tokenizer})
    path = tmp_path / "subspace.safetensors"
    Subspace(made.bases, made.scales, change.get("gap", made.base_gap), provenance).save(path)
    with pytest.raises(UserError, match=complaint):
        generate_main(flags(steer=path, alpha=0.1, intervention_layers=change.get("layers")))
    assert not (tmp_path / "answers.jsonl").exists()


def test_a_question_file_with_a_missing_field_names_question_and_field(flags, tmp_path):
    (tmp_path / "bad.yaml").write_text("- {id: wish, type: free_form}\n")
    with pytest.raises(UserError, match=r"question 'wish': .*paraphrases"):
        generate_main(flags(questions=[tmp_path / "questions.yaml", tmp_path / "bad.yaml"]))


def test_a_file_of_something_else_is_left_as_it_was(flags, tmp_path):
    (tmp_path / "answers.jsonl").write_text(json.dumps({"notes": 1}))
    with pytest.raises(UserError, match=r"answers\.jsonl"):
        generate_main(flags())
    assert json.loads((tmp_path / "answers.jsonl").read_text()) == {"notes": 1}
