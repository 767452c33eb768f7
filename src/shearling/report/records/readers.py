"""Which reader takes a file of which kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from shearling.report.records.comparison import read_comparison
from shearling.report.records.fields import Fields
from shearling.report.records.quality import tasks_of
from shearling.report.records.records import (
    Records,
    read_manifest,
    read_scores,
    runs_of,
    text_name,
)
from shearling.report.records.training import healing_of, learning_of
from shearling.report.records.unit_scores import read_unit_scores
from shearling.train.results import HealingHistory, ReferenceLosses

Values = dict[str, Any]  # a file's content


def _add_manifest(values: Values, path: Path, records: Records) -> None:
    records.manifests.append(read_manifest(Fields(values, path)))


def _add_scores(values: Values, path: Path, records: Records) -> None:
    records.scores.append(read_scores(Fields(values, path)))


def _add_unit_scores(values: Values, path: Path, records: Records) -> None:
    records.unit_scores.append(read_unit_scores(Fields(values, path)))


def _add_comparison(values: Values, path: Path, records: Records) -> None:
    records.comparisons.append(read_comparison(Fields(values, path)))


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


def _add_judgement(values: Values, path: Path, records: Records) -> None:
    records.judgements.append(Judgement.from_json(values, path))


READERS: dict[str, Callable[[Values, Path, Records], None]] = {
    "manifest": _add_manifest,
    "scores": _add_scores,
    "unit-scores": _add_unit_scores,
    "comparison": _add_comparison,
    Damage.kind: _add_damage,
    Evaluation.kind: _add_evaluation,
    Bench.kind: _add_runs,
    Generations.kind: _add_generations,
    ReferenceLosses.kind: _add_reference,
    HealingHistory.kind: _add_healing,
    LearningHistory.kind: _add_learning,
    TaskResults.kind: _add_tasks,
    Degeneration.kind: _add_degeneration,
    Judgement.kind: _add_judgement,
}


def read(path: Path, values: Values, records: Records) -> None:
    """Read one file of a known kind into the records."""
    READERS[values["kind"]](values, path, records)
