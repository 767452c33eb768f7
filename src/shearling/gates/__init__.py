"""Learned gates: what to keep, found by training (Sheared LLaMA, 2310.06694)."""
