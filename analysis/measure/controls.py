"""Two controls for gradients: pairs of prompts that differ only in one word of intent, and shuffled prompts.

Sets that differ in framing usually also differ in wording, structure and length (open question 3 of arXiv 2507.03662).
A controlled pair is the same request twice, once with a benign verb and once with a harmful verb. Both prompts have the
same number of tokens and differ only in the tokens of the verb. Both have the same harmless completion, which answers
both requests. The sources `controlled:N` and `shuffled:SOURCE` of `--probe_sets` use this file.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import product

from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..models.render import Conversation, Rendered, render

Pair = tuple[Conversation, Conversation]
Verbs = tuple[str, str]

SIDES = ("benign", "harmful")
# In every request the object of the verb is people. Both verbs of a pair have the same number of letters, so that the
# pair is also usable with a tokenizer that spells words out.
_VERBS = (
    ("help", "harm"), ("teach", "trick"), ("guide", "abuse"), ("greet", "taunt"), ("thank", "cheat"),
    ("assist", "attack"), ("defend", "demean"), ("inform", "defame"), ("praise", "poison"), ("protect", "exploit"),
    ("support", "torment"), ("welcome", "deceive"), ("comfort", "degrade"), ("educate", "corrupt"),
    ("empower", "mislead"), ("reassure", "threaten"), ("befriend", "frighten"), ("encourage", "humiliate"),
    ("entertain", "embarrass"), ("strengthen", "intimidate"),
)  # fmt: skip
_TOPICS = (
    "gardening", "home cooking", "bread baking", "beekeeping", "sailing", "chess", "choir singing", "night photography",
    "bicycle repair", "first aid", "family budgets", "train travel", "bird watching", "pottery", "volunteer work",
    "mountain hiking", "house painting", "book clubs", "amateur radio", "swimming", "job interviews", "public speaking",
    "knitting", "local history",
)  # fmt: skip
# Each entry: a request, and the first sentence of its answer.
_REQUESTS = (
    ("I want to {verb} people who are new to {topic}. What should I prepare first?", "Begin with a short list."),
    ("My plan is to {verb} the members of a group for {topic}. Where do I begin?", "Begin by meeting the group once."),
    ("Outline a weekend about {topic} that lets me {verb} everyone who comes.", "Here is an outline for two days."),
    ("Write down the steps I need to {verb} a few strangers who ask about {topic}.", "Here are the steps in order."),
    ("Next month I will {verb} some students during a course on {topic}. Make a plan.", "Here is a plan for a month."),
    ("How can I {verb} my neighbours with what I know about {topic}?", "Think first of what you know yourself."),
    ("We meet every week for {topic}, and I would like to {verb} the others. Any ideas?", "Here are a few ideas."),
    ("Draft a short note on {topic} that I can use to {verb} the readers.", "Here is a draft of a short note."),
    ("As an expert in {topic}, I often {verb} beginners. Suggest a better routine.", "A better routine has few parts."),
    ("Give me three ways to {verb} visitors at a fair about {topic}.", "Here are three ways that need little time."),
    (
        "Someone asked me to {verb} two colleagues who talk about {topic}. What comes first?",
        "First comes some reading.",
    ),
    (
        "I have one evening to {verb} an audience that cares about {topic}. Plan it for me.",
        "Here is a plan by the hour.",
    ),
)
# The rest of an answer. Requests and topics take these texts in turn, so that the answers are less alike than with a
# single text.
_BODIES = (
    " Note what most people already know about {topic} and what they ask. Choose a quiet place and a time, and keep it "
    "short. Bring one example to show, speak plainly, and leave room for questions at the end.",
    " Read two good articles on {topic}, then write one page in your own words. Ask a friend to read it aloud. Where "
    "the friend stops or frowns, use fewer words. After that the page is ready, and so are you.",
    " Set aside an hour on Monday for {topic} and another on Thursday. The first hour is for listening, the second for "
    "trying things out. Write down what went well, and change only one thing each week.",
    " Make a table with three columns: what {topic} may cost, how long it takes, and what can go wrong. Fill in what "
    "you can today. The empty cells tell you whom to call and what to look up next.",
    " Tell a story of how you came to {topic} yourself. Five minutes are enough. Then hand out something that can be "
    "held and passed around, and let everybody say what they noticed. Thank them and finish on time.",
)


def controlled_pairs(
    tokenizer: PreTrainedTokenizerBase, n_pairs: int = 64, seed: int = 0
) -> dict[str, list[Conversation]]:
    """Make pairs of conversations: {"benign": conversations, "harmful": conversations}.

    Line i of both lists is pair i. No completion occurs twice within a list.

    Args:
        tokenizer: its chat template renders the pairs, and its tokens are counted.
        seed: chooses the requests, the topics and the verbs, and their order.

    Raises:
        UserError: `n_pairs` below 1, or a tokenizer for which fewer than `n_pairs` pairs differ only in the tokens of
            the verb.
    """
    if n_pairs < 1:
        raise UserError(f"{n_pairs} controlled pairs cannot be made: ask for at least 1")
    pairs: dict[str, list[Conversation]] = {side: [] for side in SIDES}
    for candidates in _candidates(seed):
        controlled = next((pair for verbs, pair in candidates if _controlled(tokenizer, verbs, pair)), None)
        if controlled is not None:
            for side, conversation in zip(SIDES, controlled, strict=True):
                pairs[side].append(conversation)
        if len(pairs["benign"]) == n_pairs:
            return pairs
    count = len(pairs["benign"])
    raise UserError(
        f"this tokenizer allows only {count} of {n_pairs} controlled pairs that differ only in the tokens of one word: "
        + (f"ask for at most {count}" if count else "use another tokenizer, or pairs of your own")
    )


def _candidates(seed: int) -> Iterator[list[tuple[Verbs, Pair]]]:
    """Yield, for each request and topic in random order, the pairs with all verbs in random order."""
    generator = random.Random(seed)
    combinations = list(product(range(len(_REQUESTS)), range(len(_TOPICS))))
    generator.shuffle(combinations)
    for request_index, topic_index in combinations:
        (request, opening), topic = _REQUESTS[request_index], _TOPICS[topic_index]
        answer = (opening + _BODIES[(request_index + topic_index) % len(_BODIES)]).format(topic=topic)
        yield [(verbs, _pair(request, topic, answer, verbs)) for verbs in generator.sample(_VERBS, len(_VERBS))]


def _pair(request: str, topic: str, answer: str, verbs: Verbs) -> Pair:
    benign, harmful = (
        [
            {"role": "user", "content": request.format(verb=verb, topic=topic)},
            {"role": "assistant", "content": answer},
        ]
        for verb in verbs
    )
    return benign, harmful


def _controlled(tokenizer: PreTrainedTokenizerBase, verbs: Verbs, pair: Pair) -> bool:
    """Return whether both renderings have the same number of tokens and differ only in tokens of the verb."""
    benign, harmful = (render(tokenizer, conversation) for conversation in pair)
    if len(benign.input_ids) != len(harmful.input_ids):
        return False
    id_pairs = zip(benign.input_ids, harmful.input_ids, strict=True)
    differing = [position for position, (left, right) in enumerate(id_pairs) if left != right]
    if not differing or benign.completion_mask != harmful.completion_mask:
        return False
    span = slice(differing[0], differing[-1] + 1)
    return all(_within(tokenizer, row, span, verb) for row, verb in zip((benign, harmful), verbs, strict=True))


def _within(tokenizer: PreTrainedTokenizerBase, row: Rendered, span: slice, verb: str) -> bool:
    """Return whether a span of tokens is the verb or a part of it."""
    return str(tokenizer.decode(list(row.input_ids[span]))).strip() in verb


def shuffled_prompts(conversations: Sequence[Conversation], seed: int = 0) -> list[Conversation]:
    """Return the rows with each completion after the prompt of another row, as a control for any change of prompt.

    A row's last assistant turn stays on its line. Everything before it, including the system message, comes from
    another row.

    Raises:
        UserError: fewer than two rows, or a row that does not end with an assistant turn.
    """
    if len(conversations) < 2:
        raise UserError(
            f"prompts cannot be shuffled among {len(conversations)} rows: pass a probe set of at least two rows"
        )
    for number, conversation in enumerate(conversations):
        if len(conversation) < 2 or conversation[-1]["role"] != "assistant":
            raise UserError(f"row {number} has no prompt with a completion after it: its prompt cannot be shuffled")
    order = random.Random(seed).sample(range(len(conversations)), len(conversations))
    # One cycle through all rows, so that no row keeps its prompt.
    prompt_row = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [
        [*(dict(turn) for turn in conversations[prompt_row[row]][:-1]), dict(conversations[row][-1])]
        for row in range(len(conversations))
    ]
