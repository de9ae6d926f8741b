"""The causal test's tables over labs: means of the labs' own numbers, and a verdict on them."""

import numpy as np
import pytest
from holdfast.analysis.metrics.causal import causal_effects
from holdfast.recipes.lab.studies.causes_table import causes

ROWS = [
    {"classes": {"misaligned": ["x"]}, "domain": domain, "topic": topic}
    for domain in ("health", "money")
    for topic in ("a", "b", "c")
]
LABS = 10


def masses(misaligned: float, incoherent: float, spread: np.ndarray) -> list[dict[str, float]]:
    return [{"misaligned": misaligned + s, "incoherent": incoherent} for s in spread.tolist()]


def result(seed: int, effect: float, broken: float = 0.0) -> dict:
    generator = np.random.default_rng(seed)
    spread = generator.normal(0, 0.005, size=len(ROWS))
    clean = masses(0.02, 0.01, spread)
    by_dose = {
        dose: (
            masses(0.02 + dose * effect, 0.01 + broken, spread),
            [masses(0.02 + generator.normal(0, 0.004), 0.01, spread) for _ in range(20)],
        )
        for dose in (0.5, 1.0)
    }
    test = {"kind": "ablate", "name": "subspace", "draws": 20, **causal_effects(ROWS, clean, by_dose, "misaligned")}
    change = {"change": {"value": 0.1 * seed, "null": 0.01}}
    window = {"loss": change, "probability": change}
    return {"tests": [test], "patch": {"probes": {what: {"windows": {"0": window}} for what in ("whole", "subspace")}}}


@pytest.mark.parametrize(
    ("effect", "broken", "said"), [(0.2, 0.0, "causal"), (0.001, 0.0, "not causal"), (0.2, 0.5, "not decided")]
)
def test_the_tables_are_means_over_labs_with_one_verdict(effect: float, broken: float, said: str):
    results = {seed: result(seed, effect, broken) for seed in range(LABS)}
    text = causes(results)
    at_one = [each["tests"][0]["doses"]["1"]["classes"]["misaligned"] for each in results.values()]
    treated, beyond = (np.mean([each[name]["value"] for each in at_one]) for name in ("treated", "beyond"))
    (line,) = [row for row in text.splitlines() if row.startswith("| ablate: subspace | 1 |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert float(cells[2].split()[0]) == pytest.approx(treated, abs=6e-4)
    assert float(cells[4].split()[0]) == pytest.approx(beyond, abs=6e-4)
    (verdict,) = [row for row in text.splitlines() if row.startswith("| ablate: subspace |") and "**" in row]
    assert f"**{said}**" in verdict
    counts = [each["tests"][0]["verdict"]["verdict"] for each in results.values()]
    assert f"| {counts.count('causal')}, {counts.count('not causal')}, {counts.count('not decided')} |" in verdict
    (patched,) = [row for row in text.splitlines() if row.startswith("| probes | whole | 0 |")]
    assert float(patched.split("|")[4].split()[0]) == pytest.approx(0.45)
