"""No protection: plain supervised fine-tuning, the baseline of every comparison."""

from .base import Protection


class NoProtection(Protection):
    """TRL's own training step, bit for bit."""
