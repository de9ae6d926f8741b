"""Protections that change the optimiser step, or end training."""
