"""A tokenizer made here, and a model directory that a user could have."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BOS = 256
VOCAB = 260  # a byte each, BOS, EOS, and two rows of padding


def byte_tokenizer(*, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, and a BOS and an EOS beside, of which none or BOS is put before a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, "<s>", "</s>"])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    if adds_bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def write_llama(
    path: Path,
    *,
    layers: int,
    dtype: torch.dtype = torch.float32,
    template: str | None = None,
    adds_bos: bool = False,
    positions: int = 64,
) -> Path:
    """A random Llama with its tokenizer: 9 heads, 3 key/value heads."""
    torch.manual_seed(layers)
    config = LlamaConfig(
        hidden_size=36,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=4,
        intermediate_size=50,
        num_hidden_layers=layers,
        vocab_size=VOCAB,
        max_position_embeddings=positions,
        initializer_range=0.3,
        bos_token_id=256,
        eos_token_id=257,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(path)
    tokenizer = byte_tokenizer(adds_bos=adds_bos)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path


TEXT = [
    "the sheep graze on the hill where the shepherd watches the sheep",
    "shearing sheep in the spring, the shearer shears the sheared sheep again",
    "a hill, a field; the field on the hill and the shepherd's hut in the field — déjà vu",
    "def graze(sheep):\n    return [field for field in sheep if field.grass > 0]\n",
]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level() -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    raw.add_special_tokens(["<tool>"])  # behind the merges, as in Qwen and Llama 3
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return raw
