"""llama.cpp as an engine: its own benchmark programs, one repetition a call.

``llama-bench`` times one sequence: a prompt, and tokens after a prompt of that length (``-d``).
``llama-batched-bench`` times several side by side. Both feed random tokens and sample none.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError
from shearling.evaluate.engines.base import (
    Candidate,
    Cell,
    Engine,
    Setting,
    Timing,
    cache_bytes,
    failure,
    tail,
    version_of,
)
from shearling.evaluate.engines.memory import resident
from shearling.files.cache import cache_directory

VARIABLE = "LLAMA_CPP"
SINGLE, BATCHED = "llama-bench", "llama-batched-bench"
OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_LOOK_SECONDS = 0.05  # between two looks at a program's memory; the peak is the system's own
_CACHE_ITEMSIZE = 2  # the programs' default is a KV cache in 16 bits


class LlamaCpp(Engine):
    """llama.cpp's programs on GGUF files: those that were given, or converted once into the cache.

    Each model runs alone, so that one at a time is in memory; its file stays in the system's cache.
    """

    name = "llama.cpp"
    resident = False

    def __init__(self, place: Path | None = None) -> None:
        """Find the programs, in ``place`` if it is given."""
        self.program = _find(SINGLE, place)
        self.place = place
        self.version = _version(self.program)

    @contextmanager
    def open(
        self, candidates: Sequence[Candidate], setting: Setting
    ) -> Generator[Sequence[Program]]:
        """Have every model as a GGUF file."""
        batched = None
        if any(cell.batch > 1 for cell in setting.cells):
            batched = _find(BATCHED, self.place)
        yield [
            Program(one, gguf_of(one, setting.dtype), self.program, batched, setting)
            for one in candidates
        ]

    def bytes(self, candidate: Candidate, setting: Setting) -> int:
        """The file, which is mapped whole, and the KV cache."""
        size = {"float32": 4}.get(setting.dtype, 2) * candidate.parameters
        if candidate.gguf is not None:
            size = candidate.gguf.stat().st_size
        return size + cache_bytes(candidate, setting.cells, _CACHE_ITEMSIZE)


class Program:
    """One GGUF file and the programs that time it."""

    def __init__(
        self,
        candidate: Candidate,
        gguf: Path,
        single: Path,
        batched: Path | None,
        setting: Setting,
    ) -> None:
        """``batched`` may be None where the grid asks for one sequence alone."""
        self.candidate, self.gguf = candidate, gguf
        self.single, self.batched = single, batched
        self.threads = setting.threads or _cores()
        self.weights = gguf.name
        on_gpu = setting.device != "cpu"
        self.options = ["-m", str(gguf), "-t", str(self.threads)]
        self.options += ["-ngl", "999"] if on_gpu else ["-ngl", "0", "-dev", "none"]
        self.on_gpu = on_gpu

    def parts(self, cell: Cell, *, fresh: bool) -> Generator[None, None, Timing]:
        """The prompt and the tokens after it: two calls for one sequence, one for several."""
        if cell.batch > 1:
            timing = self._side_by_side(cell)
            yield
            return timing
        prompt, first = self._call(["-p", str(cell.prompt), "-n", "0"])
        yield
        tokens, second = self._call(["-p", "0", "-n", str(cell.new), "-d", str(cell.prompt)])
        return Timing(prompt, tokens, cell.new, self._peak(first, second))

    def _call(self, test: list[str]) -> tuple[float, int]:
        """Seconds of one ``llama-bench`` test, and the peak memory."""
        options = [*self.options, "-r", "1", "-o", "json", *test]
        said, peak = self._run([str(self.single), *options])
        try:
            return json.loads(said)[0]["samples_ns"][0] / 1e9, peak
        except (ValueError, LookupError, TypeError) as error:
            raise self._unreadable(SINGLE, said) from error

    def _side_by_side(self, cell: Cell) -> Timing:
        assert self.batched is not None, "found when the engine was opened"
        total = cell.batch * (cell.prompt + cell.new)
        command = [
            str(self.batched), *self.options, "-c", str(total), "-npp", str(cell.prompt),
            "-ntg", str(cell.new), "-npl", str(cell.batch), "--output-format", "jsonl",
        ]  # fmt: skip
        said, peak = self._run(command)
        try:
            (line,) = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
            return Timing(line["t_pp"], line["t_tg"], cell.new, self._peak(peak))
        except (ValueError, LookupError, TypeError) as error:
            raise self._unreadable(BATCHED, said) from error

    def _run(self, command: list[str]) -> tuple[str, int]:
        """What a program printed, and the most memory that it held."""
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
            text=True, errors="replace",
        )  # fmt: skip
        peak = 0
        try:
            while True:
                peak = max(peak, resident(process.pid))
                try:
                    said, complaint = process.communicate(timeout=_LOOK_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode:
            raise failure(
                Path(command[0]).name, self.candidate, tail(complaint), process.returncode
            )
        return said, peak

    def _peak(self, *peaks: int) -> int | None:
        return None if self.on_gpu else max(peaks)  # of the host's memory alone

    def _unreadable(self, program: str, said: str) -> ShearlingError:
        return failure(program, self.candidate, f"its answer is not understood ({tail(said)[:80]})")


def gguf_of(candidate: Candidate, dtype: str) -> Path:
    """A model as a GGUF file: the one it was given as, or one made in the cache.

    Raises:
        ShearlingError: llama.cpp's converter is not there or refuses the model.
    """
    if candidate.gguf is not None:
        return candidate.gguf
    outtype = OUTTYPES[dtype]
    place = cache_directory() / "exported" / candidate.fingerprint[:16]
    file = place / f"{candidate.path.resolve().name}-{outtype}.gguf"
    if not file.is_file():
        from shearling.ship.gguf import export_gguf

        place.mkdir(parents=True, exist_ok=True)
        export_gguf(candidate.path, file, outtype=outtype)
    return file


def _find(program: str, place: Path | None) -> Path:
    """A program of llama.cpp's: in ``place``, or else in ``$LLAMA_CPP`` or on the PATH."""
    named = os.environ.get(VARIABLE)
    if place is not None:
        path, looked = _within(program, place), f"in {place}, its bin and its build/bin"
    else:
        path = (_within(program, Path(named)) if named else None) or shutil.which(program)
        where = f"in ${VARIABLE} ({named}) and " if named else ""
        looked = f"{where}on the PATH"
    if path is None:
        raise ShearlingError(
            f"{program} was looked for {looked} and is not there; install llama.cpp (a release of "
            "it, `brew install llama.cpp`, or a build of its source) and name the directory of "
            f"its programs with --llama-cpp or ${VARIABLE}."
        )
    return Path(path).absolute()


def _within(program: str, place: Path) -> str | None:
    """A program in a directory of programs, or in llama.cpp's source once it is built."""
    folders = (place, place / "bin", place / "build" / "bin")
    return shutil.which(program, path=os.pathsep.join(map(str, folders)))


def _version(program: Path) -> str:
    """What a program says of itself; older ones are silent."""
    done = version_of(program, "a working llama.cpp with --llama-cpp", 60)
    match = re.search(r"version:\s*(.+)", done.stdout + done.stderr)
    return match[1].strip() if match else "unknown"


def _cores() -> int:
    affinity: Any = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
