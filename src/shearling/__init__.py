"""shearling: smaller language models out of larger pretrained ones."""

__version__ = "0.1.0"
