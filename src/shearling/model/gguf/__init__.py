"""GGUF files: what their metadata and tensors say, as a configuration, a tokenizer and weights."""

from shearling.model.gguf.convert import convert_gguf, known
from shearling.model.gguf.header import GgufFile
from shearling.model.gguf.others import convert_by_transformers

__all__ = ["GgufFile", "convert_by_transformers", "convert_gguf", "known"]
