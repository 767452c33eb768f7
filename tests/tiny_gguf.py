"""GGUF files of tiny models, as llama.cpp's converter lays them out, and of any metadata at all.

:func:`write_gguf` uses the gguf package's writer, and says again, apart from the package that is
tested, how rows and norms differ there. :func:`encoded` writes what that writer would refuse.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import Tensor

# Key of a configuration -> what follows the architecture's name in a file.
_SIZES = {
    "max_position_embeddings": "context_length", "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon", "vocab_size": "vocab_size",
    "sliding_window": "attention.sliding_window", "use_parallel_residual": "use_parallel_residual",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}  # fmt: skip
MERGED = "Ġt"


def words(count: int) -> list[str]:
    """So many tokens: the bytes, BOS, EOS, one that is merged, and padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    told = [*alphabet, "<s>", "</s>", MERGED]
    if count < len(told):  # too few for all bytes
        told = ["<s>", "</s>", MERGED, "Ġ", "t", *alphabet[: count - 5]]
        told = list(dict.fromkeys(told))
    return [*told, *(f"[PAD{number}]" for number in range(count - len(told)))]


def metadata_of(config: Any, architecture: str) -> dict[str, Any]:
    """What a file of a model says: sizes, as a file names them, and a byte-level tokenizer."""
    stated = {
        f"{architecture}.{name}": value
        for key, name in _SIZES.items()
        if (value := getattr(config, key, None)) is not None
    }
    width = getattr(config, "head_dim", None)
    width = width or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    turned = int(width * rope.get("partial_rotary_factor", 1.0))
    tokens = words(config.vocab_size)
    return {
        "general.architecture": architecture, **stated,
        f"{architecture}.rope.dimension_count": turned,
        f"{architecture}.attention.key_length": width,
        f"{architecture}.rope.freq_base": float(rope["rope_theta"]),
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": ["Ġ t"], "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
    }  # fmt: skip


def tensors_of(model: Any, architecture: str) -> dict[str, Tensor]:
    """A model's tensors by their names in a file, rows in llama.cpp's order."""
    import gguf

    config = model.config
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads}
    heads["k_proj"] = getattr(config, "num_key_value_heads", 0)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module = name.split(".")[-2]
        if architecture == "llama" and module in heads:  # rotary pairs side by side
            halves = tensor.reshape(heads[module], 2, -1, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        if module == "query_key_value":  # all queries, all keys, all values
            threes = tensor.reshape(config.num_attention_heads, 3, -1, *tensor.shape[1:])
            tensor = threes.swapaxes(0, 1).reshape(tensor.shape)
        if architecture.startswith("gemma") and "norm" in module:
            tensor = tensor + 1
        stored = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        tensors[stored] = tensor.float().contiguous()
    return tensors


def write_gguf(
    model: Any,
    file: Path,
    architecture: str,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    without: Iterable[str] = (),
) -> Path:
    """A GGUF file of a tiny model.

    Args:
        model: of stock transformers.
        file: a new file.
        architecture: llama.cpp's name.
        metadata: more of it, behind the architecture's name, or a full key; None drops a key.
        tensors: more of them.
        without: names of tensors that are left out.
    """
    import gguf

    own = {
        key if key.startswith("tokenizer.") else f"{architecture}.{key}": value
        for key, value in (metadata or {}).items()
    }
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in (metadata_of(model.config, architecture) | own).items():
        if key == "general.architecture" or value is None:
            continue
        adds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
                str: writer.add_string, list: writer.add_array}  # fmt: skip
        adds[type(value)](key, value)
    held = tensors_of(model, architecture) | dict(tensors or {})
    for name, tensor in held.items():
        if name not in set(without):
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def encoded(metadata: Any, tensors: Any) -> bytes:
    """The header of a GGUF file of whatever was given; what no file can say is left out.

    Args:
        metadata: key -> value.
        tensors: name -> (sizes as a file has them, number of its type, offset).
    """
    entries = [
        _text(str(key)) + value
        for key, given in _pairs(metadata)
        if (value := _value(given)) is not None
    ]
    places = []
    for name, given in _pairs(tensors):
        place = [*given, *([], 0, 0)[len(given) :]] if isinstance(given, list) else [[], 0, 0]
        sizes, kind, offset = place[:3]
        sizes = [_whole(size) for size in sizes] if isinstance(sizes, list) else []
        places.append(
            _text(str(name)) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
            + struct.pack("<IQ", _whole(kind) % 2**32, _whole(offset))
        )  # fmt: skip
    head = b"GGUF" + struct.pack("<IQQ", 3, len(places), len(entries))
    return head + b"".join(entries) + b"".join(places)


def _pairs(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _whole(value: Any) -> int:
    return value % 2**64 if isinstance(value, int) else 0


def _text(value: str) -> bytes:
    held = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(held)) + held


def _value(value: Any) -> bytes | None:
    """A value behind the number of its type, or None for what has none."""
    kind, held = _typed(value)
    if isinstance(value, list):
        one = [_typed(entry) for entry in value]
        inner = one[0][0] if one else 8
        if inner is None or inner == 9:
            return None
        held = b"".join(entry for own, entry in one if own == inner and entry is not None)
        count = sum(own == inner for own, _ in one)
        return struct.pack("<IIQ", 9, inner, count) + held
    return None if kind is None or held is None else struct.pack("<I", kind) + held


def _typed(value: Any) -> tuple[int | None, bytes | None]:
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        narrow = 0 <= value < 2**32
        return (4, struct.pack("<I", value)) if narrow else (10, struct.pack("<Q", _whole(value)))
    if isinstance(value, float):
        try:
            return 6, struct.pack("<f", value)
        except OverflowError:
            return 12, struct.pack("<d", value)
    return (8, _text(value)) if isinstance(value, str) else (9 if value == [] else None, None)


def tiny_llama() -> Any:
    """A Llama of one block and 40 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()
