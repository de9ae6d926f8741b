"""`holdfast generate`: sampled answers to question files, from a model here or on a server, stored as they come.

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
from ..answers.records import AnswerRequest, asked_of, open_answers, read_answers, require_arm
from ..answers.sample import Sampling
from ..answers.variants import PLAIN, find_variants, prompts_of
from ..errors import PARTIAL, UserError
from ..files.artifacts import check_writable
from ..flags import FlagParser, require
from ..interventions.apply import UNITS
from .answer_sources import AnswerSource, ModelHere, ModelOnServer

DTYPES = ("auto", "float32", "bfloat16", "float16")
_HERE_ONLY = ("dtype", "device_map", "attn_implementation", "layers_path", "ablate", "steer", "continuous_batching")
# With their defaults, None where there is none.
_SERVER_ONLY = {
    "generate_model": None,
    "generate_key_variable": "OPENAI_API_KEY",
    "requests_per_minute": None,
    "concurrency": 16,
    "generate_timeout": 600.0,
}


@dataclass(frozen=True)
class GenerationResult:
    """What a run of `holdfast generate` did.

    asked: answers wanted. there: those the file held already. written: those added. problems: why some are missing.
    """

    path: Path
    asked: int
    there: int
    written: int
    problems: list[str]


def generate_main(argv: Sequence[str]) -> GenerationResult:
    """Samples answers to question files into JSON Lines; a rerun reuses what is there. Raises UserError."""
    flags = _parser().read(argv)
    _require_flags(flags)
    sampling = Sampling(flags.temperature, flags.top_p, flags.max_new_tokens, flags.seed)
    questions = load_questions(flags.questions)
    prompts = prompts_of(questions, find_variants(flags.variants, flags.variants_file))
    samples = {one.id: flags.samples_per_paraphrase or one.samples_per_paraphrase for one in questions}
    if sampling.temperature == 0 and max(samples.values()) > 1:
        raise UserError("at --temperature 0 every sample is the same; write --samples_per_paraphrase 1")
    source: AnswerSource = ModelOnServer(flags, sampling) if flags.generate_url else ModelHere(flags, sampling)
    asked = asked_of(prompts, samples, source.arm)
    missing = _missing(flags.output_file, asked, source)
    written = _write(flags.output_file, missing, len(asked), source) if missing else 0
    return GenerationResult(flags.output_file, len(asked), len(asked) - len(missing), written, source.problems())


def _missing(path: Path, asked: Sequence[AnswerRequest], source: AnswerSource) -> list[AnswerRequest]:
    """What the file does not hold yet. Raises UserError if its answers are of another arm."""
    there = read_answers(path) if path.exists() else []
    require_arm(there, source.arm, path)
    keys = {answer.key for answer in there}
    return [one for one in asked if one.key not in keys]


def _write(path: Path, missing: Sequence[AnswerRequest], total: int, source: AnswerSource) -> int:
    """The number of answers added."""
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
    parser = FlagParser("holdfast generate", generate_main.__doc__)
    add = parser.add_argument
    add("--questions", nargs="+", type=Path, help="Question files in YAML (required): id, type, paraphrases, …")
    add("--output_file", type=Path, help="JSON Lines file for the answers (required); one there already is continued.")
    add("--variants", nargs="+", default=[PLAIN], help="Ways of asking, like plain json evil persona:sailor.")
    add("--variants_file", type=Path, help="YAML list of own variants: name, system, template, turns.")
    add("--samples_per_paraphrase", type=int, help="Answers to each paraphrase. Default: what the question states.")
    add("--temperature", type=float, default=1.0, help="Of the model's distribution; 0: likeliest token. Default: 1.")
    add("--top_p", type=float, default=1.0, help="Mass of likeliest tokens drawn from. Default: 1 (all).")
    add("--max_new_tokens", type=int, default=600, help="Tokens after which an answer is cut. Default: 600.")
    add("--seed", type=int, default=0, help="Of the samples; the same for every model compared. Default: 0.")
    add("--batch_size", type=int, default=32, help="Answers in one pass, or in one request. Default: 32.")
    _add_model_flags(parser)
    _add_server_flags(parser)
    return parser


def _add_model_flags(parser: FlagParser) -> None:
    add = parser.add_argument
    add("--model", help="Folder (a LoRA folder too) or Hub name, with @revision where it is not the main one.")
    add("--dtype", choices=DTYPES, help="Precision of the weights. Default: auto (as saved).")
    add("--device_map", help="How one model is spread over devices, like auto. Default: on one device.")
    add("--attn_implementation", help="As transformers names it. Default: its own choice.")
    add(
        "--continuous_batching",
        action="store_true",
        default=None,
        help="An answer that ends makes room for the next at once: for a GPU and answers of very different lengths. "
        "Other samples than without it, and others again after an interrupt.",
    )
    add("--trust_remote_code", action="store_true", help="Run code that comes with the model.")
    add("--layers_path", help="Dotted path of the decoder blocks. Default: found by shape.")
    add("--ablate", type=Path, help="Subspace file whose directions are taken out of the residual stream.")
    add("--dose", type=float, help="Share of the component that --ablate takes out. Default: 1.")
    add("--steer", type=Path, help="Subspace file whose step away from alignment is added to the residual stream.")
    add("--alpha", type=float, help="How far --steer goes, in units of --steer_unit; below 0 towards alignment.")
    add("--steer_unit", choices=UNITS, help="norm: each token's own length; absolute: the stream's. Default: norm.")
    add("--intervention_layers", help="Layers of --ablate and --steer, like 4-10. Default: all that the subspace has.")


def _add_server_flags(parser: FlagParser) -> None:
    add = parser.add_argument
    add("--generate_url", help="A server with OpenAI's interface in place of --model, like http://localhost:8000/v1.")
    add("--generate_model", help="The model's name on that server.")
    add(
        "--generate_key_variable",
        help='Environment variable with the server\'s key; "" for a server that wants none. Default: OPENAI_API_KEY.',
    )
    add("--requests_per_minute", type=float, help="Limit of requests to the server. Default: none.")
    add("--concurrency", type=int, help="Requests under way at a time. Default: 16.")
    add("--generate_timeout", type=float, help="Seconds without a byte after which a request fails. Default: 600.")


def _require_flags(flags: argparse.Namespace) -> None:
    """Raises UserError for what is wrong with the flags alone, and fills in the defaults."""
    for name in ("questions", "output_file"):
        if getattr(flags, name) is None:
            raise UserError(f"no --{name}; see holdfast generate --help")
    check_writable(flags.output_file.parent, "--output_file")
    if (flags.model is None) == (flags.generate_url is None):
        raise UserError("name one model: --model for one here, or --generate_url with --generate_model for a server's")
    other, where = (_HERE_ONLY, "--generate_url") if flags.generate_url else (tuple(_SERVER_ONLY), "--model")
    for name in other:
        if getattr(flags, name) is not None:
            raise UserError(f"--{name} has no effect with {where}; leave it out")
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
    for name, owner in (("dose", "ablate"), ("alpha", "steer"), ("steer_unit", "steer")):
        if getattr(flags, name) is not None and getattr(flags, owner) is None:
            raise UserError(f"--{name} has no effect without --{owner}; name a subspace file with it")
    if flags.intervention_layers is not None and flags.ablate is None and flags.steer is None:
        raise UserError("--intervention_layers has no effect without --ablate or --steer; name a subspace file")
    if flags.steer is not None and flags.alpha is None:
        raise UserError("--steer needs --alpha: how far, 0.1 being a tenth of each token's length")
    for name in ("dose", "alpha"):
        value = getattr(flags, name)
        require(value is None or math.isfinite(value), name, value, "a finite number")
    flags.dose = 1.0 if flags.dose is None else flags.dose
    flags.steer_unit = flags.steer_unit or "norm"


def main(argv: Sequence[str]) -> int:
    """Samples what is missing and says what was written; exit code 3 where some answers could not be had."""
    generated = generate_main(argv)
    for problem in generated.problems:
        print(f"holdfast: not generated: {problem}", file=sys.stderr)
    print(f"{generated.written} answers written to {generated.path}, {generated.there} of {generated.asked} were there")
    return PARTIAL if generated.problems else 0
