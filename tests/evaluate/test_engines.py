"""Each engine alone: what it runs, what it makes of the answers, and how it fails."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import fake_engines
from shearling.errors import ShearlingError
from shearling.evaluate.engines import (
    Candidate,
    Cell,
    Places,
    Setting,
    Timing,
    engine,
    memory,
    vllm_server,
)
from shearling.evaluate.engines import llama_cpp as llama_module
from shearling.evaluate.engines import vllm as vllm_module
from shearling.evaluate.engines.llama_cpp import gguf_of
from shearling.evaluate.engines.transformers import SLICE, Decode, ModelProcess, Prefill, Session
from shearling.evaluate.speed import measure


def candidate(path: Path, name: str | None = None, gguf: Path | None = None) -> Candidate:
    return Candidate(name or path.name, path, "f" * 64, 1000, cache_elements=24, gguf=gguf)


def setting(*cells: Cell, threads: int | None = 1) -> Setting:
    return Setting("float32", "cpu", threads, cells or (Cell(1, 4, 4),))


def timing(runner, cell: Cell) -> tuple[Timing, int]:
    """A run to its end, and how often it let others have their turn."""
    parts, turns = runner.parts(cell, fresh=True), 0
    while True:
        try:
            next(parts)
            turns += 1
        except StopIteration as end:
            return end.value, turns


# transformers


def test_a_worker_that_fails_or_dies_is_named(model_directory, tmp_path):
    """Two models at once, to pay for one import: one has no weights, one is killed."""
    broken = shutil.copytree(model_directory, tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    others = set(multiprocessing.active_children())
    with (
        ModelProcess(candidate(broken), setting()) as failing,
        ModelProcess(candidate(model_directory), setting()) as dying,
    ):
        with pytest.raises(ShearlingError, match=r"model in .*broken could not be timed: .*loaded"):
            failing.receive()
        assert dying.receive() == 1
        cell = Cell(2, 5, SLICE + 3)
        taken, turns = timing(dying, cell)
        assert (taken.steps, turns) == (SLICE + 3, 2)
        assert min(taken.prefill_seconds, taken.decode_seconds) > 0
        assert dying.child.pid is not None
        os.kill(dying.child.pid, signal.SIGKILL)
        with pytest.raises(ShearlingError, match=r"model in .*tiny ended with exit code -9"):
            timing(dying, cell)
    assert set(multiprocessing.active_children()) <= others


def test_a_run_is_one_prefill_and_one_token_a_step(model):
    """Shapes seen by the model, the cache behind them, and the tokens of greedy generation."""
    calls, fed = [], []

    def record(_module, args, kwargs, output):
        calls.append((tuple(args[0].shape), kwargs["past_key_values"].get_seq_length()))
        fed.append(args[0])
        assert output.logits.shape[1] == 1

    hook = model.register_forward_hook(record, with_kwargs=True)
    session = Session(model)
    for job in (Prefill(2, 5, fresh=True), Decode(2), Decode(1)):
        assert session.run(job).seconds > 0
    hook.remove()
    assert calls == [((2, 5), 5), ((2, 1), 6), ((2, 1), 7), ((2, 1), 8)]
    expected = model.generate(
        fed[0], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0
    )
    assert torch.equal(torch.cat(fed, dim=1), expected)
    session.run(Prefill(1, 4, fresh=False))
    assert session.cache.get_seq_length() == 4  # a run does not go on from the last one


# memory


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux alone restarts it")
def test_peak_memory_is_since_its_restart():
    big = torch.ones(64 * 2**20)  # 256 MiB, every page touched
    before = memory.own_peak()
    del big
    memory.restart_own_peak()
    if memory.own_peak() == before:
        pytest.skip("this system does not let a process restart its peak")
    assert before - memory.own_peak() > 200 * 2**20


def test_peak_memory_without_proc(monkeypatch):
    def nothing(*_args: object, **_options: object):
        raise OSError("no /proc here")

    monkeypatch.setattr(memory.Path, "read_text", nothing)
    monkeypatch.setattr(memory.Path, "write_text", nothing)
    memory.restart_own_peak()
    assert memory.own_peak() > 2**24
    assert memory.resident(os.getpid()) == pytest.approx(
        psutil.Process().memory_info().rss, rel=0.5
    )
    assert memory.resident(2**30) == 0  # nobody


def test_peak_memory_of_a_process_and_its_children():
    """100 MB in a child, freed again; the parent holds next to nothing."""
    grand = "x = bytearray(100_000_000); del x; print('ready', flush=True); input()"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {grand!r}])"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        alone, whole = memory.resident(process.pid), memory.tree_peak(process.pid)
        process.stdin.close()
    assert 0 < alone < 80_000_000
    if memory.high_water("self") is not None:  # else what is held now is all that can be known
        assert 100_000_000 < whole < 200_000_000


# llama.cpp


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    return fake_engines.llama_cpp(tmp_path / "llama")


def ggufs(tmp_path: Path, *names: str) -> list[Candidate]:
    found = []
    for name in names:
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(b"GGUF")
        found.append(candidate(tmp_path, name, gguf=file))
    return found


def test_llama_cpp_is_called_one_repetition_at_a_time_in_turns(programs, tmp_path):
    one = engine("llama.cpp", Places(llama_cpp=programs))
    assert (one.name, one.version) == ("llama.cpp", "0.6.0-dev (build 0, commit unknown)")
    cells = (Cell(1, 6, 4), Cell(3, 6, 4))
    models = ggufs(tmp_path, "quick", "slow")
    with one.open(models, setting(*cells)) as runners:
        alone, together = measure(runners, cells, repeats=1)
    assert [[t.prefill_seconds for t in each] for each in alone.timings] == [[0.06], [0.12]]
    assert [[t.decode_seconds for t in each] for each in alone.timings] == [[0.04], [0.08]]
    assert [[t.prefill_seconds for t in each] for each in together.timings] == [[0.18], [0.36]]
    assert [[t.decode_seconds for t in each] for each in together.timings] == [[0.04], [0.08]]
    assert all(t.steps == 4 for each in (*alone.timings, *together.timings) for t in each)
    assert all(0 < (t.peak_bytes or 0) < 2**28 for each in alone.timings for t in each)
    calls = fake_engines.notes(programs)
    order = [Path(call[call.index("-m") + 1]).stem for call in calls]
    assert order == [
        "quick", "slow", "slow", "quick", "slow", "quick", "quick", "slow",
        "quick", "slow", "slow", "quick",
    ]  # fmt: skip
    common = ["-m", str(models[0].gguf), "-t", "1", "-ngl", "0", "-dev", "none"]
    single = ["llama-bench", *common, "-r", "1", "-o", "json"]
    assert calls[0] == [*single, "-p", "6", "-n", "0"]
    assert calls[3] == [*single, "-p", "0", "-n", "4", "-d", "6"]
    assert calls[8] == [
        "llama-batched-bench", *common, "-c", "30", "-npp", "6", "-ntg", "4", "-npl", "3",
        "--output-format", "jsonl",
    ]  # fmt: skip


def test_llama_cpps_peak_is_that_of_its_program(programs, tmp_path):
    """A program that holds 100 MB, in a process that held 400 MB itself."""
    torch.ones(100 * 2**20)
    one = engine("llama.cpp", Places(llama_cpp=programs))
    with one.open(ggufs(tmp_path, "big"), setting()) as (runner,):
        found, _ = timing(runner, Cell(1, 4, 4))
    assert found.peak_bytes is not None
    assert 100_000_000 < found.peak_bytes < 200_000_000


def test_llama_cpp_fails_in_one_sentence(programs, tmp_path):
    one = engine("llama.cpp", Places(llama_cpp=programs))
    dying, mumbling = ggufs(tmp_path, "dying", "mumbling")
    for cell, program in ((Cell(1, 4, 4), "llama-bench"), (Cell(2, 4, 4), "llama-batched-bench")):
        with one.open([dying, mumbling], setting(cell)) as (first, second):
            with pytest.raises(
                ShearlingError,
                match=rf"^{program} could not time dying \(exit code 1\): llama_bench: error: "
                r"failed to load model '.*dying\.gguf'; if memory",
            ):
                timing(first, cell)
            with pytest.raises(ShearlingError, match=r"mumbling: its answer is not .*\| size \|"):
                timing(second, cell)


def test_llama_cpp_that_is_not_there(tmp_path, monkeypatch, programs):
    message = r"llama-bench was looked for in .*absent, its bin and its build/bin .* --llama-cpp"
    with pytest.raises(ShearlingError, match=message):
        engine("llama.cpp", Places(llama_cpp=tmp_path / "absent"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    with pytest.raises(ShearlingError, match=r"looked for on the PATH and .* or \$LLAMA_CPP\."):
        engine("llama.cpp")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "absent"))
    message = r"looked for in \$LLAMA_CPP \(.*absent\) and on the PATH and is not there"
    with pytest.raises(ShearlingError, match=message):
        engine("llama.cpp")
    monkeypatch.setenv("PATH", str(programs))
    assert engine("llama.cpp").name == "llama.cpp"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("LLAMA_CPP", str(programs))
    found = engine("llama.cpp")
    assert isinstance(found, llama_module.LlamaCpp)
    assert found.program == programs / "llama-bench"
    (programs / "llama-batched-bench").unlink()
    with found.open(ggufs(tmp_path, "quick"), setting(Cell(1, 4, 4))):
        pass  # one sequence does not need it
    with (
        pytest.raises(ShearlingError, match="llama-batched-bench was looked for in"),
        found.open(ggufs(tmp_path, "quick"), setting(Cell(2, 4, 4))),
    ):
        pass
    built = tmp_path / "source" / "build" / "bin"
    shutil.copytree(programs, built)
    found = engine("llama.cpp", Places(llama_cpp=tmp_path / "source"))
    assert isinstance(found, llama_module.LlamaCpp)
    assert found.program == built / "llama-bench"


def test_llama_cpp_needs_the_file_and_a_cache_of_16_bits(programs, tmp_path):
    one = engine("llama.cpp", Places(llama_cpp=programs))
    assert not one.resident
    cells = setting(Cell(2, 3, 4), Cell(1, 1, 1))
    assert one.bytes(candidate(tmp_path), cells) == 4 * 1000 + 2 * 24 * 2 * 7
    assert one.bytes(ggufs(tmp_path, "quick")[0], cells) == 4 + 2 * 24 * 2 * 7


def test_a_directory_is_converted_once(tmp_path, monkeypatch):
    made = []

    def export(source, output, *, outtype):
        made.append((source, output, outtype))
        output.write_bytes(b"GGUF")
        return output

    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("shearling.ship.gguf.export_gguf", export)
    one = candidate(tmp_path / "some" / "model")
    file = gguf_of(one, "bfloat16")
    assert gguf_of(one, "bfloat16") == file
    assert gguf_of(one, "float32") != file
    assert [(source, outtype) for source, _, outtype in made] == [
        (one.path, "bf16"),
        (one.path, "f32"),
    ]
    assert file == tmp_path / "cache" / "exported" / ("f" * 16) / "model-bf16.gguf"


@pytest.mark.skipif(not shutil.which("llama-bench"), reason="llama.cpp is not on the PATH")
def test_llama_cpp_itself_refuses_what_is_no_model(tmp_path):
    one = engine("llama.cpp")
    with (
        one.open(ggufs(tmp_path, "nonsense"), setting()) as (runner,),
        pytest.raises(ShearlingError, match=r"llama-bench could not time nonsense \(exit"),
    ):
        timing(runner, Cell(1, 4, 4))


# vLLM


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(vllm_server, "_ASK_SECONDS", 0.05)
    return fake_engines.vllm(tmp_path / "vllm")


def test_vllm_serves_every_model_and_is_asked_in_turns(program, model_directory):
    one = engine("vllm", Places(vllm=program))
    assert (one.name, one.version) == ("vllm", "0.32.0")
    cells = (Cell(2, 6, 5), Cell(1, 6, 5))
    models = [candidate(model_directory, "tiny"), candidate(model_directory, "tiny#2")]
    with one.open(models, setting(*cells)) as runners:
        pids = [runner.process.pid for runner in runners if isinstance(runner, vllm_module.Server)]
        both = list(measure(runners, cells, repeats=1))
    # 30 ms to the first token and 4 x 10 ms to the last; a busy machine may see them late
    for each in (*both[0].timings, *both[1].timings):
        assert each[0].steps == 4
        assert each[0].prefill_seconds >= 0.03
        assert each[0].prefill_seconds + each[0].decode_seconds >= 0.07
        assert (each[0].peak_bytes or 0) > 2**20
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)
    notes = fake_engines.notes(program.parent)
    (arguments, environment), requests = notes[0], notes[2:]
    assert arguments[:2] == ["serve", str(model_directory)]
    options = dict(zip(arguments[2:-1:2], arguments[3::2], strict=False))
    assert options.pop("--port").isdecimal()
    assert options == {
        "--served-model-name": "tiny", "--host": "127.0.0.1", "--dtype": "float32",
        "--max-model-len": "11", "--max-num-seqs": "2",
    }  # fmt: skip
    assert arguments[-1] == "--no-enable-prefix-caching"
    assert environment == {
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0-0",
    }  # fmt: skip
    assert [name for name, _ in requests] == ["tiny", "tiny#2", "tiny#2", "tiny"] * 2
    body = requests[0][1]
    assert [len(ids) for ids in body["prompt"]] == [6, 6]
    assert all(0 <= token < 300 for ids in body["prompt"] for token in ids)
    assert body["prompt"] == requests[1][1]["prompt"]
    assert (body["max_tokens"], body["ignore_eos"], body["stream"]) == (5, True, True)


def test_vllm_prefill_ends_when_every_sequence_has_a_token(program, model_directory, monkeypatch):
    """A clock that moves on by one at every look: at the start, and at every event."""
    one = engine("vllm", Places(vllm=program))
    cells = (Cell(2, 4, 3), Cell(1, 4, 3))
    with one.open([candidate(model_directory)], setting(*cells)) as (runner,):
        for cell, expected in zip(cells, ((2, 4), (1, 2)), strict=True):
            ticks = itertools.count()
            clock = SimpleNamespace(perf_counter=lambda ticks=ticks: next(ticks))
            with monkeypatch.context() as patch:
                patch.setattr(vllm_module, "time", clock)
                found, _ = timing(runner, cell)
            assert (found.prefill_seconds, found.decode_seconds) == expected


def test_vllm_fails_in_one_sentence(program, model_directory, tmp_path):
    one = engine("vllm", Places(vllm=program))
    cell = Cell(1, 4, 4)
    dying = shutil.copytree(model_directory, tmp_path / "dying")
    with (
        pytest.raises(
            ShearlingError,
            match=r"^vllm could not time dying \(exit code 1\): ValueError: Free memory is less "
            r"than what was asked for; if memory",
        ),
        one.open([candidate(dying)], setting(cell)),
    ):
        pass
    names = ("refusing", "short")
    with one.open([candidate(model_directory, name) for name in names], setting(cell)) as (a, b):
        with pytest.raises(ShearlingError, match=r"refusing: it answered 400 \(The prompt is not"):
            timing(a, cell)
        with pytest.raises(ShearlingError, match="short: 3 tokens came where 4 were asked for"):
            timing(b, cell)
        assert isinstance(b, vllm_module.Server)
        os.killpg(b.process.pid, signal.SIGKILL)
        b.process.wait()
        with pytest.raises(ShearlingError, match=r"time short \(exit code -9\): .*Error"):
            timing(b, cell)


def test_vllm_that_never_gets_ready(program, model_directory, monkeypatch):
    monkeypatch.setattr(vllm_server, "START_SECONDS", 0.0)
    one = engine("vllm", Places(vllm=program))
    started = time.monotonic()
    with (
        pytest.raises(ShearlingError, match="its server was not ready within 0 s"),
        one.open([candidate(model_directory)], setting()),
    ):
        pass
    assert time.monotonic() - started < 10
    assert not [p for p in psutil.Process().children() if "vllm" in " ".join(p.cmdline())]


def test_vllm_that_is_not_there(tmp_path, monkeypatch, program):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ShearlingError, match=r"vllm was looked for on the PATH .* its own"):
        engine("vllm")
    with pytest.raises(ShearlingError, match=r"looked for at .*absent and is not there"):
        engine("vllm", Places(vllm=tmp_path / "absent"))
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    found = engine("vllm")
    assert isinstance(found, vllm_module.Vllm)
    assert found.program == program


def test_vllm_needs_a_second_token(program, model_directory):
    one = engine("vllm", Places(vllm=program))
    with (
        pytest.raises(ShearlingError, match="--new of at least 2"),
        one.open([candidate(model_directory)], setting(Cell(1, 4, 1))),
    ):
        pass
