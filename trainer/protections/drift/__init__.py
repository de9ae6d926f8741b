"""Protections that penalise distance from the starting model."""
