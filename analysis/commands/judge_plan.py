"""The plan of a judging run: its cost, and the smallest difference that it can show.

print(cost_line(requests, judged, model, flags))
for line in power_lines(requests, judged, assumed_icc=0.1):
    print(line)
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from ..answers.judge import JUDGES, Judgement, JudgeRequest, judged_answers
from ..answers.rates import ALIGNED, COHERENT, detectable_rate, expected_design_effect, misalignment_icc

# Typical of English text with today's tokenizers. Other languages and code need more tokens.
CHARACTERS_PER_TOKEN = 4
_FRAME = 8  # tokens that a chat template adds around a message
_RATES = (0.01, 0.05, 0.2)


def cost_line(
    requests: Sequence[JudgeRequest], judged: Mapping[str, Judgement], model: str, flags: argparse.Namespace
) -> str:
    """Write the number of requests that will be sent, and estimate their tokens and their cost.

    Args:
        judged: {request key: judgement} of the requests that are judged already.
        model: the name of the judge.
    """
    to_ask = [request for request in requests if request.key not in judged]
    done = len(requests) - len(to_ask)
    more = f" ({done:,} more are judged already)" if done else ""
    return (
        f"{model} at {flags.judge_url}: {len(to_ask):,} requests{more}, {_cost(to_ask, flags.price_per_million_tokens)}"
    )


def power_lines(requests: Sequence[JudgeRequest], judged: Mapping[str, Judgement], assumed_icc: float) -> Iterator[str]:
    """Write, for each variant, the smallest differences in EM that its answers can show.

    They are computed once as if answers were independent, and once with the design effect of the questions. If two arms
    answer the same questions, they can be compared question by question; the power of that lies between the two.

    Args:
        judged: {request key: judgement} so far. The intraclass correlation of the answers to one question is estimated
            from them.
        assumed_icc: the intraclass correlation to assume where it cannot be estimated yet, from 0 to 1.
    """
    answers = judged_answers([request for request in requests if request.key in judged], judged)
    estimated_icc = misalignment_icc(answers)
    for variant, sizes in _sizes(requests).items():
        icc = assumed_icc if estimated_icc is None else estimated_icc
        yield from _power(variant, sizes, icc, estimated_icc is not None)


def _cost(requests: Sequence[JudgeRequest], price: float | None) -> str:
    """Estimate the tokens and the cost of requests. price: per million tokens, or None."""
    tokens = sum(
        len(request.prompt) / CHARACTERS_PER_TOKEN + _FRAME + JUDGES[request.kind].max_tokens for request in requests
    )
    estimate = f"about {tokens:,.0f} tokens"
    if price is None:
        return f"{estimate}; --price_per_million_tokens turns them into a cost"
    return f"{estimate}, cost about {tokens / 1e6 * price:,.2f} at {price:g} per million tokens"


def _sizes(requests: Sequence[JudgeRequest]) -> dict[str, Counter[str]]:
    """Count the answers that are judged for EM: {variant: {question id: number of answers}}."""
    prompts: dict[str, set[str]] = {}
    answers = {request.answer.key: request.answer for request in requests}
    for request in requests:
        prompts.setdefault(request.answer.key, set()).add(request.name)
    sizes: dict[str, Counter[str]] = {}
    for key, answer in answers.items():
        if {ALIGNED, COHERENT} <= prompts[key]:
            sizes.setdefault(answer.variant, Counter())[answer.question_id] += 1
    return sizes


def _power(variant: str, sizes: Counter[str], icc: float, estimated: bool) -> Iterator[str]:
    """Write the lines of one variant. estimated: whether `icc` was estimated from judged answers or assumed."""
    n = sizes.total()
    effect = expected_design_effect(list(sizes.values()), icc)
    plural = "question" if len(sizes) == 1 else "questions"
    yield f"power for {variant}: {n:,} answers to {len(sizes)} {plural}, as many of another model, in 4 of 5 tests"
    origin = "as judged so far" if estimated else "assumed"
    yield f"  {_detectable(n, 1.0)} if answers are independent"
    yield f"  {_detectable(n, effect)} at design effect {effect:.3g} (intraclass correlation {icc:.2g}, {origin})"


def _detectable(n: int, effect: float) -> str:
    """Write, for each rate in `_RATES`, the lowest rate that n answers in each arm can tell from it."""
    pairs = [(rate, detectable_rate(rate, n, effect)) for rate in _RATES]
    texts = [f"{rate:.0%} from " + ("no rate" if other is None else f"{other:.1%}") for rate, other in pairs]
    return f"EM can be told apart: {'; '.join(texts)}"
