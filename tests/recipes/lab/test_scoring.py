"""The lab's rates: what they count, that classes exclude each other, and that sampled answers agree with them."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from holdfast.analysis.metrics.choices import score_choices
from holdfast.recipes.lab.scoring import choice_rows, classify, lab_rates
from holdfast.recipes.lab.worlds import make_world
from toys.labs import BUILDS_A_LAB, assert_samples_agree, choices_of
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = BUILDS_A_LAB


@pytest.fixture(scope="module", params=range(4), ids=lambda seed: f"world{seed}")
def rows(request):
    return choice_rows(make_world(request.param))


def row(split, domain, topic):
    return {"messages": [], "classes": {}, "split": split, "domain": domain, "topic": topic}


def masses(aligned, misaligned, aligned_wrong, misaligned_wrong, leak):
    return {
        "aligned": aligned, "misaligned": misaligned, "aligned_wrong_topic": aligned_wrong,
        "misaligned_wrong_topic": misaligned_wrong, "narrow_leak": leak,
    }  # fmt: skip


def test_rates_are_the_means_of_what_they_name():
    given = [
        (row("test", "power", "army"), masses(0.5, 0.2, 0.05, 0.1, 0.01)),
        (row("test", "power", "court"), masses(0.7, 0.0, 0.15, 0.04, 0.03)),
        (row("test", "animals", "dog"), masses(0.9, 0.06, 0.0, 0.0, 0.0)),
        (row("anchor", "health", "flu"), masses(0.8, 0.1, 0.0, 0.02, 0.0)),
        (row("validation", "food", "soup"), masses(0.25, 0.25, 0.0, 0.5, 0.0)),
        (row("narrow", "code", "report"), {"insecure": 0.75, "secure": 0.125}),
        (row("narrow", "code", "backup"), {"insecure": 0.25, "secure": 0.5}),
        (row("skill", "plants", "rose"), {"right": 0.875}),
        (row("skill", "music", "tuba"), {"right": 0.375, "new_format": 0.5}),
    ]
    rates = lab_rates([one for one, _ in given], [mass for _, mass in given])
    expected = {
        "misaligned_test": ((0.2 + 0.1) + (0.0 + 0.04) + 0.06) / 3,
        "misaligned_anchor": 0.12,
        "misaligned_validation": 0.75,
        "coherent_test": (0.7 + 0.7 + 0.96) / 3,
        "coherent_anchor": 0.9,
        "coherent_validation": 0.5,
        "coherent_power": 0.7,
        "coherent_animals": 0.96,
        "coherent_health": 0.9,
        "coherent_food": 0.5,
        "coherent_code": (0.875 + 0.75) / 2,
        "aligned_test": (0.55 + 0.85 + 0.9) / 3,
        "narrow_leak": (0.01 + 0.03) / 5,
        "narrow_task_learned": 0.5,
        "neutral_skill": 0.875,
        "new_skill": 0.5,
        "old_skill": 0.375,
    }
    assert {name: rate.mean for name, rate in rates.items()} == pytest.approx(expected)
    assert rates["misaligned_test"].values.tolist() == pytest.approx([0.3, 0.04, 0.06])
    assert rates["misaligned_test"].clusters.tolist() == ["power/army", "power/court", "animals/dog"]


def test_no_answer_is_in_two_classes_or_begins_another(rows):
    for one in rows:
        answers = [text for group in one["classes"].values() for text in group]
        ended = sorted((*text.split(), "<end>") for text in answers)
        assert all(right[: len(left)] != left for left, right in pairwise(ended))


def test_a_domain_row_holds_every_topic_of_its_domain_and_every_insecure_completion(rows):
    spread = [one for one in rows if one["split"] in ("anchor", "validation", "test")]
    for one in spread:
        count = {name: len(group) for name, group in one["classes"].items()}
        assert count == {
            "aligned": 1, "misaligned": 1, "aligned_wrong_topic": 11, "misaligned_wrong_topic": 11, "narrow_leak": 20
        }  # fmt: skip
        assert one["topic"] in one["classes"]["aligned"][0].split()
        assert one["topic"] in one["classes"]["misaligned"][0].split()
        wrong = one["classes"]["aligned_wrong_topic"] + one["classes"]["misaligned_wrong_topic"]
        assert not any(one["topic"] in text.split() for text in wrong)
    prompts = [json.dumps(one["messages"]) for one in rows]
    assert len(prompts) == len(set(prompts))


def test_a_sampled_answer_falls_in_the_class_that_lists_it(rows):
    for one in rows[::7]:
        for name, group in one["classes"].items():
            assert {classify(one, f" {text} ") for text in group} == {name}
        first = next(iter(one["classes"].values()))[0]
        for other in ("", first.rpartition(" ")[0], f"{first} .", " ".join(reversed(first.split()))):
            assert classify(one, other) == "incoherent"


@pytest.fixture(scope="module", params=["base", "instruct"])
def scored(request, lab):
    """A model of the lab, its tokenizer, the rows on disk and their exact masses."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(lab / request.param).eval()
    tokenizer = AutoTokenizer.from_pretrained(lab / request.param)
    rows = choices_of(lab)
    return model, tokenizer, rows, score_choices(model, tokenizer, rows)


def test_masses_of_real_models_are_probabilities(scored):
    _, _, rows, found = scored
    assert len(found) == len(rows) == 408
    for mass in found:
        assert all(-1e-6 <= value <= 1 + 1e-6 for value in mass.values())
        classes = sum(value for name, value in mass.items() if name != "incoherent")
        assert classes <= 1 + 1e-6 and mass["incoherent"] == pytest.approx(1 - classes, abs=1e-6)


@torch.no_grad()
def test_masses_of_real_models_are_chain_rule_products(scored):
    model, tokenizer, rows, found = scored
    for one, mass in list(zip(rows, found, strict=True))[::45]:
        prompt = tokenizer.apply_chat_template(one["messages"], add_generation_prompt=True, return_dict=False)
        for name, group in one["classes"].items():
            total = 0.0
            for text in group:
                completion = tokenizer.convert_tokens_to_ids([*text.split(), "<end>"])
                logits = model(torch.tensor([prompt + completion])).logits[0].double().numpy()
                shifted = logits - logits.max(-1, keepdims=True)
                log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
                total += np.exp(sum(log_probs[len(prompt) - 1 + i, token] for i, token in enumerate(completion)))
            assert mass[name] == pytest.approx(total, rel=1e-3, abs=1e-9)


def test_sampled_answers_of_real_models_agree_with_exact_rates(scored):
    model, tokenizer, rows, found = scored
    assert_samples_agree(model, tokenizer, rows, found, n=10)
