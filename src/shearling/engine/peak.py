"""How much memory a cut with its repair takes at its peak, said before anything is loaded.

Of a device: the processor's memory where that computes, a GPU's where one does. Nothing is
measured; what the code holds at a time is counted, in each stage, and the largest of these is told.
Python and its libraries come on top: some 400 MB of a processor's memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from shearling.engine.card import MARGIN, capped, gb
from shearling.engine.moments import DOUBLE_INPUTS
from shearling.engine.place import Need, Place
from shearling.model.checkpoint import Checkpoint
from shearling.model.memory import free_bytes
from shearling.table.axes import EXPERT_MLP, EXPERTS
from shearling.table.values import Shape

OUTPUT_BYTES = 2**27  # of what all experts give, kept at a time while they are scored
# Of a system: matrices for what is fitted and what is held out, and one that is factorised; right
# sides likewise, the solution, and what its error is worked out in.
_GRAMS, _CROSSES = 3, 6
SCORING, REPAIRING, PROVING = "scoring", "repairing", "proving the cut"


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes that are there at the same time, in the stage that takes most.

    Attributes:
        stage: which one.
        outside: embeddings, head and final norm, in float32.
        blocks: weights of blocks.
        joining: copies of experts' matrices while they are put into one tensor, on a GPU; on a
            processor, pages of the file that is read.
        states: activations that wait between two blocks.
        computing: what computes: activations, logits, systems to solve.
        margin: what a GPU's libraries take, and gaps.
    """

    stage: str
    outside: int
    blocks: int
    joining: int = 0
    states: int = 0
    computing: int = 0
    margin: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return (
            self.outside + self.blocks + self.joining + self.states + self.computing + self.margin
        )

    @staticmethod
    def of(
        checkpoint: Checkpoint, place: Place, need: Need, after: Shape, *, scored: int,
        repaired: bool,
    ) -> Peak:  # fmt: skip
        """What a cut of a model takes.

        Args:
            checkpoint: the source.
            place: where it runs.
            need: what a repair keeps of its text between two blocks.
            after: sizes of the result.
            scored: tokens that units are scored on; none without text.
            repaired: whether it is repaired; if not, it is cut and proved alone.
        """
        stages = stages_of(checkpoint, place, need, after, scored=scored)
        if not repaired:
            stages = [stage for stage in stages if stage.stage != REPAIRING]
        return max(stages, key=lambda stage: stage.total)

    def as_json(self) -> dict[str, str | int]:
        """Every part, and the sum."""
        return {"peak_bytes": self.total, **asdict(self)}

    def line(self) -> str:
        """For a person."""
        return (
            f"needs about {gb(self.total)} of it while {self.stage}: {gb(self.blocks)} blocks, "
            f"{gb(self.outside)} what is outside of them, {gb(self.states)} states, "
            f"{gb(self.joining + self.computing + self.margin)} what computes."
        )


def shortage(peak: Peak, place: Place) -> str | None:
    """A sentence for where a cut would take more than is free or allowed; None where it fits."""
    device = str(place.device)
    free = capped(free_bytes(device) or peak.total, place.allowed)
    if peak.total <= free:
        return None
    gpu = place.device.type != "cpu"
    advice = "take fewer --samples or a smaller --length"
    if place.weights == "resident":
        advice = f"give --memory {0.8 * free / 1e9:.0f}GB, with which blocks wait in pinned memory"
        if not gpu:
            advice = "give --stream, with which blocks are read one at a time"
    elif gpu and place.states == "device":
        advice = f"give --memory {0.6 * free / 1e9:.0f}GB, with which states wait on the host"
    return (
        f"the cut takes about {gb(peak.total)} while {peak.stage}, but {gb(free)} of {device} are "
        f"free or allowed, and it may run out there; {advice}."
    )


def stages_of(
    checkpoint: Checkpoint, place: Place, need: Need, after: Shape, *, scored: int
) -> list[Peak]:
    """What each stage takes, with arguments as :meth:`Peak.of` has them."""
    counted = _Counted(checkpoint, place, need, after, scored)
    return [counted.proving(), *(counted.with_text() if need.tokens else ())]


@dataclass(frozen=True, slots=True)
class _Counted:
    checkpoint: Checkpoint
    place: Place
    need: Need
    after: Shape
    scored: int

    @property
    def _gpu(self) -> bool:
        return self.place.device.type != "cpu"

    @property
    def _resident(self) -> bool:
        return self.place.weights == "resident"

    def _outside(self, shape: Shape) -> int:
        layout = self.checkpoint.layout
        rows = (row for row in layout.stored if not row.in_block)
        return max(4, self.place.dtype.itemsize) * sum(layout.numbers(row, shape) for row in rows)

    def _block(self, shape: Shape, itemsize: int | None = None) -> int:
        return self.checkpoint.layout.count_block(shape) * (itemsize or self.place.dtype.itemsize)

    def _joining(self, itemsize: int | None = None) -> int:
        """What reading a block takes beside the block."""
        checkpoint = self.checkpoint
        if not self._gpu:
            stored = self._block(checkpoint.shape, checkpoint.bytes // checkpoint.parameters)
            largest = max(file.stat().st_size for file in set(checkpoint.files.values()))
            return min(stored, largest)
        if self.place.weights == "pinned" and itemsize is None:
            return 0  # joined on the host
        joined: dict[str, int] = {}
        for row in checkpoint.layout.block_rows():
            if row.in_expert and row.name in checkpoint.family.stacked:
                home, *_ = checkpoint.family.stacked[row.name]
                blocks = checkpoint.layout.blocks_with(EXPERTS, checkpoint.shape)
                numbers = checkpoint.layout.numbers(row, checkpoint.shape) // blocks
                joined[home] = joined.get(home, 0) + numbers
        return max(joined.values(), default=0) * (itemsize or self.place.dtype.itemsize)

    def _waiting(self) -> int:
        on_device = self.place.states == ("device" if self._gpu else "host")
        return self.need.bytes if on_device else 0

    def with_text(self) -> Iterator[Peak]:
        """Scoring and rewriting, and the repair."""
        shape, item = self.checkpoint.shape, self.place.dtype.itemsize
        block, cut_block = self._block(shape), self._block(self.after)
        everything = block * shape["layers"]
        margin = MARGIN if self._gpu else 0
        outside, joining = self._outside(shape), self._joining()
        tokens = min(self.place.batch_tokens, self.need.tokens)
        scoring = min(tokens, self.scored) * self._activations(item) + self._outputs()
        running = max(scoring, tokens * self._activations(item), self._logits(tokens))
        # On a GPU one block is read while another computes; a processor does either.
        ahead = self._gpu and not self._resident
        walked = everything if self._resident else block * (1 + ahead)
        both = _overlap(joining, running, together=ahead)
        # A repair keeps more of its text than the stream, which is all while it is scored.
        begun = min(self._waiting(), 4 * self.need.tokens * shape["hidden"])
        yield Peak(SCORING, outside, walked, both[0], begun, both[1], margin)
        if self.after["hidden"] != shape["hidden"]:
            outside += self._outside(self.after)
        solving = max(self._solving(tokens), running if ahead else 0)
        beside = everything if self._resident else block if ahead else 0
        mended = beside + cut_block * (1 + self._gpu)
        both = _overlap(joining, solving, together=self._gpu)
        yield Peak(REPAIRING, outside, mended, both[0], self._waiting(), both[1], margin)

    def proving(self) -> Peak:
        """The proof: in float32, the source block by block, the running model's outside beside.

        On a processor, its blocks as well.
        """
        block = self._block(self.checkpoint.shape, 4)
        blocks = block * (1 + self._gpu)
        if self._resident and self.need.tokens and not self._gpu:  # where they are let go of
            blocks += self._block(self.checkpoint.shape) * self.checkpoint.shape["layers"]
        if self.place.room_for(self.checkpoint.layout.count(self.after), torch.float32):
            blocks += 4 * self.checkpoint.layout.count(self.after) - block
        outside = self._outside(self.checkpoint.shape) * (2 if self.need.tokens else 1)
        margin = MARGIN if self._gpu else 0
        return Peak(PROVING, outside, blocks, self._joining(4), margin=margin)

    def _outputs(self) -> int:
        """Of what all experts give, where experts are scored."""
        before = self.checkpoint.shape
        axes = [axis for axis in (EXPERTS, EXPERT_MLP) if axis in before]
        if all(self.after[axis] == before[axis] for axis in axes):
            return 0
        return min(OUTPUT_BYTES, 4 * self.scored * before[EXPERTS] * before["hidden"])

    def _logits(self, tokens: int) -> int:
        """Of what a loss is worked out from: logits, their logarithms, and the gradient."""
        return 3 * min(self.place.logits_bytes, 4 * tokens * self.checkpoint.shape["vocab"])

    def _activations(self, itemsize: int) -> int:
        """Bytes of a token while a block runs forward."""
        shape, routed = self.checkpoint.shape, self.checkpoint.layout.routed
        mixed = shape["heads"] * shape["head_dim"]
        inside = max(shape.get("mlp", 0), routed * shape.get(EXPERT_MLP, 0))
        return 32 * shape["hidden"] + itemsize * (4 * mixed + 4 * inside)

    def _solving(self, tokens: int) -> int:
        """The largest system of the cut, and the inputs of a batch that are added to it."""
        shape = self.after
        head = max(shape["head_dim"], shape.get("global_head_dim", 0))
        widths = [shape["heads"] * head, shape.get("mlp", 0), shape.get(EXPERT_MLP, 0)]
        widths += [shape.get("linear_heads", 0) * shape.get("linear_value_dim", 0)]
        hidden, most = shape["hidden"], 0
        for inputs in widths:
            itemsize = 8 if inputs <= DOUBLE_INPUTS else 4
            system = itemsize * (_GRAMS * (inputs + 1) ** 2 + _CROSSES * (inputs + 1) * hidden)
            most = max(most, system + 4 * tokens * (2 * inputs + 4 * hidden))
        return most


def _overlap(reading: int, computing: int, *, together: bool) -> tuple[int, int]:
    """What reading and computing take at a time: both together, or the larger alone."""
    if together:
        return reading, computing
    return (reading, 0) if reading > computing else (0, computing)
