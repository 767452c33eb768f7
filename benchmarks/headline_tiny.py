"""A small random model, random text and a store of it, to try headline.py on a processor."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from headline_runs import Scale, Size

SCALE = Scale(
    tokens=8192, length=32, batch=16, gate_batch=8, micro=16, looks=4, sequences=4, samples=8,
    real=16, window=32, windows=4,
    sizes={"0.8": Size(4, 39_264, "layers=5,hidden=28,heads=2,mlp=44")},
)  # fmt: skip
WORDS = 400
VOCAB = 258  # a byte each, BOS, EOS


def make(folder: Path) -> tuple[str, Path, Path]:
    """The model, the store and the folder of texts, made unless they are there."""
    model, store, texts = folder / "model", folder / "store", folder / "texts"
    if (store / "store.json").exists():
        return str(model), store, texts
    _model(model)
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefgh", k=chance.randint(2, 6))) for _ in range(WORDS)]
    texts.mkdir(parents=True, exist_ok=True)
    for name in ("cal", "held", "a", "b", "c"):
        lines = [
            json.dumps({"text": " ".join(chance.choices(words, k=60))}) + "\n" for _ in range(60)
        ]
        (texts / f"{name}.jsonl").write_text("".join(lines))
    (texts / "wikitext2-test.txt").write_text(" ".join(chance.choices(words, k=600)))
    domains = [f"{name}={texts / f'{name}.jsonl'}" for name in "abc"]
    subprocess.run(
        [
            sys.executable, "-m", "shearling.cli", "pack", *domains, "--tokenizer", str(model),
            "--output", str(store), "--length", str(SCALE.length), "--held-out", "0.1",
        ],
        check=True,
    )  # fmt: skip
    return str(model), store, texts


def _model(folder: Path) -> None:
    """A Llama of five blocks with random weights, whose tokens are bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, "<s>", "</s>"])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, num_hidden_layers=5, vocab_size=VOCAB, max_position_embeddings=64,
        initializer_range=0.2, bos_token_id=256, eos_token_id=257, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


__all__ = ["SCALE", "make"]
