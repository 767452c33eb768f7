"""Results of a set of models that somebody names, whatever each of them was made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from shearling.model.refs import ModelRef
from shearling.report.records.records import Manifest, Records
from shearling.report.records.results import (
    Model,
    Results,
    distinct_names,
    made_by,
    measurements,
    newest_manifests,
    source_model,
)


@dataclass(frozen=True)
class ComparedModel:
    """A model as it was opened.

    Attributes:
        parameters, bytes: exact; bytes are those of the tensors on disk.
        where: how to name it in a command, such as its directory's name, or a hub id.
        engine: what runs the directory: transformers, or llama.cpp for a GGUF file.
    """

    name: str
    fingerprint: str
    parameters: int | None
    bytes: int | None
    shape: dict[str, int]
    where: str
    engine: str = "transformers"


@dataclass(frozen=True)
class ComparisonResults:
    """What a comparison page shows.

    Attributes:
        candidates: in the order of the page, the baseline first.
        table: their measurements; the baseline is in the source's place, so that all others are
            compared with it.
        families: for every source that something here was made of, that source and the models.
        everyone: as ``table``, with every ancestor that was measured beside them.
    """

    candidates: tuple[ComparedModel, ...]
    table: Results
    families: tuple[Results, ...]
    everyone: Results


def select(records: Records, candidates: Sequence[ComparedModel]) -> ComparisonResults:
    """Join what was read about the models named; the first of them is the baseline.

    Args:
        records: results, of other models as well.
        candidates: no two of one fingerprint.
    """
    manifests = newest_manifests(records.manifests)
    models = list(distinct_names(_model(one, manifests) for one in candidates))
    named = {model.fingerprint: model for model in models}
    sources: dict[str, Model] = {}
    ancestors: dict[str, Model] = {}
    for model in models:
        if model.chain:
            root = source_model(model.chain[0].source)
            sources.setdefault(root.fingerprint, named.get(root.fingerprint, root))
        for step in model.chain:
            for ref in (step.source.ref, step.model):
                if ref.fingerprint not in named:
                    ancestors.setdefault(ref.fingerprint, Model(ref.name, ref.fingerprint,
                                                                "reference", {}))  # fmt: skip
    results = measurements(records)
    columns = (
        replace(models[0], role="source"),
        *(replace(model, role="made") for model in models[1:]),
    )
    return ComparisonResults(
        tuple(candidates),
        _restricted(results, columns),
        tuple(_family(results, source, models) for source in sources.values()),
        _restricted(results, (*columns, *ancestors.values())),
    )


def _model(one: ComparedModel, manifests: dict[str, Manifest]) -> Model:
    manifest = manifests.get(one.fingerprint)
    chain = () if manifest is None else made_by(manifest, manifests).chain
    shape = one.shape or (manifest.shape if manifest else {})
    return Model(one.name, one.fingerprint, "made", shape, one.parameters, one.bytes, chain)


def _family(results: Results, source: Model, models: Iterable[Model]) -> Results:
    """A source and those of the models that were made of it, the least cut first."""
    made = [
        replace(model, role="made")
        for model in models
        if model.chain and model.chain[0].source.ref.fingerprint == source.fingerprint
    ]
    made.sort(key=lambda model: -(model.parameters or 0))
    # as a manifest knows it, it has a shape whatever the model directory says of itself
    shape = source.shape or made[0].chain[0].source.shape
    return _restricted(results, (replace(source, role="source", shape=shape, chain=()), *made))


def _restricted(results: Results, models: Sequence[Model]) -> Results:
    """The measurements of some models alone, named as on the page."""
    names = {model.fingerprint for model in models}

    def speaks_of(model: ModelRef) -> bool:
        return model.fingerprint in names

    return replace(
        results,
        models=tuple(models),
        scores=tuple(one for one in results.scores if speaks_of(one.model)),
        damages=tuple(one for one in results.damages if speaks_of(one.model)),
        evaluations=tuple(one for one in results.evaluations if speaks_of(one.model)),
        runs=tuple(one for one in results.runs if speaks_of(one.model)),
        generations=tuple(one for one in results.generations if speaks_of(one.model)),
        healings=tuple(one for one in results.healings if speaks_of(one.model)),
        learnings=tuple(one for one in results.learnings if speaks_of(one.model)),
        tasks=tuple(one for one in results.tasks if speaks_of(one.model)),
        abilities=tuple(one for one in results.abilities if speaks_of(one.model)),
        degenerations=tuple(one for one in results.degenerations if speaks_of(one.model)),
        judgements=tuple(
            one for one in results.judgements if speaks_of(one.a) and speaks_of(one.b)
        ),
        comparisons=(),
    )
