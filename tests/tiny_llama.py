"""A tiny random Llama with SmolLM2's awkward geometry (9 heads, 3 key/value heads)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tiny_tokenizer import byte_tokenizer


def tiny_llama(layers: int = 3, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=36,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=4,
        intermediate_size=50,
        num_hidden_layers=layers,
        vocab_size=300,
        max_position_embeddings=64,
        initializer_range=0.3,  # so that the logits differ enough to tell a wrong one
        bos_token_id=256,
        eos_token_id=257,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model directory; nobody may write to it."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def smaller_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "smaller"
    tiny_llama(layers=1).save_pretrained(path)
    return path


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()
