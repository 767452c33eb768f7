"""Which reader takes a file of which kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from shearling.evaluate.abilities.results import Abilities
from shearling.evaluate.results import (
    Bench,
    Damage,
    Degeneration,
    Evaluation,
    Generations,
    Judgement,
    TaskResults,
)
from shearling.files.results import public
from shearling.gates.results import LearningHistory
from shearling.model.manifest import ModelManifest
from shearling.pruning.results import FamilyFile
from shearling.report.records.comparison import ComparisonFile, comparison_of
from shearling.report.records.quality import tasks_of
from shearling.report.records.records import (
    Records,
    manifest_of,
    runs_of,
    scores_of,
    text_name,
)
from shearling.report.records.training import healing_of, learning_of
from shearling.report.records.unit_scores import units_of
from shearling.scoring.results import BlockScoresFile, UnitScoresFile
from shearling.train.results import HealingHistory, ReferenceLosses

Values = dict[str, Any]  # a file's content


def _add_manifest(values: Values, path: Path, records: Records) -> None:
    records.manifests.append(manifest_of(ModelManifest.from_json(values, path), path))


def _add_scores(values: Values, path: Path, records: Records) -> None:
    records.scores.append(scores_of(BlockScoresFile.from_json(values, path), path))


def _add_unit_scores(values: Values, path: Path, records: Records) -> None:
    records.unit_scores.append(units_of(UnitScoresFile.from_json(values, path), path))


def _add_comparison(values: Values, path: Path, records: Records) -> None:
    records.comparisons.append(comparison_of(ComparisonFile.from_json(values, path)))


def _add_damage(values: Values, path: Path, records: Records) -> None:
    damage = Damage.from_json(values, path)
    records.damages.append(replace(damage, text=text_name(damage.text)))


def _add_evaluation(values: Values, path: Path, records: Records) -> None:
    evaluation = Evaluation.from_json(values, path)
    records.evaluations.append(replace(evaluation, text=text_name(evaluation.text)))


def _add_degeneration(values: Values, path: Path, records: Records) -> None:
    measured = Degeneration.from_json(values, path)
    records.degenerations.append(replace(measured, text=text_name(measured.text)))


def _add_runs(values: Values, path: Path, records: Records) -> None:
    records.runs.extend(runs_of(Bench.from_json(values, path)))


def _add_generations(values: Values, path: Path, records: Records) -> None:
    records.generations.append(Generations.from_json(values, path))


def _add_reference(values: Values, path: Path, records: Records) -> None:
    reference = ReferenceLosses.from_json(values, path)
    losses = {public(name): loss for name, loss in reference.losses.items()}
    records.references.append(replace(reference, losses=losses))


def _add_healing(values: Values, path: Path, records: Records) -> None:
    records.healings.append(healing_of(HealingHistory.from_json(values, path)))


def _add_learning(values: Values, path: Path, records: Records) -> None:
    records.learnings.append(learning_of(LearningHistory.from_json(values, path)))


def _add_tasks(values: Values, path: Path, records: Records) -> None:
    records.tasks.append(tasks_of(TaskResults.from_json(values, path), path))


def _add_abilities(values: Values, path: Path, records: Records) -> None:
    records.abilities.append(Abilities.from_json(values, path))


def _add_judgement(values: Values, path: Path, records: Records) -> None:
    records.judgements.append(Judgement.from_json(values, path))


def _add_family(values: Values, path: Path, records: Records) -> None:
    records.families.append(FamilyFile.from_json(values, path))


READERS: dict[str, Callable[[Values, Path, Records], None]] = {
    ModelManifest.kind: _add_manifest,
    BlockScoresFile.kind: _add_scores,
    UnitScoresFile.kind: _add_unit_scores,
    ComparisonFile.kind: _add_comparison,
    Damage.kind: _add_damage,
    Evaluation.kind: _add_evaluation,
    Bench.kind: _add_runs,
    Generations.kind: _add_generations,
    ReferenceLosses.kind: _add_reference,
    HealingHistory.kind: _add_healing,
    LearningHistory.kind: _add_learning,
    TaskResults.kind: _add_tasks,
    Abilities.kind: _add_abilities,
    Degeneration.kind: _add_degeneration,
    Judgement.kind: _add_judgement,
    FamilyFile.kind: _add_family,
}


def read(path: Path, values: Values, records: Records) -> None:
    """Read one file of a known kind into the records."""
    READERS[values["kind"]](values, path, records)
