"""Passes: what one model shows in a forward or backward pass, before any metric is computed."""
