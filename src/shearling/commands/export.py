"""``shearling export``: what the command line says, checked, and handed to :mod:`gguf_export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shearling.commands.options import Json, ModelOptions, print_result, warn
from shearling.commands.quantize import (
    ComparedText,
    DryRun,
    check_text,
    perplexities,
    perplexity_lines,
)
from shearling.commands.takes import takes_options
from shearling.errors import ShearlingError

if TYPE_CHECKING:
    from shearling.ship.llama_run import LlamaRun

if TYPE_CHECKING:
    from shearling.model.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What the command line says."""

    model: ModelOptions
    output: Annotated[Path, typer.Option(help="A new file.")]
    to: Annotated[str, typer.Option(help="gguf, which llama.cpp runs.")] = "gguf"
    outtype: Annotated[
        str,
        typer.Option(
            "--type",
            help="f32, f16, bf16 or q8_0; with llama-quantize on the PATH also q4_k_m and others.",
        ),
    ] = "f16"
    text: ComparedText
    dry_run: DryRun = False
    as_json: Json = False


@takes_options
def export(options: ExportOptions) -> None:
    """Write a model as a GGUF file with llama.cpp's converter, and compare it with the source.

    The converter is looked for in the directory that LLAMA_CPP names, then on the PATH.
    """
    from shearling.ship.gguf import check, estimated_bytes
    from shearling.ship.quantize import open_source

    if options.to != "gguf":
        raise ShearlingError(f"--to {options.to} is not known; give gguf.")
    check_text(options.text.text)
    outtype = options.outtype.lower()
    source = open_source(options.model.given())
    check(source, options.output, outtype)
    if not options.dry_run:
        _export(source, outtype, options)
        return
    size = estimated_bytes(source, outtype)
    plan: dict[str, Any] = {
        "file": str(options.output), "type": outtype, "parameters": source.parameters,
        "source_bytes": source.bytes, "bytes": size,
    }  # fmt: skip
    line = f"{source.bytes / 1e6:,.1f} -> about {size / 1e6:,.1f} MB as {outtype}"
    print_result(plan, options.as_json, [line])


def _export(source: Checkpoint, outtype: str, options: ExportOptions) -> None:
    """Convert, read back, compare, and print what came of it."""
    from shearling.files.terminal import progress_bars
    from shearling.model.resolve import resolve
    from shearling.ship.gguf import as_json, export

    output = options.output
    with progress_bars() as progress:
        proof = export(source, output, outtype=outtype, progress=progress)
        compared = options.text
        written = output if compared.text is None else resolve(output) or output
        evaluations = perplexities(compared, source.path, written, progress)
    result = as_json(source, output, outtype, proof) | evaluations
    for remark in proof.remarks:
        warn(remark)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(proof.types.items()))
    lines = [
        f"{proof.tensors} tensors read back ({kinds}): {proof.exact} as in the source"
        + (f", the others within {proof.largest_error:.1%}" * (proof.exact < proof.tensors)),
        f"{source.bytes / 1e6:,.1f} -> {result['bytes'] / 1e6:,.1f} MB",
        *_run_lines(proof.run),
        *perplexity_lines(evaluations),
        f"wrote {output}",
        f"next: shearling eval {output} --text {compared.text or 'FILE'}, or "
        f"llama-server -m {output}",
    ]
    print_result(result, options.as_json, lines)


def _run_lines(run: LlamaRun | None) -> list[str]:
    """What came of running llama.cpp, or how to have it run."""
    if run is None:
        return ["not run in llama.cpp: install xllamacpp, or llama-server, to have it compared"]
    if run.reason:
        return [f"not run in llama.cpp: {run.program} could not be used ({run.reason})"]
    return [
        f"{run.program} runs it: log-probabilities within {run.mean:.4f} nats of the model's in "
        f"the mean, {run.largest:.4f} at the most ({run.tokens} compared)"
    ]
