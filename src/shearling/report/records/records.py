"""What each kind of result file says, as small frozen values.

The kinds that are dataclasses where they are written read themselves; here they become what a page
shows. Of the others the schema is in ``docs/files.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from shearling.evaluate.results import (
    Bench,
    Damage,
    Degeneration,
    Evaluation,
    Generations,
    Judgement,
    Spread,
)
from shearling.model.refs import ModelRef
from shearling.report.records.comparison import Comparison
from shearling.report.records.fields import Fields, describe
from shearling.report.records.quality import Tasks
from shearling.report.records.refs import read_created, read_ref
from shearling.report.records.training import Healing, Learning
from shearling.report.records.unit_scores import ScoredUnits
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
    degenerations: list[Degeneration] = field(default_factory=list)
    judgements: list[Judgement] = field(default_factory=list)


def read_manifest(
    fields: Fields, directory: str | None = None, called: str | None = None
) -> Manifest:
    """Read a ``shearling.json``, and inside it those of the models it was made from.

    Args:
        fields: of the manifest.
        directory: the model's; by default the file's.
        called: what the model made from this one calls it; by default its directory.
    """
    if directory is None:
        directory = called = fields.path.resolve().parent.name
    source = fields.child("source")
    ref, model = read_ref(source), read_ref(fields.child("model"))
    if model.name.startswith(".") and called:  # made under a passing name, then moved
        model = replace(model, name=called)
    shape = _shape(source, "shape") or _shape(fields, "source_shape")
    parameters = source.maybe_integer("parameters")
    if parameters is None:
        parameters = fields.integer("source_parameters")
    return Manifest(
        model=model,
        source=SourceModel(ref, shape, parameters, source.maybe_integer("bytes")),
        stage=fields.text("stage"),
        keep=_keep(fields, shape),
        units=_units(fields, shape),
        lost=_lost(fields),
        shape=_shape(fields, "shape"),
        parameters=fields.integer("parameters"),
        bytes=fields.integer("bytes"),
        options=fields.mapping("options"),
        seed=fields.maybe_integer("seed"),
        versions={name: str(version) for name, version in fields.mapping("versions").items()},
        proof=_proof(fields.child("proof")) if fields.has("proof") else None,
        seconds=fields.maybe_number("seconds"),
        created=read_created(fields),
        shearling=str(fields.raw("shearling") or ""),
        parent=(
            read_manifest(fields.child("parent"), "", ref.name) if fields.has("parent") else None
        ),
        directory=directory,
    )


def read_scores(fields: Fields) -> BlockScores:
    """Read what ``shearling score`` wrote."""
    return BlockScores(
        model=read_ref(fields.child("model")),
        criterion=fields.text("criterion"),
        axis=fields.text("axis"),
        scores=fields.numbers("scores"),
        order=fields.integers("order"),
        protected=frozenset(fields.integers("protected") if fields.has("protected") else ()),
        baseline=fields.maybe_number("baseline_perplexity"),
        calibration=fields.raw("calibration"),
        created=read_created(fields),
    )


def runs_of(bench: Bench) -> list[TimedRun]:
    """The runs of one file, each with the machine that all were timed on."""
    machine = describe(bench.machine)
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
        )
        for run in bench.runs
    ]


def text_name(name: str) -> str:
    """What to call a text: the name it has, or that of its file without the ending."""
    return PurePath(name).stem if name.endswith((".jsonl", ".txt", ".md")) else name


def _shape(fields: Fields, key: str) -> dict[str, int]:
    shape = fields.mapping(key)
    sizes = Fields(shape, fields.path, f"{key}.")
    return {axis: sizes.integer(axis) for axis in shape if sizes.has(axis)}


def _keep(fields: Fields, shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Surviving indices by axis, each of them an index the source has."""
    keep = {axis: kept for axis, kept in fields.mapping("keep").items() if not _is_inside(kept)}
    indices = Fields(keep, fields.path, "keep.")
    return {axis: _indices(indices, axis, shape) for axis in keep}


def _units(fields: Fields, shape: dict[str, int]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Surviving indices of every axis that lies inside the blocks: a list for each that stays."""
    keep = fields.mapping("keep")
    layers = len(keep["layers"]) if "layers" in keep else shape.get("layers")
    found = {}
    for axis, kept in keep.items():
        if not _is_inside(kept):
            continue
        if len(kept) != layers:
            Fields(keep, fields.path, "keep.").refuse(axis, f"a list for each of {layers} blocks")
        blocks = Fields({f"{axis}[{n}]": one for n, one in enumerate(kept)}, fields.path, "keep.")
        found[axis] = tuple(_indices(blocks, key, shape, axis) for key in blocks.values)
    return found


def _is_inside(kept: object) -> bool:
    return isinstance(kept, list) and any(isinstance(one, list) for one in kept)


def _indices(
    fields: Fields, key: str, shape: dict[str, int], axis: str | None = None
) -> tuple[int, ...]:
    size = shape.get(axis or key)
    if not all(0 <= index < (size or 0) for index in fields.integers(key)):
        fields.refuse(key, f"indices below the source's size of {size or 'unknown'}")
    return fields.integers(key)


def _lost(fields: Fields) -> dict[str, float]:
    lost = Fields(fields.mapping("probability_lost"), fields.path, "probability_lost.")
    return {axis: lost.number(axis) for axis in lost.values}


def _proof(fields: Fields) -> ProofFigures:
    loaded_with = fields.raw("loaded_with")
    return ProofFigures(
        passed=True in (fields.raw("passed"), fields.raw("identical")),  # a cut; a quantised model
        max_abs_difference=fields.number("max_abs_difference"),
        max_relative_difference=fields.maybe_number("max_relative_difference"),
        tokens=fields.maybe_integer("tokens"),
        loaded_with=None if loaded_with is None else describe(loaded_with),
    )
