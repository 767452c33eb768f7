"""What each kind of result file says, as small frozen values.

The schema is in ``docs/files.md``. A field that the report does not show is not read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shearling.report.comparison import Comparison, read_comparison
from shearling.report.fields import Fields, describe, public


@dataclass(frozen=True)
class ModelRef:
    """The model a file speaks of; files are joined by the fingerprint alone."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class Source:
    """What a manifest says of the model it was made from."""

    ref: ModelRef
    shape: dict[str, int]
    parameters: int
    bytes: int | None


@dataclass(frozen=True)
class Proof:
    """Logits of the written checkpoint against those of the source without the removed units."""

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


@dataclass(frozen=True)
class Generations:
    """What one model says to some prompts."""

    model: ModelRef
    sampling: Any
    max_new_tokens: int | None
    samples: tuple[tuple[str, str], ...]
    created: str


@dataclass(frozen=True)
class Healing:
    """Held-out losses (nats a token) and weights by domain over the tokens trained on."""

    model: ModelRef
    recipe: str
    tokens: tuple[int, ...]
    losses: dict[str, tuple[float, ...]]
    weights: dict[str, tuple[float, ...]]
    created: str


@dataclass(frozen=True)
class Reference:
    """Losses (nats a token, by domain) that a model of some size would have."""

    losses: dict[str, float]
    method: str
    created: str


@dataclass(frozen=True)
class Records:
    """Everything read, in the order of the files' paths."""

    manifests: list[Manifest] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)
    damages: list[Damage] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    generations: list[Generations] = field(default_factory=list)
    healings: list[Healing] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)


def read_manifest(fields: Fields, directory: str | None = None) -> Manifest:
    """Read a ``shearling.json``, and inside it those of the models it was made from."""
    source = fields.child("source")
    shape = _shape(source, "shape") or _shape(fields, "source_shape")
    parameters = source.maybe_integer("parameters")
    if parameters is None:
        parameters = fields.integer("source_parameters")
    return Manifest(
        model=_model(fields.child("model")),
        source=Source(_model(source), shape, parameters, source.maybe_integer("bytes")),
        stage=fields.text("stage"),
        keep=_keep(fields, shape),
        shape=_shape(fields, "shape"),
        parameters=fields.integer("parameters"),
        bytes=fields.integer("bytes"),
        options=fields.mapping("options"),
        seed=fields.maybe_integer("seed"),
        versions={name: str(version) for name, version in fields.mapping("versions").items()},
        proof=_proof(fields.child("proof")) if fields.has("proof") else None,
        seconds=fields.maybe_number("seconds"),
        created=_created(fields),
        shearling=str(fields.raw("shearling") or ""),
        parent=read_manifest(fields.child("parent"), "") if fields.has("parent") else None,
        directory=fields.path.resolve().parent.name if directory is None else directory,
    )


def read_scores(fields: Fields) -> Scores:
    """Read what ``shearling score`` wrote."""
    return Scores(
        model=_model(fields.child("model")),
        criterion=fields.text("criterion"),
        axis=fields.text("axis"),
        scores=fields.numbers("scores"),
        order=fields.integers("order"),
        protected=frozenset(fields.integers("protected") if fields.has("protected") else ()),
        baseline=fields.maybe_number("baseline_perplexity"),
        calibration=fields.raw("calibration"),
        created=_created(fields),
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
        model=_model(fields.child("model")),
        text=fields.text_name("text"),
        window=fields.maybe_integer("window"),
        windows=fields.maybe_integer("windows"),
        curves=tuple(curves),
        created=_created(fields),
    )


def read_evaluation(fields: Fields) -> Evaluation:
    """Read what ``shearling eval`` wrote."""
    return Evaluation(
        model=_model(fields.child("model")),
        text=fields.text_name("text"),
        window=fields.integer("window"),
        tokens=fields.integer("tokens"),
        bos=bool(fields.raw("bos")),
        nll=fields.number("nll"),
        perplexity=fields.number("perplexity"),
        created=_created(fields),
    )


def read_runs(fields: Fields) -> list[Run]:
    """Read what ``shearling bench`` wrote: one file, many runs."""
    machine = describe(fields.raw("machine"))
    return [
        Run(
            model=_model(run.child("model")),
            machine=machine,
            batch=run.integer("batch"),
            prompt=run.integer("prompt"),
            new=run.integer("new"),
            repeats=run.integer("repeats"),
            prefill=_spread(run.child("prefill_tokens_per_s")),
            decode=_spread(run.child("decode_tokens_per_s")),
            peak_memory=run.maybe_integer("peak_memory_bytes"),
            created=_created(fields),
        )
        for run in fields.children("runs")
    ]


def read_generations(fields: Fields) -> Generations:
    """Read the continuations that ``shearling eval --prompt`` wrote."""
    return Generations(
        model=_model(fields.child("model")),
        sampling=fields.raw("sampling"),
        max_new_tokens=fields.maybe_integer("max_new_tokens"),
        samples=tuple((one.text("prompt"), one.text("text")) for one in fields.children("samples")),
        created=_created(fields),
    )


def read_healing(fields: Fields) -> Healing:
    """Read the history that ``shearling heal`` left."""
    looks = fields.children("looks")
    domains = [public(name) for name in looks[0].mapping("losses")] if looks else []

    def over(key: str) -> dict[str, tuple[float, ...]]:
        return {name: tuple(look.child(key).number(name) for look in looks) for name in domains}

    return Healing(
        model=_model(fields.child("model")),
        recipe=fields.text("recipe"),
        tokens=tuple(look.integer("tokens") for look in looks),
        losses=over("losses"),
        weights=over("weights"),
        created=_created(fields),
    )


def read_reference(fields: Fields) -> Reference:
    """Read what ``shearling reference`` wrote."""
    losses = fields.child("losses")
    how = fields.mapping("how")
    return Reference(
        losses={public(name): losses.number(name) for name in losses.values},
        method=public(str(how.get("method") or "")),
        created=_created(fields),
    )


def _model(fields: Fields) -> ModelRef:
    return ModelRef(fields.label("name"), fields.text("fingerprint"))


def _shape(fields: Fields, key: str) -> dict[str, int]:
    shape = fields.mapping(key)
    sizes = Fields(shape, fields.path, f"{key}.")
    return {axis: sizes.integer(axis) for axis in shape if sizes.has(axis)}


def _keep(fields: Fields, shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Surviving indices by axis, each of them an index the source has.

    An axis that lies inside each block has a list for every block; those are not shown.
    """
    given = fields.mapping("keep")
    keep = {
        axis: kept
        for axis, kept in given.items()
        if not (isinstance(kept, list) and any(isinstance(one, list) for one in kept))
    }
    indices = Fields(keep, fields.path, "keep.")
    for axis in keep:
        if not all(0 <= index < shape.get(axis, 0) for index in indices.integers(axis)):
            indices.refuse(axis, f"indices below the source's size of {shape.get(axis, 'unknown')}")
    return {axis: indices.integers(axis) for axis in keep}


def _spread(fields: Fields) -> Spread:
    return Spread(fields.number("median"), fields.number("min"), fields.number("max"))


def _proof(fields: Fields) -> Proof:
    loaded_with = fields.raw("loaded_with")
    return Proof(
        passed=fields.raw("passed") is True,
        max_abs_difference=fields.number("max_abs_difference"),
        max_relative_difference=fields.maybe_number("max_relative_difference"),
        tokens=fields.maybe_integer("tokens"),
        loaded_with=None if loaded_with is None else describe(loaded_with),
    )


def _created(fields: Fields) -> str:
    created = fields.raw("created")
    return created if isinstance(created, str) else ""


READERS: dict[str, Callable[[Fields, Records], None]] = {
    "manifest": lambda fields, records: records.manifests.append(read_manifest(fields)),
    "scores": lambda fields, records: records.scores.append(read_scores(fields)),
    "damage": lambda fields, records: records.damages.append(read_damage(fields)),
    "evaluation": lambda fields, records: records.evaluations.append(read_evaluation(fields)),
    "bench": lambda fields, records: records.runs.extend(read_runs(fields)),
    "generations": lambda fields, records: records.generations.append(read_generations(fields)),
    "comparison": lambda fields, records: records.comparisons.append(read_comparison(fields)),
    "reference": lambda fields, records: records.references.append(read_reference(fields)),
    "healing": lambda fields, records: records.healings.append(read_healing(fields)),
}


def read(path: Path, values: dict[str, Any], records: Records) -> None:
    """Read one file of a known kind into the records."""
    READERS[values["kind"]](Fields(values, path), records)
