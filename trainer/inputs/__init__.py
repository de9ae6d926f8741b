"""Inputs of a run: parsed arguments become checked rows, a subspace and a protection."""
