"""Joins records by model fingerprint: one source, what was made of it, and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar

from shearling.errors import ShearlingError
from shearling.evaluate.abilities.results import Abilities
from shearling.evaluate.results import (
    Damage,
    Degeneration,
    Evaluation,
    Generations,
    Judgement,
)
from shearling.model.refs import ModelRef
from shearling.pruning.results import FamilyFile
from shearling.report.records.comparison import Comparison
from shearling.report.records.quality import Tasks
from shearling.report.records.records import BlockScores, Manifest, Records, SourceModel, TimedRun
from shearling.report.records.training import Healing, Learning
from shearling.report.records.unit_scores import ScoredUnits
from shearling.train.results import ReferenceLosses


class _Dated(Protocol):
    @property
    def created(self) -> str: ...


T = TypeVar("T", bound=_Dated)
Role = Literal["source", "made", "reference"]


@dataclass(frozen=True)
class Model:
    """One column of the report. A reference is a model that no manifest ties to the source."""

    name: str
    fingerprint: str
    role: Role
    shape: dict[str, int]
    parameters: int | None = None
    bytes: int | None = None
    chain: tuple[Manifest, ...] = ()  # from the source to this model

    @property
    def manifest(self) -> Manifest | None:
        """How this model was made, or None for one that was not."""
        return self.chain[-1] if self.chain else None

    def kept(self, axis: str, of: str) -> tuple[int, ...] | None:
        """Indices of an axis of the ancestor with fingerprint ``of`` that are left in this model.

        None where ``of`` is no ancestor, or does not say how long the axis is.
        """
        start = [step.source.ref.fingerprint for step in self.chain]
        if of not in start or axis not in self.chain[start.index(of)].source.shape:
            return None
        steps = self.chain[start.index(of) :]
        indices = tuple(range(steps[0].source.shape[axis]))
        for step in steps:
            if axis in step.keep:
                indices = tuple(indices[index] for index in step.keep[axis])
        return indices

    def kept_in_blocks(self, axis: str, of: str) -> dict[int, tuple[int, ...]] | None:
        """Block of the ancestor ``of`` that is left -> indices of an axis inside it that are left.

        None where ``of`` is no ancestor, or a manifest does not say which indices it removed.
        """
        blocks = self.kept("layers", of)
        start = [step.source.ref.fingerprint for step in self.chain]
        if blocks is None or axis not in self.chain[start.index(of)].source.shape:
            return None
        steps = self.chain[start.index(of) :]
        first = steps[0].source.shape
        left = [tuple(range(first[axis]))] * first["layers"]
        for step in steps:
            left = [left[block] for block in step.keep.get("layers", range(len(left)))]
            if axis in step.units:
                left = [
                    tuple(units[index] for index in kept)
                    for units, kept in zip(left, step.units[axis], strict=True)
                ]
            elif step.source.shape.get(axis) != step.shape.get(axis):
                return None
        return dict(zip(blocks, left, strict=True))


@dataclass(frozen=True)
class Results:
    """All that one report shows. The models come source first, then ever smaller ones."""

    models: tuple[Model, ...]
    scores: tuple[BlockScores, ...]
    damages: tuple[Damage, ...]
    evaluations: tuple[Evaluation, ...]
    runs: tuple[TimedRun, ...]
    generations: tuple[Generations, ...]
    healings: tuple[Healing, ...] = ()
    learnings: tuple[Learning, ...] = ()
    references: tuple[ReferenceLosses, ...] = ()  # the newest first
    comparisons: tuple[Comparison, ...] = ()
    tasks: tuple[Tasks, ...] = ()
    degenerations: tuple[Degeneration, ...] = ()
    judgements: tuple[Judgement, ...] = ()
    unit_scores: tuple[ScoredUnits, ...] = ()
    abilities: tuple[Abilities, ...] = ()
    families: tuple[FamilyFile, ...] = ()

    @property
    def source(self) -> Model | None:
        """The model everything else was made of; None where nothing ties the models together."""
        first = self.models[0] if self.models else None
        return first if first and first.role == "source" else None

    @property
    def made(self) -> tuple[Model, ...]:
        """The models that were made of the source."""
        return tuple(model for model in self.models if model.role == "made")

    @property
    def primary(self) -> Model | None:
        """The model the headline is about: the last one made, that is the most cut, then newest."""
        return self.made[-1] if self.made else None

    def name_of(self, fingerprint: str) -> str:
        """The name a model has in this report."""
        return next(model.name for model in self.models if model.fingerprint == fingerprint)


def join_records(records: Records) -> Results:
    """Join records by fingerprint; of two that measure the same, the newer one counts.

    Raises:
        ShearlingError: the models descend from several sources, or no file speaks of a model.
    """
    measured = measurements(records)
    spoken_of = [
        *(one.model for one in _measured(measured)),
        *(model for one in measured.judgements for model in (one.a, one.b)),
        *(size.model for one in measured.families for size in one.sizes),
    ]
    models = _models(records.manifests, spoken_of, sizes_told(measured))
    if not models and not records.comparisons:
        raise ShearlingError(
            "There are reference losses alone, which are of no model; give the directory of a run "
            "of `shearling heal` as well."
        )
    return replace(measured, models=distinct_names(models))


def measurements(records: Records) -> Results:
    """All that was measured, of no models yet; of two that measure the same, the newer counts."""
    return Results(
        models=(),
        scores=_newest(
            records.scores, lambda one: (one.model.fingerprint, one.axis, one.criterion)
        ),
        unit_scores=_newest(
            records.unit_scores, lambda one: (one.model.fingerprint, one.axis, one.criterion)
        ),
        damages=_merge(records.damages),
        evaluations=_newest(
            records.evaluations,
            lambda one: (one.model.fingerprint, one.text, one.window, one.tokens, one.bos),
        ),
        runs=_newest(
            records.runs,
            lambda one: (
                *(one.model.fingerprint, one.engine, one.machine),
                *(one.batch, one.prompt, one.new),
            ),
        ),
        generations=_newest(
            records.generations,
            lambda one: (one.model.fingerprint, str(one.sampling), one.max_new_tokens, one.samples),
        ),
        healings=_newest(records.healings, lambda one: one.model.fingerprint),
        learnings=_newest(records.learnings, lambda one: one.model.fingerprint),
        references=tuple(sorted(records.references, key=lambda one: one.created, reverse=True)),
        comparisons=_newest(records.comparisons, lambda one: one.title),
        tasks=tuple(sorted(records.tasks, key=lambda one: one.created)),
        degenerations=_newest(
            records.degenerations,
            lambda one: (
                *(one.model.fingerprint, one.text, one.prompts, one.prompt_tokens, one.bos),
                *(one.new_tokens, str(one.sampling)),
            ),
        ),
        abilities=_newest(
            records.abilities,
            lambda one: (one.model.fingerprint, one.asked_sha256, one.limit, one.bos),
        ),
        judgements=_newest(
            records.judgements, lambda one: (one.a.fingerprint, one.b.fingerprint, one.judge)
        ),
        families=_newest(
            records.families, lambda one: tuple(size.model.fingerprint for size in one.sizes)
        ),
    )


def _measured(
    results: Results,
) -> list[
    BlockScores
    | Damage
    | Evaluation
    | TimedRun
    | Generations
    | Healing
    | Learning
    | Tasks
    | Abilities
    | Degeneration
    | ScoredUnits
]:
    return [
        *(*results.scores, *results.unit_scores, *results.damages, *results.evaluations),
        *(*results.runs, *results.generations, *results.healings, *results.learnings),
        *(*results.tasks, *results.abilities, *results.degenerations),
    ]


def _newest(records: Iterable[T], key: Callable[[T], Hashable]) -> tuple[T, ...]:
    """One record a key, the one created last, in the order of first appearance."""
    chosen: dict[Hashable, T] = {}
    for record in records:
        held = chosen.get(key(record))
        if held is None or record.created >= held.created:
            chosen[key(record)] = record
    return tuple(chosen.values())


def _merge(damages: Iterable[Damage]) -> tuple[Damage, ...]:
    """Curves of one model on one text belong into one figure, even when measured in two runs."""
    merged: dict[Hashable, Damage] = {}
    for damage in sorted(damages, key=lambda one: one.created):
        measured = (damage.text, damage.window, damage.windows, damage.bos)
        key = (damage.model.fingerprint, *measured)
        earlier = merged[key].curves if key in merged else ()
        curves = {curve.criterion: curve for curve in (*earlier, *damage.curves)}
        merged[key] = replace(damage, curves=tuple(curves.values()))
    return tuple(merged.values())


def _models(
    manifests: list[Manifest], measured: list[ModelRef], sizes: Mapping[str, dict[str, int]]
) -> list[Model]:
    """All models spoken of, source first."""
    by_fingerprint = newest_manifests(manifests)
    made = [made_by(one, by_fingerprint) for one in by_fingerprint.values()]
    made.sort(key=lambda model: (-(model.parameters or 0), len(model.chain), _created(model)))
    known: dict[str, Model] = {}
    if made:
        source = _common_source(made)
        known[source.ref.fingerprint] = source_model(source)
    known |= {model.fingerprint: model for model in made}
    for ref in measured:
        if ref.fingerprint not in known:
            shape = sizes.get(ref.fingerprint, {})
            known[ref.fingerprint] = Model(ref.name, ref.fingerprint, "reference", shape)
    models = list(known.values())
    if len(models) == 1:  # nothing was made yet: the only model there is will be the source
        return [replace(models[0], role="source")]
    return models


def sizes_told(results: Results) -> dict[str, dict[str, int]]:
    """Fingerprint -> the sizes that a model's scores tell, by axis."""
    sizes: dict[str, dict[str, int]] = {}
    for one in results.scores:
        sizes.setdefault(one.model.fingerprint, {})[one.axis] = len(one.scores)
    for units in results.unit_scores:
        told = sizes.setdefault(units.model.fingerprint, {})
        told[units.axis] = len(units.rows[0])
        if len(units.rows) > 1:
            told["layers"] = len(units.rows)
    return sizes


def newest_manifests(manifests: Iterable[Manifest]) -> dict[str, Manifest]:
    """Fingerprint -> how that model was made."""
    return {
        one.model.fingerprint: one for one in _newest(manifests, lambda one: one.model.fingerprint)
    }


def made_by(manifest: Manifest, by_fingerprint: Mapping[str, Manifest]) -> Model:
    """A model with the manifests that lead to it, the first step first."""
    chain, seen = [manifest], {manifest.model.fingerprint}
    while True:
        source = chain[0].source.ref.fingerprint
        step = chain[0].parent or by_fingerprint.get(source)
        if step is None or step.model.fingerprint in seen:
            break
        seen.add(step.model.fingerprint)
        # the parent's own file, where it was found, also knows the name of its directory
        chain.insert(0, by_fingerprint.get(step.model.fingerprint, step))
    return Model(
        manifest.model.name,
        manifest.model.fingerprint,
        "made",
        manifest.shape,
        manifest.parameters,
        manifest.bytes,
        tuple(chain),
    )


def source_model(source: SourceModel) -> Model:
    """The model that others were made of, as their manifests know it."""
    return Model(
        source.ref.name,
        source.ref.fingerprint,
        "source",
        source.shape,
        source.parameters,
        source.bytes,
    )


def _common_source(made: list[Model]) -> SourceModel:
    sources = {model.chain[0].source.ref.fingerprint: model.chain[0].source for model in made}
    if len(sources) > 1:
        names = " and ".join(sorted(source.ref.name for source in sources.values()))
        raise ShearlingError(
            f"The models given descend from {len(sources)} different sources, {names}; a report "
            "compares one source with what was made of it: give the directories of one source."
        )
    return next(iter(sources.values()))


def _created(model: Model) -> str:
    return model.chain[-1].created


def distinct_names(models: Iterable[Model]) -> tuple[Model, ...]:
    """Two models of one name are told apart by their directory, or by their fingerprint."""
    models = list(models)
    names = [model.name for model in models]
    distinct = []
    for model in models:
        name = model.name
        if names.count(name) > 1 and model.role != "source":
            directory = model.manifest.directory if model.manifest else ""
            name = f"{name} ({directory or model.fingerprint[:8]})"
        distinct.append(replace(model, name=name))
    return tuple(distinct)
