"""Checkpoints in other forms: quantised, GGUF."""
