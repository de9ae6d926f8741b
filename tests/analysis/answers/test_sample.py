"""Sampling: the model's own distribution, each answer from numbers of its own, ended where the model ends its turn."""

import numpy as np
import pytest
import torch
from holdfast.analysis.answers.continuous import sample_continuously
from holdfast.analysis.answers.records import AnswerRequest
from holdfast.analysis.answers.sample import Sampling, end_tokens, prompt_ids, sample_answers, uniforms
from holdfast.analysis.answers.variants import Prompt
from holdfast.analysis.errors import UserError
from holdfast.analysis.interventions.apply import ablate
from holdfast.analysis.models.hooks import patch
from holdfast.analysis.models.render import render
from scipy import stats
from toys.architectures import architecture
from toys.chat_models import CHATML, FOLDED_SYSTEM, GENERATION, chat, toy_model, toy_tokenizer

USERS = ["Ann asks about soup", "and money", "take the money and run away from them", "hi", "be honest and help them"]


def asked(samples=2, users=USERS):
    prompts = [Prompt(f"q{number}", 0, "plain", chat(user)) for number, user in enumerate(users)]
    return [AnswerRequest(f"{prompt.question_id}/{at}", prompt, at) for prompt in prompts for at in range(samples)]


def said(model, wanted, sampling, batch_size=4, tokenizer=None, sample=sample_answers):
    """{key: (text, finish)}."""
    batches = sample(model, tokenizer or toy_tokenizer(), wanted, sampling, {}, batch_size)
    return {answer.key: (answer.answer, answer.finish) for batch in batches for answer in batch}


@torch.no_grad()
def plain_loop(model, tokenizer, one, sampling, stops):
    """The answer by one forward pass over all tokens for each new one: no cache, no padding, numpy's cumulative sum."""
    ids = tokenizer.apply_chat_template(one.prompt.messages, add_generation_prompt=True, return_dict=False)
    start, numbers = len(ids), uniforms(one, sampling)
    for number in numbers:
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double().numpy()
        if sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            logits = logits / sampling.temperature
            probabilities = np.exp(logits - logits.max())
            if sampling.top_p < 1:
                order = np.argsort(-probabilities)
                before = np.cumsum(probabilities[order]) - probabilities[order]
                probabilities[order[before >= sampling.top_p * probabilities.sum()]] = 0
            token = int(np.argmax(np.cumsum(probabilities) > number * probabilities.sum()))
        if token in stops:
            return tokenizer.decode(ids[start:]), "stop"
        ids.append(token)
    return tokenizer.decode(ids[start:]), "length"


SETTINGS = [Sampling(max_new_tokens=8), Sampling(0.5, 0.7, 8, seed=3), Sampling(0, 1, 8)]


@pytest.mark.parametrize("sampling", SETTINGS, ids=lambda sampling: f"t{sampling.temperature}-p{sampling.top_p}")
def test_batched_sampling_equals_a_loop_without_cache_or_padding(sampling):
    model, tokenizer = toy_model(scale=2.0), toy_tokenizer()
    found = said(model, asked(), sampling)
    assert len(found) == 10
    for one in asked():
        assert found[one.key] == plain_loop(model, tokenizer, one, sampling, {3})


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt_neox", "qwen3_moe"])
def test_architectures_sample_alike_in_any_batch(kind):
    model, sampling = architecture(kind), Sampling(max_new_tokens=6)
    found = said(model, asked(), sampling, batch_size=10)
    assert said(model, asked(), sampling, batch_size=3) == found
    one = asked()[5]
    assert found[one.key] == plain_loop(model, toy_tokenizer(), one, sampling, {3})


def test_an_answer_does_not_depend_on_its_batch_or_on_what_was_sampled_before():
    model, sampling = toy_model(scale=2.0), Sampling(max_new_tokens=8)
    found = said(model, asked(), sampling)
    torch.manual_seed(99)
    assert said(model, asked()[::-3], sampling, batch_size=1) == {one.key: found[one.key] for one in asked()[::-3]}
    more = said(model, asked(samples=4), sampling)
    assert {key: more[key] for key in found} == found


def test_samples_seeds_and_prompts_draw_different_numbers():
    drawn = [uniforms(one, Sampling(max_new_tokens=5, seed=seed)) for one in asked() for seed in (0, 1)]
    assert len(np.unique(np.stack(drawn))) == 10 * 2 * 5
    assert uniforms(asked()[0], Sampling(max_new_tokens=9))[:5].tolist() == drawn[0].tolist()


@pytest.mark.parametrize("sample", [sample_answers, sample_continuously])
def test_first_tokens_follow_the_models_distribution(sample):
    model, tokenizer = toy_model(scale=0.5), toy_tokenizer()
    wanted = asked(samples=2000, users=["hi"])
    ids = torch.tensor([prompt_ids(tokenizer, wanted[0].prompt.messages)])
    with torch.no_grad():
        exact = model(input_ids=ids).logits[0, -1].double().softmax(-1).numpy()
    texts = [tokenizer.decode([token]) for token in range(320)]
    counts = dict.fromkeys(texts, 0)
    for text, finish in said(model, wanted, Sampling(max_new_tokens=1), 500, sample=sample).values():
        counts["<|im_end|>" if finish == "stop" else text] += 1
    mass = {text: sum(exact[token] for token in range(320) if texts[token] == text) for text in counts}
    observed = np.array([counts[text] for text in counts])
    expected = 2000 * np.array([mass[text] for text in counts])
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    assert stats.chisquare(observed, expected).pvalue > 1e-6 and len(observed) > 50


def test_continuous_batching_says_what_batches_say_with_hooks_and_without():
    model, likeliest = toy_model(scale=2.0), Sampling(0, 1, 8)
    plain = said(model, asked(), likeliest)
    assert said(model, asked(), likeliest, sample=sample_continuously) == plain
    basis = torch.linalg.qr(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))[0]
    with ablate(model, {0: basis, 1: basis}):
        ablated = said(model, asked(), likeliest)
        assert said(model, asked(), likeliest, sample=sample_continuously) == ablated != plain
    assert said(model, asked(), likeliest) == plain


def test_continuous_batching_draws_anew_for_what_is_missing():
    model, sampling = toy_model(scale=2.0), Sampling(max_new_tokens=8)
    first = said(model, asked(8, ["hi"]), sampling, sample=sample_continuously)
    rest = said(model, asked(8, ["hi"])[4:], sampling, sample=sample_continuously)
    assert len(rest) == 4 and not set(rest.values()) & set(first.values())


def test_the_models_own_generation_config_neither_bends_the_distribution_nor_is_changed():
    model, sampling = toy_model(scale=2.0), Sampling(max_new_tokens=8)
    plain = said(model, asked(), sampling)
    own = model.generation_config
    own.do_sample, own.top_k, own.repetition_penalty, own.no_repeat_ngram_size, own.min_new_tokens = True, 1, 9.0, 1, 8
    assert said(model, asked(), sampling) == plain
    assert model.generation_config is own and own.top_k == 1


def model_that_can_say(token):
    """A model that is sure of what it says, and of nothing as much as of one token."""
    model = toy_model()
    with torch.no_grad():
        model.lm_head.weight *= 100
        model.lm_head.weight[token] *= 10
    return model


def towards(model, token):
    """A change under which a token is all but certain."""
    row = model.lm_head.weight[token].detach()
    return lambda layer, hidden: hidden * 0 + row


def test_hooks_around_the_call_change_the_answers_and_are_gone_after_it():
    model, sampling = model_that_can_say(100), Sampling(max_new_tokens=5)
    plain = said(model, asked(), sampling)
    with patch(model, [2], towards(model, 100)):
        hooked = said(model, asked(), sampling)
        loop = plain_loop(model, toy_tokenizer(), asked()[4], sampling, {3})
    letter = toy_tokenizer().decode([100])
    assert set(hooked.values()) == {(letter * 5, "length")} and hooked[asked()[4].key] == loop
    assert said(model, asked(), sampling) == plain


@pytest.mark.parametrize("template", [CHATML, GENERATION], ids=["plain", "marked"])
def test_an_answer_ends_at_the_chat_templates_end_of_turn_where_the_generation_config_knows_none(template):
    tokenizer = toy_tokenizer(template, end="<|begin|>")
    for token in (1, 3, 7):
        model = model_that_can_say(token)
        model.generation_config.eos_token_id = [1, 7]
        assert end_tokens(model, tokenizer) == [1, 3, 7]
        with patch(model, [2], towards(model, token)):
            assert set(said(model, asked(), Sampling(max_new_tokens=3), tokenizer=tokenizer).values()) == {("", "stop")}


def test_a_word_that_the_vocabulary_lacks_ends_no_answer():
    tokenizer = toy_tokenizer()
    tokenizer.unk_token = "<|begin|>"
    tokenizer.chat_template = CHATML.replace("m.content", "'<|begin|>'")
    assert end_tokens(toy_model(), tokenizer) == [3]


def test_a_model_without_any_end_token_is_refused():
    model, tokenizer = toy_model(), toy_tokenizer(CHATML.replace("<|im_end|>", " over"))
    model.generation_config.eos_token_id, tokenizer.eos_token = None, None
    with pytest.raises(UserError, match="end token"):
        said(model, asked(), Sampling(max_new_tokens=3), tokenizer=tokenizer)


def test_prompts_are_rendered_as_everywhere_and_earlier_turns_are_kept():
    tokenizer = toy_tokenizer()
    assert (
        prompt_ids(tokenizer, chat("hi", system="be kind")) == render(tokenizer, chat("hi", system="be kind")).input_ids
    )
    turns = [*chat("hi", "go away"), *chat("and money")]
    text = tokenizer.decode(prompt_ids(tokenizer, turns))
    assert text.endswith("go away<|im_end|>\n<|im_start|>user\nand money<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"temperature": -1.0}, "--temperature .*-1.0"),
        ({"temperature": float("nan")}, "--temperature .*nan"),
        ({"temperature": float("inf")}, "--temperature .*inf"),
        ({"top_p": 0.0}, "--top_p .*0.0"),
        ({"top_p": 1.5}, "--top_p .*1.5"),
        ({"max_new_tokens": 0}, "--max_new_tokens .*0"),
        ({"seed": -1}, "--seed .*-1"),
    ],
)
def test_settings_that_cannot_be_are_one_line(change, complaint):
    with pytest.raises(UserError, match=complaint):
        Sampling(**change)


def test_prompts_that_cannot_be_answered_are_refused_before_any_work():
    with pytest.raises(
        UserError, match=r"'q2'.* plain .*22 tokens.*--max_new_tokens 250 .*256 positions.*--max_new_tokens 234"
    ):
        said(toy_model(), asked(), Sampling(max_new_tokens=250))
    with pytest.raises(UserError, match=r"'q0'.* plain .*310 tokens"):
        said(toy_model(), asked(users=["money " * 300]), Sampling(max_new_tokens=1))
    with pytest.raises(UserError, match=r"'q0'.* chat template"):
        said(toy_model(), asked(), Sampling(max_new_tokens=3), tokenizer=toy_tokenizer(None))
    odd = [AnswerRequest("k", Prompt("odd", 0, "plain", [*chat("a"), *chat("b")]), 0)]
    with pytest.raises(UserError, match=r"question 'odd': .*chat template"):
        said(toy_model(), odd, Sampling(max_new_tokens=3), tokenizer=toy_tokenizer(FOLDED_SYSTEM))
    late = [AnswerRequest("k", Prompt("late", 0, "plain", [*chat("a", "b"), *chat("c"), *chat("d")]), 0)]
    with pytest.raises(UserError, match=r"question 'late': .*chat template"):
        said(toy_model(), late, Sampling(max_new_tokens=3), tokenizer=toy_tokenizer(FOLDED_SYSTEM))


def test_logits_that_are_not_finite_are_one_line():
    model = toy_model()
    with patch(model, [2], lambda layer, hidden: hidden * float("nan")), pytest.raises(UserError, match="not finite"):
        said(model, asked(), Sampling(max_new_tokens=3))
