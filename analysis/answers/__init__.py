"""Answers in words: questions, sampling, chat servers, judging, and the rates of judged answers."""
