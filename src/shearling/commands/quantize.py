"""``shearling quantize``: what the command line says, checked, and handed to :mod:`quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shearling.commands.options import Json, Model, print_result
from shearling.errors import ShearlingError

if TYPE_CHECKING:
    from shearling.files.progress import Progress

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


def quantize(
    model: Model,
    to: Annotated[str, typer.Option(help="int8 or int4.")],
    output: Annotated[Path, typer.Option(help="A new directory.")],
    group: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a scale; by default a whole row for int8, and for int4 32, or "
            "what divides the most weights."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="What stays unquantised is stored in this; by default as it is."),
    ] = None,
    text: Text = None,
    window: Window = 512,
    max_windows: MaxWindows = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Round a model's matrices to eight or four bits with torchao, and prove that it loads.

    Embeddings, the head, norms and biases stay as they are.
    """
    from shearling.files.terminal import progress_bars
    from shearling.ship.quantize import check, open_source, plan
    from shearling.ship.quantize import quantize as run

    check_text(text)
    source = open_source(model)
    wanted = plan(source, to, group=group, dtype=dtype)
    check(source, output, wanted)
    result: dict[str, Any] = {
        "to": to,
        "group": wanted.group,
        "dtype": wanted.dtype,
        "weights": wanted.weights,
        "parameters": source.parameters,
        "source_bytes": source.bytes,
        "bytes": wanted.bytes,
        "kept": dict(wanted.kept),
    }
    lines = [
        f"{wanted.weights:,} of {source.parameters:,} weights to {to}, "
        + (f"a scale for {wanted.group} inputs" if wanted.group else "a scale a row"),
        f"{source.bytes / 1e6:,.1f} -> {wanted.bytes / 1e6:,.1f} MB",
        *([wanted.remark] if wanted.remark else []),
        *([_WIDE] if to == "int4" else []),
    ]
    if not dry_run:
        with progress_bars() as progress:
            result = run(source, output, wanted, progress=progress)
            found = perplexities(text, source.path, output, window, max_windows, progress)
        proof = result["proof"]
        lines += [
            f"loads as it was in memory, bit for bit; from the source {proof['divergence']:.2g} "
            f"nats on {proof['tokens']} random tokens",
            *perplexity_lines(found),
            f"wrote {output}",
            f"next: shearling eval {output} --text {text or 'FILE'}",
        ]
        result = result | found
    print_result(result, as_json, lines)


def check_text(text: Path | None) -> None:
    """Refuse a text that is not there before any work is done."""
    if text is not None and not text.exists():
        raise ShearlingError(f"--text {text} does not exist; give .jsonl, .txt or a directory.")


def perplexities(
    text: Path | None,
    source: Path,
    output: Path,
    window: int,
    max_windows: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """The same evaluation of the source and of what was made from it, if there is a text."""
    if text is None:
        return {}
    from shearling.evaluate.perplexity import evaluate

    before, after = (
        evaluate(path, text, window=window, max_windows=max_windows, progress=progress)
        for path in (source, output)
    )
    return {"evaluations": {"before": before, "after": after}}


def perplexity_lines(found: dict[str, Any]) -> list[str]:
    """The same for a person."""
    if not found:
        return []
    before, after = (found["evaluations"][when] for when in ("before", "after"))
    return [
        f"perplexity {before['perplexity']:.3f} -> {after['perplexity']:.3f} on {after['text']} "
        f"({after['windows']} windows of {after['window']} tokens)"
    ]
