"""Models: load them, find and hook their decoder blocks, render chat rows for them, and run them."""
