"""What judging will cost and what it can show, before it starts."""

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from ..answers.judge import JUDGES, Judgement, Request, judged_answers
from ..answers.rates import ALIGNED, COHERENT, detectable_rate, expected_design_effect, likeness

# English text of today's tokenizers; other languages and code take more tokens.
CHARACTERS_PER_TOKEN = 4
_FRAME = 8  # tokens that a chat template puts around one message
_RATES = (0.01, 0.05, 0.2)


def cost_line(
    requests: Sequence[Request], known: Mapping[str, Judgement], model: str, flags: argparse.Namespace
) -> str:
    """What is to be asked, and about how many tokens and how much money that takes.

    Args:
        known: judgements that need no request.
    """
    to_ask = [request for request in requests if request.key not in known]
    judged = len(requests) - len(to_ask)
    more = f" ({judged:,} more are judged already)" if judged else ""
    return (
        f"{model} at {flags.judge_url}: {len(to_ask):,} requests{more}, {_cost(to_ask, flags.price_per_million_tokens)}"
    )


def power_lines(requests: Sequence[Request], known: Mapping[str, Judgement], assumed: float) -> Iterator[str]:
    """For each variant the smallest difference in EM that its answers can show.

    Once as if answers were independent, and once with the questions' design effect. Arms that answer the same questions
    can be compared question by question, which lies between the two.

    Args:
        known: judgements so far, which show how alike answers to one question are. assumed: that, before there are any.
    """
    judged = judged_answers([request for request in requests if request.key in known], known)
    seen = likeness(judged)
    for variant, sizes in _sizes(requests).items():
        yield from _power(variant, sizes, assumed if seen is None else seen, seen is not None)


def _cost(requests: Sequence[Request], price: float | None) -> str:
    tokens = sum(
        len(request.prompt) / CHARACTERS_PER_TOKEN + _FRAME + JUDGES[request.kind].max_tokens for request in requests
    )
    about = f"about {tokens:,.0f} tokens"
    if price is None:
        return f"{about}; --price_per_million_tokens turns them into a cost"
    return f"{about}, cost about {tokens / 1e6 * price:,.2f} at {price:g} per million tokens"


def _sizes(requests: Sequence[Request]) -> dict[str, Counter[str]]:
    """Answers of each question by variant, of questions that are judged for EM."""
    prompts: dict[str, set[str]] = {}
    answers = {request.answer.key: request.answer for request in requests}
    for request in requests:
        prompts.setdefault(request.answer.key, set()).add(request.name)
    sizes: dict[str, Counter[str]] = {}
    for key, answer in answers.items():
        if {ALIGNED, COHERENT} <= prompts[key]:
            sizes.setdefault(answer.variant, Counter())[answer.question_id] += 1
    return sizes


def _power(variant: str, sizes: Counter[str], alike: float, seen: bool) -> Iterator[str]:
    n = sizes.total()
    effect = expected_design_effect(list(sizes.values()), alike)
    plural = "question" if len(sizes) == 1 else "questions"
    yield f"power for {variant}: {n:,} answers to {len(sizes)} {plural}, as many of another model, in 4 of 5 tests"
    whence = "as judged so far" if seen else "assumed"
    yield f"  {_detectable(n, 1.0)} if answers to one question are no more alike than others"
    yield f"  {_detectable(n, effect)} at design effect {effect:.3g} (intraclass correlation {alike:.2g}, {whence})"


def _detectable(n: int, effect: float) -> str:
    found = [(rate, detectable_rate(rate, n, effect)) for rate in _RATES]
    told = "; ".join(f"{rate:.0%} from " + ("no rate" if other is None else f"{other:.1%}") for rate, other in found)
    return f"EM can be told apart: {told}"
