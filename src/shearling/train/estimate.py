"""What a run will take, before it takes it: memory of a rank, and time at an assumed speed.

Weights, gradients and AdamW's two moments are float32, four bytes each, unless options say less,
divided over the ranks of a node's mesh. Activations follow Korthikanti et al. (2205.05198, equation
2 without the attention scores, which scaled-dot-product attention does not keep): about 34 bytes a
token, channel and block at two bytes a value, twice that in float32; with checkpointing a block's
input alone is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from shearling.errors import ShearlingError
from shearling.files.sizes import in_bytes
from shearling.model.checkpoint import Checkpoint
from shearling.model.memory import free_bytes
from shearling.train.memory import MICRO_TOKENS, adapter_parameters
from shearling.train.options import Options

# FLOPs a second that forward passes reach, from two CPU cores measured here to an H100 at 40 % of
# its dense bfloat16 peak; the last two were never measured by us.
SPEEDS = {"two CPU cores": 1.2e11, "A100": 1.25e14, "H100": 4.0e14}
# Training: on two cores with AVX2 3.3e10 were measured, with AVX-512 up to 1.2e11.
TRAINING_SPEEDS = SPEEDS | {"two CPU cores": 6e10}


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank, and seconds of the whole run on each kind of machine."""

    parameters: int
    ranks: int
    steps: int
    tokens: int
    weights: int
    gradients: int
    moments: int
    activations: int
    teacher: int
    flops: float

    @property
    def total(self) -> int:
        """Bytes of one rank."""
        return self.weights + self.gradients + self.moments + self.activations + self.teacher

    def tokens_per_s(self) -> dict[str, float]:
        """Assumed, of all ranks together."""
        each = self.flops / self.tokens
        return {name: speed * self.ranks / each for name, speed in TRAINING_SPEEDS.items()}

    def as_json(self) -> dict[str, Any]:
        """Every figure."""
        return asdict(self) | {
            "bytes_of_a_rank": self.total, "assumed_tokens_per_s": self.tokens_per_s(),
        }  # fmt: skip

    def as_text(self) -> str:
        """A few lines for a person."""
        parts = ("weights", "gradients", "moments", "activations", "teacher")
        lines = [f"{self.parameters:,} parameters on {self.ranks} rank(s), {self.steps:,} steps"]
        lines += [f"{part:<12} {in_bytes(getattr(self, part), 2):>11} a rank" for part in parts]
        lines.append(f"{'in all':<12} {in_bytes(self.total, 2):>11} a rank")
        for name, speed in self.tokens_per_s().items():
            hours = self.tokens / speed / 3600
            lines.append(f"at {speed:,.0f} tokens/s ({name}, assumed): {hours:,.1f} h")
        return "\n".join(lines)


def check_host_memory(
    source: Checkpoint, options: Options, *, ranks: int, teacher: Checkpoint | None,
    least: Callable[[float], float] = float,
) -> None:  # fmt: skip
    """Refuse a model whose training cannot fit in the memory of the machine that trains it.

    Activations are not counted: how many there are at a time can be changed.

    Args:
        source: the model.
        options: of its training.
        ranks: of this machine, which all take their share of its memory.
        teacher: a model that is in memory besides.
        least: the least of all ranks' numbers, so that none loads before all have looked.

    Raises:
        ShearlingError: it needs more than is free, with both figures.
    """
    needed = estimate(source, options, 1, ranks=ranks, teacher=teacher)
    standing, free = ranks * (needed.total - needed.activations), free_bytes()
    if free is not None and standing > least(free):
        raise ShearlingError(
            f"{in_bytes(free)} of memory are free, but weights, gradients and the optimiser's "
            f"moments of {source.parameters:,} parameters take {in_bytes(standing)} without any "
            "activations; use --recipe lora, optimizer=adamw8bit with weight_dtype=bfloat16"
            f"{' in one process' if ranks > 1 else ''}, or a machine with more memory."
        )


def estimate(
    source: Checkpoint, options: Options, length: int, *, ranks: int = 1,
    teacher: Checkpoint | None = None,
) -> Estimate:  # fmt: skip
    """What healing ``source`` takes on ``ranks`` ranks, for sequences of ``length`` tokens."""
    shape, parameters = source.shape, source.parameters
    steps = options.steps(length)
    tokens = steps * options.batch * length
    trained, divided = parameters, ranks
    if options.recipe == "lora":  # every rank reads all of the model
        trained, divided = adapter_parameters(source, options.rank), 1
    rows = min(options.micro or max(1, MICRO_TOKENS // length), max(1, options.batch // ranks))
    kept = 4 if options.checkpointing else 68
    activations = rows * length * shape["hidden"] * shape["layers"] * kept
    if options.checkpointing:  # one block's, while it is computed anew
        activations += rows * length * shape["hidden"] * 68
    kept_in = 2 if options.weight_dtype == "bfloat16" else 4
    moments = 2 if options.optimizer == "adamw8bit" else 8
    wise = 0 if teacher is None or options.recipe != "distill" else teacher.parameters
    # Two for a product forward, four back; without weights' gradients, two of these four.
    flops = (6 if trained == parameters else 4) * parameters + 2 * wise
    return Estimate(
        parameters, ranks, steps, tokens, kept_in * parameters // divided,
        kept_in * trained // ranks,
        moments * trained // ranks, activations, kept_in * wise // ranks, float(flops) * tokens,
    )  # fmt: skip
