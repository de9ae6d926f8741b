"""Measures models: imports neither `trainer` nor `recipes`."""
