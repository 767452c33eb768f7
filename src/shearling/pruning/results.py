"""The file that lies beside several sizes of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from shearling.files.results import ResultFile, entry
from shearling.model.manifest import ModelManifest, SourceFacts
from shearling.model.refs import ModelRef

FAMILY = "family.json"


@dataclass(frozen=True)
class FamilySize:
    """One model of a family."""

    name: str = entry("of its directory: what was asked for")
    model: ModelRef = entry()
    shape: dict[str, int] = entry("size by axis")
    parameters: int = entry("tied ones once")
    bytes: int = entry("of the tensors on disk")
    removed: tuple[int, ...] = entry("blocks of the source", absent=())
    error_before: float | None = entry(
        "the repair's held-out error, of the stream's squared norm, without it; mean over the "
        "matrices solved",
        absent=None,
    )
    error_after: float | None = entry("the same with it", absent=None)
    divergence: float | None = entry(
        "of the next-token distribution from the source's on held-out calibration tokens, in nats, "
        "after the final norm was fitted",
        absent=None,
    )
    proof: float | None = entry(
        "largest difference of a logit in the proof of surgery, over the largest logit", absent=None
    )

    @staticmethod
    def of(name: str, manifest: ModelManifest) -> FamilySize:
        """What a size's manifest says."""
        repair = manifest.options.get("repair") or {}
        steps, divergence = repair.get("steps") or [], repair.get("divergence")
        proof = manifest.proof
        return FamilySize(
            name, manifest.model, manifest.shape, manifest.parameters, manifest.bytes,
            removed=tuple(manifest.options.get("removed") or ()),
            error_before=_mean([step["error_before"] for step in steps]),
            error_after=_mean([step["error_after"] for step in steps]),
            divergence=divergence[1] if divergence else None,
            proof=None if proof is None else proof.max_relative_difference,
        )  # fmt: skip


@dataclass(frozen=True)
class FamilyFile(ResultFile):
    """Several sizes of one model that were made together."""

    kind: ClassVar[str] = "family"
    written_by: ClassVar[str] = "`shearling prune` of several sizes, as `family.json` beside them"

    source: SourceFacts = entry()
    sizes: tuple[FamilySize, ...] = entry("the largest first")
    nested: bool = entry("whether each keeps only what the one before it keeps")
    seconds: float | None = entry("that the sizes took which were not there yet", absent=None)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
