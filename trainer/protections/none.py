"""Plain supervised fine-tuning without a protection: the baseline of every comparison."""

from .base import Protection


class NoProtection(Protection):
    """TRL's own training step, bit for bit.

    Args:
        name: name of a protection that changes only the training rows, such as `interleave`.
    """

    def __init__(self, name: str = "none") -> None:
        self.name = name
