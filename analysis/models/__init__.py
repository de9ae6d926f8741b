"""Models: load them, find their blocks, hook them, render chat rows for them, run them."""
