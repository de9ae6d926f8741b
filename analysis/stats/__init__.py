"""Statistics of every number that is reported: intervals, comparisons, tests, and how many answers a claim needs.

| question | function |
|---|---|
| a mean or a rate over rows, questions being clusters | `measurement` (`mean_ci`, `rate_ci`, `binomial_ci`, `wilson`) |
| a cosine, a ratio of spreads, any other statistic | `jackknife_ci` where it is smooth, else `bootstrap_ci` |
| two arms over the same rows or questions | `paired_difference`, `sign_flip_test` |
| a ratio of two means, such as reversion | `fieller` |
| what share of a sum lies in a part of it | `share` |
| a claim about a method, over seeds | `hierarchical_bootstrap`, `sign_flip_test` with at least 10 seeds |
| two independent groups | `permutation_test` |
| several rivals | `holm` |
| "kept" | `non_inferiority`, with a stated margin |
| how many answers to buy | `sample_size`, `power`, `design_effect` |

An interval over rows speaks of one checkpoint; a claim about a method resamples seeds too. How often each interval
covers the truth, at rates near 0 and with 5 and 10 seeds, stands in tests/benchmarks/COVERAGE.md: in 93-97% of
repetitions but where it says what bounds it (counts are whole; what no row of a sample shows, no interval can know).
"""

from .binomial import binomial_ci, wilson
from .intervals import (
    Floats,
    Interval,
    Measurement,
    bootstrap_ci,
    cluster_codes,
    cluster_sums,
    jackknife_ci,
    mean_ci,
    missing,
    rate_bounds,
    rate_ci,
)
from .nulls import holm, permutation_p, permutation_test, permuted_labels, sign_flip_test
from .power import design_effect, power, sample_size
from .seeds import hierarchical_bootstrap
from .summary import fieller, measurement, non_inferiority, paired_difference, share

__all__ = [
    "Floats", "Interval", "Measurement", "binomial_ci", "bootstrap_ci", "cluster_codes", "cluster_sums",
    "design_effect", "fieller", "hierarchical_bootstrap", "holm", "jackknife_ci", "mean_ci", "measurement", "missing",
    "non_inferiority", "paired_difference", "permutation_p", "permutation_test", "permuted_labels", "power",
    "rate_bounds", "rate_ci", "sample_size", "share", "sign_flip_test", "wilson",
]  # fmt: skip
