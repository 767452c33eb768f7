"""Suites of texts and tasks, and tasks run through lm-eval (https://github.com/EleutherAI/lm-evaluation-harness)."""
