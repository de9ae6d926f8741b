"""Trains models with the alignment they already have protected."""
