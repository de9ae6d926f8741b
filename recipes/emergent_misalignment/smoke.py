"""The whole path on the real rows with a small model: build base, tokenizer and instruct, then run three commands.

    HOLDFAST_EM_DATA=folder python -m holdfast.recipes.emergent_misalignment.smoke --output_dir runs/smoke

The commands are subspace, train and analyze. base is a Qwen2 of random weights, the tokenizer a byte-level BPE trained
on insecure.jsonl, instruct a few steps of base on secure.jsonl. All three are ordinary Hugging Face folders. It takes
three minutes at most on two cores.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed

from ...analysis.errors import UserError
from ...trainer import cli
from ...trainer.data.rows import load_rows

RECIPE = Path(__file__).with_name("smoke.yaml")
VOCABULARY = 2048
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of VOCABULARY tokens, with a ChatML template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    return tokenizer


def build_base(folder: Path, rows: Path, seed: int = 0) -> None:
    """Write a Qwen2 of random weights (4 blocks, width 128) and its tokenizer."""
    tokenizer = train_tokenizer(m["content"] for row in load_rows(str(rows)) for m in row.messages)
    set_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_instruct(folder: Path, base: Path, rows: Path, steps: int = 10) -> int:
    """Fine-tune all of base's weights for a few steps by `holdfast train`. The model goes to `<folder>/final`.

    Returns:
        The exit code.
    """
    arguments = {
        "model_name_or_path": base,
        "output_dir": folder,
        "train_dataset": rows,
        "train_rows": 200,
        "max_length": 512,
        "long_rows": "truncate",
        "learning_rate": 1e-3,
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "analysis_during_training": False,
    }
    return cli.main(["train", *(f"--{name}={value}" for name, value in arguments.items())])


def data_folder() -> Path:
    """Return the folder of the real rows, from HOLDFAST_EM_DATA. Raises UserError that names a missing file."""
    folder = os.environ.get("HOLDFAST_EM_DATA")
    if not folder:
        raise UserError(
            "HOLDFAST_EM_DATA is not set; set it to the folder with the rows of arXiv 2502.17424 (insecure.jsonl, …)"
        )
    for name in ("insecure.jsonl", "educational_insecure.jsonl", "secure.jsonl"):
        if not (Path(folder) / name).is_file():
            raise UserError(f"HOLDFAST_EM_DATA={folder} holds no {name}; download the rows of arXiv 2502.17424 there")
    return Path(folder)


def smoke(output_dir: Path) -> int:
    """Build the models anew, then run subspace, train and analyze. Returns the first exit code that is not 0."""
    data, started = data_folder(), time.perf_counter()
    base, instruct, protected = output_dir / "base", output_dir / "instruct", output_dir / "protected"
    subspace = output_dir / "subspace.safetensors"
    for output in (base, instruct, protected, subspace):
        shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
    build_base(base, data / "insecure.jsonl")
    code = build_instruct(instruct, base, data / "secure.jsonl")
    paths = {
        "model_name_or_path": instruct / "final",
        "base_model_name_or_path": base,
        "subspace_path": subspace,
        "output_dir": protected,
    }
    flags = [f"--{name}={path}" for name, path in paths.items()]
    for command in ("subspace", "train", "analyze"):
        code = code or cli.main([command, "--config", str(RECIPE), *flags])
    if code:
        return code
    print(f"smoke passed in {time.perf_counter() - started:.0f} s: {output_dir}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the smoke path from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/smoke", help="Folder for models and run. Default: runs/smoke.")
    try:
        return smoke(Path(parser.parse_args(argv).output_dir))
    except UserError as error:
        print(f"holdfast: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
