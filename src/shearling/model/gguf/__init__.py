"""GGUF files: what their metadata and tensors say, as a configuration, a tokenizer and weights."""

from shearling.model.gguf.convert import convert_gguf

__all__ = ["convert_gguf"]
