"""DeepSeek V3 and R1, Moonlight, Kimi K2, GLM 4.7 Flash: keys and values from a latent, a mixture.

A head's query and key are a part without positions and a rotary one, and its value has a width of
its own; the rotary part of the key is one for all heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shearling.table.axes import Axis, Row
from shearling.table.families.base import (
    HEAD_DIM,
    HIDDEN,
    LAYERS,
    MLP,
    VOCAB,
    ExpertModules,
    Family,
    embedding_rows,
    linear,
)
from shearling.table.families.experts import (
    DENSE,
    fewer_leading,
    leading_kinds,
    sigmoid_mixture,
    sigmoid_rules,
    sigmoid_sizes,
    stacks,
)
from shearling.table.families.llama_cpp import SILU, UNBIASED, LlamaCppFacts, LlamaCppLimit
from shearling.table.families.llama_cpp_rows import split_latent
from shearling.table.layout import Layout
from shearling.table.values import Shape

_BLOCK = "model.layers.{}"


def _queries(config: Any) -> tuple[Row, ...]:
    at, wide = f"{_BLOCK}.self_attn", "heads*query_dim"
    if config.q_lora_rank is None:
        return linear(f"{at}.q_proj", wide, "hidden", bias=False)
    return (
        *linear(f"{at}.q_a_proj", "query_rank", "hidden", bias=config.attention_bias),
        Row.of(f"{at}.q_a_layernorm.weight", "norm", "query_rank"),
        *linear(f"{at}.q_b_proj", wide, "query_rank", bias=False),
    )


def _layout(config: Any) -> Layout:
    at, mlp, bias = f"{_BLOCK}.self_attn", f"{_BLOCK}.mlp", config.attention_bias
    sizes = _sizes(config)
    rigid = tuple(Axis(name, rigid=True) for name in sizes if name != "head_dim")
    dense = Layout(
        (LAYERS, HIDDEN, VOCAB, Axis("heads", per_block=True), HEAD_DIM, MLP, *rigid),
        (
            *embedding_rows("model.embed_tokens.weight", config.tie_word_embeddings),
            *_queries(config),
            *linear(f"{at}.kv_a_proj_with_mqa", "latent + rotary_dim", "hidden", bias=bias),
            Row.of(f"{at}.kv_a_layernorm.weight", "norm", "latent"),
            *linear(f"{at}.kv_b_proj", "heads*key_value_dim", "latent", bias=False),
            *linear(f"{at}.o_proj", "hidden", "heads*head_dim", bias=bias),
            *linear(f"{mlp}.gate_proj", "mlp", "hidden", bias=False),
            *linear(f"{mlp}.up_proj", "mlp", "hidden", bias=False),
            *linear(f"{mlp}.down_proj", "hidden", "mlp", bias=False),
            Row.of(f"{_BLOCK}.input_layernorm.weight", "norm", "hidden"),
            Row.of(f"{_BLOCK}.post_attention_layernorm.weight", "norm", "hidden"),
            Row.of("model.norm.weight", "norm", "hidden"),
        ),
    )
    return sigmoid_mixture(dense, config)


def _sizes(config: Any) -> dict[str, int]:
    """Widths inside attention, none of which a cut changes."""
    plain, rotary, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    rank = {} if config.q_lora_rank is None else {"query_rank": config.q_lora_rank}
    return rank | {
        "head_dim": value,
        "query_dim": plain + rotary,
        "key_value_dim": plain + value,
        "latent": config.kv_lora_rank,
        "rotary_dim": rotary,
    }


def _adapt(raw: dict[str, Any], config: Any, shape: Any) -> dict[str, Any]:
    """Every head has a key of its own, which the config counts as well."""
    return {**raw, "num_key_value_heads": shape["heads"]}


def _as_counted(config: Any, shape: Shape) -> bool:
    """Whether llama.cpp looks for a latent of queries where there is one: it goes by sizes."""
    without = shape["layers"] in (26, 27) or (shape["layers"], shape["vocab"]) == (48, 128256)
    return without == (config.q_lora_rank is None)


_SIZE_KEYS = {
    "head_dim": "attention.value_length_mla",
    "query_dim": "attention.key_length_mla",
    "latent": "attention.kv_lora_rank",
    "query_rank": "attention.q_lora_rank",
    "rotary_dim": "rope.dimension_count",
}
_LIMITS = (
    UNBIASED,
    LlamaCppLimit(
        "queries from a latent in models of DeepSeek's kind, but for those of 26 or 27 blocks, "
        "which must have none; this one has {layers} blocks",
        _as_counted,
        axes=("layers",),
    ),
    LlamaCppLimit(
        "rotary pairs side by side (rope_interleave)",
        lambda config, shape: bool(config.rope_interleave),
    ),
    LlamaCppLimit(
        "a router that leaves out some of its groups of experts",
        lambda config, shape: config.n_group == 1 or config.topk_group < config.n_group,
    ),
)

LLAMA_CPP = LlamaCppFacts(
    "deepseek2",
    fixed=SILU,
    sizes=_SIZE_KEYS,
    limits=_LIMITS,
    stated={"routed_scaling_factor": "expert_weights_scale"},
    told=lambda config: {"scoring_func": "sigmoid"},
    stored=split_latent,
    reads=False,
)
DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "model.layers",
    _layout,
    {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "vocab": "vocab_size",
        "heads": "num_attention_heads",
        "experts": "n_routed_experts",
    },
    lambda config: _sizes(config) | sigmoid_sizes(config),
    stacked=stacks("mlp.experts"),
    mixture=ExpertModules(shared="mlp.shared_experts.down_proj"),
    rules=sigmoid_rules,
    predicting="num_nextn_predict_layers",
    adapt=_adapt,
    adapt_layers=fewer_leading,
    llama_cpp=LLAMA_CPP,
)
# The same with a list of which blocks have experts; vLLM and llama.cpp's converter go by how many
# of the first have none.
GLM4_MOE_LITE = replace(
    DEEPSEEK_V3,
    model_type="glm4_moe_lite",
    per_layer=("mlp_layer_types",),
    llama_cpp=replace(
        LLAMA_CPP,
        ahead=True,
        told=lambda config: {
            "scoring_func": "sigmoid", "first_k_dense_replace": leading_kinds(config).count(DENSE),
        },
        limits=(
            *_LIMITS,
            LlamaCppLimit(
                "all blocks without experts before those with",
                lambda config, shape: sorted(leading_kinds(config)) == [*leading_kinds(config)],
            ),
        ),
    ),
)  # fmt: skip
