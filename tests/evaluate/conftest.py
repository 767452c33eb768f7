"""A tiny Llama on disk and in memory."""

from tiny_llama import model, model_directory, smaller_directory, tokenizer

__all__ = ["model", "model_directory", "smaller_directory", "tokenizer"]
