"""Compare sampled answers with the lab's exact rates. The lab's prompts become a question file for `holdfast generate`.

    python -m holdfast.recipes.lab.sampling --lab runs/lab --output_file runs/lab_questions.yaml
    holdfast generate --model runs/lab/base --questions runs/lab_questions.yaml --max_new_tokens 32 \
        --output_file runs/base.jsonl
    python -m holdfast.recipes.lab.sampling --lab runs/lab --model runs/lab/base --answers runs/base.jsonl
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...analysis.answers.records import Answer, read_answers
from ...analysis.errors import UserError
from ...analysis.files.artifacts import check_writable, staged_file
from ...analysis.flags import FlagParser, require
from ...analysis.metrics.choices import INCOHERENT, score_choices
from ...analysis.models.load import load_model, load_tokenizer, model_fingerprint
from ...analysis.stats.intervals import Measurement
from ...analysis.stats.summary import measurement
from .scoring import classify

# {class of answers: its template classes in `scoring.choice_rows`}.
CLASSES = {
    "aligned": ("aligned", "aligned_wrong_topic"),
    "misaligned": ("misaligned", "misaligned_wrong_topic"),
    "leak": ("narrow_leak",),
    "incoherent": (INCOHERENT,),
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Agreement:
    """The rate of one class, sampled and exact, over the same prompts in the same proportions.

    Attributes:
        sampled: the sampled rate with Wilson's interval over answers. The prompts are enumerated, so that answers are
            independent draws. The interval is a little too wide, because prompts differ in their rates.
        exact: the rate computed from probabilities.
    """

    sampled: Measurement
    exact: float

    @property
    def agrees(self) -> bool:
        """Whether the exact rate lies in the sample's 95% interval. It misses by chance in one case of twenty."""
        low, high = self.sampled["ci95"]
        return bool(low <= self.exact <= high)


def prompt_rows(lab: Path, split: str = "test") -> list[Row]:
    """Return the prompts of a lab's split with their template classes. Raises UserError if the folder holds no lab."""
    path = lab / "data" / "choices.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"--lab {lab} holds no lab ({error.strerror}: {path}); make one by `holdfast lab`") from None
    return [row for row in rows if row["split"] == split]


def lab_questions(rows: Sequence[Row], n: int = 500) -> list[dict[str, Any]]:
    """Return prompts as entries of a question file that asks for at least n answers; a question for each topic."""
    questions: dict[str, dict[str, Any]] = {}
    for row in rows:
        system, user = (message["content"] for message in row["messages"])
        question = {
            "id": f"{row['domain']}_{row['topic']}",
            "type": "free_form",
            "system": system,
            "paraphrases": [],
            "samples_per_paraphrase": math.ceil(n / len(rows)),
        }
        questions.setdefault(question["id"], question)["paraphrases"].append(user)
    return list(questions.values())


def answer_class(row: Row, answer: Answer) -> str:
    """Return the class of an answer. An answer that is no whole, ended template is incoherent."""
    template = classify(row, answer.answer) if answer.finish != "length" else INCOHERENT
    return next(name for name, templates in CLASSES.items() if template in templates)


def agreement(
    rows: Sequence[Row], masses: Sequence[Mapping[str, float]], answers: Sequence[Answer]
) -> dict[str, Agreement]:
    """Return {class: `Agreement`}: rates of sampled answers, and the exact rates of the prompts that they answer.

    Args:
        rows: prompts with their template classes.
        masses: {template class: probability} of each row (`score_choices`).
        answers: sampled answers to these prompts.

    Raises:
        UserError: there are no answers, or an answer is to a prompt that is not among the rows.
    """
    by_prompt = {json.dumps(row["messages"]): number for number, row in enumerate(rows)}
    numbers = [by_prompt.get(json.dumps(answer.messages), -1) for answer in answers]
    if -1 in numbers or not answers:
        example = repr(answers[numbers.index(-1)].question_id) if answers else "none at all"
        raise UserError(
            f"the answers are not to this lab's prompts ({example}); ask its question file, in variant plain"
        )
    classes = [answer_class(rows[number], answer) for number, answer in zip(numbers, answers, strict=True)]
    return {
        name: Agreement(
            measurement([answered == name for answered in classes], rate=True),
            sum(sum(masses[number][template] for template in templates) for number in numbers) / len(numbers),
        )
        for name, templates in CLASSES.items()
    }


def sampling_main(argv: Sequence[str]) -> str:
    """Write a lab's question file, or compare sampled answers with a model's exact rates."""
    parser = FlagParser("python -m holdfast.recipes.lab.sampling", sampling_main.__doc__)
    parser.add_argument("--lab", type=Path, required=True, help="Folder of a lab.")
    parser.add_argument("--output_file", type=Path, help="Question file to write.")
    parser.add_argument(
        "--n", type=int, default=500, help="Least number of answers that the question file asks for. Default: 500."
    )
    parser.add_argument("--answers", type=Path, help="Answers to that file, written by holdfast generate.")
    parser.add_argument("--model", type=Path, help="The model that gave the answers.")
    flags = parser.read(argv)
    require(flags.n >= 1, "n", flags.n, "at least 1")
    rows = prompt_rows(flags.lab)
    if flags.output_file is not None:
        check_writable(flags.output_file.parent, "--output_file")
        with staged_file(flags.output_file) as staging:
            staging.write_text(yaml.safe_dump(lab_questions(rows, flags.n), sort_keys=False), encoding="utf-8")
        return f"questions written to {flags.output_file}\n"
    if flags.answers is None or flags.model is None:
        raise UserError("write --output_file for a question file, or --answers with --model to compare")
    answers = read_answers(flags.answers)
    models = {str(answer.provenance["arm"].get("model")) for answer in answers}
    if models - {model_fingerprint(flags.model)}:
        raise UserError(
            f"--answers {flags.answers} are of another model than --model {flags.model}: name the model that gave them"
        )
    masses = score_choices(load_model(flags.model), load_tokenizer(flags.model), rows)
    return "".join(_line(name, rates) for name, rates in agreement(rows, masses, answers).items())


def _line(name: str, rates: Agreement) -> str:
    low, high = rates.sampled["ci95"]
    sampled = f"{rates.sampled['value']:.3f} [{low:.3f}, {high:.3f}]"
    agrees = "yes" if rates.agrees else "NO"
    return f"{name:<12}sampled {sampled}  exact {rates.exact:.3f}  n {rates.sampled['n']}  {agrees}\n"


if __name__ == "__main__":
    try:
        print(sampling_main(sys.argv[1:]), end="")
    except UserError as error:
        sys.exit(f"error: {error}")
