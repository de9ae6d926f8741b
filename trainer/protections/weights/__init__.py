"""Protections that act on weights, or are built from differences of weights."""
