"""What a family file says about an architecture, and the rows that many of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from shearling.table.axes import Axis, Row
from shearling.table.families import legal
from shearling.table.families.llama_cpp import LlamaCppFacts
from shearling.table.layout import Layout
from shearling.table.values import Shape

LAYERS = Axis("layers")
HIDDEN = Axis("hidden")
VOCAB = Axis("vocab")
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


@dataclass(frozen=True, slots=True)
class Affine:
    """What a tensor's values become when the sizes around it change: scale * tensor + shift.

    Computed in double precision and rounded to the type that the tensor is stored in.

    Attributes:
        scale, shift: the change.
        lasting: it makes up for norms over fewer channels. The source with removed channels
            masked, whose norms pass them over as well, then needs it too, and nothing undoes it.
    """

    scale: float
    shift: float
    lasting: bool = False

    def apply(self, tensor: Tensor) -> Tensor:
        """The values after the cut, in the tensor's own type."""
        return (self.scale * tensor.double() + self.shift).to(tensor.dtype)

    def undo(self, tensor: Tensor) -> Tensor:
        """What the masked source has where the result has ``tensor``, in double precision.

        The values that would have become it, or, where the change is lasting, these themselves.
        """
        return tensor.double() if self.lasting else (tensor.double() - self.shift) / self.scale


@dataclass(frozen=True, slots=True)
class Home:
    """Where transformers' model holds a tensor of a checkpoint.

    Attributes:
        parameter: its name there.
        expert: index along the first dimension, of a parameter that holds those of all experts.
        part, parts: which of so many equal stretches along the next one.
    """

    parameter: str
    expert: int | None = None
    part: int = 0
    parts: int = 1

    def of(self, parameter: Tensor) -> Tensor:
        """The tensor, a view of the parameter."""
        if self.expert is None:
            return parameter
        return parameter[self.expert].chunk(self.parts, 0)[self.part]


@dataclass(frozen=True, slots=True)
class ExpertModules:
    """The experts of a block of transformers' model.

    Attributes:
        module: path inside a block of what joins the router, the experts and shared ones.
        router: path of the module that gives logits, weights and numbers of the chosen experts.
        experts: path of the module that holds all experts.
        shared: path of the matrix that ends the expert that every token meets, if there is one.
        shared_gate: path of what gives the logit of its weight, if it has one.
        handed: path of a buffer that is handed to the router beside the tokens, if one is.
        rows: inside the router, the matrix of which each expert has a row.
        common: names of tensors in the router that are not one number, or row, an expert.
        norm: path of the norm behind what the experts give together, if there is one.
        beside: path of the norm behind an MLP that stands beside the experts, reads the stream by
            itself, and is added to them; the sum then goes through the norm that is behind the MLP
            where there are no experts. None where no such MLP is.
    """

    module: str = "mlp"
    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    shared: str | None = None
    shared_gate: str | None = None
    handed: str | None = None
    rows: str = "weight"
    common: tuple[str, ...] = ()
    norm: str | None = None
    beside: str | None = None


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
        stacked: name of an expert's tensor in the checkpoint -> the parameter that holds those of
            all experts, which stretch of an expert's it is, and of how many.
        mixture: where a block's experts are; None without experts.
        rules: what a Shape must satisfy to be written, beyond what the table says; from a config.
        adapt: completes a config.json that already carries the new sizes; from it, the source's
            resolved config, and the new Shape.
        adapt_layers: the same, where it matters which blocks survive; given these as well.
        remarks: what a user should know of a Shape that can be written; from the source's
            resolved config, and the new Shape.
        predicting: config key of how many blocks behind the last predict tokens further ahead;
            they are no part of the model as transformers loads it, and no cut has them.
        predictors: beginning of the names of tensors that predict tokens further ahead, where
            they lie beside the blocks; likewise.
        frozen: axes that stay as they are, and why.
        rescale: how a row's values change between two Shapes, where code that we cannot change
            computes with a size; None where they do not.
        post_norms: axis -> module inside a block that norms what the axis' units write before it
            is added to the residual stream.
        additive: whether a block's output is its input plus what its halves write (it is not
            where a norm follows the addition); from a resolved config.
        gain_offset: what is added to a norm's weight before it multiplies.
        branch_scale: what a half of a block is multiplied by before it is added to the residual
            stream; from a resolved config.
        centred: whether norms over the stream that are no ``nn.LayerNorm`` subtract the mean.
        llama_cpp: how llama.cpp stores and runs it; None where it does not know it.
    """

    model_type: str
    blocks: str
    layout: Callable[[Any], Layout]
    keys: Mapping[str, str]
    rigid: Callable[[Any], dict[str, int]]
    per_layer: tuple[str, ...] = ()
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)
    renamed: Mapping[str, str] = field(default_factory=dict)
    stacked: Mapping[str, tuple[str, int, int]] = field(default_factory=dict)
    mixture: ExpertModules | None = None
    rules: Callable[[Any], tuple[legal.Rule, ...]] = lambda config: ()
    adapt: Callable[[dict[str, Any], Any, Shape], dict[str, Any]] = lambda raw, config, shape: raw
    adapt_layers: Callable[[dict[str, Any], Any, Shape, tuple[int, ...]], dict[str, Any]] = (
        lambda raw, config, shape, layers: raw
    )
    remarks: Callable[[Any, Shape], list[str]] = lambda config, shape: []
    predicting: str = ""
    predictors: str = ""
    frozen: Mapping[str, str] = field(default_factory=dict)
    rescale: Callable[[Row, Shape, Shape], Affine | None] = lambda row, before, after: None
    post_norms: Mapping[str, str] = field(default_factory=dict)
    additive: Callable[[Any], bool] = lambda config: True
    gain_offset: float = 0.0
    branch_scale: Callable[[Any], float] = lambda config: 1.0
    centred: bool = False
    llama_cpp: LlamaCppFacts | None = None

    def homes(self, row: Row, block: int | None, shape: Shape) -> dict[str, Home]:
        """Name -> where transformers' model holds it, of a row's tensors in a block or outside."""
        if row.name in self.stacked:
            assert block is not None
            parameter, part, parts = self.stacked[row.name]
            return {
                name: Home(parameter.format(block), expert, part, parts)
                for expert, name in enumerate(row.names(block, shape))
            }
        names = [row.name] if block is None else row.names(block, shape)
        home = self.renamed.get(row.name, row.name)
        return {name: Home(home if block is None else home.format(block)) for name in names}

    def shape(self, config: Any) -> Shape:
        """Sizes by axis, from a resolved transformers config."""
        return Shape(
            {axis: getattr(config, key) for axis, key in self.keys.items()} | self.rigid(config)
        )

    def legality(self, config: Any) -> tuple[legal.Rule, ...]:
        """Every rule that a Shape must satisfy to be a cut of the model of ``config``.

        That sizes lie between 1 and the source's goes without saying.
        """
        layout, shape = self.layout(config), self.shape(config)
        frozen = legal.frozen(self.frozen, shape)
        every = (*frozen, *legal.nesting(layout, shape), *legal.kinds(layout))
        return (*every, *self.rules(config))

    def check(self, config: Any, after: Shape) -> None:
        """Refuse what this architecture, or transformers' code for it, cannot express.

        Args:
            config: the source's, resolved by transformers.
            after: every axis with its size after the cut.

        Raises:
            ShearlingError: an axis the architecture has not, a size that is not between 1 and the
                source's, a rigid axis with another size, or a rule that does not hold, with the
                nearest shapes for which it does.
        """
        legal.check(
            self.model_type, self.layout(config), self.legality(config), self.shape(config), after
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
        changed = {
            key: shape[axis]
            for axis, name in self.keys.items()
            if shape[axis] != before[axis]
            for key in _spellings(raw, config, name)
        }
        lists = {
            key: [values[i] for i in layers]
            for key in self.per_layer
            if (values := raw.get(key) or getattr(config, key, None)) is not None
        }
        adapted = self.adapt({**raw, **changed, **lists}, config, shape)
        if adapted.get(self.predicting):
            adapted = {**adapted, self.predicting: 0}
        return self.adapt_layers(adapted, config, shape, layers)


def _spellings(raw: Mapping[str, Any], config: Any, key: str) -> list[str]:
    """Under which names a config.json has, or is to have, what ``key`` says."""
    known = {
        key,
        *(other for pair in config.attribute_map.items() if key in pair for other in pair),
    }
    return sorted(known & raw.keys()) or [key]


def explicit_head_dim(raw: dict[str, Any], config: Any, shape: Shape) -> dict[str, Any]:
    """Write the width of a head down once hidden size and heads no longer give it."""
    before = (config.hidden_size, config.num_attention_heads)
    unchanged = before == (shape["hidden"], shape["heads"])
    if unchanged or raw.get("head_dim") is not None or not odd_heads(shape):
        return raw
    return {**raw, "head_dim": shape["head_dim"]}


def odd_heads(shape: Shape) -> bool:
    """Whether the width of a head is not what hidden size and heads give."""
    return shape["hidden"] != shape["heads"] * shape["head_dim"]


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
    weight = Row.of(f"{name}.weight", "norm", "hidden", bare=not affine)
    bias = Row.of(f"{name}.bias", "bias", "hidden")
    return (weight, bias) if affine else (weight,)


def gated_decoder(
    config: Any,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: Literal["head", "heads"] | None = None,
    fused_mlp: bool = False,
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm"),
) -> Layout:
    """Llama and its kin: grouped queries, a gated MLP, RMSNorms, separate projections.

    Args:
        config: resolved by transformers.
        qkv_bias, o_bias, mlp_bias: which projections have biases.
        qk_norm: whether queries and keys are normed: each head by itself, or all heads together.
        fused_mlp: whether gate and up are one tensor.
        norms: those of a block, over the stream, in the order in which they run.
    """
    block = "model.layers.{}"
    attention, mlp = f"{block}.self_attn", f"{block}.mlp"
    query, key = "heads*head_dim", "kv_heads*head_dim"
    normed = {"head": ("head_dim", "head_dim"), "heads": (query, key), None: ()}[qk_norm]
    gates = (("gate_up_proj", "mlp + mlp"),)
    if not fused_mlp:
        gates = (("gate_proj", "mlp"), ("up_proj", "mlp"))
    return Layout(
        GROUPED_QUERY_AXES,
        (
            *embedding_rows("model.embed_tokens.weight", config.tie_word_embeddings),
            *linear(f"{attention}.q_proj", query, "hidden", bias=qkv_bias),
            *linear(f"{attention}.k_proj", key, "hidden", bias=qkv_bias),
            *linear(f"{attention}.v_proj", key, "hidden", bias=qkv_bias),
            *linear(f"{attention}.o_proj", "hidden", query, bias=o_bias),
            *(
                Row.of(f"{attention}.{name}.weight", "norm", width)
                for name, width in zip(("q_norm", "k_norm"), normed, strict=False)
            ),
            *(
                row
                for name, rows in gates
                for row in linear(f"{mlp}.{name}", rows, "hidden", bias=mlp_bias)
            ),
            *linear(f"{mlp}.down_proj", "hidden", "mlp", bias=mlp_bias),
            *(Row.of(f"{block}.{name}.weight", "norm", "hidden") for name in norms),
            Row.of("model.norm.weight", "norm", "hidden"),
        ),
    )
