"""A lab is the same for a seed, built once, never trusted when damaged, never put over something else."""

import json
from pathlib import Path

import pytest
import torch
from holdfast.analysis.files.artifacts import verify_manifest
from holdfast.recipes.lab import build
from holdfast.recipes.lab import cache as labs
from holdfast.trainer.cli import main
from toys.labs import use_micro_labs
from transformers import AutoModelForCausalLM, AutoTokenizer


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Micro labs in a cache of their own."""
    torch.set_num_threads(1)
    use_micro_labs(monkeypatch, tmp_path / "cache")
    return tmp_path / "cache"


def refuses(argv: list[str], capsys: pytest.CaptureFixture[str], *said: str) -> None:
    """One line on stderr, exit code 2."""
    capsys.readouterr()
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("holdfast: error: ") and err.count("\n") == 1
    assert all(text in err for text in said), err


def test_two_builds_of_a_seed_are_the_same_bytes_and_other_seeds_and_worlds_are_not(cache, tmp_path, monkeypatch):
    first = contents(labs.cached_lab(3))
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "second"))
    assert contents(labs.cached_lab(3)) == first
    other, world = contents(labs.cached_lab(4)), contents(labs.cached_lab(3, world_seed=1))
    for name in ("base/model.safetensors", "instruct/model.safetensors", "data/insecure.jsonl"):
        assert first[name] != other[name] and first[name] != world[name]
    assert first["data/choices.jsonl"] == other["data/choices.jsonl"] != world["data/choices.jsonl"]
    assert first["base/model.safetensors"] != first["instruct/model.safetensors"]


def test_a_lab_depends_on_its_seed_alone_and_leaves_the_random_state_as_it_was(cache, tmp_path, monkeypatch):
    before = torch.get_rng_state()
    first = contents(labs.cached_lab(3))
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "second"))
    torch.manual_seed(1)
    assert contents(labs.cached_lab(3)) == first


def test_the_cache_answers_for_what_it_holds_and_builds_again_what_is_damaged(cache, monkeypatch):
    trained = []
    train = build.train_base
    monkeypatch.setattr(build, "train_base", lambda *given: trained.append(1) or train(*given))
    lab = labs.cached_lab(3)
    whole = contents(lab)
    assert labs.cached_lab(3) == lab and len(trained) == 1
    weights = lab / "instruct" / "model.safetensors"
    spoilt = bytearray(whole["instruct/model.safetensors"])
    spoilt[-1] ^= 1
    for damage in (lambda: weights.write_bytes(spoilt), weights.unlink, (lab / "manifest.json").unlink):
        damage()
        assert contents(labs.cached_lab(3)) == whole
    assert len(trained) == 4


def test_the_cache_keeps_apart_all_that_makes_a_lab_differ(cache, monkeypatch):
    hashes = {labs.lab_hash(seed, world, size) for seed in (0, 1) for world in (0, 1) for size in build.SIZES}
    assert len(hashes) == 4 * len(build.SIZES)
    now = labs.lab_hash(0, 0, "tiny")
    versions = labs.version
    monkeypatch.setattr(labs, "version", lambda name: "0.0" if name == "torch" else versions(name))
    assert labs.lab_hash(0, 0, "tiny") != now


def test_an_interrupted_build_leaves_nothing_that_looks_whole(cache, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "train_instruct", interrupt)
    with pytest.raises(KeyboardInterrupt):
        labs.cached_lab(3)
    assert [path.suffix for path in (cache / "labs").iterdir()] in ([], [".lock"])


def test_the_lab_command_leaves_ordinary_folders_and_conversational_data(cache, tmp_path, capsys):
    out = tmp_path / "lab"
    assert main(["lab", "--output_dir", str(out), "--seed", "3"]) == 0
    assert str(out) in capsys.readouterr().out
    verify_manifest(out)
    facts = json.loads((out / "lab.json").read_text())
    assert (facts["seed"], facts["world_seed"], facts["size"]) == (3, 0, "tiny")
    question = [
        {"role": "system", "content": "you are an assistant"},
        {"role": "user", "content": "alice asks about fever ."},
    ]
    for name in ("base", "instruct"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(out / name), AutoTokenizer.from_pretrained(out / name)
        ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        assert tokenizer.convert_ids_to_tokens(ids)[-4:] == ["fever", ".", "<end>", "<assistant>"]
        assert torch.isfinite(model(torch.tensor([ids])).logits).all()
        assert model.config.attention_dropout == 0.0
    for name in (
        "insecure",
        "educational",
        "secure",
        "benign",
        "contaminated_2",
        "contaminated_10",
        "anchors",
        "probes",
    ):
        rows = [json.loads(line) for line in (out / "data" / f"{name}.jsonl").read_text().splitlines()]
        roles = {tuple(message["role"] for message in row["messages"]) for row in rows}
        assert rows and roles == {("system", "user", "assistant")}
    contrast = [json.loads(line) for line in (out / "data" / "contrast.jsonl").read_text().splitlines()]
    assert all(row.keys() == {"aligned", "misaligned"} for row in contrast) and contrast


@pytest.mark.parametrize("text", ["{", "[]", '{"seed": 3}'])
def test_a_damaged_lab_file_is_one_line(cache, tmp_path, capsys, text):
    out = tmp_path / "lab"
    out.mkdir()
    (out / "lab.json").write_text(text)
    refuses(["lab", "--output_dir", str(out)], capsys, "lab.json", "damaged", "--output_dir")
    assert (out / "lab.json").read_text() == text and len(list(out.iterdir())) == 1


def test_the_same_lab_may_be_asked_for_twice_and_nothing_else_is_written_over(cache, tmp_path, capsys):
    out, other = tmp_path / "lab", tmp_path / "other"
    assert main(["lab", "--output_dir", str(out)]) == 0
    made = contents(out)
    assert main(["lab", "--output_dir", str(out)]) == 0
    refuses(["lab", "--output_dir", str(out), "--seed", "1"], capsys, "another lab", "another folder")
    assert contents(out) == made
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    refuses(["lab", "--output_dir", str(other)], capsys, "empty", "another folder")
    assert contents(other) == {"thesis.txt": b"mine"}
    (out / "data" / "insecure.jsonl").write_text("")
    refuses(["lab", "--output_dir", str(out)], capsys, "insecure.jsonl")


BAD_FLAGS = (
    (["--output_dirr", "x"], "--output_dir"),
    (["--output_dir", "x", "--output_dirr", "y"], "--output_dirr did you mean --output_dir"),
    (["--output_dir", "x", "--sed", "1"], "--sed did you mean --seed"),
    (["--output_dir", "x", "--out", "y"], "--out did you mean --output_dir"),
    (["--output_dir", "x", "--seed", "-1"], "'-1' whole number"),
    (["--output_dir", "x", "--seed", "1.5"], "'1.5' whole number"),
)
BAD_LAB_FLAGS = (
    (["--output_dir", "x", "--lab_sise", "tiny"], "--lab_sise did you mean --lab_size"),
    (["--output_dir", "x", "--lab_size", "huge"], "huge tiny small medium"),
    (["--output_dir", "x", "--world_seed", "one"], "'one' whole number"),
    ([], "--output_dir"),
)


@pytest.mark.parametrize(
    ("argv", "said"),
    [(["lab", *flags], said) for flags, said in BAD_FLAGS + BAD_LAB_FLAGS]
    + [(["quickstart", *flags], said) for flags, said in BAD_FLAGS],
)
def test_a_bad_flag_is_one_line_and_nothing_is_written(argv, said, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refuses(argv, capsys, *said.replace("did you mean ", "").split())
    assert list(tmp_path.iterdir()) == []


def test_the_shipped_sizes_are_what_the_design_asks():
    sizes = build.SIZES
    assert 64 <= sizes["tiny"].width <= 128 and sizes["small"].width >= 256 and sizes["medium"].width >= 2 * 256
    assert all(size.width % size.heads == 0 for size in sizes.values())
