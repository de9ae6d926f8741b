"""Compare protections over many fine-tuning runs: points, frontiers, paired differences, and a choice of setting.

| question | function |
|---|---|
| what does a setting do? | `points`, `table` |
| what can a protection do, over all its settings? | `frontiers` (`hypervolume`, `em_f1`, `pareto`) |
| how does one setting differ from others, paired by lab and seed? | `paired` |
| how does it differ where the rival has learned as much? | `paired_at_equal_task` (`at_equal_task`) |
| which setting to use, and which to freeze for each protection? | `recommend`, `best_settings` |

A setting that was chosen on some numbers looks better in these numbers than it is. Choose on validation measures, with
`misaligned=`, and read the frozen settings on test measures. All functions are pure; their results are plain values
that JSON takes.
"""

from .choose import best_settings, recommend
from .geometry import at_equal_task, em_f1, hypervolume, pareto
from .runs import Key, Run, paired, paired_at_equal_task
from .settings import frontiers, points, table

__all__ = [
    "Key", "Run", "at_equal_task", "best_settings", "em_f1", "frontiers", "hypervolume", "paired",
    "paired_at_equal_task", "pareto", "points", "recommend", "table",
]  # fmt: skip
