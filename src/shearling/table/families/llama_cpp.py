"""What llama.cpp makes of an architecture: its names in a file, and what its code derives.

llama.cpp counts where a configuration lists: every sixth block of a Gemma 3 attends to everything,
whatever ``layer_types`` says, and a model of 62 blocks has its attention scaled in another way. A
file says nothing of it. What is stated here was read in llama.cpp's ``load_arch_hparams`` and
``load_arch_tensors`` of each architecture and in its converter, in 2026, and tried by running it on
models of every family, whole and cut (tests/ship/test_llama_cpp_runs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from shearling.table.values import Shape

FULL, SLIDING = "full_attention", "sliding_attention"
ROTATED, UNROTATED = "rotary_positions", "no_positions"
Stored = Callable[[Any, str, Tensor], Mapping[str, Tensor] | None]


@dataclass(frozen=True, slots=True)
class LlamaCppLimit:
    """What llama.cpp's code for an architecture takes for granted, and no file can say otherwise.

    Attributes:
        wants: what, to follow "wants"; names of sizes in braces are filled in.
        holds: whether a model is so; from its configuration, as resolved, and its sizes.
        axes: whose sizes decide, and a cut can break it by; none where the configuration does.
    """

    wants: str
    holds: Callable[[Any, Shape], bool]
    axes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LlamaCppFacts:
    """One architecture of llama.cpp, as a family of ours is stored in it.

    Attributes:
        architecture: its name in a file.
        fixed: config key -> value that its code has built in.
        biases: config key -> a tensor of the first block that is there where the key is true.
        epsilon: config key and metadata key of what norms add to a mean square.
        paired: modules whose rows are heads with rotary pairs side by side, not half apart, and
            the axis that counts the heads.
        fused: modules with query, key and value of each head in turn; a file has all queries,
            then all keys, then all values.
        partial: whether rotary positions may turn only a part of a head.
        divides: whether it is only for models whose heads divide the hidden size, and that have
            no sliding window; others of the architecture are of the next family.
        window: config key of a sliding window; None where the family has none.
        slides: whether its code keeps to a window; where not, all positions are attended to.
        period: every block whose number, counted from 1, divides by it attends to everything, the
            others slide; None where a file's blocks are all alike.
        listed: whether a file lists which blocks slide all the same, and newer versions of
            llama.cpp go by that.
        widest: the window of a file that names none.
        local_theta: base of the rotary positions in blocks that slide, where it is another.
        scalar: config key of what attention is divided by the root of; None where that is the
            width of a head without a key.
        scaled_depth: with so many blocks it is hidden / heads instead.
        softcaps: config key -> metadata key, and the value of a file that names none.
        unrotated: every block whose number, counted from 1, divides by it is run without rotary
            positions; None where all have them.
        sizes: axis -> metadata key, where it is another than in most architectures' files.
        limits: what else its code takes for granted.
        stated: config key -> metadata key of a number that must arrive; of architectures that are
            not read as models of ours, whose configuration is not compared as a whole.
        told: keys that the converter looks for in a configuration, and that transformers does not
            give on; from the configuration, as resolved.
        ahead: whether the converter must be told to leave out what predicts tokens further ahead.
        stored: what a file holds of a tensor, from the resolved configuration, its name and its
            values: names that the converter would know -> values in llama.cpp's order; None
            where it holds the tensor as others do.
        reads: whether a file of the architecture is read as a model of ours. Where not, only
            what is said here is known of it, and what llama.cpp computes is compared by running it.
    """

    architecture: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    epsilon: tuple[str, str] = ("rms_norm_eps", "attention.layer_norm_rms_epsilon")
    paired: Mapping[str, str] = field(default_factory=dict)
    fused: tuple[str, ...] = ()
    partial: bool = False
    divides: bool = False
    window: str | None = None
    slides: bool = False
    period: int | None = None
    listed: bool = False
    widest: int | None = None
    local_theta: float | None = None
    scalar: str | None = None
    scaled_depth: int | None = None
    softcaps: Mapping[str, tuple[str, float | None]] = field(default_factory=dict)
    unrotated: int | None = None
    sizes: Mapping[str, str] = field(default_factory=dict)
    limits: tuple[LlamaCppLimit, ...] = ()
    stated: Mapping[str, str] = field(default_factory=dict)
    told: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    ahead: bool = False
    stored: Stored | None = None
    reads: bool = True

    def kinds(self, depth: int, period: int | None = None) -> tuple[str, ...] | None:
        """The kind of each of ``depth`` blocks as llama.cpp counts them, or None."""
        if self.unrotated is not None:
            return tuple(
                ROTATED if (block + 1) % self.unrotated else UNROTATED for block in range(depth)
            )
        every = self.period if period is None else period
        if every is None:
            return None
        return tuple(
            SLIDING if every == 0 or block % every < every - 1 else FULL for block in range(depth)
        )

    def broken(self, config: Any, shape: Shape) -> Iterator[LlamaCppLimit]:
        """The limits that a model of these sizes does not keep to."""
        return (limit for limit in self.limits if not limit.holds(config, shape))

    def scaled_by(self, depth: int, hidden: int, heads: int, head_dim: int) -> int:
        """What attention is divided by the root of, in a model of these sizes."""
        return hidden // heads if depth == self.scaled_depth else head_dim


SILU = {"hidden_act": "silu"}
PAIRED = {"q_proj": "heads", "k_proj": "kv_heads"}

WHOLE = LlamaCppLimit(
    "hidden to be heads * head_dim, which are {hidden} and {heads} * {head_dim} here",
    lambda config, shape: shape["hidden"] == shape["heads"] * shape["head_dim"],
    axes=("hidden", "heads"),
)
DIVIDED = LlamaCppLimit(
    "heads as wide as hidden / heads, which are {hidden} and {heads}, and {head_dim} wide here",
    lambda config, shape: shape["hidden"] // shape["heads"] == shape["head_dim"],
    axes=("hidden", "heads"),
)
UNTIED = LlamaCppLimit(
    "an output head of its own, where this model's is the embedding",
    lambda config, shape: not config.tie_word_embeddings,
)
TIED = LlamaCppLimit(
    "the embedding for an output head, where this model has one of its own",
    lambda config, shape: bool(config.tie_word_embeddings),
)
UNBIASED = LlamaCppLimit(
    "no bias on what attention writes, where this model has one",
    lambda config, shape: not getattr(config, "attention_bias", False),
)
PLAIN_MLP = LlamaCppLimit(
    "no biases in an MLP, where this model has them",
    lambda config, shape: not getattr(config, "mlp_bias", False),
)


def router(normed: bool) -> LlamaCppLimit:
    """Whether the weights of the experts that a token is sent to are scaled to add up to 1."""
    words = "weights of chosen experts that add up to 1, which norm_topk_prob=false does not make"
    if not normed:
        words = "weights of chosen experts as they are, which norm_topk_prob=true scales"
    return LlamaCppLimit(words, lambda config, shape: bool(config.norm_topk_prob) == normed)
