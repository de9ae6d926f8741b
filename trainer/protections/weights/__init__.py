"""Protections that act on weights, or are made from differences of weights."""
