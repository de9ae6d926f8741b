"""Protections that change the residual stream while training."""
