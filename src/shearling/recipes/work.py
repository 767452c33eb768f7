"""What each kind of stage does: one of the commands' functions, called on a stage's inputs.

A stage fills its own directory. What was interrupted is begun again on what it left there: training
and packing go on from it, measuring keeps each result, a cut begins anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shearling.data.pack import PackPlan, pack
from shearling.data.sources import TextSource
from shearling.data.store import Store
from shearling.engine.place import Place, Wish
from shearling.engine.ranks import leave
from shearling.errors import ShearlingError
from shearling.evaluate.benchmark import bench_models
from shearling.evaluate.speed import Workload
from shearling.evaluate.tasks.suite import CUSTOM, Suite, build_suite, load_suite, merged
from shearling.files.progress import Progress, silent
from shearling.files.writer import write_json, write_text
from shearling.gates.learn import learn
from shearling.gates.options import LearnOptions
from shearling.model.checkpoint import Checkpoint
from shearling.model.loading import load_tokenizer
from shearling.model.resolve import resolve
from shearling.model.subject import open_subject
from shearling.pruning.prune import (
    Criteria,
    Repairs,
    Running,
    prune,
)
from shearling.pruning.text import CalibrationText
from shearling.recipes.target import measured_size
from shearling.report import write_report
from shearling.report.measured import Missing, WantedResults, candidate, gather, measure
from shearling.report.pages.comparison_report import write_comparison
from shearling.report.records.records import Records
from shearling.table.values import Shape
from shearling.train.heal import Healed, heal
from shearling.train.options import Options
from shearling.train.parallel import World, join
from shearling.train.reference import measured
from shearling.train.steering import inherited, references

Notify = Callable[[str], None]
CALIBRATION, HELD_OUT, LOSSES = "calibration.jsonl", "held-out.jsonl", "reference.json"
REPORT, COMPARISON = "report.html", "comparison.html"


@dataclass(frozen=True)
class StageWork:
    """A stage about to be worked on.

    Attributes:
        output: its directory.
        inputs: what it is made from, by what it is to the stage; each one or several.
        options: what it is told, its free options among them.
        device: what computes, as the user named it.
        progress, notify: told how far the work is; told what a user should know.
    """

    output: Path
    inputs: Mapping[str, tuple[str, ...]]
    options: Mapping[str, Any]
    device: str = "auto"
    progress: Progress = silent
    notify: Notify = field(default=lambda sentence: None)

    def one(self, role: str) -> str:
        """The only input of a role."""
        (path,) = self.inputs[role]
        return path

    def model(self, role: str = "model") -> Checkpoint:
        """An input that is a model."""
        return Checkpoint.open(self.one(role))

    def teacher(self) -> Checkpoint | None:
        """The model to distil from, if there is one."""
        return self.model("teacher") if "teacher" in self.inputs else None

    def losses(self, store: Store, options: Options) -> dict[str, float] | None:
        """Reference losses for a dynamic mix: measured by a stage before, or given."""
        if options.mix == "dynamic" and self.options.get("losses"):
            return dict(self.options["losses"])
        file = Path(self.one("reference")) if "reference" in self.inputs else None
        return references(file, None, store, options)

    @contextmanager
    def world(self) -> Generator[World]:
        """This process alone, on its device."""
        try:
            yield join(self.device)
        finally:
            leave()


def pack_text(work: StageWork) -> None:
    """Text to a token store."""
    directory = resolve(work.one("tokenizer"))
    plan = PackPlan.of(
        work.inputs["text"], load_tokenizer(directory), directory.resolve().name, **work.options
    )
    pack(plan, work.output, progress=work.progress)


def draw_text(work: StageWork) -> None:
    """Text for calibration and for measuring, out of the two parts of a store."""
    tokenizer, store = (
        load_tokenizer(resolve(work.one("tokenizer"))),
        Store.open(Path(work.one("store"))),
    )
    ends = {store.bos, tokenizer.eos_token_id, tokenizer.bos_token_id}
    for part, file in (("train", CALIBRATION), ("held_out", HELD_OUT)):
        wanted = -(-int(work.options[part]) // store.length)
        if not wanted:
            continue
        lines = [
            json.dumps({"text": text}, ensure_ascii=False)
            for ids in _spread(store, part, wanted)
            for text in _documents(ids, ends, tokenizer)
        ]
        if not lines:
            raise ShearlingError(
                f"{store.path} has nothing {'held out' if part == 'held_out' else 'to train on'}; "
                "set data.held_out higher, or give more text."
            )
        write_text(work.output / file, "".join(f"{line}\n" for line in lines))


def _spread(store: Store, part: str, wanted: int) -> list[list[int]]:
    """Tokens of so many sequences, evenly spread over each domain, by the domains' sizes."""
    sizes = {domain: len(store.sequences(domain, part)) for domain in store.domains}
    total, rows = sum(sizes.values()), []
    for domain, size in sizes.items():
        count = min(size, max(1, round(wanted * size / total))) if size else 0
        chosen = [number * size // count for number in range(count)]
        if chosen:
            rows += store.sequences(domain, part)[chosen][0].tolist()
    return rows


def _documents(ids: list[int], ends: set[int | None], tokenizer: Any) -> list[str]:
    """The texts of a sequence, which ends and begins documents where it has EOS or BOS."""
    documents: list[list[int]] = [[]]
    for token in ids:
        if token in ends:
            documents.append([])
        else:
            documents[-1].append(token)
    texts = [tokenizer.decode(one, clean_up_tokenization_spaces=False) for one in documents if one]
    return [text for text in texts if text.strip()]


def measure_reference(work: StageWork) -> None:
    """The source's own losses on held-out text."""
    source, store = work.model(), Store.open(Path(work.one("store")))
    place = Place.best(source, Wish(device=work.device))
    sequences = int(work.options["sequences"])
    losses = measured(source, store, sequences, place=place, progress=work.progress)
    losses.save(work.output / LOSSES)


def prune_model(work: StageWork) -> None:
    """A cut by scores, repaired and proven."""
    told = work.options
    text = None
    if "calibration" in work.inputs:
        text = _calibration(work.inputs["calibration"], **told["text"])
    model, wish = work.model(), Wish(device=work.device, dtype=told["dtype"])
    size = measured_size(told["size"], model, wish, work.notify, work.progress)
    prune(
        model, work.output, size,
        calibration=text, criteria=Criteria(**told["criteria"]), repairs=Repairs(**told["repairs"]),
        running=Running(wish=wish, progress=work.progress, notify=work.notify),
    )  # fmt: skip


def _calibration(
    given: Sequence[str], *, shares: Sequence[float] | None = None, **options: Any
) -> CalibrationText:
    """Sources as a stage names them, with their shares."""
    parsed = [TextSource.parse(one) for one in given]
    sources = [
        replace(one, share=share)
        for one, share in zip(parsed, shares or [None] * len(parsed), strict=True)
    ]
    return CalibrationText(sources=sources, **options)


def learn_gates(work: StageWork) -> bool:
    """A cut to what was learned while training; False where it was stopped."""
    source, store = work.model(), Store.open(Path(work.one("store")))
    options = LearnOptions.model_validate(work.options["learning"])
    tell_epochs(work, store, options)
    with work.world() as world:
        learned = learn(
            source, Shape(work.options["shape"]), store, options, work.output,
            teacher=work.teacher(), reference=work.losses(store, options), world=world,
            progress=work.progress, notify=work.notify,
        )  # fmt: skip
    return _whole(work, learned)


def heal_model(work: StageWork) -> bool:
    """A model retrained; False where it was stopped."""
    source, store = work.model(), Store.open(Path(work.one("store")))
    told = dict(work.options["healing"])
    if work.options["epochs"] is not None:
        told["tokens"] = max(1, round(work.options["epochs"] * trained_tokens(store)))
    options = inherited(Options.model_validate(told), source, store, work.notify)
    tell_epochs(work, store, options)
    with work.world() as world:
        healed = heal(
            source, store, options, work.output, teacher=work.teacher(),
            reference=work.losses(store, options), world=world, progress=work.progress,
            notify=work.notify,
        )  # fmt: skip
    return _whole(work, healed)


def _whole(work: StageWork, trained: Healed) -> bool:
    if trained.model is None:
        work.notify(f"stopped at step {trained.step} of {trained.steps}.")
    return trained.model is not None


def trained_tokens(store: Store) -> int:
    """Tokens of a store that are trained on."""
    return store.length * sum(len(store.sequences(domain)) for domain in store.domains)


def tell_epochs(work: StageWork, store: Store, options: Options) -> None:
    """Say how often all of the data is seen, where that is more than once."""
    there = trained_tokens(store)
    if there and options.tokens > there:
        work.notify(
            f"{options.tokens:,} tokens are asked for, and {store.path} holds {there:,} to train "
            f"on: they are seen {options.tokens / there:.1f} times."
        )


def evaluate_models(work: StageWork) -> None:
    """Perplexity, tasks and continuations of every model; each result is kept as it is there."""
    paths, told = work.inputs["models"], work.options
    subjects = [open_subject(path) for path in paths]
    wanted = WantedResults(
        *suite_of(work.inputs, told), limit=told["limit"], prompts=tuple(told["prompts"]),
        max_new_tokens=told["max_new_tokens"], seed=told["seed"], dtype=told["dtype"],
        device=str(Wish(device=work.device).torch_device()),
    )  # fmt: skip
    known = gather([], [work.output])
    jobs = Missing(subjects, wanted, work.output, Records(), known).jobs()
    work.output.mkdir(parents=True, exist_ok=True)
    measure(jobs, subjects, paths, wanted, work.progress)


def suite_of(inputs: Mapping[str, tuple[str, ...]], told: Mapping[str, Any]) -> tuple[str, Suite]:
    """What is measured, and what results call it."""
    windows = {"window": told["window"], "max_windows": told["windows"], "bos": told["bos"]}
    own = build_suite(texts=[{"file": text} | windows for text in inputs.get("text", ())])
    if "suite" not in inputs:
        return CUSTOM, own
    label, suite = load_suite(*inputs["suite"])
    return label, merged(suite, own)


def time_models(work: StageWork) -> None:
    """Speed and memory, in turns."""
    told: dict[str, Any] = {
        key: tuple(one) if isinstance(one, list) else one for key, one in work.options.items()
    }
    workload = Workload(device=str(Wish(device=work.device).torch_device()), **told)
    result = bench_models(work.inputs["models"], workload, progress=work.progress)
    write_json(work.output / "bench.json", result)


def write_pages(work: StageWork) -> None:
    """The report on everything that was made and measured, and a comparison of the models."""
    results = [Path(path) for path in work.inputs.get("results", ())]
    made = [Path(path) for path in work.inputs["made"]]
    write_report([*made, *results], work.output / REPORT)
    paths = work.inputs["models"]
    subjects = [open_subject(path) for path in paths]
    records = gather([], [*made, *results])
    candidates = [candidate(*pair) for pair in zip(subjects, paths, strict=True)]
    write_comparison(
        records, candidates, work.output / COMPARISON, within=work.options["within"] / 100
    )


@dataclass(frozen=True)
class StageKind:
    """A kind of stage: its function, and whether a model or a store is what it makes."""

    name: str
    work: Callable[[StageWork], bool | None]
    makes: str = "files"


KINDS = {
    kind.name: kind
    for kind in (
        StageKind("pack", pack_text, "store"),
        StageKind("text", draw_text),
        StageKind("reference", measure_reference),
        StageKind("prune", prune_model, "model"),
        StageKind("learn", learn_gates, "model"),
        StageKind("heal", heal_model, "model"),
        StageKind("evaluate", evaluate_models),
        StageKind("bench", time_models),
        StageKind("report", write_pages),
    )
}
