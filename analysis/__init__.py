"""Measures language models; knows nothing of training and never imports `trainer`."""
