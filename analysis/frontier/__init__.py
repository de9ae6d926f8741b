"""How protections are compared over many fine-tuning runs: points, frontiers, paired differences, and which to use.

| question | function |
|---|---|
| what a setting does | `points`, `table` |
| what a protection can do, over all its settings | `frontiers` (`hypervolume`, `em_f1`, `pareto`) |
| one setting against others, lab by lab and seed by seed | `paired` |
| the same where the rival has learned as much | `paired_at_equal_task` (`at_equal_task`) |
| which setting to use; which to freeze for each protection | `recommend`, `best_settings` |

A setting chosen on some numbers looks better in them than it is: choose on validation measures, by `misaligned=`, and
read the frozen settings on test measures. Pure functions; results are plain values that JSON takes.
"""

from .choose import best_settings, frontiers, points, recommend, table
from .geometry import at_equal_task, em_f1, hypervolume, pareto
from .runs import Key, Run, paired, paired_at_equal_task

__all__ = [
    "Key", "Run", "at_equal_task", "best_settings", "em_f1", "frontiers", "hypervolume", "paired",
    "paired_at_equal_task", "pareto", "points", "recommend", "table",
]  # fmt: skip
