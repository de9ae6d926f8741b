"""Protections: what keeps a fine-tune aligned. Each is one file and one class, with `base.Protection`'s interface."""

from .base import Protection
from .none import NoProtection
from .settings import PenaltySettings
from .subspace import SubspaceProtection

__all__ = ["NoProtection", "PenaltySettings", "Protection", "SubspaceProtection"]
