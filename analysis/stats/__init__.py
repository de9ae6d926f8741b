"""Statistics of every number that is reported: intervals, tests, and how many answers a claim needs.

Arrays go in, numbers come out. `clusters` are the units that vary: a label per row (its question, topic or seed).

| interval of | function | method |
|---|---|---|
| a mean over rows | `mean_ci` | Student's t corrected for skewness (Hall 1992) |
| a rate of independent answers | `binomial_ci` | Wilson's, opened to an exact bound |
| a rate in clusters | `rate_ci` | Wilson's on the effective number of rows |
| a smooth statistic, such as a cosine | `jackknife_ci` | leaves out each cluster in turn |
| any other statistic | `bootstrap_ci` | BCa from 30 clusters on, below it the jackknife |
| a difference of two arms on the same rows | `paired_difference` | of the differences; for answers also Newcombe's |
| a ratio of two means, such as reversion | `fieller` | Fieller (1954); null if the denominator may be 0 |
| the share of a sum in a part of it | `share` | CR2 variance (Bell and McCaffrey 2002) |
| a method, over several seeds | `hierarchical_bootstrap` | bootstrap-t over the outermost units |

`measurement` chooses between `mean_ci` and `rate_ci`, and returns {"value", "n", "ci95"}.

| test or plan | function |
|---|---|
| paired differences are 0 on average | `sign_flip_test`; use at least 10 seeds, 5 cannot reach p < 0.05 |
| two independent groups have the same mean | `permutation_test` |
| several rivals at once | `holm` adjusts their p-values |
| something was kept | `non_inferiority`, with a margin stated before |
| how many answers to buy | `sample_size`, `power`, `design_effect` |

An interval over rows is about one checkpoint; a claim about a method must resample the seeds too. How often each
interval covers the truth, at rates near 0 and with 5 and 10 seeds, is listed in tests/benchmarks/COVERAGE.md. It is
93-97% of repetitions, except where that file says what bounds it (counts are whole numbers; no interval can know what
no row of the sample shows).
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
