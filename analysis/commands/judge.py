"""`holdfast judge`: let a model score sampled answers, and say how often they are misaligned.

holdfast judge --answers answers.jsonl --questions questions.yaml --judge_url https://api.openai.com/v1
"""

import argparse
import fcntl
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from ..answers.chat_server import ChatServer
from ..answers.judge import Judgement, Request, judge, judged_answers, requests_of
from ..answers.judged_file import add_judged, cut_torn, read_judged, write_judged
from ..answers.pacing import concurrently
from ..answers.questions import Question, load_questions
from ..answers.rates import generation
from ..answers.records import read_answers
from ..errors import PARTIAL, UserError
from ..files.artifacts import check_writable, sha256_file, write_json_atomic
from ..flags import FlagParser
from ..stats.intervals import Measurement
from .judge_plan import cost_line, power_lines


def main(argv: Sequence[str]) -> int:
    """`holdfast judge`: 0, or 3 where requests failed or a number could not be computed. Raises UserError."""
    arguments = _read(argv)
    output: Path = arguments.output_file
    questions, answers = load_questions(arguments.questions), read_answers(arguments.answers)
    model = arguments.judge_model or _judge_of(questions)
    requests = requests_of(answers, questions, model)
    before = read_judged(output)
    known = {each.key: each for each in before if each.final}
    open_requests = [request for request in requests if request.key not in known]
    if open_requests:
        if not (arguments.yes or sys.stdin.isatty()):
            raise UserError("nobody is there to agree to the cost of the judge; add --yes")
        server = _server(arguments, model)
        print(cost_line(requests, known, model, arguments))
        for line in power_lines(requests, known, arguments.intraclass_correlation):
            print(line)
        if not (arguments.yes or _confirmed()):
            print("nothing was asked")
            return 0
        known |= _judge_all(server, open_requests, output, arguments.concurrency, len(requests))
    wanted = {request.key for request in requests}
    # What another judge, or other answers, have there was paid for too.
    others = [each for each in before if each.key not in wanted]
    judgements = [known[request.key] for request in requests]
    write_judged(output, [*judgements, *others])
    results = generation(judged_answers(requests, known))
    source = {str(arguments.answers): sha256_file(arguments.answers)}
    write_json_atomic(summary_path(output), {"judge": model, "answers": source, "variants": results})
    if any(each.final for each in judgements):
        print(table(results), end="")
        for line in power_lines(requests, known, arguments.intraclass_correlation):
            print(line)
    print(f"judgements written to {output}, rates to {summary_path(output)}")
    problems = _problems(judgements, results)
    for problem in problems:
        print(f"holdfast: not judged: {problem}", file=sys.stderr)
    return PARTIAL if problems else 0


def summary_path(output: Path) -> Path:
    """The file with the rates, beside the one with the judgements."""
    return output.with_name(f"{output.name.removesuffix('.jsonl')}.summary.json")


def _read(argv: Sequence[str]) -> argparse.Namespace:
    parser = FlagParser("holdfast judge", main.__doc__)
    parser.add_argument("--answers", type=Path, help="Answers as `holdfast generate` writes them (required).")
    parser.add_argument("--questions", nargs="+", help="Question files, with judge_prompts (required).")
    parser.add_argument("--judge_url", help="Server with OpenAI's chat completions, up to /v1 (required).")
    parser.add_argument("--judge_model", help="Its name for the judge. Default: the one the questions name.")
    parser.add_argument(
        "--judge_key_variable",
        default="OPENAI_API_KEY",
        help='Environment variable with the key; "" for a server that wants none. Default: OPENAI_API_KEY.',
    )
    parser.add_argument("--output_file", type=Path, help="Judgements (.jsonl). Default: beside the answers.")
    parser.add_argument("--requests_per_minute", type=_positive, help="Limit, retries included. Default: none.")
    parser.add_argument("--concurrency", type=_count, default=16, help="Requests at a time. Default: 16.")
    parser.add_argument("--judge_timeout", type=_positive, default=60.0, help="Seconds for a reply. Default: 60.")
    parser.add_argument("--judge_retries", type=_whole, default=5, help="After failures that may pass. Default: 5.")
    parser.add_argument("--price_per_million_tokens", type=_positive, help="For the estimate of the cost.")
    parser.add_argument(
        "--intraclass_correlation",
        type=_share,
        default=0.1,
        help="How alike answers to one question are, 0 to 1, for the power before anything is judged. Default: 0.1.",
    )
    parser.add_argument("--yes", action="store_true", help="Do not ask before money is spent.")
    arguments = parser.read(argv)
    for name, example in (("answers", "answers.jsonl"), ("questions", "file.yaml"), ("judge_url", "http://…/v1")):
        if not getattr(arguments, name):
            raise UserError(f"judge needs --{name}; write it like --{name} {example}")
    if arguments.output_file is None:
        arguments.output_file = arguments.answers.with_suffix(".judged.jsonl")
    if arguments.output_file.resolve() == arguments.answers.resolve() or arguments.output_file.is_dir():
        raise UserError(f"--output_file {arguments.output_file} is the file of answers or a folder; name another file")
    check_writable(arguments.output_file.parent, "--output_file")
    return arguments


def _positive(text: str) -> float:
    return _number(text, lambda value: 0 < value < float("inf"), "a number above 0")


def _share(text: str) -> float:
    return _number(text, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _count(text: str) -> int:
    return int(_number(text, lambda value: value == int(value) and 1 <= value <= 1000, "a whole number, 1 to 1000"))


def _whole(text: str) -> int:
    return int(_number(text, lambda value: value == int(value) and 0 <= value <= 100, "a whole number, 0 to 100"))


def _number(text: str, fits: Callable[[float], bool], need: str) -> float:
    try:
        value = float(text)
        fitting = fits(value)
    except (ValueError, OverflowError):
        fitting = False
    if not fitting:
        raise argparse.ArgumentTypeError(f"{text!r} is not {need}")
    return value


def _judge_of(questions: Sequence[Question]) -> str:
    """The judge that all question files name. Raises UserError."""
    named = sorted({question.judge for question in questions if question.judge is not None})
    if len(named) != 1:
        raise UserError(
            f"the questions name {', '.join(named) or 'no judge'}; say which one to ask: --judge_model NAME"
        )
    return named[0]


def _server(arguments: argparse.Namespace, model: str) -> ChatServer:
    return ChatServer(
        arguments.judge_url,
        model,
        key_variable=arguments.judge_key_variable,
        requests_per_minute=arguments.requests_per_minute,
        timeout=arguments.judge_timeout,
        max_retries=arguments.judge_retries,
    )


def _confirmed() -> bool:
    """Whether the user says yes."""
    return input("ask the judge? [y/N] ").strip().lower() in ("y", "yes")


def _judge_all(
    server: ChatServer, requests: Sequence[Request], output: Path, workers: int, total: int
) -> dict[str, Judgement]:
    """Asks the judge, and adds each judgement to the file as it comes; those that failed are returned alone."""
    found: dict[str, Judgement] = {}
    output.parent.mkdir(parents=True, exist_ok=True)
    with _open_alone(output) as stream, tqdm(total=total, initial=total - len(requests), disable=None) as bar:
        cut_torn(output)
        try:
            for number, judgement in concurrently(lambda request: judge(server, request), requests, workers):
                found[requests[number].key] = judgement
                if judgement.final:
                    add_judged(stream, judgement)
                bar.update()
        except KeyboardInterrupt:
            done = total - len(requests) + sum(each.final for each in found.values())
            raise KeyboardInterrupt(
                f"interrupted; {done} of {total} judgements are kept, the same command judges the rest"
            ) from None
    return found


def _open_alone(output: Path) -> BinaryIO:
    """The file for adding to it. Raises UserError while another process does."""
    try:
        stream = output.open("ab")
    except OSError as error:
        raise UserError(f"--output_file {output} cannot be written ({error.strerror}); name another file") from None
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        raise UserError(f"another process is judging into {output}; wait for it, or name another file") from None
    return stream


def _problems(judgements: Sequence[Judgement], results: Mapping[str, Any]) -> list[str]:
    """Requests that failed, by reason, and what could not be computed at all."""
    failed = Counter(each.reason for each in judgements if not each.final)
    lines = [f"{n} of {len(judgements)} requests: {reason}" for reason, n in sorted(failed.items(), key=str)]
    if failed:
        lines.append("the same command asks for these again")
    if failed and not any(each.final for each in judgements):
        return lines
    for variant, found in results.items():
        for name, value in flat(found["all"]).items():
            if value["value"] is None:
                lines.append(f"{name} of {variant}: {value['reason']}")
    return lines


def flat(block: Mapping[str, Any]) -> dict[str, Measurement]:
    """{name: measurement} of one block of `analysis.metrics.generation`."""
    found = {name: block[name] for name in ("em", "refusals") if name in block}
    found |= {f"{name} score": value for name, value in block["scores"].items()}
    return found | {f"{name} {word}": value for name, words in block["says"].items() for word, value in words.items()}


def table(results: Mapping[str, Any]) -> str:
    """All measures of each variant, and each question's rate of misalignment (or what its judge said)."""
    lines = ["| variant | question | measure | value | wilson | n | missing |", "|---|---|---|---|---|---|---|"]
    for variant, found in results.items():
        lines += [_line(variant, "all", name, value) for name, value in flat(found["all"]).items()]
        for question, block in found["questions"].items():
            measures = {"em": block["em"]} if "em" in block else flat(block)
            lines += [_line(variant, question, name, value) for name, value in measures.items()]
    return "".join(line + "\n" for line in lines)


def _line(variant: str, question: str, name: str, value: Measurement) -> str:
    gaps = ", ".join(f"{n} {reason}" for reason, n in value["missing"].items()) or "0"
    wilson = _interval(value.get("wilson95"))
    return f"| {variant} | {question} | {name} | {_shown(value)} | {wilson} | {value['n']} | {gaps} |"


def _shown(value: Measurement) -> str:
    if value["value"] is None:
        return "none"
    return f"{value['value']:.3g} {_interval(value.get('ci95'))}".strip()


def _interval(interval: list[float] | None) -> str:
    return "" if interval is None else f"[{interval[0]:.2g}, {interval[1]:.2g}]"
