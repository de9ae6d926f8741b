"""No protection: plain supervised fine-tuning, the baseline of every comparison."""

from .base import Protection


class NoProtection(Protection):
    """TRL's own training step, bit for bit.

    Args:
        name: of a protection that changes the rows alone.
    """

    def __init__(self, name: str = "none") -> None:
        self.name = name
