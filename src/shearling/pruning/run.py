"""From a target shape to a repaired checkpoint: score, choose, refit and cut, joined.

What is removed follows from a criterion for blocks and one for units; each has a default that is
the best we measured (docs/one_shot.md). The calibration windows serve the criteria as they are,
and the repair together with copies that the source model rewrote in part, and more that it wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from torch import Tensor

from shearling.data.bos import TokenWindows
from shearling.engine.devices import give_back_memory
from shearling.engine.place import Need, Place
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.files.scratch import scratch
from shearling.files.writer import check_output, check_space, claimed
from shearling.model.checkpoint import Checkpoint
from shearling.model.loading import check_length
from shearling.pruning.choices import Choice, Wanted, check_all, choose_all
from shearling.pruning.cut import SHARD_BYTES, cut, written_bytes
from shearling.repair.by_source import Apart
from shearling.repair.calibration import Calibration, repair_text
from shearling.repair.cut_walk import CutToRepair
from shearling.repair.experts import ExpertOptions
from shearling.repair.openings import Openings
from shearling.repair.refit import FURTHER_WIDTHS, KEPT_WIDTHS, refit_all
from shearling.repair.result import Repair
from shearling.repair.rotate import rotate
from shearling.scoring.registry import find
from shearling.scoring.score import NO_TOKENS, no_text
from shearling.table.values import Cut


@dataclass(frozen=True, slots=True)
class Asked:
    """A choice, and where what it leaves is written."""

    choice: Choice
    output: Path


class Run:
    """One model and one text on their way through a command.

    The model is opened once as a running one, and the text tokenised once, when first needed.

    Attributes:
        source: the model.
        calibration: the text; criteria by magnitude and at random need none.
        place: where blocks run.
        progress: told how far the work is.
    """

    def __init__(
        self,
        source: Checkpoint,
        calibration: Calibration | None = None,
        *,
        place: Place | None = None,
        progress: Progress = silent,
    ) -> None:
        """Nothing is read yet."""
        self.source, self.calibration = source, calibration
        self.place = place or Place.best(source, need=repair_need(source, calibration))
        self.progress = progress

    @cached_property
    def stream(self) -> BlockStream:
        """The running model."""
        return BlockStream(self.source, self.place)

    @cached_property
    def windows(self) -> TokenWindows:
        """Calibration tokens (samples, length), no longer than the model has positions for."""
        assert self.calibration is not None
        windows = self.calibration.windows(self.source)
        check_length(windows.ids_NS.shape[1], self.source.config, self.source.name)
        return windows

    @property
    def seed(self) -> int:
        """Of every random choice."""
        return self.calibration.seed if self.calibration else 0

    def text_for(self, by: str) -> Tensor:
        """The windows, for a criterion or a repair (ShearlingError if there is no text)."""
        if self.calibration is None:
            raise no_text(by)
        return self.windows.ids_NS

    def text_for_units(self, by: str) -> Tensor:
        """The windows, or no tokens for a criterion that looks at none."""
        return NO_TOKENS if find(by, "units").textless else self.text_for(by)

    @cached_property
    def openings(self) -> Openings | None:
        """What sequences that the model writes begin with, if not with the text alone."""
        return None if self.calibration is None else self.calibration.openings(self.source)

    def text_that_chooses(self, purpose: str) -> Calibration:
        """The text itself (ShearlingError if there is none)."""
        if self.calibration is None:
            raise ShearlingError(f"{purpose} is chosen by a text; give --calibration FILE.")
        return self.calibration

    @cached_property
    def repair_ids_NS(self) -> Tensor:
        """Tokens (N, S) that repairs are solved on: the windows, and what the model makes of them.

        Whatever number of cuts is repaired, they are made once.
        """
        assert self.calibration is not None
        return repair_text(
            self.stream, self.calibration, self.windows, openings=self.openings,
            progress=self.progress,
        )  # fmt: skip

    def choose(self, wanted: Wanted) -> Choice:
        """Choose what survives a cut, as :func:`shearling.pruning.choices.choose_all` says."""
        (choice,) = self.choose_all([wanted])
        return choice

    def choose_all(self, wanted: Sequence[Wanted], *, nested: bool = False) -> list[Choice]:
        """Choose what survives of each of several cuts; see there."""
        return choose_all(self, wanted, nested=nested)

    def check(self, wanted: Sequence[Wanted]) -> None:
        """Refuse what choosing these would refuse, before the model is opened (ShearlingError)."""
        check_all(self, wanted)

    def write(
        self, choice: Choice, output: Path, *, repaired: bool = True, shard_bytes: int = SHARD_BYTES
    ) -> Checkpoint:
        """Cut to a choice, as :meth:`write_all` does to several."""
        asked = [Asked(choice, output)]
        (written,) = self.write_all(asked, repaired=repaired, shard_bytes=shard_bytes)
        return written

    def write_all(
        self, asked: Sequence[Asked], *, repaired: bool = True, shard_bytes: int = SHARD_BYTES
    ) -> list[Checkpoint]:
        """Cut to each choice, repaired if asked, and prove it; the first rank alone writes.

        Cuts of the source as it is are repaired beside one walk of it. One whose stream is rotated
        has a source of its own.

        Raises:
            ShearlingError: as :func:`shearling.repair.refit.refit_all` and
                :func:`shearling.pruning.cut.cut`.
        """
        expanded = [self._expanded(one) for one in asked]
        needed = [written_bytes(self.source, cut) for cut in expanded]
        for one, total in zip(asked, accumulate(needed), strict=True):
            check_output(one.output)
            check_space(one.output, total)
        if repaired and self.calibration is None:
            raise ShearlingError(
                "a repair runs the model on text; give --calibration FILE, or --no-refit."
            )
        self.place.ranks.barrier()  # nothing is written before all have looked
        cuts = list(zip(asked, expanded, strict=True))
        plain = [cut for cut in cuts if not cut[0].choice.rotated]
        alone = [[cut] for cut in cuts if cut[0].choice.rotated]
        written: dict[Path, Checkpoint] = {}
        with ExitStack() as outputs:
            if self.place.ranks.first:
                for one in asked:
                    outputs.enter_context(claimed(one.output))
            for group in [*([plain] if plain else []), *alone]:
                with scratch() as directory:
                    written |= self._write(group, directory, repaired, shard_bytes)
        return [written[one.output] for one in asked]

    def _expanded(self, asked: Asked) -> Cut:
        return self.source.layout.cut(asked.choice.keep, self.source.shape)

    def _write(
        self, group: Sequence[tuple[Asked, Cut]], directory: Path, repaired: bool, shard_bytes: int
    ) -> dict[Path, Checkpoint]:
        """Cut and repair what is cut from the same stream; of a rotated one, a single cut."""
        cuttable, stream, rotation = self.source, self.stream if repaired else None, {}
        (first, _), *_ = group
        if first.choice.rotated:
            turned = rotate(
                self.stream, self.windows.ids_NS, len(first.choice.keep.model["hidden"]),
                directory / "rotated", shard_bytes=shard_bytes, progress=self.progress,
            )  # fmt: skip
            cuttable, rotation = turned.cuttable, {"rotation": dict(turned.figures)}
            stream = BlockStream(turned.exact, replace(self.place, tell=None)) if repaired else None
        repairs: list[Repair] | None = None
        if stream is not None:
            repairs = self._repair(group, cuttable, stream, directory)
            self._make_room(stream)
        written: dict[Path, Checkpoint] = {}
        for number, (one, expanded) in enumerate(group):
            options = {**one.choice.options, **rotation}
            solved = None if repairs is None else repairs[number]
            if solved is not None:
                if one.choice.experts != ExpertOptions():
                    options["expert_repair"] = asdict(one.choice.experts)
                options["repair"] = solved.as_json()
            made = None
            if self.place.ranks.first:
                made = cut(
                    cuttable, expanded, one.output, replaced=solved.replaced if solved else None,
                    options=options, seed=self.calibration.seed if self.calibration else None,
                    place=self.place, shard_bytes=shard_bytes, progress=self.progress,
                )  # fmt: skip
            self.place.ranks.wait_for(one.output)
            written[one.output] = made or Checkpoint.open(one.output)
        return written

    def _make_room(self, stream: BlockStream) -> None:
        """Have a proof on a GPU take the place of the source's blocks, beside which it may not fit.

        On a processor they stay: they are in memory only where as much again was free.
        """
        if self.place.device.type != "cpu":
            for running in (stream, self.__dict__.get("stream")):
                if running is not None:
                    running.release()
            give_back_memory()

    def _repair(
        self,
        group: Sequence[tuple[Asked, Cut]],
        cuttable: Checkpoint,
        stream: BlockStream,
        directory: Path,
    ) -> list[Repair]:
        """Solve what cuts of ``cuttable`` leave anew, towards ``stream``, the source's equal."""
        assert self.calibration is not None
        cuts = []
        for number, (one, expanded) in enumerate(group):
            solved = directory / f"solved-{number}"
            solved.mkdir()
            choice = one.choice
            cuts.append(CutToRepair(expanded, solved, cuttable, choice.final_norm, choice.experts))
        return refit_all(
            stream, cuts, self.repair_ids_NS, windows=self.calibration.samples,
            apart=Apart.of(self.calibration), progress=self.progress,
        )  # fmt: skip


def repair_need(source: Checkpoint, calibration: Calibration | None, cuts: int = 1) -> Need:
    """What a repair of some cuts keeps of its text between two blocks; a criterion keeps less."""
    if calibration is None:
        return Need()
    copies = 1 + len(calibration.shares)
    sequences = copies * calibration.samples + calibration.sequences
    shape = source.shape
    linear = shape.get("linear_heads", 0) * shape.get("linear_value_dim", 0)
    head = max(shape["head_dim"], shape.get("global_head_dim", 0))
    widest = max(shape.get("mlp", 0), shape["heads"] * head, linear)
    widths = KEPT_WIDTHS + (cuts - 1) * FURTHER_WIDTHS
    return Need(sequences * calibration.length, widths * shape["hidden"] + widest)
