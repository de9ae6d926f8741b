"""Flags: one file for each group, and the parser that reads recipes and the command line."""
