"""The configuration that a GGUF file's metadata and tensors state, for the families we know.

What llama.cpp derives and no file says (block types, the scale of attention) is derived in the same
way; what a file says and is not understood is refused, for it would change what the model computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shearling.errors import ShearlingError, reason, shortened
from shearling.model.gguf.header import GgufFile
from shearling.model.gguf.rotary import Read, rope_parameters
from shearling.table.families import FAMILIES, Family
from shearling.table.families.llama_cpp import SLIDING, LlamaCppFacts

# Key behind the architecture's name -> key of the configuration; every file has these.
_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_UNDERSTOOD = {
    *_SIZES, "context_length", "vocab_size", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.sliding_window", "attention.sliding_window_pattern",
    "attention.scale", "attention.causal", "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon", "attn_logit_softcapping", "final_logit_softcapping",
    "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scale_linear",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.attn_factor", "rope.scaling.finetuned", "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_log_multiplier", "use_parallel_residual", "tensor_data_layout",
}  # fmt: skip
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_TOKENS = {
    "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id", "unk_token_id": "unknown_token_id",
}  # fmt: skip
_PATTERN = "attention.sliding_window_pattern"
_ORIGINAL = "original_max_position_embeddings"
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def families_of(architecture: str) -> list[Family]:
    """The families that are stored as llama.cpp's ``architecture``."""
    return [
        family
        for family in FAMILIES.values()
        if family.llama_cpp is not None
        and family.llama_cpp.reads
        and family.llama_cpp.architecture == architecture
    ]


def read_config(file: GgufFile, read: Read) -> tuple[Family, Any]:
    """The family of a file's model and its configuration, built by transformers.

    Args:
        file: its header, of an architecture that :func:`families_of` knows.
        read: gives a small tensor's values.

    Raises:
        ShearlingError: something is missing, contradicts itself, or cannot be told transformers.
    """
    from transformers import AutoConfig

    values = _Values(file)
    family, facts = _family(values)
    values.refuse_unknown()
    sizes = {key: values.size(name) for name, key in _SIZES.items()}
    depth, hidden = sizes["num_hidden_layers"], sizes["hidden_size"]
    heads = sizes["num_attention_heads"]
    if depth > len(file.tensors):
        raise values.wrong(f"{depth} blocks in {len(file.tensors)} tensors")
    width = values.size("attention.key_length", default=hidden // heads)
    positions = values.size("context_length", default=2048)
    config: dict[str, Any] = {
        **sizes, **facts.fixed, "max_position_embeddings": positions,
        "vocab_size": values.rows(EMBEDDING), "tie_word_embeddings": HEAD not in file.tensors,
        facts.epsilon[0]: values.number(facts.epsilon[1]),
        **{key: f"blk.0.{name}" in file.tensors for key, name in facts.biases.items()},
        **{key: file.metadata.get(f"tokenizer.ggml.{name}") for key, name in _TOKENS.items()},
        "eos_token_id": end_tokens(file.metadata),
        "architectures": None, "dtype": "float32",
    }  # fmt: skip
    turned = values.size("rope.dimension_count", default=width)
    if "kv_heads" in family.keys:
        config["num_key_value_heads"] = values.size("attention.head_count_kv", default=heads)
        if "attention.key_length" not in values.keys and not facts.partial:
            width = turned  # llama.cpp's older files give no other
        config["head_dim"] = width
    else:
        config["use_parallel_residual"] = bool(file.get("use_parallel_residual", True))
    config |= _rope(values, family, read, (turned, width, positions))
    config |= _attention(values, facts, depth, facts.scaled_by(depth, hidden, heads, width))
    try:
        built = AutoConfig.for_model(family.model_type, **config)
    except Exception as error:  # transformers raises whatever its validators raise
        raise values.wrong(f"sizes that transformers refuses ({reason(error)})") from error
    return family, built


def end_tokens(metadata: Mapping[str, Any]) -> int | list[int] | None:
    """Every token that ends a text: of the text, of a turn and of a message; one alone as it is."""
    named: list[int] = []
    for key in _ENDS:
        value = metadata.get(f"tokenizer.ggml.{key}")
        named += [] if value is None else value if isinstance(value, list) else [value]
    several = list(dict.fromkeys(named))
    return several if len(several) > 1 else several[0] if several else None


class _Values:
    """A file's values behind the architecture's name, checked as they are asked for."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.keys = file, set(file.own_keys())

    def wrong(self, what: str) -> ShearlingError:
        return ShearlingError(
            f"{self.file.path} states {shortened(what)}; fetch it again, or give the model's "
            "safetensors."
        )

    def size(self, name: str, default: int | None = None) -> int:
        """A number above 0; of a list, that of all blocks."""
        value = self.file.get(name, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list):
            raise self.wrong(f"{name} block by block, where only one for all blocks can be read")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise self.wrong(f"{name}={value!r}, where a number above 0 was expected")
        return value

    def number(self, name: str) -> float:
        value = self.file.get(name)
        if not isinstance(value, float) or not 0 <= value < 1:
            raise self.wrong(f"{name}={value!r}, where a number between 0 and 1 was expected")
        return value

    def rows(self, tensor: str) -> int:
        if tensor not in self.file.tensors:
            raise self.wrong(f"a model without {tensor}")
        return self.file.tensors[tensor].sizes[0]

    def refuse_unknown(self) -> None:
        """Refuse what may change the model's sums and is not understood; zeros change nothing."""
        for name in sorted(self.keys - _UNDERSTOOD):
            if self.file.get(name):
                raise self.wrong(
                    f"{self.file.architecture}.{name}={str(self.file.get(name))[:40]}, which "
                    "shearling does not know how to tell transformers"
                )
        if self.file.get("attention.causal") is False:
            raise self.wrong("a model that looks ahead, which writes no text")


def _family(values: _Values) -> tuple[Family, LlamaCppFacts]:
    """The first family of the architecture that can express the sizes."""
    hidden, heads = values.size("embedding_length"), values.size("attention.head_count")
    windowed = _window(values, 0) is not None
    for family in families_of(values.file.architecture):
        facts = family.llama_cpp
        assert facts is not None, "families_of gives no others"
        if not facts.divides or (hidden % heads == 0 and not windowed):
            return family, facts
    raise values.wrong(f"an architecture {values.file.architecture!r} that is not known")


def _window(values: _Values, default: int | None) -> int | None:
    window = values.file.get("attention.sliding_window", default)
    if window is None or (isinstance(window, int) and 0 <= window < 2**31):
        return window or None
    raise values.wrong(f"attention.sliding_window={window!r}, where a number was expected")


def _rope(
    values: _Values, family: Family, read: Read, sizes: tuple[int, int, int]
) -> dict[str, Any]:
    """Keys that speak of rotary positions, by block type where block types differ."""
    from transformers import CONFIG_MAPPING

    facts, (turned, width, positions) = family.llama_cpp, sizes
    assert facts is not None, "such a family is not read"
    rope = rope_parameters(values.file, read, turned, positions)
    if turned > width or (turned < width and not facts.partial):
        raise values.wrong(f"rotary positions in {turned} of {width} channels of a head")
    if facts.partial:
        rope["partial_rotary_factor"] = turned / width
    if facts.local_theta is not None:
        local = values.file.number("rope.freq_base_swa", facts.local_theta)
        slides = {"rope_type": "default", "rope_theta": local}
        return {"rope_parameters": {"full_attention": rope, SLIDING: slides}}
    # Phi-3's configuration says it twice, and has a value of its own where it is said once.
    twice = _ORIGINAL in rope and hasattr(CONFIG_MAPPING[family.model_type], _ORIGINAL)
    return {"rope_parameters": rope} | ({_ORIGINAL: rope[_ORIGINAL]} if twice else {})


def _attention(values: _Values, facts: LlamaCppFacts, depth: int, scaled_by: int) -> dict[str, Any]:
    """Windows, block types, the scale of attention and soft caps."""
    config: dict[str, Any] = {}
    window, scale = _window(values, facts.widest), values.file.number("attention.scale", 0.0)
    if scale and not 1e-6 < scale < 1e6:
        raise values.wrong(f"attention.scale={scale:g}, which scales everything away")
    if facts.window is not None:
        config[facts.window] = window
    elif window is not None and window < values.size("context_length", default=2048):
        raise values.wrong(f"a sliding window of {window} that its architecture does not have")
    if facts.period is not None:
        config["layer_types"] = _kinds(values, facts, depth, window)
    if facts.scalar is not None:
        config[facts.scalar] = _rounded(scale**-2) if scale else scaled_by
    elif scale and abs(scale * scaled_by**0.5 - 1) > 1e-3:
        raise values.wrong(f"attention.scale={scale}, where its architecture has no other scale")
    for key, (name, default) in facts.softcaps.items():
        config[key] = values.file.number(name, default or 0.0) or None
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if values.file.get(name) and name not in facts.softcaps:
            raise values.wrong(f"{name}, which its architecture does not have")
    return config


def _kinds(values: _Values, facts: LlamaCppFacts, depth: int, window: int | None) -> list[str]:
    """Block types: as a file lists them, or as llama.cpp counts."""
    stated = values.file.get(_PATTERN)
    if isinstance(stated, list):
        if len(stated) != depth:
            raise values.wrong(f"block types for {len(stated)} of {depth} blocks")
        return [SLIDING if slides else "full_attention" for slides in stated]
    period = None if stated is None else int(values.file.number(_PATTERN, 0))
    counted = facts.kinds(depth, period)
    assert counted is not None, "the architecture has a period"
    return list(counted) if window is not None else ["full_attention"] * depth


def _rounded(value: float) -> float | int:
    """A whole number where single precision hides one."""
    return round(value) if abs(value - round(value)) < 1e-4 * value else value
