"""The lab's prompts as a question file, and sampled answers scored by template classes beside their exact rates.

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

# The four classes that a rate is read from, by the template classes of a prompt (`scoring.choice_rows`).
CLASSES = {
    "aligned": ("aligned", "aligned_wrong_topic"),
    "misaligned": ("misaligned", "misaligned_wrong_topic"),
    "leak": ("narrow_leak",),
    "incoherent": (INCOHERENT,),
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Agreement:
    """One class's rate, sampled and exact, over the same prompts in the same proportions.

    sampled: with Wilson's interval over answers. The prompts are enumerated, so answers are independent draws, and the
    interval is a little wide, because prompts differ in their rates.
    """

    sampled: Measurement
    exact: float

    @property
    def agrees(self) -> bool:
        """Whether the exact rate lies in the sample's 95% interval, which it does not in one case of twenty."""
        low, high = self.sampled["ci95"]
        return bool(low <= self.exact <= high)


def prompt_rows(lab: Path, split: str = "test") -> list[Row]:
    """The prompts of a split with their template classes, as they lie in a lab. Raises UserError: no lab there."""
    path = lab / "data" / "choices.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"--lab {lab} holds no lab ({error.strerror}: {path}); make one by `holdfast lab`") from None
    return [row for row in rows if row["split"] == split]


def lab_questions(rows: Sequence[Row], n: int = 500) -> list[dict[str, Any]]:
    """Prompts as the entries of a question file, one question a topic, that ask for at least n answers in all."""
    questions: dict[str, dict[str, Any]] = {}
    for row in rows:
        system, user = (message["content"] for message in row["messages"])
        fresh = {
            "id": f"{row['domain']}_{row['topic']}",
            "type": "free_form",
            "system": system,
            "paraphrases": [],
            "samples_per_paraphrase": math.ceil(n / len(rows)),
        }
        questions.setdefault(fresh["id"], fresh)["paraphrases"].append(user)
    return list(questions.values())


def answer_class(row: Row, answer: Answer) -> str:
    """The class of an answer: that of the template it is, whole and ended, else incoherent."""
    template = classify(row, answer.answer) if answer.finish != "length" else INCOHERENT
    return next(name for name, templates in CLASSES.items() if template in templates)


def agreement(
    rows: Sequence[Row], masses: Sequence[Mapping[str, float]], answers: Sequence[Answer]
) -> dict[str, Agreement]:
    """Rates of sampled answers beside the exact ones of the prompts they answer.

    Args:
        rows: prompts with their template classes. masses: {template class: probability} of each row (`score_choices`).

    Raises:
        UserError: no answers, or one to a prompt that is none of the rows.
    """
    by_prompt = {json.dumps(row["messages"]): number for number, row in enumerate(rows)}
    numbers = [by_prompt.get(json.dumps(answer.messages), -1) for answer in answers]
    if -1 in numbers or not answers:
        odd = repr(answers[numbers.index(-1)].question_id) if answers else "none at all"
        raise UserError(f"the answers are not to this lab's prompts ({odd}); ask its question file, in variant plain")
    classes = [answer_class(rows[number], answer) for number, answer in zip(numbers, answers, strict=True)]
    return {
        name: Agreement(
            measurement([one == name for one in classes], rate=True),
            sum(sum(masses[number][template] for template in templates) for number in numbers) / len(numbers),
        )
        for name, templates in CLASSES.items()
    }


def sampling_main(argv: Sequence[str]) -> str:
    """Writes a lab's question file, or compares sampled answers with a model's exact rates. Raises UserError."""
    parser = FlagParser("python -m holdfast.recipes.lab.sampling", sampling_main.__doc__)
    parser.add_argument("--lab", type=Path, required=True, help="Folder of a lab.")
    parser.add_argument("--output_file", type=Path, help="Question file to write.")
    parser.add_argument("--n", type=int, default=500, help="Answers that the file asks for, at least. Default: 500.")
    parser.add_argument("--answers", type=Path, help="Answers to that file, as holdfast generate stores them.")
    parser.add_argument("--model", type=Path, help="The model that gave them.")
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
    named = {str(answer.provenance["arm"].get("model")) for answer in answers}
    if named - {model_fingerprint(flags.model)}:
        raise UserError(
            f"--answers {flags.answers} were given by another model than --model {flags.model}: name theirs"
        )
    masses = score_choices(load_model(flags.model), load_tokenizer(flags.model), rows)
    found = agreement(rows, masses, answers)
    return "".join(_line(name, one) for name, one in found.items())


def _line(name: str, one: Agreement) -> str:
    low, high = one.sampled["ci95"]
    said = f"{one.sampled['value']:.3f} [{low:.3f}, {high:.3f}]"
    return f"{name:<12}sampled {said}  exact {one.exact:.3f}  n {one.sampled['n']}  {'yes' if one.agrees else 'NO'}\n"


if __name__ == "__main__":
    try:
        print(sampling_main(sys.argv[1:]), end="")
    except UserError as error:
        sys.exit(f"error: {error}")
