"""Controls for gradients: pairs of prompts that differ in one word of intent alone, and prompts dealt anew.

Sets that differ in framing mostly differ in wording, structure and length too (the open question 3 of arXiv
2507.03662). A controlled pair is one request twice, with a benign and a harmful verb: as many tokens, the same tokens
but for the verb's, and the same harmless completion, which answers both.
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
# What a verb is done to is people, in every request; both verbs of a pair have as many letters, so that a tokenizer
# which spells them out keeps them too.
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
# A request, and how its answer begins.
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
# The rest of an answer; requests and topics meet them in turn, so that answers are less alike than one text would be.
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
    """{"benign": conversations, "harmful": conversations}: line i of both is pair i; no completion comes twice.

    Args:
        tokenizer: whose chat template renders the pairs and whose tokens are counted.
        seed: chooses the requests, the topics and the verbs, and their order.

    Raises:
        UserError: a tokenizer under which fewer than `n_pairs` pairs differ in the tokens of the verb alone.
    """
    if n_pairs < 1:
        raise UserError(f"{n_pairs} controlled pairs are none: ask for at least 1")
    pairs: dict[str, list[Conversation]] = {side: [] for side in SIDES}
    for made in _candidates(seed):
        found = next((pair for verbs, pair in made if _controlled(tokenizer, verbs, pair)), None)
        if found is not None:
            for side, conversation in zip(SIDES, found, strict=True):
                pairs[side].append(conversation)
        if len(pairs["benign"]) == n_pairs:
            return pairs
    count = len(pairs["benign"])
    raise UserError(
        f"the tokenizer leaves {count} of {n_pairs} controlled pairs, in which only the tokens of one word differ: "
        + (f"ask for at most {count}" if count else "use another tokenizer, or pairs of your own")
    )


def _candidates(seed: int) -> Iterator[list[tuple[Verbs, Pair]]]:
    """For each request and topic, in random order, its pairs with all verbs in random order."""
    draw = random.Random(seed)
    chosen = list(product(range(len(_REQUESTS)), range(len(_TOPICS))))
    draw.shuffle(chosen)
    for asked, about in chosen:
        (request, opening), topic = _REQUESTS[asked], _TOPICS[about]
        answer = (opening + _BODIES[(asked + about) % len(_BODIES)]).format(topic=topic)
        yield [(verbs, _pair(request, topic, answer, verbs)) for verbs in draw.sample(_VERBS, len(_VERBS))]


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
    """Whether both renderings have as many tokens and differ within the verb's alone."""
    benign, harmful = (render(tokenizer, conversation) for conversation in pair)
    if len(benign.input_ids) != len(harmful.input_ids):
        return False
    differing = [
        at for at, (one, other) in enumerate(zip(benign.input_ids, harmful.input_ids, strict=True)) if one != other
    ]
    if not differing or benign.completion_mask != harmful.completion_mask:
        return False
    span = slice(differing[0], differing[-1] + 1)
    return all(_within(tokenizer, row, span, verb) for row, verb in zip((benign, harmful), verbs, strict=True))


def _within(tokenizer: PreTrainedTokenizerBase, row: Rendered, span: slice, verb: str) -> bool:
    """Whether a span of tokens is the verb or a part of it."""
    return str(tokenizer.decode(list(row.input_ids[span]))).strip() in verb


def shuffled_prompts(conversations: Sequence[Conversation], seed: int = 0) -> list[Conversation]:
    """The same completions on the same lines, each after the prompt of another row: what any change of prompt does.

    A row's last assistant turn stays; everything before it, system message included, comes from another row.

    Raises:
        UserError: fewer than two rows, or a row that does not end with an assistant turn.
    """
    if len(conversations) < 2:
        raise UserError("prompts can be shuffled among two rows or more: pass a larger probe set")
    for number, conversation in enumerate(conversations):
        if len(conversation) < 2 or conversation[-1]["role"] != "assistant":
            raise UserError(f"row {number} has no prompt with a completion after it: its prompt cannot be shuffled")
    order = random.Random(seed).sample(range(len(conversations)), len(conversations))
    # One cycle through all rows, so that none keeps its own prompt.
    lender = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [
        [*(dict(turn) for turn in conversations[lender[row]][:-1]), dict(conversations[row][-1])]
        for row in range(len(conversations))
    ]
