"""Several sizes of one model, made together: scored once, and repaired beside one walk of it.

Each size is a complete, proven checkpoint in a directory of its own, as it would be alone. Sizes
that are there already, made of the same inputs, are kept.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from shearling.data.domains import find_domains
from shearling.engine.peak import Peak
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.files.remembered import known_digest
from shearling.files.writer import check_outside, claimed, write_json
from shearling.model.checkpoint import Checkpoint
from shearling.model.manifest import ModelManifest, SourceFacts, describe
from shearling.pruning.nested import check_shapes
from shearling.pruning.prune import Criteria, Pruning, Repairs, Running, prunings
from shearling.pruning.results import FAMILY, FamilyFile, FamilySize
from shearling.pruning.run import Asked
from shearling.pruning.settle import Notify, tell_pattern
from shearling.pruning.size import Size
from shearling.pruning.text import CalibrationText
from shearling.repair.calibration import Calibration
from shearling.version import __version__


@dataclass(frozen=True, slots=True)
class Member:
    """One size that was asked for.

    Attributes:
        name: of its directory.
        pruning: the cut, settled.
        output: its directory.
        inputs: a digest of all that it is made from.
    """

    name: str
    pruning: Pruning
    output: Path
    inputs: str

    def is_made(self) -> bool:
        """Whether it is there, whole, and made of the same inputs.

        Raises:
            ShearlingError: something else is in its place.
        """
        if not self.output.exists() and not self.output.is_symlink():
            return False
        if self.output.is_dir() and not any(self.output.iterdir()):
            return False
        manifest = ModelManifest.load(self.output) if self.output.is_dir() else None
        family = (manifest.options if manifest else {}).get("family")
        inputs = family.get("inputs") if isinstance(family, dict) else None
        if manifest is None or inputs != self.inputs:
            raise ShearlingError(
                f"{self.output} is there already, and was not made of the same model, text and "
                "options; name a new --output, or remove it."
            )
        lost = [file for file in manifest.files if not (self.output / file).is_file()]
        if lost:
            raise ShearlingError(f"{self.output} lacks {lost[0]}; remove it to make it again.")
        return True


@dataclass(frozen=True, slots=True)
class FamilyPruning:
    """Sizes that were asked for together, checked, with every default settled.

    Attributes:
        directory: holds a directory for each.
        members: the sizes, the largest first.
        nested: whether each keeps only what the one before it keeps.
    """

    directory: Path
    members: tuple[Member, ...]
    nested: bool

    @staticmethod
    def of(
        source: Checkpoint,
        directory: Path,
        sizes: Sequence[Size],
        *,
        nested: bool = False,
        calibration: CalibrationText | None = None,
        criteria: Criteria | None = None,
        repairs: Repairs | None = None,
        running: Running | None = None,
    ) -> FamilyPruning:
        """Check and settle, before any work; arguments and errors as :func:`prune_family`."""
        _check_sizes(sizes, nested=nested)
        _check_directory(directory)
        check_outside(directory, source.path)
        settled = prunings(
            source, sizes, calibration=calibration, criteria=criteria, repairs=repairs,
            running=running,
        )  # fmt: skip
        layout = source.layout.heaviest(source.shape)
        named = sorted(
            zip(sizes, settled, strict=True),
            key=lambda pair: layout.count(pair[1].wanted.after), reverse=True,
        )  # fmt: skip
        _check_distinct([(size, one) for size, one in named])
        if nested:
            check_shapes([(size.asked, one.wanted.after) for size, one in named])
        members = []
        for number, (size, one) in enumerate(named):
            larger = [dict(other.wanted.after) for _, other in named[:number]] if nested else []
            inputs = _digest(one, larger)
            members.append(Member(size.name, one, directory / size.name, inputs))
        return FamilyPruning(directory, tuple(members), nested)

    @property
    def peak(self) -> Peak:
        """The memory of the device that all of them, made together, will take."""
        count = len(self.members)
        peaks = [member.pruning.peak(count) for member in self.members]
        return max(peaks, key=lambda peak: peak.total)

    def missing(self) -> list[Member]:
        """Those that are not made yet (ShearlingError if something else is in a place)."""
        return [member for member in self.members if not member.is_made()]

    def check(self) -> None:
        """Refuse all that the cuts would refuse before the model is opened (ShearlingError)."""
        run = self.members[0].pruning.run()
        run.check([member.pruning.wanted for member in self.members])

    def write(
        self,
        progress: Progress = silent,
        *,
        running: Running | None = None,
        tell: Notify | None = None,
    ) -> FamilyFile:
        """Make what is missing, and say of all what they are.

        Args:
            progress: told how far the work is.
            running: the largest weight file, and who is told what the user should know.
            tell: told the place.
        """
        running, started = running or Running(), time.perf_counter()
        missing, seconds = self.missing(), None
        if missing:
            run = self.members[0].pruning.run(progress, tell)
            with ExitStack() as outputs:
                if run.place.ranks.first:
                    for member in missing:
                        outputs.enter_context(claimed(member.output))
                # A smaller size depends on the larger ones, whether they are made already or not.
                chosen = list(self.members if self.nested else missing)
                choices = run.choose_all([m.pruning.wanted for m in chosen], nested=self.nested)
                asked = []
                for member, choice in zip(chosen, choices, strict=True):
                    if member in missing:
                        if run.place.ranks.first:
                            tell_pattern(run.source, choice.keep, running.notify)
                        options = {**choice.options, "family": self._told(member)}
                        asked.append(Asked(replace(choice, options=options), member.output))
                run.write_all(
                    asked, repaired=self.members[0].pruning.wanted.repaired,
                    shard_bytes=running.shard_bytes,
                )  # fmt: skip
            seconds = round(time.perf_counter() - started, 2)
        family = self._described(seconds)
        if not missing and (self.directory / FAMILY).is_file():
            return family
        if self.members[0].pruning.place.ranks.first:
            write_json(self.directory / FAMILY, family.to_json())
        return family

    def _told(self, member: Member) -> dict[str, Any]:
        """What a size's manifest says of its family."""
        return {
            "name": self.directory.resolve().name,
            "sizes": [one.name for one in self.members],
            "nested": self.nested,
            "inputs": member.inputs,
        }

    def _described(self, seconds: float | None) -> FamilyFile:
        sizes = []
        for member in self.members:
            manifest = ModelManifest.load(member.output)
            assert manifest is not None, "it was written, or found"
            sizes.append(FamilySize.of(member.name, manifest))
        source = SourceFacts(**describe(self.members[0].pruning.source))
        return FamilyFile(source, tuple(sizes), self.nested, seconds=seconds)


def prune_family(
    source: Checkpoint,
    directory: Path,
    sizes: Sequence[Size],
    *,
    nested: bool = False,
    calibration: CalibrationText | None = None,
    criteria: Criteria | None = None,
    repairs: Repairs | None = None,
    running: Running | None = None,
) -> dict[str, Checkpoint]:
    """Cut a model to several sizes at once; each is what :func:`shearling.prune` makes of it.

    Blocks and units are scored once, the calibration text is made once, and the source is walked
    once with all cuts beside it.

    Args:
        source: the model; nothing of it is written to.
        directory: a directory for each size is made in it; sizes that are there already, of the
            same inputs, are kept.
        sizes: how much is left in each.
        nested: whether each smaller size keeps only what the next larger one keeps.
        calibration: as of :func:`shearling.prune`, and so are the others.
        criteria: likewise.
        repairs: likewise.
        running: likewise.

    Returns:
        The models by the names of their directories, the largest first.

    Raises:
        ShearlingError: as there; sizes that are alike, or that cannot be nested; something else in
            a size's place.
    """
    running = running or Running()
    family = FamilyPruning.of(
        source, directory, sizes, nested=nested, calibration=calibration, criteria=criteria,
        repairs=repairs, running=running,
    )  # fmt: skip
    family.write(running.progress, running=running)
    return {member.name: Checkpoint.open(member.output) for member in family.members}


def _check_sizes(sizes: Sequence[Size], *, nested: bool) -> None:
    if nested and len(sizes) < 2:
        raise ShearlingError(
            "--nested has each smaller size keep only what the larger one keeps, but one size was "
            "asked for; give several, such as --params 0.9x,0.8x, or leave out --nested."
        )
    removing = [size for size in sizes if size.remove is not None]
    if removing and len(sizes) > 1:
        raise ShearlingError(
            f"{removing[0].asked} names the blocks that go itself, and {len(sizes)} sizes were "
            "asked for; leave one of the two out."
        )
    said: set[str] = set()
    for size in sizes:
        if size.name.casefold() in said:
            raise ShearlingError(f"{size.asked} was asked for twice; give each size once.")
        said.add(size.name.casefold())


def _check_distinct(named: Sequence[tuple[Size, Pruning]]) -> None:
    """Refuse sizes that come to the same shape."""
    held: dict[Any, Size] = {}
    for size, one in named:
        other = held.setdefault(one.wanted.after, size)
        if other is not size:
            raise ShearlingError(
                f"{other.asked} and {size.asked} come to the same shape ({one.wanted.after}); "
                "leave one of them out."
            )


def _check_directory(directory: Path) -> None:
    """Refuse a place that cannot hold a directory for each size."""
    if directory.exists() and not directory.is_dir():
        raise ShearlingError(f"output {directory} is a file; name a directory for the sizes.")
    if (directory / "config.json").exists():
        raise ShearlingError(
            f"output {directory} is a model itself; name a directory for the sizes, in which each "
            "has one of its own."
        )


def _digest(pruning: Pruning, larger: Sequence[dict[str, int]]) -> str:
    """Of all that a size is made from; ``larger`` sizes are those that it lies within."""
    wanted, place = pruning.wanted, pruning.place
    blocks = wanted.keep_blocks
    made_from = {
        "shearling": __version__,
        "model": pruning.source.fingerprint,
        "shape": dict(wanted.after),
        "by": wanted.by,
        "scores": None if wanted.scores is None else [wanted.scores.rows, wanted.scores.order],
        "blocks": None if blocks is None else blocks.as_json(),
        "repaired": [wanted.repaired, wanted.rotated, wanted.final_norm, asdict(wanted.experts)],
        "protect": wanted.protect,
        "pattern": wanted.pattern is not None,
        "text": None if pruning.calibration is None else _text(pruning.calibration),
        "computed": [str(place.dtype), place.weights == "resident"],
        "within": list(larger),
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _text(calibration: Calibration) -> list[Any]:
    """The calibration text, and how it is used."""
    files = [
        (source.name, known_digest(source.file))
        for one in calibration.sources
        for sources in find_domains([str(one.file)]).values()
        for source in sources
    ]
    return [calibration.as_json(), calibration.bos, files]
