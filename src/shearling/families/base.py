"""What a family file says about an architecture, and the rows that many of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shearling.axes import Axis, Layout, Row, Shape

LAYERS = Axis("layers")
HIDDEN = Axis("hidden")
VOCAB = Axis("vocab", rigid=True)
HEADS = Axis("heads", per_block=True, inside="kv_heads")
KV_HEADS = Axis("kv_heads", per_block=True)
HEAD_DIM = Axis("head_dim", rigid=True)
MLP = Axis("mlp", per_block=True)
GROUPED_QUERY_AXES = (LAYERS, HIDDEN, VOCAB, HEADS, KV_HEADS, HEAD_DIM, MLP)

GROUPED_QUERY_KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "vocab": "vocab_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp": "intermediate_size",
}


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    Attributes:
        model_type: ``model_type`` in config.json.
        blocks: path of the module list that holds the blocks.
        layout: the table, from a resolved transformers config.
        keys: axis -> config key, both to read a Shape and to write one.
        rigid: sizes of axes that no single config key gives.
        per_layer: config lists with one entry a block; they follow the blocks that survive.
        ignored: endings of tensor names that old checkpoints carry and the model does not load.
        renamed: name in the checkpoint -> name in the model, where transformers renames on load.
    """

    model_type: str
    blocks: str
    layout: Callable[[Any], Layout]
    keys: Mapping[str, str]
    rigid: Callable[[Any], dict[str, int]]
    per_layer: tuple[str, ...] = ()
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)
    renamed: Mapping[str, str] = field(default_factory=dict)

    def shape(self, config: Any) -> Shape:
        """Sizes by axis, from a resolved transformers config."""
        return Shape(
            {axis: getattr(config, key) for axis, key in self.keys.items()} | self.rigid(config)
        )

    def write(
        self, raw: Mapping[str, Any], config: Any, shape: Shape, layers: tuple[int, ...]
    ) -> dict[str, Any]:
        """The config.json of a model cut to ``shape``.

        Args:
            raw: the source's config.json; keys that do not speak of sizes are kept as they are,
                so that every program that could read the source can read the result.
            config: the same, resolved by transformers (which fills in per-layer lists).
            shape: sizes after the cut.
            layers: surviving blocks, in the source's numbering.
        """
        before = self.shape(config)
        changed = {k: shape[a] for a, k in self.keys.items() if shape[a] != before[a]}
        lists = {
            key: [values[i] for i in layers]
            for key in self.per_layer
            if (values := getattr(config, key, None)) is not None
        }
        return {**raw, **changed, **lists}


def head_dim(config: Any) -> dict[str, int]:
    """Width of a head: explicit, or what hidden size and heads give."""
    explicit = getattr(config, "head_dim", None)
    return {"head_dim": explicit or config.hidden_size // config.num_attention_heads}


def embedding_rows(
    embedding: str, tied: bool, *, width: str = "hidden", head: str = "lm_head.weight"
) -> tuple[Row, Row]:
    """The token embedding and the output head, one storage when tied."""
    return (
        Row.of(embedding, "embedding", "vocab", width),
        Row.of(head, "head", "vocab", width, tied_to=embedding if tied else None),
    )


def linear(name: str, rows: str, columns: str, *, bias: bool) -> tuple[Row, ...]:
    """A matrix product's weight (out, in) and, if it has one, its bias."""
    weight = Row.of(f"{name}.weight", "linear", rows, columns)
    return (weight, Row.of(f"{name}.bias", "bias", rows)) if bias else (weight,)


def layer_norm(name: str, *, affine: bool = True) -> tuple[Row, ...]:
    """A LayerNorm over the residual stream: a weight and a bias, if it has them."""
    weight, bias = (
        Row.of(f"{name}.weight", "norm", "hidden"),
        Row.of(f"{name}.bias", "bias", "hidden"),
    )
    return (weight, bias) if affine else ()


def gated_decoder(
    config: Any,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm"),
) -> Layout:
    """Llama and its kin: grouped queries, a gated MLP, RMSNorms, separate projections."""
    block = "model.layers.{}"
    attention, mlp = f"{block}.self_attn", f"{block}.mlp"
    query, key = "heads*head_dim", "kv_heads*head_dim"
    return Layout(
        GROUPED_QUERY_AXES,
        (
            *embedding_rows("model.embed_tokens.weight", config.tie_word_embeddings),
            *linear(f"{attention}.q_proj", query, "hidden", bias=qkv_bias),
            *linear(f"{attention}.k_proj", key, "hidden", bias=qkv_bias),
            *linear(f"{attention}.v_proj", key, "hidden", bias=qkv_bias),
            *linear(f"{attention}.o_proj", "hidden", query, bias=o_bias),
            *(
                Row.of(f"{attention}.{name}.weight", "norm", "head_dim")
                for name in (("q_norm", "k_norm") if qk_norm else ())
            ),
            *linear(f"{mlp}.gate_proj", "mlp", "hidden", bias=mlp_bias),
            *linear(f"{mlp}.up_proj", "mlp", "hidden", bias=mlp_bias),
            *linear(f"{mlp}.down_proj", "hidden", "mlp", bias=mlp_bias),
            *(Row.of(f"{block}.{name}.weight", "norm", "hidden") for name in norms),
            Row.of("model.norm.weight", "norm", "hidden"),
        ),
    )
