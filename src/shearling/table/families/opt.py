"""OPT: learned positions, LayerNorms before or after, embeddings of a width of their own."""

from __future__ import annotations

from typing import Any

from shearling.table.axes import Axis, Row
from shearling.table.families.base import (
    HEAD_DIM,
    HIDDEN,
    LAYERS,
    MLP,
    VOCAB,
    Family,
    embedding_rows,
    head_dim,
    layer_norm,
    linear,
)
from shearling.table.families.legal import Rule, whole_heads
from shearling.table.layout import Layout
from shearling.table.values import Shape

_BLOCK = "model.decoder.layers.{}"


def _projected(config: Any) -> bool:
    """Whether embeddings have a width of their own, which the code tells from the sizes alone."""
    return config.word_embed_proj_dim != config.hidden_size


def _layout(config: Any) -> Layout:
    bias, affine = config.enable_bias, config.layer_norm_elementwise_affine
    heads = "heads*head_dim"
    projected = _projected(config)
    final_norm = config.do_layer_norm_before and not config._remove_final_layer_norm
    axes = (LAYERS, HIDDEN, VOCAB, Axis("heads", per_block=True), HEAD_DIM, MLP)
    return Layout(
        (
            *axes,
            Axis("positions", rigid=True),
            *((Axis("embed", rigid=True),) if projected else ()),
        ),
        (
            *embedding_rows(
                "model.decoder.embed_tokens.weight",
                config.tie_word_embeddings,
                width="embed" if projected else "hidden",
            ),
            # The first two rows of the position table are never looked up with a full mask.
            Row.of("model.decoder.embed_positions.weight", "embedding", "positions + 2", "hidden"),
            *(linear("model.decoder.project_in", "hidden", "embed", bias=False) * projected),
            *(linear("model.decoder.project_out", "embed", "hidden", bias=False) * projected),
            *linear(f"{_BLOCK}.self_attn.q_proj", heads, "hidden", bias=bias),
            *linear(f"{_BLOCK}.self_attn.k_proj", heads, "hidden", bias=bias),
            *linear(f"{_BLOCK}.self_attn.v_proj", heads, "hidden", bias=bias),
            *linear(f"{_BLOCK}.self_attn.out_proj", "hidden", heads, bias=bias),
            *linear(f"{_BLOCK}.fc1", "mlp", "hidden", bias=bias),
            *linear(f"{_BLOCK}.fc2", "hidden", "mlp", bias=bias),
            *layer_norm(f"{_BLOCK}.self_attn_layer_norm", affine=affine),
            *layer_norm(f"{_BLOCK}.final_layer_norm", affine=affine),
            *(layer_norm("model.decoder.final_layer_norm", affine=affine) * final_norm),
        ),
    )


def _rigid(config: Any) -> dict[str, int]:
    sizes = head_dim(config) | {"positions": config.max_position_embeddings}
    if _projected(config):
        sizes["embed"] = config.word_embed_proj_dim
    return sizes


def _rules(config: Any) -> tuple[Rule, ...]:
    width = config.word_embed_proj_dim
    apart = Rule(
        ("hidden", "heads"),
        f"OPT takes embeddings to be unprojected when hidden is their width of {width}",
        lambda shape: shape["hidden"] != width,
    )
    return (whole_heads("OPT"), *((apart,) if _projected(config) else ()))


def _adapt(raw: dict[str, Any], config: Any, shape: Shape) -> dict[str, Any]:
    if _projected(config) or raw.get("word_embed_proj_dim") is None:
        return raw
    return {**raw, "word_embed_proj_dim": shape["hidden"]}


OPT = Family(
    "opt",
    "model.decoder.layers",
    _layout,
    {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "vocab": "vocab_size",
        "heads": "num_attention_heads",
        "mlp": "ffn_dim",
    },
    _rigid,
    rules=_rules,
    adapt=_adapt,
    additive=lambda config: config.do_layer_norm_before,
)
