"""What llama.cpp makes of an architecture: its names in a file, and what its code derives.

llama.cpp counts where a configuration lists: every sixth block of a Gemma 3 attends to everything,
whatever ``layer_types`` says, and a model of 62 blocks has its attention scaled in another way. A
file says nothing of it. What is stated here was read in llama.cpp's ``load_arch_hparams`` of each
architecture and in its converter, in 2026.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"


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
        widest: the window of a file that names none.
        local_theta: base of the rotary positions in blocks that slide, where it is another.
        scalar: config key of what attention is divided by the root of; None where that is the
            width of a head without a key.
        scaled_depth: with so many blocks it is hidden / heads instead.
        softcaps: config key -> metadata key, and the value of a file that names none.
        unrotated: every block whose number, counted from 1, divides by it is run without rotary
            positions; None where all have them.
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
    widest: int | None = None
    local_theta: float | None = None
    scalar: str | None = None
    scaled_depth: int | None = None
    softcaps: Mapping[str, tuple[str, float | None]] = field(default_factory=dict)
    unrotated: int | None = None
    reads: bool = True

    def kinds(self, depth: int, period: int | None = None) -> tuple[str, ...] | None:
        """The kind of each of ``depth`` blocks as llama.cpp counts them, or None."""
        every = self.period if period is None else period
        if every is None:
            return None
        return tuple(
            SLIDING if every == 0 or block % every < every - 1 else FULL for block in range(depth)
        )

    def scaled_by(self, depth: int, hidden: int, heads: int, head_dim: int) -> int:
        """What attention is divided by the root of, in a model of these sizes."""
        return hidden // heads if depth == self.scaled_depth else head_dim


SILU = {"hidden_act": "silu"}
PAIRED = {"q_proj": "heads", "k_proj": "kv_heads"}
