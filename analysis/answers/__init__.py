"""Sampled answers in words: question files, sampling, chat servers, judges, and the rates of judged answers."""
