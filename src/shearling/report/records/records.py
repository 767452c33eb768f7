"""What each kind of result file says, as small frozen values.

All kinds are dataclasses where they are written, and read themselves; here they become what a page
shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from shearling.evaluate.abilities.results import Abilities
from shearling.evaluate.results import (
    Bench,
    Damage,
    Degeneration,
    Evaluation,
    Generations,
    Judgement,
    Spread,
)
from shearling.files.results import refuse
from shearling.model.manifest import ModelManifest, WrittenProof
from shearling.model.refs import ModelRef
from shearling.pruning.results import FamilyFile
from shearling.report.records.comparison import Comparison
from shearling.report.records.fields import describe
from shearling.report.records.quality import Tasks
from shearling.report.records.training import Healing, Learning
from shearling.report.records.unit_scores import ScoredUnits
from shearling.scoring.results import BlockScoresFile
from shearling.train.results import ReferenceLosses


@dataclass(frozen=True)
class SourceModel:
    """What a manifest says of the model it was made from."""

    ref: ModelRef
    shape: dict[str, int]
    parameters: int
    bytes: int | None


@dataclass(frozen=True)
class ProofFigures:
    """Logits of the written checkpoint against those of the source without the removed units.

    Of a quantised model: whether it reads back as what it was in memory, and how far it is from
    the source.
    """

    passed: bool
    max_abs_difference: float
    max_relative_difference: float | None
    tokens: int | None
    loaded_with: str | None


@dataclass(frozen=True)
class Manifest:
    """How one model was made from another (``shearling.json``)."""

    model: ModelRef
    source: SourceModel
    stage: str
    keep: dict[str, tuple[int, ...]]
    units: dict[str, tuple[tuple[int, ...], ...]]  # axes inside blocks: a list for each that stays
    lost: dict[str, float]  # by axis: of the gates' open probability, what the cut closes
    shape: dict[str, int]
    parameters: int
    bytes: int
    options: dict[str, Any]
    seed: int | None
    versions: dict[str, str]
    proof: ProofFigures | None
    seconds: float | None
    created: str
    shearling: str
    parent: Manifest | None
    directory: str  # the name of the model's directory; "" for a parent read from inside its child


@dataclass(frozen=True)
class BlockScores:
    """One criterion's importance per index of an axis; the lowest goes first."""

    model: ModelRef
    criterion: str
    axis: str
    scores: tuple[float, ...]
    order: tuple[int, ...]
    protected: frozenset[int]
    baseline: float | None
    calibration: Any
    created: str


@dataclass(frozen=True)
class TimedRun:
    """Speed and memory of one model at one batch size."""

    model: ModelRef
    machine: str
    batch: int
    prompt: int
    new: int
    repeats: int
    prefill: Spread
    decode: Spread
    peak_memory: int | None
    created: str
    budget_notes: tuple[str, ...] = ()  # sentences on what a budget of time left out
    engine: str = "transformers"  # what ran it: runs of two engines are never compared
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Records:
    """Everything read, in the order of the files' paths."""

    manifests: list[Manifest] = field(default_factory=list)
    scores: list[BlockScores] = field(default_factory=list)
    unit_scores: list[ScoredUnits] = field(default_factory=list)
    damages: list[Damage] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    runs: list[TimedRun] = field(default_factory=list)
    generations: list[Generations] = field(default_factory=list)
    healings: list[Healing] = field(default_factory=list)
    learnings: list[Learning] = field(default_factory=list)
    references: list[ReferenceLosses] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    tasks: list[Tasks] = field(default_factory=list)
    abilities: list[Abilities] = field(default_factory=list)
    degenerations: list[Degeneration] = field(default_factory=list)
    judgements: list[Judgement] = field(default_factory=list)
    families: list[FamilyFile] = field(default_factory=list)


def manifest_of(file: ModelManifest, path: Path) -> Manifest:
    """What a ``shearling.json`` says, and inside it those of the models it was made from.

    Raises:
        ShearlingError: a manifest inside it is damaged, or does not say how large its source is.
    """
    made: Manifest | None = None
    chain = list(file.lineage(path))
    for depth, one in reversed(list(enumerate(chain))):
        called = chain[depth - 1].source.name if depth else path.resolve().parent.name
        made = _one_manifest(one, path, depth, called, made)
    assert made is not None, "a lineage has at least the file itself"
    return made


def _one_manifest(
    file: ModelManifest, path: Path, depth: int, called: str, parent: Manifest | None
) -> Manifest:
    """One step of a lineage, ``depth`` parents down, whose model goes by ``called``."""
    model, source = file.model, file.source
    if model.name.startswith(".") and called:  # made under a passing name, then moved
        model = replace(model, name=called)
    parameters = file.source_parameters if source.parameters is None else source.parameters
    if parameters is None:
        refuse(path, "parent." * depth + "source_parameters", "a whole number")
    shape = source.shape or file.source_shape
    keep = file.keep or {}
    inside = {axis for axis, kept in keep.items() if any(isinstance(one, list) for one in kept)}
    return Manifest(
        model=model,
        source=SourceModel(ModelRef(source.name, source.fingerprint), shape, parameters,
                           source.bytes),
        stage=file.stage,
        keep={axis: tuple(kept) for axis, kept in keep.items() if axis not in inside},
        units={axis: tuple(tuple(one) for one in keep[axis]) for axis in keep if axis in inside},
        lost=file.probability_lost,
        shape=file.shape,
        parameters=file.parameters,
        bytes=file.bytes,
        options=file.options,
        seed=file.seed,
        versions={name: str(version) for name, version in file.versions.items()},
        proof=None if file.proof is None else _proof(file.proof),
        seconds=file.seconds,
        created=file.created,
        shearling=file.shearling,
        parent=parent,
        directory="" if depth else called,
    )  # fmt: skip


def scores_of(file: BlockScoresFile, path: Path) -> BlockScores:
    """What ``shearling score`` wrote of blocks (ShearlingError if it names no model)."""
    return BlockScores(
        model=file.model or refuse(path, "model", "an object", None),
        criterion=file.criterion,
        axis=file.axis,
        scores=file.scores,
        order=file.order,
        protected=frozenset(file.protected),
        baseline=file.baseline_perplexity,
        calibration=file.calibration,
        created=file.created,
    )


def runs_of(bench: Bench) -> list[TimedRun]:
    """The runs of one file, each with the machine that all were timed on."""
    machine = describe(bench.machine)
    told = bench.machine if isinstance(bench.machine, dict) else {}
    return [
        TimedRun(
            model=run.model,
            machine=machine,
            batch=run.batch,
            prompt=run.prompt,
            new=run.new,
            repeats=run.repeats,
            prefill=run.prefill_tokens_per_s,
            decode=run.decode_tokens_per_s,
            peak_memory=run.peak_memory_bytes,
            created=bench.created,
            budget_notes=bench.budget_notes,
            engine=run.engine,
            dtype=told.get("dtype"),
            device=told.get("device"),
            threads=told.get("threads"),
        )
        for run in bench.runs
    ]


def text_name(name: str) -> str:
    """What to call a text: the name it has, or that of its file without the ending."""
    return PurePath(name).stem if name.endswith((".jsonl", ".txt", ".md")) else name


def _proof(proof: WrittenProof) -> ProofFigures:
    loaded_with = proof.loaded_with
    return ProofFigures(
        passed=True in (proof.passed, proof.identical),  # a cut; a quantised model
        max_abs_difference=proof.max_abs_difference,
        max_relative_difference=proof.max_relative_difference,
        tokens=proof.tokens,
        loaded_with=None if loaded_with is None else describe(loaded_with),
    )
