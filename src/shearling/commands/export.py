"""``shearling export``: what the command line says, checked, and handed to :mod:`gguf_export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shearling.commands.options import Json, Model, print_result, warn
from shearling.commands.quantize import (
    DryRun,
    MaxWindows,
    Text,
    Window,
    check_text,
    perplexities,
    perplexity_lines,
)
from shearling.errors import ShearlingError


def export(
    model: Model,
    output: Annotated[Path, typer.Option(help="A new file.")],
    to: Annotated[str, typer.Option(help="gguf, which llama.cpp runs.")] = "gguf",
    outtype: Annotated[
        str,
        typer.Option(
            "--type",
            help="f32, f16, bf16 or q8_0; with llama-quantize on the PATH also q4_k_m and others.",
        ),
    ] = "f16",
    text: Text = None,
    window: Window = 512,
    max_windows: MaxWindows = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write a model as a GGUF file with llama.cpp's converter, and compare it with the source.

    The converter is looked for in the directory that LLAMA_CPP names, then on the PATH.
    """
    from shearling.files.terminal import progress_bars
    from shearling.model.resolve import resolve
    from shearling.ship.gguf import as_json as described
    from shearling.ship.gguf import check, estimated_bytes
    from shearling.ship.gguf import export as run
    from shearling.ship.quantize import open_source

    if to != "gguf":
        raise ShearlingError(f"--to {to} is not known; give gguf.")
    check_text(text)
    outtype = outtype.lower()
    source = open_source(model)
    check(source, output, outtype)
    size = estimated_bytes(source, outtype)
    result: dict[str, Any] = {
        "file": str(output), "type": outtype, "parameters": source.parameters,
        "source_bytes": source.bytes, "bytes": size,
    }  # fmt: skip
    lines = [f"{source.bytes / 1e6:,.1f} -> about {size / 1e6:,.1f} MB as {outtype}"]
    if not dry_run:
        with progress_bars() as progress:
            proof = run(source, output, outtype=outtype, progress=progress)
            back = None if text is None else resolve(output)
            found = perplexities(text, source.path, back or output, window, max_windows, progress)
        result = described(source, output, outtype, proof) | found
        for remark in proof.remarks:
            warn(remark)
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(proof.types.items()))
        lines = [
            f"{proof.tensors} tensors read back ({kinds}): {proof.exact} as in the source"
            + (f", the others within {proof.largest_error:.1%}" * (proof.exact < proof.tensors)),
            f"{source.bytes / 1e6:,.1f} -> {result['bytes'] / 1e6:,.1f} MB",
            *perplexity_lines(found),
            f"wrote {output}",
            f"next: shearling eval {output} --text {text or 'FILE'}, or llama-server -m {output}",
        ]
    print_result(result, as_json, lines)
