"""A tiny model and a packed store of its tokenizer."""

from tiny_flock import model, store

__all__ = ["model", "store"]
