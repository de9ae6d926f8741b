"""Measure checkpoints: a plan, what one checkpoint shows, the families of metrics, and result files."""

from .measurer import Measurer, UnreadableCheckpoint, check_checkpoint, measure_checkpoint
from .plan import MeasurePlan
from .results import scalars

__all__ = ["MeasurePlan", "Measurer", "UnreadableCheckpoint", "check_checkpoint", "measure_checkpoint", "scalars"]
