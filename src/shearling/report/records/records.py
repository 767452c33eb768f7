"""What each kind of result file says, as small frozen values.

The schema is in ``docs/files.md``. A field that the report does not show is not read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shearling.report.records.comparison import Comparison, read_comparison
from shearling.report.records.fields import Fields, describe
from shearling.report.records.quality import (
    Degeneration,
    Judgement,
    Tasks,
    read_degeneration,
    read_judgement,
    read_tasks,
)
from shearling.report.records.refs import ModelRef, read_created, read_ref
from shearling.report.records.training import (
    Healing,
    Learning,
    Reference,
    read_healing,
    read_learning,
    read_reference,
)
from shearling.report.records.unit_scores import UnitScores, read_unit_scores


@dataclass(frozen=True)
class Source:
    """What a manifest says of the model it was made from."""

    ref: ModelRef
    shape: dict[str, int]
    parameters: int
    bytes: int | None


@dataclass(frozen=True)
class Proof:
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
    source: Source
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
    proof: Proof | None
    seconds: float | None
    created: str
    shearling: str
    parent: Manifest | None
    directory: str  # the name of the model's directory; "" for a parent read from inside its child


@dataclass(frozen=True)
class Scores:
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
class Curve:
    """Perplexity as one criterion's order of removal is followed."""

    criterion: str
    removed: tuple[tuple[int, ...], ...]
    perplexity: tuple[float, ...]


@dataclass(frozen=True)
class Damage:
    """Curves measured on one text."""

    model: ModelRef
    text: str
    window: int | None
    windows: int | None
    curves: tuple[Curve, ...]
    created: str


@dataclass(frozen=True)
class Evaluation:
    """Perplexity of one model on one text."""

    model: ModelRef
    text: str
    window: int
    tokens: int
    bos: bool
    nll: float
    perplexity: float
    created: str
    windows: int | None = None


@dataclass(frozen=True)
class Spread:
    """A repeated measurement."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Run:
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
    engine: str = "transformers"  # what ran it: runs of two engines are never compared


@dataclass(frozen=True)
class Generations:
    """What one model says to some prompts."""

    model: ModelRef
    sampling: Any
    max_new_tokens: int | None
    samples: tuple[tuple[str, str], ...]
    created: str


@dataclass(frozen=True)
class Records:
    """Everything read, in the order of the files' paths."""

    manifests: list[Manifest] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)
    unit_scores: list[UnitScores] = field(default_factory=list)
    damages: list[Damage] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    generations: list[Generations] = field(default_factory=list)
    healings: list[Healing] = field(default_factory=list)
    learnings: list[Learning] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)
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
        source=Source(ref, shape, parameters, source.maybe_integer("bytes")),
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


def read_scores(fields: Fields) -> Scores:
    """Read what ``shearling score`` wrote."""
    return Scores(
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


def read_damage(fields: Fields) -> Damage:
    """Read what ``shearling damage`` wrote."""
    curves = []
    for curve in fields.children("curves"):
        removed = tuple(
            tuple(one) if isinstance(one, list) else curve.refuse("removed", "lists of indices")
            for one in curve.items("removed")
        )
        perplexity = curve.numbers("perplexity")
        if len(perplexity) != len(removed):
            curve.refuse("perplexity", f"as many numbers as removed has lists, {len(removed)},")
        curves.append(Curve(curve.text("criterion"), removed, perplexity))
    return Damage(
        model=read_ref(fields.child("model")),
        text=fields.text_name("text"),
        window=fields.maybe_integer("window"),
        windows=fields.maybe_integer("windows"),
        curves=tuple(curves),
        created=read_created(fields),
    )


def read_evaluation(fields: Fields) -> Evaluation:
    """Read what ``shearling eval`` wrote."""
    return Evaluation(
        model=read_ref(fields.child("model")),
        text=fields.text_name("text"),
        window=fields.integer("window"),
        tokens=fields.integer("tokens"),
        bos=bool(fields.raw("bos")),
        nll=fields.number("nll"),
        perplexity=fields.number("perplexity"),
        created=read_created(fields),
        windows=fields.maybe_integer("windows"),
    )


def read_runs(fields: Fields) -> list[Run]:
    """Read what ``shearling bench`` wrote: one file, many runs."""
    machine = describe(fields.raw("machine"))
    return [
        Run(
            model=read_ref(run.child("model")),
            machine=machine,
            batch=run.integer("batch"),
            prompt=run.integer("prompt"),
            new=run.integer("new"),
            repeats=run.integer("repeats"),
            prefill=_spread(run.child("prefill_tokens_per_s")),
            decode=_spread(run.child("decode_tokens_per_s")),
            peak_memory=run.maybe_integer("peak_memory_bytes"),
            created=read_created(fields),
            engine=run.label("engine") if run.has("engine") else "transformers",
        )
        for run in fields.children("runs")
    ]


def read_generations(fields: Fields) -> Generations:
    """Read the continuations that ``shearling eval --prompt`` wrote."""
    return Generations(
        model=read_ref(fields.child("model")),
        sampling=fields.raw("sampling"),
        max_new_tokens=fields.maybe_integer("max_new_tokens"),
        samples=tuple((one.text("prompt"), one.text("text")) for one in fields.children("samples")),
        created=read_created(fields),
    )


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


def _spread(fields: Fields) -> Spread:
    return Spread(fields.number("median"), fields.number("min"), fields.number("max"))


def _proof(fields: Fields) -> Proof:
    loaded_with = fields.raw("loaded_with")
    return Proof(
        passed=True in (fields.raw("passed"), fields.raw("identical")),  # a cut; a quantised model
        max_abs_difference=fields.number("max_abs_difference"),
        max_relative_difference=fields.maybe_number("max_relative_difference"),
        tokens=fields.maybe_integer("tokens"),
        loaded_with=None if loaded_with is None else describe(loaded_with),
    )


READERS: dict[str, Callable[[Fields, Records], None]] = {
    "manifest": lambda fields, records: records.manifests.append(read_manifest(fields)),
    "scores": lambda fields, records: records.scores.append(read_scores(fields)),
    "unit-scores": lambda fields, records: records.unit_scores.append(read_unit_scores(fields)),
    "damage": lambda fields, records: records.damages.append(read_damage(fields)),
    "evaluation": lambda fields, records: records.evaluations.append(read_evaluation(fields)),
    "bench": lambda fields, records: records.runs.extend(read_runs(fields)),
    "generations": lambda fields, records: records.generations.append(read_generations(fields)),
    "comparison": lambda fields, records: records.comparisons.append(read_comparison(fields)),
    "reference": lambda fields, records: records.references.append(read_reference(fields)),
    "healing": lambda fields, records: records.healings.append(read_healing(fields)),
    "learning": lambda fields, records: records.learnings.append(read_learning(fields)),
    "tasks": lambda fields, records: records.tasks.append(read_tasks(fields)),
    "degeneration": lambda fields, records: records.degenerations.append(read_degeneration(fields)),
    "judgement": lambda fields, records: records.judgements.append(read_judgement(fields)),
}


def read(path: Path, values: dict[str, Any], records: Records) -> None:
    """Read one file of a known kind into the records."""
    READERS[values["kind"]](Fields(values, path), records)
