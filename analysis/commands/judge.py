"""`holdfast judge`: lets a judge model score sampled answers, and reports how often they are misaligned.

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
from ..answers.judge import Judgement, JudgeRequest, judge, judge_requests, judged_answers
from ..answers.judged_file import add_judged, cut_torn, read_judged, write_judged
from ..answers.pacing import concurrently
from ..answers.questions import Question, load_questions
from ..answers.rates import rates_by_variant
from ..answers.records import read_answers
from ..errors import PARTIAL, UserError
from ..files.artifacts import check_writable, sha256_file, write_json_atomic
from ..flags import FlagParser
from ..stats.intervals import Measurement
from .judge_plan import cost_line, power_lines


def main(argv: Sequence[str]) -> int:
    """Judge answers and print their rates. Returns 0, or 3 if requests failed or a measure could not be computed.

    Raises:
        UserError: wrong flags or files, nobody to confirm the cost, or a judge that cannot be used.
    """
    arguments = _read(argv)
    output: Path = arguments.output_file
    questions, answers = load_questions(arguments.questions), read_answers(arguments.answers)
    model = arguments.judge_model or _judge_of(questions)
    requests = judge_requests(answers, questions, model)
    previous = read_judged(output)
    judged = {judgement.key: judgement for judgement in previous if judgement.final}
    open_requests = [request for request in requests if request.key not in judged]
    if open_requests:
        if not (arguments.yes or sys.stdin.isatty()):
            raise UserError("the cost of the judge must be confirmed, and there is no terminal to ask; add --yes")
        server = _server(arguments, model)
        print(cost_line(requests, judged, model, arguments))
        for line in power_lines(requests, judged, arguments.intraclass_correlation):
            print(line)
        if not (arguments.yes or _confirmed()):
            print("nothing was asked")
            return 0
        judged |= _judge_all(server, open_requests, output, arguments.concurrency, len(requests))
    keys = {request.key for request in requests}
    # Judgements of other answers, or by another judge, stay in the file: they were paid for too.
    others = [judgement for judgement in previous if judgement.key not in keys]
    judgements = [judged[request.key] for request in requests]
    write_judged(output, [*judgements, *others])
    rates = rates_by_variant(judged_answers(requests, judged))
    source = {str(arguments.answers): sha256_file(arguments.answers)}
    write_json_atomic(summary_path(output), {"judge": model, "answers": source, "variants": rates})
    if any(judgement.final for judgement in judgements):
        print(rates_table(rates), end="")
        for line in power_lines(requests, judged, arguments.intraclass_correlation):
            print(line)
    print(f"judgements written to {output}, rates to {summary_path(output)}")
    problems = _problems(judgements, rates)
    for problem in problems:
        print(f"holdfast: not judged: {problem}", file=sys.stderr)
    return PARTIAL if problems else 0


def summary_path(output: Path) -> Path:
    """Return the path of the file with the rates, beside the file with the judgements."""
    return output.with_name(f"{output.name.removesuffix('.jsonl')}.summary.json")


def _read(argv: Sequence[str]) -> argparse.Namespace:
    parser = FlagParser("holdfast judge", "Let a judge model score sampled answers.")
    add = parser.add_argument
    add("--answers", type=Path, help="File of answers, written by `holdfast generate` (required).")
    add("--questions", nargs="+", help="Question files with judge_prompts, in YAML (required).")
    add("--judge_url", help="Address of a server with OpenAI's interface, up to /v1 (required).")
    add("--judge_model", help="Name of the judge on the server. Default: the judge that the questions name.")
    add(
        "--judge_key_variable",
        default="OPENAI_API_KEY",
        help='Environment variable with the key; "" for a server that needs no key. Default: OPENAI_API_KEY.',
    )
    add("--output_file", type=Path, help="File for the judgements (.jsonl). Default: beside the answers.")
    add("--requests_per_minute", type=_positive, help="Request limit, including retries. Default: none.")
    add("--concurrency", type=_count, default=16, help="Requests sent at the same time. Default: 16.")
    add("--judge_timeout", type=_positive, default=60.0, help="Seconds to wait for a reply. Default: 60.")
    add("--judge_retries", type=_whole, default=5, help="Retries after temporary failures. Default: 5.")
    add("--price_per_million_tokens", type=_positive, help="Price for the cost estimate. Default: none.")
    add(
        "--intraclass_correlation",
        type=_share,
        default=0.1,
        help="Intraclass correlation of the answers to one question, 0 to 1, to compute the power before anything is "
        "judged. Default: 0.1.",
    )
    add("--yes", action="store_true", help="Do not ask for confirmation before money is spent.")
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
    """Parse a number and check it. need: what a fitting number is, for the error message."""
    try:
        value = float(text)
        fitting = fits(value)
    except (ValueError, OverflowError):
        fitting = False
    if not fitting:
        raise argparse.ArgumentTypeError(f"{text!r} is not {need}")
    return value


def _judge_of(questions: Sequence[Question]) -> str:
    """Return the judge that the questions name. Raises UserError if they name none, or more than one."""
    judges = sorted({question.judge for question in questions if question.judge is not None})
    if len(judges) != 1:
        raise UserError(
            f"the questions name {', '.join(judges) or 'no judge'}; choose the judge to ask with --judge_model NAME"
        )
    return judges[0]


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
    """Ask the user for confirmation, and return whether the answer was yes."""
    return input("ask the judge? [y/N] ").strip().lower() in ("y", "yes")


def _judge_all(
    server: ChatServer, requests: Sequence[JudgeRequest], output: Path, workers: int, total: int
) -> dict[str, Judgement]:
    """Ask the judge, and append each judgement to the file as it comes. Failed requests are not written.

    Args:
        workers: number of requests at the same time.
        total: number of requests, including requests judged by earlier runs, for the progress bar.

    Returns:
        {request key: judgement}, including failed requests.
    """
    judged: dict[str, Judgement] = {}
    output.parent.mkdir(parents=True, exist_ok=True)
    with _open_alone(output) as stream, tqdm(total=total, initial=total - len(requests), disable=None) as bar:
        cut_torn(output)
        try:
            for number, judgement in concurrently(lambda request: judge(server, request), requests, workers):
                judged[requests[number].key] = judgement
                if judgement.final:
                    add_judged(stream, judgement)
                bar.update()
        except KeyboardInterrupt:
            done = total - len(requests) + sum(judgement.final for judgement in judged.values())
            raise KeyboardInterrupt(
                f"interrupted; {done} of {total} judgements are kept, the same command judges the rest"
            ) from None
    return judged


def _open_alone(output: Path) -> BinaryIO:
    """Open the file for appending. Raises UserError if it cannot be written or another process is writing to it."""
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


def _problems(judgements: Sequence[Judgement], rates: Mapping[str, Any]) -> list[str]:
    """List the failed requests by reason, and the measures that could not be computed."""
    failed = Counter(judgement.reason for judgement in judgements if not judgement.final)
    lines = [f"{n} of {len(judgements)} requests: {reason}" for reason, n in sorted(failed.items(), key=str)]
    if failed:
        lines.append("the same command asks for these again")
    if failed and not any(judgement.final for judgement in judgements):
        return lines
    for variant, of_variant in rates.items():
        for name, value in measures_by_name(of_variant["all"]).items():
            if value["value"] is None:
                lines.append(f"{name} of {variant}: {value['reason']}")
    return lines


def measures_by_name(rates: Mapping[str, Any]) -> dict[str, Measurement]:
    """Flatten the result of `answers.rates.answer_rates` to {name of the measure in the table: measurement}."""
    measures = {name: rates[name] for name in ("em", "refusals") if name in rates}
    measures |= {f"{name} score": value for name, value in rates["scores"].items()}
    words = {f"{name} {word}": share for name, shares in rates["says"].items() for word, share in shares.items()}
    return measures | words


def rates_table(rates: Mapping[str, Any]) -> str:
    """Format a Markdown table of rates.

    It has all measures of each variant, and for each question the rate of misalignment, or all measures of the question
    if it has no such rate.

    Args:
        rates: the result of `answers.rates.rates_by_variant`.
    """
    rows = ["| variant | question | measure | value | wilson | n | missing |", "|---|---|---|---|---|---|---|"]
    for variant, of_variant in rates.items():
        rows += [_table_row(variant, "all", name, value) for name, value in measures_by_name(of_variant["all"]).items()]
        for question, of_question in of_variant["questions"].items():
            measures = {"em": of_question["em"]} if "em" in of_question else measures_by_name(of_question)
            rows += [_table_row(variant, question, name, value) for name, value in measures.items()]
    return "".join(row + "\n" for row in rows)


def _table_row(variant: str, question: str, name: str, value: Measurement) -> str:
    gaps = ", ".join(f"{n} {reason}" for reason, n in value["missing"].items()) or "0"
    wilson = _interval_cell(value.get("wilson95"))
    return f"| {variant} | {question} | {name} | {_value_cell(value)} | {wilson} | {value['n']} | {gaps} |"


def _value_cell(value: Measurement) -> str:
    if value["value"] is None:
        return "none"
    return f"{value['value']:.3g} {_interval_cell(value.get('ci95'))}".strip()


def _interval_cell(interval: list[float] | None) -> str:
    return "" if interval is None else f"[{interval[0]:.2g}, {interval[1]:.2g}]"
