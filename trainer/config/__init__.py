"""Flags: one file for each group of flags, and the parser that reads recipes and the command line."""
