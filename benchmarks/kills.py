"""Kills at moments nobody chose, and whether the same command then ends as if nothing had happened.

    python benchmarks/kills.py [--kills 200] [--seconds 280] [--stages "heal;learn"] [--anew]

Every stage runs on a tiny random model. A run is killed (SIGKILL, SIGTERM, SIGINT in turns) at a
moment drawn evenly from the time that an undisturbed run takes, start-up excluded, and the command
is given again. Then all that it wrote must be what the undisturbed run wrote, and nothing else may
be left: not beside it, not inside it, not in the directory for temporary files. Figures that are
times are left out of the comparison.

Nothing is imported anew: this process forks one for each run, so that a kill costs a second or two.
Results are added to benchmarks/results/kills.json after every kill, from where a further call goes
on; --seconds ends a call early.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import pkgutil
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

RESULTS = Path(__file__).parent / "results" / "kills.json"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TIMES = ("created", "seconds", "tokens_per_s", "seconds_choosing", "versions", "shearling")
PATIENCE = 600  # seconds that a run may take, beside other work as well
CONVERTER = """
import os, shutil, sys, time
output = sys.argv[sys.argv.index("--outfile") + 1]
with open(os.path.join(os.path.dirname(__file__), "model.gguf"), "rb") as made:
    with open(output, "wb") as file:
        while held := made.read(20000):
            file.write(held)
            time.sleep(0.05)
"""

# Arguments of each stage, in a directory that holds model/, cut/, store/ and three texts.
STAGES: dict[str, list[str]] = {
    "score": ["score", "model", "--calibration", "fell.jsonl", "--samples", "6", "--length", "24",
              "--by", "perplexity", "--output", "out/scores.json"],
    "prune": ["prune", "model", "--params", "0.75x", "--calibration", "fell.jsonl", "--samples",
              "8", "--length", "24", "--output", "out/pruned"],
    "prune on disk": ["prune", "model", "--shape", "hidden=32,layers=3", "--calibration",
                      "fell.jsonl", "--samples", "8", "--length", "24", "--stream", "--output",
                      "out/pruned"],
    "pack": ["pack", "fell.jsonl", "meadow.jsonl", "pen.jsonl", "--tokenizer", "model", "--length",
             "24", "--held-out", "0.2", "--output", "out/store"],
    "teach": ["teach", "model", "--data", "store", "--top", "7", "--output", "out/cache"],
    "reference": ["reference", "model", "--store", "store", "--output", "out/reference.json"],
    "heal": ["heal", "cut", "--data", "store", "--tokens", "1200", "--output", "out/healed",
             "batch=4", "lr=1e-2", "save_every=3", "eval_every=4"],
    "heal, distill": ["heal", "cut", "--data", "store", "--tokens", "900", "--recipe", "distill",
                      "--teacher", "model", "--output", "out/healed", "batch=4", "save_every=3"],
    "heal, two phases": ["heal", "cut", "--data", "store", "--tokens", "1200", "--recipe",
                         "cpt-then-lora", "--output", "out/healed", "batch=4", "save_every=2"],
    "learn, scores": ["learn", "model", "--data", "store", "--tokens", "900", "--shape",
                      "layers=3,mlp=40", "--output", "out/learned", "batch=4", "save_every=3",
                      "samples=8", "sample_length=24"],
    "learn, gates": ["learn", "model", "--data", "store", "--tokens", "900", "--shape",
                     "layers=3,mlp=40", "--recipe", "warm", "--output", "out/learned", "batch=4",
                     "save_every=3", "samples=8", "sample_length=24"],
    "eval": ["eval", "model", "cut", "--text", "fell.jsonl", "--window", "24", "--prompt",
             "the sheep", "--max-new-tokens", "6", "--output", "out/results"],
    "quantize": ["quantize", "model", "--to", "int8", "--output", "out/quantized"],
    "compare": ["compare", "model", "cut", "--text", "fell.jsonl", "--window", "24", "--prompt",
                "the sheep", "--max-new-tokens", "6", "--output", "out/comparison.html"],
    "export": ["export", "model", "--type", "f32", "--output", "out/model.gguf"],
    "judge": ["judge", "model", "cut", "--prompts", "prompts.txt", "--endpoint", "{judge}",
              "--max-new-tokens", "6", "--output", "out/judgement.json"],
    "bench": ["bench", "model", "cut", "--prompt", "16", "--new", "4", "--batch", "1",
              "--repeats", "2", "--output", "out/bench.json"],
    "demo": ["demo", "--model", "model", "--text", "hill.jsonl", "--output", "out/demo"],
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a process came to: ``code`` as a shell has it, negative for a signal."""

    code: int
    seconds: float
    said: str


@dataclass(frozen=True)
class Kill:
    """One kill, and what became of it; ``faults`` is empty where all is as it should be."""

    stage: str
    signal: str
    share: float  # of the undisturbed run's time
    late: bool  # the run had ended before
    code: int
    faults: tuple[str, ...]


class Bench:
    """A directory with what the stages are given, and the undisturbed runs."""

    def __init__(self, root: Path) -> None:
        """Make models, texts and a store; done in a process of its own, as everything is."""
        self.root, self.given = root, root / "given"
        self.given.mkdir()
        made = self.forked(lambda: _make(self.given), self.given)
        assert made.code == 0, made.said
        self.judge = _judge()
        self.whole: dict[str, tuple[float, dict[str, str]]] = {}

    def undisturbed(self, stage: str) -> tuple[float, dict[str, str]]:
        """Seconds of a run, and what it leaves."""
        if stage not in self.whole:
            place = self.place("whole")
            run = self.command(stage, place)
            assert run.code == 0, f"{stage}: {run.said}"
            left = contents(place)
            shutil.rmtree(place)
            self.whole[stage] = run.seconds, left
        return self.whole[stage]

    def kill(self, stage: str, sign: signal.Signals, share: float) -> Kill:
        """Kill one run of a stage, give the command again, and compare."""
        seconds, whole = self.undisturbed(stage)
        place = self.place("parts")
        killed = self.command(stage, place, (sign, share * seconds))
        late = killed.code == 0 and contents(place) == whole
        faults = []
        if "Traceback" in killed.said:
            faults.append(f"a traceback: {killed.said[-600:]}")
        if sign != signal.SIGKILL and any((place / "tmp").iterdir()):
            faults.append("temporary files were left, though it could clean up")
        again = self.command(stage, place)
        if "Traceback" in again.said:
            faults.append(f"a traceback, given again: {again.said[-600:]}")
        faults += differences(whole, contents(place))
        faults += [f"{name} still runs" for name in _left_running(place)]
        if faults and again.code:
            faults.append(f"given again it said: {again.said[-300:]}")
        shutil.rmtree(place)
        return Kill(stage, sign.name, round(share, 3), late, killed.code, tuple(faults))

    def place(self, name: str) -> Path:
        """A directory with all that is given, and nothing else."""
        place = self.root / name
        shutil.copytree(self.given, place)
        for empty in ("out", "tmp", "cache"):
            (place / empty).mkdir()
        return place

    def command(
        self, stage: str, place: Path, kill: tuple[signal.Signals, float] | None = None
    ) -> Run:
        """Run a stage's command in a directory, and maybe kill it after so many seconds."""

        def run() -> None:
            from shearling.cli import main
            from shearling.commands import demo_run

            vars(demo_run)["_busy_cores"] = lambda: 0.0  # else how much text is taken is chance
            sys.argv = ["shearling", *(one.format(judge=self.judge) for one in STAGES[stage])]
            main()

        return self.forked(run, place, kill)

    def forked(
        self, work: Callable[[], None], place: Path,
        kill: tuple[signal.Signals, float] | None = None,
    ) -> Run:  # fmt: skip
        """Do some work in a process of its own, with its own temporary directory and cache."""
        said, (ready, begun) = self.root / "said", os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ready)
            _become(place, said)
            code = 1
            try:
                os.close(begun)
                work()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(begun)
        os.read(ready, 1)  # until the child has closed its end: from now on it works
        os.close(ready)
        return _waited(child, kill, said)


def _waited(child: int, kill: tuple[signal.Signals, float] | None, said: Path) -> Run:
    """Wait for a process, killing it on the way if asked."""
    started, status = time.perf_counter(), None
    while status is None:
        passed = time.perf_counter() - started
        if kill is not None and passed >= kill[1]:
            os.kill(child, kill[0])
            kill = None
        if passed > PATIENCE:
            os.kill(child, signal.SIGKILL)
        ended, code = os.waitpid(child, os.WNOHANG)
        status = code if ended else None
        time.sleep(0.002)
    seconds = time.perf_counter() - started
    return Run(os.waitstatus_to_exitcode(status), seconds, said.read_text(errors="replace"))


def _become(place: Path, said: Path) -> None:
    """Make a forked process look like one that a shell has started in a directory."""
    os.chdir(place)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= {"TMPDIR": str(place / "tmp"), "SHEARLING_CACHE": str(place / "cache"),
                   "SHEARLING_SCRATCH": str(place / "tmp"),
                   "LLAMA_CPP": str(place / "llama.cpp")}  # fmt: skip
    tempfile.tempdir = None
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's & switches off
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _make(given: Path) -> None:
    """Two models of one tokenizer, three texts and a store of them."""
    write_llama = importlib.import_module("tiny_tokenizer").write_llama
    for name, layers in (("model", 4), ("cut", 3)):
        file = write_llama(given / name, layers=layers) / "config.json"
        longer = json.loads(file.read_text()) | {"max_position_embeddings": 256}
        file.write_text(json.dumps(longer))
    importlib.import_module("tiny_store").write_store(given)
    (given / "prompts.txt").write_text("the sheep\nthe wool\nthe gate\n")
    lines = [json.dumps({"text": f"{n} sheep went through the gate to the hill " * 12}) for n in
             range(40)]  # fmt: skip
    (given / "hill.jsonl").write_text("\n".join(lines))
    # llama.cpp's converter is not installed everywhere: this one copies what was made before.
    home, load = given / "llama.cpp", importlib.import_module("shearling.model.loading").load_model
    home.mkdir()
    write_gguf = importlib.import_module("tiny_gguf").write_gguf
    write_gguf(load(given / "model"), home / "model.gguf", "llama")
    (home / "convert_hf_to_gguf.py").write_text(CONVERTER)


def _judge() -> str:
    """The address of a judge, in a process of its own, which likes the longer answer."""
    (ready, told), parent = os.pipe(), os.getpid()
    if os.fork() == 0:
        stub = importlib.import_module("judge_stub")
        os.write(told, stub.Stub(stub.longer).address.encode() + b"\n")
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(0)
    os.close(told)
    with os.fdopen(ready) as address:
        return address.readline().strip()


def _left_running(place: Path) -> list[str]:
    """Processes that were begun in a directory and are there two seconds later."""
    import psutil

    def there() -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                if Path(process.cwd()).is_relative_to(place):
                    found.append(" ".join(process.cmdline())[:80])
            except psutil.Error:  # gone meanwhile, or somebody else's
                continue
        return found

    until = time.monotonic() + 2
    while (left := there()) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def contents(place: Path) -> dict[str, str]:
    """What lies in a directory: of every file a digest, without times, and every directory."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        if name.startswith("cache/") and "partial" not in name:
            continue  # digests of files, named by when those were made
        found[name] = "" if path.is_dir() else _digest(path)
    return found


def _digest(path: Path) -> str:
    if path.name == "bench.json":  # nothing but times
        data = json.loads(path.read_text())["kind"]
    elif path.suffix == ".json":
        data = _timeless(json.loads(path.read_text()))
    elif path.suffix == ".jsonl" and path.name == "log.jsonl":
        data = [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
    elif path.suffix == ".jsonl" and "judgement" in path.as_posix():  # in any order
        lines = (_timeless(json.loads(line)) for line in path.read_text().splitlines())
        data = sorted(json.dumps(line, sort_keys=True) for line in lines)
    elif path.suffix == ".html":  # drawn from the rest, and dated
        return "page"
    else:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(one) for key, one in value.items() if key not in TIMES}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def differences(whole: dict[str, str], parts: dict[str, str]) -> list[str]:
    """What is missing, left over or other than after the undisturbed run."""
    return [
        *(f"{name} is missing" for name in whole.keys() - parts.keys()),
        *(f"{name} was left behind" for name in parts.keys() - whole.keys()),
        *(f"{name} differs" for name in whole.keys() & parts.keys() if whole[name] != parts[name]),
    ]


def drawn(stages: list[str], seed: int) -> Iterator[tuple[str, signal.Signals, float]]:
    """Stages and signals in turns, and a share of the undisturbed time."""
    number = 0
    while True:
        share = random.Random(f"{seed} {number}").random()
        yield stages[number % len(stages)], SIGNALS[number // len(stages) % len(SIGNALS)], share
        number += 1


def table(kills: list[dict[str, Any]]) -> str:
    """Per stage: kills by signal, how many came after the end, and faults; as Markdown."""
    lines = ["| stage | SIGKILL | SIGTERM | SIGINT | after its end | faults |",
             "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for stage in [*dict.fromkeys(kill["stage"] for kill in kills), None]:
        own = [kill for kill in kills if stage in (None, kill["stage"])]
        by = Counter(kill["signal"] for kill in own)
        counts = [by[sign.name] for sign in SIGNALS]
        counts += [sum(kill["late"] for kill in own), sum(bool(kill["faults"]) for kill in own)]
        lines.append(f"| {stage or 'all'} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def preload() -> None:
    """Import what commands import when they run, once."""
    import shearling

    for module in pkgutil.walk_packages(shearling.__path__, "shearling."):
        if not module.name.endswith(("__main__", "endpoint", "app", "serve", "harness")):
            importlib.import_module(module.name)
    for late in ("transformers.models.llama.modeling_llama", "torchao.quantization", "peft"):
        importlib.import_module(late)
    import torch

    torch.set_num_threads(1)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--stages", default=",".join(STAGES), help="separated by ;")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--anew", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    stages = list(STAGES) if given.stages == ",".join(STAGES) else given.stages.split(";")
    preload()
    from shearling.files.writer import write_json

    begun = time.perf_counter()
    before = json.loads(given.output.read_text()) if given.output.is_file() else {}
    kills = [] if given.anew else before.get("kills", [])
    with tempfile.TemporaryDirectory(prefix="kills-") as root:
        bench = Bench(Path(root))
        for number, (stage, sign, share) in enumerate(drawn(stages, given.seed)):
            if number < len(kills):
                continue
            if number >= given.kills or time.perf_counter() - begun > given.seconds:
                break
            kill = bench.kill(stage, sign, share)
            kills.append(asdict(kill))
            write_json(given.output, {"kind": "kills", "seed": given.seed, "kills": kills})
            for fault in kill.faults:
                print(f"{number} {stage}, {sign.name} at {share:.2f}: {fault}", flush=True)
    print(table(kills))
    print(f"{len(kills)} kills, {sum(bool(kill['faults']) for kill in kills)} with a fault")


if __name__ == "__main__":
    main()
