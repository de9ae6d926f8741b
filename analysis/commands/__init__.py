"""Commands that never train: generate, judge, evaluate, export, compare."""
