"""Measure checkpoints: the plan, the reference models, the families of metrics, the result files, and comparisons.

results = Measurer(MeasurePlan(instruct_path="model", probe_sets={"rows": conversations})).measure(model)
"""

from .measurer import Measurer, UnreadableCheckpoint, check_checkpoint, measure_checkpoint
from .plan import MeasurePlan
from .results import scalars

__all__ = ["MeasurePlan", "Measurer", "UnreadableCheckpoint", "check_checkpoint", "measure_checkpoint", "scalars"]
