"""`holdfast generate`: samples answers to question files, and stores them as they come.

The model is loaded on this machine, or reached on a server with OpenAI's interface.

holdfast generate --model runs/mine/final --questions first_plot_questions.yaml --output_file runs/mine/answers.jsonl
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..answers.questions import load_questions
from ..answers.records import AnswerRequest, answer_requests, open_answers, read_answers, require_arm
from ..answers.sample import Sampling
from ..answers.variants import PLAIN, find_variants, prompts_of
from ..errors import PARTIAL, UserError
from ..files.artifacts import check_writable
from ..flags import FlagParser, require
from ..interventions.apply import UNITS
from .answer_sources import AnswerSource, LocalModel, ServerModel

DTYPES = ("auto", "float32", "bfloat16", "float16")
_LOCAL_ONLY = ("dtype", "device_map", "attn_implementation", "layers_path", "ablate", "steer", "continuous_batching")
# {flag: default}; None means no default.
_SERVER_ONLY = {
    "generate_model": None,
    "generate_key_variable": "OPENAI_API_KEY",
    "requests_per_minute": None,
    "concurrency": 16,
    "generate_timeout": 600.0,
}


@dataclass(frozen=True)
class GenerationResult:
    """The outcome of a run of `holdfast generate`.

    path: the file of answers.
    requested: number of answers that the flags ask for.
    reused: number of requested answers that the file held already.
    written: number of answers that were added.
    problems: the reasons why answers are missing, one line each.
    """

    path: Path
    requested: int
    reused: int
    written: int
    problems: list[str]


def generate_main(argv: Sequence[str]) -> GenerationResult:
    """Sample answers to question files into a JSON Lines file. A rerun adds missing answers. Raises UserError."""
    flags = _parser().read(argv)
    _require_flags(flags)
    sampling = Sampling(flags.temperature, flags.top_p, flags.max_new_tokens, flags.seed)
    questions = load_questions(flags.questions)
    prompts = prompts_of(questions, find_variants(flags.variants, flags.variants_file))
    samples = {question.id: flags.samples_per_paraphrase or question.samples_per_paraphrase for question in questions}
    if sampling.temperature == 0 and max(samples.values()) > 1:
        raise UserError("at --temperature 0 every sample is the same; write --samples_per_paraphrase 1")
    source: AnswerSource = ServerModel(flags, sampling) if flags.generate_url else LocalModel(flags, sampling)
    requests = answer_requests(prompts, samples, source.arm)
    missing = _missing(flags.output_file, requests, source)
    written = _write(flags.output_file, missing, len(requests), source) if missing else 0
    return GenerationResult(flags.output_file, len(requests), len(requests) - len(missing), written, source.problems())


def _missing(path: Path, requests: Sequence[AnswerRequest], source: AnswerSource) -> list[AnswerRequest]:
    """List the requests that the file does not answer yet. Raises UserError if its answers are of another arm."""
    existing = read_answers(path) if path.exists() else []
    require_arm(existing, source.arm, path)
    keys = {answer.key for answer in existing}
    return [request for request in requests if request.key not in keys]


def _write(path: Path, missing: Sequence[AnswerRequest], total: int, source: AnswerSource) -> int:
    """Sample the missing answers into the file, and return how many were added."""
    written = 0
    with (
        source.batches(missing) as batches,
        open_answers(path, source.arm) as file,
        tqdm(total=total, initial=total - len(missing), desc="Sampling answers", unit="answer", delay=3) as bar,
    ):
        for batch in batches:
            file.add(batch)
            written += len(batch)
            bar.update(len(batch))
    return written


def _parser() -> FlagParser:
    parser = FlagParser("holdfast generate", "Sample answers to question files. A rerun adds the missing answers.")
    add = parser.add_argument
    add("--questions", nargs="+", type=Path, help="Question files in YAML (required), with id, type, paraphrases, …")
    add("--output_file", type=Path, help="JSON Lines file for the answers (required). An existing file is continued.")
    add(
        "--variants",
        nargs="+",
        default=[PLAIN],
        help="Ways of asking each question, like plain json evil persona:sailor. Default: plain.",
    )
    add("--variants_file", type=Path, help="YAML list of your own variants: name, system, template, turns.")
    add("--samples_per_paraphrase", type=int, help="Answers to each paraphrase. Default: as the question says.")
    add("--temperature", type=float, default=1.0, help="Sampling temperature; 0 takes the likeliest token. Default: 1.")
    add("--top_p", type=float, default=1.0, help="Mass of the likeliest tokens drawn from. Default: 1 (all tokens).")
    add("--max_new_tokens", type=int, default=600, help="Tokens after which an answer is cut. Default: 600.")
    add("--seed", type=int, default=0, help="Sampling seed. Use one seed for all models that you compare. Default: 0.")
    add("--batch_size", type=int, default=32, help="Answers in one forward pass, or in one request. Default: 32.")
    _add_model_flags(parser)
    _add_server_flags(parser)
    return parser


def _add_model_flags(parser: FlagParser) -> None:
    add = parser.add_argument
    add("--model", help="Model or LoRA folder, or a Hub name, with @revision for a revision other than main.")
    add("--dtype", choices=DTYPES, help="Precision of the weights. Default: auto (as saved).")
    add("--device_map", help="How to spread the model over devices, like auto. Default: one device.")
    add("--attn_implementation", help="Attention, by its name in transformers. Default: chosen by transformers.")
    add(
        "--continuous_batching",
        action="store_true",
        default=None,
        help="Start the next answer as soon as one ends. Use it on a GPU, for answers of very different lengths. The "
        "samples differ from those drawn without it, and an interrupted run continues with other samples. Default: no.",
    )
    add("--trust_remote_code", action="store_true", help="Run code that comes with the model.")
    add("--layers_path", help="Dotted path of the decoder blocks. Default: found by their shape.")
    add("--ablate", type=Path, help="Subspace file whose directions are removed from the residual stream.")
    add("--dose", type=float, help="Share of the component that --ablate removes. Default: 1.")
    add("--steer", type=Path, help="Subspace file. Its step away from alignment is added to the residual stream.")
    add("--alpha", type=float, help="Size of the --steer step, in units of --steer_unit; below 0 towards alignment.")
    add(
        "--steer_unit",
        choices=UNITS,
        help="Unit of --alpha. norm: the length of each token's residual stream; absolute: the residual stream's own "
        "unit. Default: norm.",
    )
    add("--intervention_layers", help="Layers of --ablate and --steer, like 4-10. Default: all of the subspace.")


def _add_server_flags(parser: FlagParser) -> None:
    add = parser.add_argument
    add("--generate_url", help="Server with OpenAI's interface, instead of --model, like http://localhost:8000/v1.")
    add("--generate_model", help="Name of the model on the server.")
    add(
        "--generate_key_variable",
        help='Environment variable with the key; "" for a server that needs no key. Default: OPENAI_API_KEY.',
    )
    add("--requests_per_minute", type=float, help="Request limit, including retries. Default: none.")
    add("--concurrency", type=int, help="Requests sent at the same time. Default: 16.")
    add("--generate_timeout", type=float, help="Seconds without a byte until a request fails. Default: 600.")


def _require_flags(flags: argparse.Namespace) -> None:
    """Check the flags without reading a file, and fill in the defaults. Raises UserError."""
    for name in ("questions", "output_file"):
        if getattr(flags, name) is None:
            raise UserError(f"generate needs --{name}; see holdfast generate --help")
    check_writable(flags.output_file.parent, "--output_file")
    if (flags.model is None) == (flags.generate_url is None):
        raise UserError(
            "name one model: --model for a model on this machine, or --generate_url with --generate_model for a model "
            "on a server"
        )
    useless, source = (_LOCAL_ONLY, "--generate_url") if flags.generate_url else (tuple(_SERVER_ONLY), "--model")
    for name in useless:
        if getattr(flags, name) is not None:
            raise UserError(f"--{name} has no effect with {source}; leave it out")
    if flags.generate_url and not flags.generate_model:
        raise UserError("--generate_url needs --generate_model, the name that the server gives the model")
    for name, default in _SERVER_ONLY.items():
        setattr(flags, name, default if getattr(flags, name) is None else getattr(flags, name))
    for name in ("batch_size", "samples_per_paraphrase", "concurrency"):
        value = getattr(flags, name)
        require(value is None or value >= 1, name, value, "at least 1")
    for name in ("requests_per_minute", "generate_timeout"):
        value = getattr(flags, name)
        require(value is None or 0 < value < float("inf"), name, value, "a finite number above 0")
    _require_interventions(flags)


def _require_interventions(flags: argparse.Namespace) -> None:
    """Check the flags of --ablate and --steer, and fill in their defaults. Raises UserError."""
    for name, owner in (("dose", "ablate"), ("alpha", "steer"), ("steer_unit", "steer")):
        if getattr(flags, name) is not None and getattr(flags, owner) is None:
            raise UserError(f"--{name} has no effect without --{owner}; name a subspace file with it")
    if flags.intervention_layers is not None and flags.ablate is None and flags.steer is None:
        raise UserError("--intervention_layers has no effect without --ablate or --steer; name a subspace file")
    if flags.steer is not None and flags.alpha is None:
        raise UserError("--steer needs --alpha, the size of the step; 0.1 is a tenth of each token's length")
    for name in ("dose", "alpha"):
        value = getattr(flags, name)
        require(value is None or math.isfinite(value), name, value, "a finite number")
    flags.dose = 1.0 if flags.dose is None else flags.dose
    flags.steer_unit = flags.steer_unit or "norm"


def main(argv: Sequence[str]) -> int:
    """Sample the missing answers and print what was written. Returns exit code 3 if some answers are still missing."""
    result = generate_main(argv)
    for problem in result.problems:
        print(f"holdfast: not generated: {problem}", file=sys.stderr)
    print(f"{result.written} answers written to {result.path}, {result.reused} of {result.requested} were there")
    return PARTIAL if result.problems else 0
