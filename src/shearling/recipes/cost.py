"""What a stage will take, as far as it is known before: seconds, memory, disk.

Seconds are at the speeds that ``heal --dry-run`` assumes; those of a cut are in proportion to the
nine minutes of a default one of SmolLM2-135M on two cores (LOG.md). What nobody knows is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shearling.data.domains import find_domains
from shearling.data.records import suffix_of
from shearling.gates.options import trained
from shearling.model.checkpoint import Checkpoint
from shearling.recipes.schema import ScoresMethod
from shearling.train.estimate import SPEEDS, estimate
from shearling.train.options import Options

CPU, GPU = "two CPU cores", "H100"
PACKED_TOKENS = 2.4e5  # a second on one core (tokenizers' batch encoder)
BYTES_PER_TOKEN = 4.0  # of English text
UNPACKED = 3.0  # bytes of text in one of .gz or .zst
# Of a default cut's time, what is not the forward passes over the repair's text.
CUT_FACTOR, CUT_SECONDS = 2.4, 15.0


@dataclass(frozen=True)
class StageCost:
    """What a stage takes.

    Attributes:
        seconds: at an assumed speed.
        memory: bytes, activations included.
        least: bytes without which it cannot begin.
        disk: bytes that are left there, and on the way.
        says: in a few words, what it does.
    """

    seconds: float | None = None
    memory: int | None = None
    least: int | None = None
    disk: int | None = None
    says: str = ""

    def as_json(self) -> dict[str, Any]:
        """Every figure."""
        return asdict(self)


@dataclass(frozen=True)
class Costs:
    """Costs on one kind of machine, ``CPU`` or ``GPU``, of models stored as the source is."""

    machine: str
    source: Checkpoint

    @property
    def speed(self) -> float:
        """FLOPs a second."""
        return SPEEDS[self.machine]

    def stored(self, parameters: int) -> int:
        """Bytes on disk of a model of so many parameters."""
        return round(parameters * self.source.bytes / self.source.parameters)

    def pack(self, tokens: int, itemsize: int) -> StageCost:
        """Of ``tokens`` of text."""
        said = f"about {tokens:,} tokens"
        return StageCost(tokens / PACKED_TOKENS, None, None, 2 * itemsize * tokens, said)

    def run(self, models: Sequence[Checkpoint], tokens: int, says: str) -> StageCost:
        """Of a forward pass over ``tokens`` for each of several models, in float32."""
        flops = sum(2.0 * model.parameters * tokens for model in models)
        held = 4 * max(model.parameters for model in models)
        return StageCost(flops / self.speed, held, held, 1_000_000, says)

    def cut(
        self, model: Checkpoint, after: Mapping[str, int], method: ScoresMethod, *, repaired: bool
    ) -> StageCost:
        """Of a cut by scores."""
        tokens = method.samples * method.length
        passes = float(model.shape["layers"]) / 2  # of removals, each from its block on
        if repaired:
            written = 4 * method.samples if method.written is None else method.written
            copies = 1 if method.copies is None else method.copies
            passes = CUT_FACTOR * (1 + copies + written / method.samples)
        seconds = CUT_SECONDS + passes * 2.0 * model.parameters * tokens / self.speed
        parameters = model.layout.count(model.shape.with_(**after))
        disk = self.stored(parameters)
        said = f"{model.parameters:,} -> {parameters:,} parameters"
        return StageCost(seconds, 4 * model.parameters, None, disk, said)

    def train(
        self, model: Checkpoint, after: Mapping[str, int], options: Options, length: int,
        teacher: Checkpoint | None,
    ) -> StageCost:  # fmt: skip
        """Of training ``model``, which ends with the sizes ``after``."""
        needed = estimate(trained(model, after, options), options, length, teacher=teacher)
        parameters = model.layout.count(model.shape.with_(**after))
        kept = (options.keep + 1) * (needed.moments + needed.gradients)  # as large as weights
        said = f"{needed.tokens:,} tokens in {needed.steps:,} steps"
        if parameters < model.parameters:
            said += f", {model.parameters:,} -> {parameters:,} parameters"
        return StageCost(
            needed.tokens / needed.tokens_per_s()[self.machine], needed.total,
            needed.total - needed.activations, kept + 2 * self.stored(parameters), said,
        )  # fmt: skip


def text_tokens(specs: Sequence[str]) -> int:
    """About how many tokens the files of ``specs`` hold (ShearlingError where there are none)."""
    total = 0.0
    for sources in find_domains(specs).values():
        for source in sources:
            packed = (suffix_of(source.file) or "").endswith((".gz", ".zst"))
            total += source.file.stat().st_size * (UNPACKED if packed else 1)
    return max(1, round(total / BYTES_PER_TOKEN))
