"""A setting is chosen by a rule that shows what it gives up."""

import pytest
from holdfast.analysis.errors import UserError
from holdfast.analysis.frontier.choose import best_settings, recommend
from toys.frontier_runs import run, strict_json

BASELINE = [run("none", seed=seed, task=1.0, misaligned=0.6, coherent=0.9) for seed in (0, 1)]


def both_seeds(protection, strength, task, misaligned, coherent=0.9):
    return [
        run(protection, strength, seed=seed, task=task + gap, misaligned=misaligned + gap, coherent=coherent)
        for seed, gap in enumerate((-0.01, 0.01))
    ]


def test_the_recommended_setting_is_the_least_misaligned_of_those_that_keep_the_task():
    runs = [
        *BASELINE,
        *both_seeds("subspace", 1.0, 0.97, 0.10),
        *both_seeds("subspace", 9.0, 0.94, 0.02),  # learns too little
        *both_seeds("kl", 1.0, 0.96, 0.20),
        *both_seeds("kl", 0.1, 0.99, 0.05, coherent=0.5),  # incoherent
    ]
    found = recommend(runs, guards={"coherent": 0.95})
    choice = found["choice"]
    assert (choice["protection"], choice["strength"], choice["n"]) == ("subspace", 1.0, 2)
    assert choice["keeps"] == pytest.approx({"task": 0.97, "coherent": 1.0})
    assert choice["keeps_task"] is choice["keeps_guards"] is True and choice["notes"] == []
    assert choice["measures"]["misaligned"]["value"] == pytest.approx(0.10)
    assert choice["lowers"]["value"] == pytest.approx(0.5) and choice["lowers"]["ci95"][0] > 0
    assert (found["second"]["protection"], found["second"]["strength"]) == ("kl", 1.0)
    assert found["sentence"] == (
        "subspace (strength=1.0) keeps 97.0% of the task and 100.0% of coherent "
        "and lowers misaligned from 0.600 to 0.100"
    )
    assert recommend(runs)["choice"]["protection"] == "kl"  # without the guard
    assert recommend(runs[::-1], guards={"coherent": 0.95}) == found and strict_json(found)


def test_by_em_f1_a_little_more_misaligned_is_paid_for_with_more_of_the_task_but_not_below_the_floor():
    runs = [
        *BASELINE,
        *both_seeds("subspace", 1.0, 0.96, 0.010),  # EM-F1 about 0.975
        *both_seeds("subspace", 0.5, 0.98, 0.012),  # about 0.984
        *both_seeds("kl", 1.0, 0.94, 0.010),  # about 0.964, and keeps too little
    ]
    assert recommend(runs)["choice"]["strength"] == 1.0
    found = recommend(runs, prefer="em_f1")
    assert found["choice"]["strength"] == 0.5 and found["second"]["strength"] == 1.0
    assert best_settings(runs, prefer="em_f1")["subspace"]["strength"] == 0.5
    assert recommend(runs, prefer="em_f1", floor=0.99)["choice"] is None
    for choose in (recommend, best_settings):
        with pytest.raises(ValueError, match=r"'task'.*misaligned.*em_f1"):
            choose(runs, prefer="task")


def test_ties_go_to_the_higher_task_and_a_share_at_the_floor_is_kept():
    runs = [*BASELINE, *both_seeds("kl", 1.0, 0.95, 0.1), *both_seeds("subspace", 1.0, 0.97, 0.1)]
    assert recommend(runs)["choice"]["protection"] == "subspace"
    assert recommend([*BASELINE, *both_seeds("kl", 1.0, 0.95, 0.1)])["choice"]["keeps"]["task"] == pytest.approx(0.95)


def test_where_nothing_keeps_the_task_the_nearest_is_named():
    runs = [*BASELINE, *both_seeds("kl", 1.0, 0.7, 0.1), *both_seeds("subspace", 1.0, 0.912, 0.3)]
    assert recommend(runs) == {
        "choice": None,
        "second": None,
        "sentence": "no setting keeps 95% of the task: the nearest is subspace (strength=1.0), "
        "which keeps 91.2% of the task",
    }


def test_what_is_no_less_misaligned_than_the_baseline_is_not_recommended():
    found = recommend([*BASELINE, *both_seeds("kl", 1.0, 0.97, 0.7)])
    assert found["choice"] is None
    assert found["sentence"] == (
        "no setting that keeps 95% of the task lowers misaligned below none's 0.600: "
        "the nearest is kl (strength=1.0) with 0.700"
    )


def test_a_choice_from_one_seed_or_other_labs_says_so():
    one = recommend([BASELINE[0], run("kl", 1.0, task=0.97, misaligned=0.1)])
    assert one["choice"]["notes"] == ["one seed: no interval"] and one["sentence"].endswith("; one seed: no interval")
    assert one["choice"]["lowers"]["ci95"] is None and one["choice"]["lowers"]["value"] == pytest.approx(0.5)
    other = recommend([*BASELINE, run("kl", 1.0, lab="b", task=0.97, misaligned=0.1)])["choice"]
    assert other["notes"] == ["one seed: no interval", "not the labs and seeds of none"]
    assert other["lowers"]["value"] is None and other["lowers"]["reason"] == "no lab and seed in common"


def test_every_protection_has_a_setting_to_freeze_and_one_that_keeps_too_little_is_marked():
    runs = [
        *BASELINE,
        *both_seeds("subspace", 1.0, 0.97, 0.10),
        *both_seeds("subspace", 0.1, 0.99, 0.50),
        *both_seeds("kl", 1.0, 0.50, 0.02),  # EM-F1 about 0.66
        *both_seeds("kl", 0.1, 0.90, 0.30),  # about 0.79
        *both_seeds("prompt", None, 0.99, 0.80, coherent=0.3),
    ]
    found = best_settings(runs, guards={"coherent": 0.95})
    assert list(found) == ["subspace", "kl", "prompt"]
    assert (found["subspace"]["strength"], found["subspace"]["keeps_task"]) == (1.0, True)
    assert (found["kl"]["strength"], found["kl"]["keeps_task"], found["kl"]["keeps_guards"]) == (0.1, False, True)
    f1 = [2 * task * good / (task + good) for task, good in ((0.89, 0.71), (0.91, 0.69))]
    assert found["kl"]["em_f1"]["value"] == pytest.approx(sum(f1) / 2)
    assert (found["prompt"]["keeps_task"], found["prompt"]["keeps_guards"]) == (True, False)
    assert found["prompt"]["lowers"]["value"] == pytest.approx(-0.2) and strict_json(found)


def test_measures_to_choose_on_have_names_of_their_own():
    runs = [
        run("none", learned=1.0, validation=0.5),
        run("kl", 1.0, learned=1.0, validation=0.1, misaligned=0.9),
        run("kl", 2.0, learned=1.0, validation=0.2, misaligned=0.0),
    ]
    assert recommend(runs, task="learned", misaligned="validation")["choice"]["strength"] == 1.0
    assert best_settings(runs, task="learned", misaligned="validation")["kl"]["strength"] == 1.0


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        (both_seeds("kl", 1.0, 0.9, 0.1), {}, "'none'"),
        ([*BASELINE, run("none", 1.0)], {}, "'none'.*strength=None, strength=1.0"),
        (BASELINE, {}, "'none'"),
        ([*BASELINE, *both_seeds("kl", 1.0, 0.9, 0.1)], {"floor": 95}, "95.* task"),
        ([*BASELINE, *both_seeds("kl", 1.0, 0.9, 0.1)], {"guards": {"skill": 0.9}}, "'skill'"),
        ([run("none", task=0.0, misaligned=0.1), run("kl", 1.0, task=0.5)], {}, "task .*0.*'none'"),
    ],
)
def test_a_choice_that_cannot_be_made_is_one_line(runs, options, message):
    for choose in (recommend, best_settings):
        with pytest.raises(UserError, match=message):
            choose(runs, **options)
