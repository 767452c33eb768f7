"""``shearling quantize``: what the command line says, checked, and handed to :mod:`quantize`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shearling.commands.options import Json, ModelOptions, print_result
from shearling.commands.takes import takes_options
from shearling.errors import ShearlingError

if TYPE_CHECKING:
    from shearling.files.progress import Progress
    from shearling.model.checkpoint import Checkpoint
    from shearling.ship.quantize import QuantizePlan

_WIDE = (
    "torchao keeps a four-bit value in a byte where a CPU is to run it; for a smaller file, "
    "shearling export --type q4_k_m"
)
Text = Annotated[
    Path | None,
    typer.Option(help="Also measure perplexity before and after, on .jsonl, .txt or a directory."),
]
Window = Annotated[int, typer.Option(min=2, help="Tokens in a window of --text.")]
MaxWindows = Annotated[
    int | None, typer.Option(min=1, help="Use the first so many windows of --text; default all.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and stop.")]


@dataclass(frozen=True, kw_only=True)
class ComparedText:
    """A text on which the source and what is made of it are both measured."""

    text: Text = None
    window: Window = 512
    max_windows: MaxWindows = None


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """What the command line says."""

    model: ModelOptions
    to: Annotated[str, typer.Option(help="int8 or int4.")]
    output: Annotated[Path, typer.Option(help="A new directory.")]
    group: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a scale; by default a whole row for int8, and for int4 32, or "
            "what divides the most weights."
        ),
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(help="What stays unquantised is stored in this; by default as it is."),
    ] = None
    text: ComparedText
    dry_run: DryRun = False
    as_json: Json = False


@takes_options
def quantize(options: QuantizeOptions) -> None:
    """Round a model's matrices to eight or four bits with torchao, and prove that it loads.

    Embeddings, the head, norms and biases stay as they are.
    """
    from shearling.files.terminal import progress_bars
    from shearling.ship.quantize import check, open_source, plan
    from shearling.ship.quantize import quantize as run

    check_text(options.text.text)
    source = open_source(options.model.given())
    wanted = plan(source, options.to, group=options.group, dtype=options.dtype)
    check(source, options.output, wanted)
    lines = _plan_lines(source, wanted, options.to)
    if options.dry_run:
        print_result(_plan_json(source, wanted, options.to), options.as_json, lines)
        return
    with progress_bars() as progress:
        result = run(source, options.output, wanted, progress=progress)
        evaluations = perplexities(options.text, source.path, options.output, progress)
    proof = result["proof"]
    lines += [
        f"loads as it was in memory, bit for bit; from the source {proof['divergence']:.2g} "
        f"nats on {proof['tokens']} random tokens",
        *perplexity_lines(evaluations),
        f"wrote {options.output}",
        f"next: shearling eval {options.output} --text {options.text.text or 'FILE'}",
    ]
    print_result(result | evaluations, options.as_json, lines)


def _plan_json(source: Checkpoint, wanted: QuantizePlan, to: str) -> dict[str, Any]:
    return {
        "to": to,
        "group": wanted.group,
        "dtype": wanted.dtype,
        "weights": wanted.weights,
        "parameters": source.parameters,
        "source_bytes": source.bytes,
        "bytes": wanted.bytes,
        "kept": dict(wanted.kept),
    }


def _plan_lines(source: Checkpoint, wanted: QuantizePlan, to: str) -> list[str]:
    return [
        f"{wanted.weights:,} of {source.parameters:,} weights to {to}, "
        + (f"a scale for {wanted.group} inputs" if wanted.group else "a scale a row"),
        f"{source.bytes / 1e6:,.1f} -> {wanted.bytes / 1e6:,.1f} MB",
        *([wanted.remark] if wanted.remark else []),
        *([_WIDE] if to == "int4" else []),
    ]


def check_text(text: Path | None) -> None:
    """Refuse a text that is not there before any work is done."""
    if text is not None and not text.exists():
        raise ShearlingError(f"--text {text} does not exist; give .jsonl, .txt or a directory.")


def perplexities(
    compared: ComparedText, source: Path, output: Path, progress: Progress
) -> dict[str, Any]:
    """The same evaluation of the source and of what was made from it, if there is a text."""
    if compared.text is None:
        return {}
    from shearling.evaluate.perplexity import Windows, evaluate

    windows = Windows(compared.window, compared.max_windows)
    before, after = (
        evaluate(path, compared.text, windows, progress=progress) for path in (source, output)
    )
    return {"evaluations": {"before": before, "after": after}}


def perplexity_lines(evaluations: dict[str, Any]) -> list[str]:
    """The same for a person."""
    if not evaluations:
        return []
    before, after = (evaluations["evaluations"][when] for when in ("before", "after"))
    return [
        f"perplexity {before['perplexity']:.3f} -> {after['perplexity']:.3f} on {after['text']} "
        f"({after['windows']} windows of {after['window']} tokens)"
    ]
