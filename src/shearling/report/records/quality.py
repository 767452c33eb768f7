"""Results that say how good a model is beyond its perplexity: tasks, repetition, judgements."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from shearling.report.records.fields import Fields
from shearling.report.records.refs import ModelRef, read_created, read_ref


@dataclass(frozen=True)
class Task:
    """One task as one model was asked it; ``stderr`` is None where nothing says how sure it is."""

    name: str
    metric: str
    value: float
    stderr: float | None
    shots: int | None
    limit: int | None
    samples: int | None

    @property
    def asked(self) -> tuple[str, str, int | None, int | None, int | None]:
        """Equal for figures that may be compared with one another."""
        return self.name, self.metric, self.shots, self.limit, self.samples


@dataclass(frozen=True)
class Tasks:
    """A suite of tasks, asked of one model."""

    model: ModelRef
    suite: str
    tasks: tuple[Task, ...]
    created: str


@dataclass(frozen=True)
class Repetition:
    """How much sampled text repeats itself; shares of one, None where not measured."""

    distinct: dict[int, float]  # n -> distinct n-grams over all n-grams
    repeated: float | None  # 4-grams that occurred before in the same text
    loops: float | None  # texts that end in a loop


@dataclass(frozen=True)
class Degeneration:
    """Repetition of one model's continuations, beside that of the text that people wrote."""

    model: ModelRef
    text: str
    prompts: int | None
    prompt_tokens: int | None
    new_tokens: int | None
    sampling: Any
    found: Repetition
    reference: Repetition | None
    created: str


@dataclass(frozen=True)
class Judgement:
    """How often a judge preferred what ``a`` said to what ``b`` said; ties count half."""

    a: ModelRef
    b: ModelRef
    judge: str
    prompts: int | None
    wins: int
    ties: int
    losses: int
    win_rate: float
    interval: tuple[float, float] | None
    created: str


def read_tasks(fields: Fields) -> Tasks:
    """Read what ``shearling eval --suite`` wrote."""
    named = fields.child("tasks")
    return Tasks(
        model=read_ref(fields.child("model")),
        suite=fields.label("suite"),
        tasks=tuple(
            task for name in named.values if (task := _task(name, named.child(name))) is not None
        ),
        created=read_created(fields),
    )


def read_degeneration(fields: Fields) -> Degeneration:
    """Read how much a model repeats itself."""
    return Degeneration(
        model=read_ref(fields.child("model")),
        text=fields.text_name("text"),
        prompts=fields.maybe_integer("prompts"),
        prompt_tokens=fields.maybe_integer("prompt_tokens"),
        new_tokens=fields.maybe_integer("new_tokens"),
        sampling=fields.raw("sampling"),
        found=_repetition(fields),
        reference=_repetition(fields.child("reference")) if fields.has("reference") else None,
        created=read_created(fields),
    )


def read_judgement(fields: Fields) -> Judgement:
    """Read what ``shearling judge`` wrote."""
    interval = fields.numbers("interval") if fields.has("interval") else ()
    if len(interval) not in (0, 2):
        fields.refuse("interval", "a list of two numbers")
    return Judgement(
        a=read_ref(fields.child("a")),
        b=read_ref(fields.child("b")),
        judge=fields.label("judge"),
        prompts=fields.maybe_integer("prompts"),
        wins=fields.integer("wins"),
        ties=fields.integer("ties"),
        losses=fields.integer("losses"),
        win_rate=fields.number("win_rate"),
        interval=(interval[0], interval[1]) if interval else None,
        created=read_created(fields),
    )


def _task(name: str, fields: Fields) -> Task | None:
    """A task by the metric that counts, or None for one that gave no figure."""
    metrics = fields.child("metrics")
    metric = fields.text("primary") if fields.has("primary") else next(iter(metrics.values), "acc")
    if not metrics.has(metric):
        return None
    base, _, chosen = metric.partition(",")  # "exact_match,strict-match": a filter of lm-eval's
    error = metrics.raw(f"{base}_stderr,{chosen}" if chosen else f"{base}_stderr")
    known = isinstance(error, int | float) and not isinstance(error, bool) and math.isfinite(error)
    return Task(
        name=name,
        metric=metric,
        value=metrics.number(metric),
        stderr=float(error) if known else None,
        shots=fields.maybe_integer("shots"),
        limit=fields.maybe_integer("limit"),
        samples=fields.maybe_integer("samples"),
    )


def _repetition(fields: Fields) -> Repetition:
    distinct = Fields(fields.mapping("distinct"), fields.path, f"{fields.inside}distinct.")
    return Repetition(
        distinct={
            int(n): distinct.number(n) for n in distinct.values if n.isdigit() and distinct.has(n)
        },
        repeated=fields.maybe_number("repetition_4"),
        loops=fields.maybe_number("loops"),
    )
