"""The commands of `holdfast` that only analyse models: generate, judge, evaluate, export, compare."""
