"""GGUF files: what their metadata and tensors say, as a configuration, a tokenizer and weights."""
