"""Recipes for emergent misalignment on real data and real architectures."""
