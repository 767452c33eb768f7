"""Architectures that transformers has and we have no table of, and which of ours comes nearest.

Who meets one is told what sets it apart: what a new table would have to say besides.
"""

from __future__ import annotations

_STATES = "its state-space blocks (Mamba) have axes that no table has yet"
_PLAIN_MLP = "its MLP has no gate"
_INDEXED = "an indexer of its own picks the keys that queries meet"

NEAREST: dict[str, tuple[str, str]] = {
    "arcee": ("llama", _PLAIN_MLP),
    "bamba": ("qwen3_next", _STATES),
    "cohere": ("cohere2", "all of its blocks have rotary positions"),
    "deepseek_v2": ("deepseek_v3", "its router weights experts by a softmax"),
    "deepseek_v32": ("deepseek_v3", _INDEXED),
    "dots1": ("glm4_moe", "its attention is Qwen 3's, whose blocks may slide"),
    "exaone_moe": ("glm4_moe", "its attention is EXAONE 4's"),
    "falcon_h1": ("qwen3_next", _STATES),
    "falcon_mamba": ("qwen3_next", _STATES),
    "gemma": ("gemma2", "nothing norms what its blocks write, so that hidden cannot be rescaled"),
    "gemma3n_text": ("gemma3_text", "its blocks hand on more than the stream"),
    "glm": ("glm4", "nothing norms what its blocks write"),
    "glm_moe_dsa": ("deepseek_v3", _INDEXED),
    "gpt2": ("opt", "its matrices are stored the other way round"),
    "granitemoeshared": ("granitemoe", "it has a shared expert"),
    "helium": ("llama", "it computes the width of a head as hidden / heads"),
    "hunyuan_v1_moe": ("qwen2_moe", "its attention is that of Hunyuan's dense models"),
    "hy_v3": ("glm4_moe", "its router is MiniMax M2's"),
    "jamba": ("qwen3_next", _STATES),
    "kimi_linear": ("qwen3_next", "its linear attention decays channel by channel"),
    "lfm2": ("qwen3_5_text", "most of its blocks are short convolutions"),
    "lfm2_moe": ("qwen3_next", "most of its blocks are short convolutions"),
    "mamba": ("qwen3_next", _STATES),
    "mamba2": ("qwen3_next", _STATES),
    "minimax": ("qwen3_next", "its linear attention (lightning) is another"),
    "nemotron": ("gpt_neox", f"{_PLAIN_MLP}, and its heads share keys and values"),
    "nemotron_h": ("qwen3_next", _STATES),
    "olmo": ("llama", "its norms have no weights"),
    "olmo_hybrid": ("qwen3_next", "its attention is OLMo 3's"),
    "phimoe": ("mixtral", "its router picks one expert after the other"),
    "stablelm": ("llama", "its norms are LayerNorms"),
    "starcoder2": ("gpt_neox", f"{_PLAIN_MLP}, and its heads share keys and values"),
    "vaultgemma": ("gemma2", "nothing norms what its blocks write"),
    "zamba2": ("qwen3_next", _STATES),
}
