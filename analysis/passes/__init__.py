"""Passes: forward and backward passes that read from one model what the metrics are later computed from."""
