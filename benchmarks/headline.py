"""Whole runs at equal tokens: both papers' recipes and ours, cut and healed, on one GPU.

    python benchmarks/headline.py --model MODEL --store STORE --texts DIR --scratch DIR
        [--output FILE] [--limit SECONDS] [--jobs N] [--tokens N] [--only NAME,...] [--device cuda]
        [--dtype bfloat16] [--real WINDOWS]
    python benchmarks/headline.py --model MODEL --store STORE --texts DIR --scratch DIR --reduced
    python benchmarks/headline.py --tiny          # a small random model on a CPU, two minutes
    python benchmarks/headline.py --plot          # docs/headline.svg and the table of its page;
                                                  # with --reduced from the reduced runs

A run is a cut (``shearling prune``) or gates (``shearling learn``), then ``shearling heal``, then
``shearling eval``, each a command line of its own, as a user gives it; headline_runs.py has them
all. Every run has the same tokens (calibration, gates and healing together), 16,384 of them a step
(sequences of 512), and as many looks at the same held-out sequences. Peak rates: 5e-4 for all that
trains every weight, on text or from a teacher; 2e-3 for LoRA; 3e-4 while gates are trained, at
4,096 tokens a step, because gates need steps. Warm-up over 5 % of the steps (10 % with gates), then
a cosine.

Several runs share the device at once (``--jobs``), in the order of headline_runs.py. What several
need (the reference losses, a cut) is made once, by the first. No run is begun that the time left
cannot hold; at the end those that go on are stopped, save themselves, and are gone on with by the
next call, if SCRATCH is still there. A run is written to ``--output`` when it ends, unfinished ones
at the end; what is finished there is not done again. ``seconds`` of runs that shared the device do
not compare with those of a run that had it alone.

STORE is as headline_store.py makes it; DIR holds cal.jsonl, held.jsonl (both c4, of documents that
take no part in the other; calibration and perplexity) and wikitext2-test.txt.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

from headline_jobs import Job, Machine, Step
from headline_runs import REDUCED, Command, Run, Scale, parts, runs
from shearling.files.writer import write_json

RESULTS = Path(__file__).parent / "results"
TEXTS = {"c4": "held.jsonl", "wikitext2": "wikitext2-test.txt"}


@dataclass(frozen=True)
class Paths:
    """What is given, and where all that is made goes."""

    model: str
    store: Path
    texts: Path
    scratch: Path

    @property
    def reference(self) -> Path:
        """The source's own held-out losses."""
        return self.scratch / "reference.json"

    def part(self, name: str) -> Path:
        """A cut."""
        return self.scratch / "parts" / name

    def gated(self, name: str) -> Path:
        """What gates lead to."""
        return self.scratch / "gated" / name

    def healed(self, name: str) -> Path:
        """The end of a run."""
        return self.scratch / "healed" / name

    def perplexity(self, name: str) -> Path:
        """What ``shearling eval`` says of it."""
        return self.scratch / "perplexity" / f"{name}.json"


@dataclass(frozen=True)
class Bench:
    """All that jobs are made from."""

    paths: Paths
    scale: Scale
    device: str
    dtype: str = "auto"  # what training computes its products in

    def argv(self, command: Command, output: Path, cut: Path | None = None) -> tuple[str, ...]:
        """A command's words with what stands for paths in them."""
        places = {
            "MODEL": self.paths.model, "STORE": str(self.paths.store), "CUT": str(cut),
            "CALIBRATION": str(self.paths.texts / "cal.jsonl"),
            "REFERENCE": str(self.paths.reference),
        }  # fmt: skip
        words = (places.get(word, word) for word in command.words)
        trains = command.words[0] in ("learn", "heal")
        dtype = ("--dtype", self.dtype) if trains and self.dtype != "auto" else ()
        return (*words, "--output", str(output), "--device", self.device, *dtype)

    def jobs(self, wanted: list[str], table: dict[str, Run]) -> list[Job]:
        """What has to be done for some runs, in an order in which it can be."""
        paths, scale = self.paths, self.scale
        unpacked = paths.scratch / "inspected.json"
        inspect = Step("unpack", ("inspect", paths.model, "--json"), unpacked, unpacked)
        command = (
            "reference", paths.model, "--store", str(paths.store), "--sequences",
            str(scale.sequences), "--output", str(paths.reference), "--device", self.device,
        )  # fmt: skip
        measured = Step("reference", command, paths.reference)
        made = [
            Job("unpack", (inspect,), shared=True),
            Job("reference", (measured,), ("unpack",), shared=True),
        ]
        cuts = parts(scale)
        for name in dict.fromkeys(part for n in wanted if (part := table[n].part)):
            step = Step("cut", self.argv(cuts[name], paths.part(name)), _config(paths.part(name)))
            made.append(Job(_cut_job(name), (step,), ("unpack",), shared=True))
        source = (self._measured("source", paths.model),)
        own = [self._run(name, table[name]) for name in wanted]
        own.insert(5, Job("source", source, ("reference",)))
        return [*made, *own]

    def _run(self, name: str, run: Run) -> Job:
        paths, steps = self.paths, []
        cut = paths.gated(name) if run.part is None else paths.part(run.part)
        if run.gates is not None:
            steps.append(Step("gates", self.argv(run.gates, cut), _config(cut)))
        output = paths.healed(name)
        steps.append(Step("healing", self.argv(run.heal, output, cut), _config(output)))
        steps.append(self._measured(name, str(output)))
        needs = () if run.part is None else (_cut_job(run.part),)
        if run.part is None or "REFERENCE" in run.heal.words:
            needs = (*needs, "reference")
        return Job(name, tuple(steps), needs, run.cost * run.tokens)

    def _measured(self, name: str, model: str) -> Step:
        texts = [
            word for file in TEXTS.values() for word in ("--text", str(self.paths.texts / file))
        ]
        argv = (
            "eval", model, *texts, "--window", str(self.scale.length), "--max-windows",
            str(self.scale.windows), "--device", self.device, "--json",
        )  # fmt: skip
        output = self.paths.perplexity(name)
        return Step("perplexity", argv, output, output)


def _cut_job(name: str) -> str:
    """Of the job that makes a cut, the name."""
    return f"cut {name}"


def _config(model: Path) -> Path:
    """What a model's directory holds once it is whole."""
    return model / "config.json"


@dataclass
class Results:
    """The file of results: what earlier calls found, and what this one does."""

    file: Path
    bench: Bench
    table: dict[str, Run]
    machine: Machine

    @property
    def known(self) -> dict[str, Any]:
        """What the file says."""
        return json.loads(self.file.read_text()) if self.file.exists() else {}

    def have(self, name: str) -> bool:
        """Whether a run with as many tokens has its figures."""
        run = self.known.get("runs", {}).get(name, {})
        return bool(run.get("finished")) and (run["healing_tokens"] == self.table[name].heal.tokens)

    def write(self, name: str) -> None:
        """Add a run, ended or not, or what is known of the source."""
        from shearling.evaluate.speed import machine as described
        from shearling.model.manifest import stamp, versions

        known = self.known
        paths, scale = self.bench.paths, self.bench.scale
        reference = json.loads(paths.reference.read_text()) if paths.reference.exists() else {}
        source: dict[str, Any] = known.get("source") or {"losses": None, "perplexity": None}
        source |= {"losses": reference["losses"]} if reference else {}
        if perplexity := _perplexity(paths.perplexity("source")):
            source |= {"perplexity": perplexity}
        settings = {
            "tokens": scale.tokens, "tokens_a_step": scale.step, "length": scale.length,
            "sequences": scale.sequences, "windows": scale.windows, "jobs": self.machine.most_jobs,
            "dtype": self.bench.dtype,
        }  # fmt: skip
        found = known.get("runs", {})
        if name in self.table:
            found = found | {name: self.record(name)}
        found = {n: found[n] for n in [*self.table, *found] if n in found}
        about = stamp() | {"machine": described(), "versions": versions()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, about | {"settings": settings, "source": source, "runs": found})

    def record(self, name: str) -> dict[str, Any]:
        """A run: its commands, sizes, curves, and what it came to."""
        run, paths, spent = self.table[name], self.bench.paths, self.machine.seconds
        part = None if run.part is None else spent.get(_cut_job(run.part), {}).get("cut")
        own = spent.get(name, {})
        commands = [parts(self.bench.scale)[run.part]] if run.part else []
        commands += [command for command in (run.gates, run.heal) if command]
        before = own.get("gates", 0.0) if part is None else part
        return {
            "size": run.size, "title": run.title,
            "commands": [" ".join(("shearling", *command.words)) for command in commands],
            "calibration_tokens": run.calibration,
            "gate_tokens": run.gates.tokens if run.gates else 0,
            "healing_tokens": run.heal.tokens,
            "parameters": _manifest(paths.healed(name)).get("parameters"),
            "command_seconds": {"cut": part} | own,
            "finished": paths.perplexity(name).exists(),
            "perplexity": _perplexity(paths.perplexity(name)),
        } | _curve(run, paths.gated(name), paths.healed(name), before)  # fmt: skip


def _curve(run: Run, gated: Path, healed: Path, before: float) -> dict[str, Any]:
    """Held-out losses (nats) over tokens and seconds; a look has an entry in each list.

    ``before``: seconds of the commands before healing.
    """
    from shearling.train.finish import looks_at

    points: list[dict[str, Any]] = []
    phases = [("gates", [gated / "learning" / "gates"], run.calibration, 0.0)] if run.gates else []
    spent = run.calibration + (run.gates.tokens if run.gates else 0)
    folders = sorted(path for path in healed.glob("healing/*") if path.is_dir())
    for phase, logs, tokens, seconds in (*phases, ("healing", folders, spent, before)):
        points += [
            {"phase": phase, "tokens": tokens + look["tokens"],
             "seconds": round(seconds + look["seconds"], 1), "losses": look["losses"],
             "weights": look["weights"]}
            for look in looks_at([log for log in logs if log.is_dir()])
        ]  # fmt: skip
    domains = list(points[0]["losses"]) if points else []
    return {
        "phase": [point["phase"] for point in points],
        "tokens": [point["tokens"] for point in points],
        "seconds": [point["seconds"] for point in points],
        "loss": [round(sum(p["losses"].values()) / len(domains), 4) for p in points],
        "losses": {d: [round(p["losses"][d], 4) for p in points] for d in domains},
        "weights": {d: [round(p["weights"][d], 4) for p in points] for d in domains},
    }


def _manifest(model: Path) -> dict[str, Any]:
    file = model / "shearling.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _perplexity(file: Path) -> dict[str, float] | None:
    """Text -> perplexity."""
    if not file.exists():
        return None
    found = json.loads(file.read_text())["results"]
    return {
        name: round(one["perplexity"], 3) for name, one in zip(TEXTS, found, strict=True)
    }  # fmt: skip


def _clean(name: str, paths: Paths) -> None:
    """Remove the checkpoints of a run that is over: they are six times its model."""
    for folder in (paths.gated(name), paths.healed(name)):
        if (folder / "config.json").exists():
            for checkpoint in folder.glob("*/*/step-*"):
                shutil.rmtree(checkpoint)


def work(bench: Bench, machine: Machine, only: list[str] | None, output: Path) -> None:
    """Do what has not been done, as long as there is time."""
    table = runs(bench.scale)
    unknown = set(only or ()) - set(table)
    if unknown:
        raise SystemExit(f"{', '.join(sorted(unknown))} is no run; there are {', '.join(table)}")
    results = Results(output, bench, table, machine)
    wanted = [name for name in table if name in (only or table) and not results.have(name)]

    def ended(name: str) -> None:
        _clean(name, bench.paths)
        if name in table or name == "source":
            results.write(name)

    # Takes seconds, in which the first commands are begun.
    Thread(target=import_module, args=["shearling.train.finish"], daemon=True).start()
    unfinished = machine.run(bench.jobs(wanted, table), ended)
    for name in unfinished:
        begun = bench.paths.healed(name).exists() or bench.paths.gated(name).exists()
        if name in table and begun:
            results.write(name)
    print(f"not finished: {', '.join(unfinished) or 'none'}", flush=True)


def main() -> None:
    """Read what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="SmolLM2-135M: a .gguf file or a directory")
    parser.add_argument("--store", type=Path, help="as headline_store.py makes it")
    parser.add_argument("--texts", type=Path, help="cal.jsonl, held.jsonl, wikitext2-test.txt")
    parser.add_argument("--scratch", type=Path, help="where models are made and kept")
    parser.add_argument("--output", type=Path, help="default: results/headline.json")
    parser.add_argument("--only", help="runs to make, separated by commas")
    parser.add_argument("--tokens", type=int, help="of each run; default 5,000,000")
    parser.add_argument("--micro", type=int, help="sequences in memory at a time; default 32")
    parser.add_argument("--jobs", type=int, help="runs at once; default 6")
    parser.add_argument("--limit", type=float, default=240, help="seconds for all of this call")
    parser.add_argument("--most", type=float, default=900, help="seconds for one run")
    parser.add_argument("--rate", type=float, help="tokens a second that the device is thought of")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--real", type=int, help="windows, where nothing that is written is read")
    parser.add_argument("--dtype", default="auto", help="of training's products")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument("--reduced", action="store_true", help="what two cores give in two hours")
    parser.add_argument("--plot", action="store_true", help="draw what there are results of")
    given = parser.parse_args()
    started = time.perf_counter()
    file = "headline_reduced.json" if given.reduced else "headline.json"
    if given.plot:
        from plot_headline import main as plot

        plot(given.output or RESULTS / file, Path(__file__).parents[1] / "docs")
        return
    with tempfile.TemporaryDirectory() as temporary:
        scratch = given.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        if given.tiny:
            from headline_tiny import SCALE, make

            scale, device = SCALE, "cpu"
            model, store, texts = make(scratch / "tiny")
        else:
            if None in (given.model, given.store, given.texts):
                parser.error("give --model, --store and --texts, or --tiny")
            scale, device = (REDUCED, "cpu") if given.reduced else (Scale(), given.device)
            model, store, texts = given.model, given.store, given.texts
        changed = {
            k: v for k in ("tokens", "micro", "real") if (v := getattr(given, k)) is not None
        }
        bench = Bench(
            Paths(model, store, texts, scratch), replace(scale, **changed), device, given.dtype
        )
        machine = Machine(
            scratch / "logs", given.jobs or (2 if device == "cpu" else 6), started + given.limit,
            given.most, given.rate or (2_000 if given.tiny else 50 if given.reduced else 300_000),
            threads=1 if given.reduced else 2,
        )  # fmt: skip
        signal.signal(signal.SIGTERM, lambda *_: machine.hurry())
        output = given.output or (scratch if given.tiny else RESULTS) / file
        work(bench, machine, given.only.split(",") if given.only else None, output)
        if given.tiny and output.exists():
            from plot_headline import main as plot

            plot(output, scratch)


if __name__ == "__main__":
    main()
