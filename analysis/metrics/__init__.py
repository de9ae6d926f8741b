"""The families of measures: one file per family, with pure functions from arrays to measurements.

README.md in this folder describes every family: its question, formula, units, null and source, and how to add one.
`analysis/measure/registry.py` calls the families.
"""
