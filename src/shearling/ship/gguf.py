"""A model as a GGUF file, by llama.cpp's own converter, and the proof that nothing was lost.

The converter writes beside the final place. Before the file gets its name, every tensor is
compared with the source's (:mod:`shearling.ship.readback`), what llama.cpp will make of the
metadata with the configuration (:mod:`shearling.ship.computes`), and, where llama.cpp is
installed, its log-probabilities with the model's (:mod:`shearling.ship.llama_run`).
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.files.staging import check_writable, reserved
from shearling.files.writer import check_space, disk_errors, sync
from shearling.model.checkpoint import Checkpoint
from shearling.model.gguf.header import gguf_package
from shearling.ship.computes import check_computes, check_counted
from shearling.ship.converter import (
    HOME,
    QUANTIZER,
    convert,
    find_converter,
    find_quantizer,
    quantize_file,
)
from shearling.ship.llama_run import run_and_compare
from shearling.ship.readback import GgufProof, open_back, prove

CONVERTED = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}  # bytes a weight


def export_gguf(
    source: Path, output: Path, *, outtype: str = "f16", progress: Progress = silent
) -> Path:
    """Write a model as a GGUF file that llama.cpp runs.

    Args:
        source: a model directory (or hub id, or another GGUF file).
        output: a new file; it appears whole, or not at all.
        outtype: f32, f16, bf16 or q8_0, which the converter writes, or any type of llama.cpp's
            own ``llama-quantize``, such as q4_k_m, where that program is found.
        progress: told how far the work is.

    Returns:
        ``output``.

    Raises:
        ShearlingError: no converter, or one that fails; an unknown type; a model that the file
            would not stand for; ``output`` is taken or the disk full.
    """
    export(Checkpoint.open(source), output, outtype=outtype, progress=progress)
    return output


def export(
    source: Checkpoint, output: Path, *, outtype: str = "f16", progress: Progress = silent
) -> GgufProof:
    """As :func:`export_gguf`, of an opened checkpoint; gives what reading back has shown."""
    outtype = outtype.lower()
    check(source, output, outtype)
    first = outtype if outtype in CONVERTED else _unquantised(source)
    output = output.resolve()
    with reserved(output) as folder:
        with disk_errors(output):
            made = folder / "model.gguf"
            progress("converting to GGUF", 0, 1)
            convert(source, made, first, output)
            progress("converting to GGUF", 1, 1)
            if first != outtype:
                made = quantize_file(made, outtype, output, progress)
            proof = prove(source, made, progress=progress)
            check_computes(source, open_back(made))
            ran = run_and_compare(source, made, exact=outtype in CONVERTED, progress=progress)
            proof = replace(proof, run=ran)
            sync(made)
            os.replace(made, output)
        sync(output.parent)
    return proof


def check(source: Checkpoint, output: Path, outtype: str) -> None:
    """Refuse what cannot work before any work is done; see :func:`export_gguf`."""
    if outtype not in types():
        raise ShearlingError(
            f"the GGUF type {outtype!r} is not known; give one of {', '.join(types())}."
        )
    check_counted(source)
    find_converter()
    if outtype not in CONVERTED and find_quantizer() is None:
        raise ShearlingError(
            f"the GGUF type {outtype} is written by llama.cpp's {QUANTIZER}, which is not on the "
            f"PATH nor in the directory that {HOME} names; give one of {', '.join(CONVERTED)}, "
            "or build llama.cpp."
        )
    if output.exists() or output.is_symlink():
        raise ShearlingError(f"output {output} exists; name a new file, or remove it.")
    check_writable(output)
    check_space(output, estimated_bytes(source, outtype))


def estimated_bytes(source: Checkpoint, outtype: str) -> int:
    """What is on disk at the most while a file is made: for most types, a 16-bit one as well."""
    if outtype in CONVERTED:
        return round(source.parameters * CONVERTED[outtype])
    return round(source.parameters * (CONVERTED[_unquantised(source)] + CONVERTED["q8_0"]))


def types() -> tuple[str, ...]:
    """Names of the types that a file can be written in, the converter's own first."""
    gguf = gguf_package()
    names = [kind.name.removeprefix("MOSTLY_").lower() for kind in gguf.LlamaFileType]
    known = [name for name in names if name not in (*CONVERTED, "all_f32", "guessed")]
    return (*CONVERTED, *sorted(known))


def as_json(source: Checkpoint, output: Path, outtype: str, proof: GgufProof) -> dict[str, Any]:
    """What ``shearling export --json`` says."""
    return {
        "source": {"name": source.name, "fingerprint": source.fingerprint},
        "parameters": source.parameters,
        "file": str(output),
        "type": outtype,
        "source_bytes": source.bytes,
        "bytes": output.stat().st_size,
        "proof": asdict(proof),
    }


def _unquantised(source: Checkpoint) -> str:
    """The type that keeps a source's weights as they are, or nearly."""
    stored = set(source.dtypes.values())
    return "bf16" if stored == {"BF16"} else "f16" if stored == {"F16"} else "f32"
