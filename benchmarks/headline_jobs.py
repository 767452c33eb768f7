"""Several shearling commands at once on one device, in order, for so long and no longer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from shearling.files.writer import write_json

SAVING = 15.0  # seconds before the end at which runs are told to save themselves
STARTING = 25.0  # seconds that the commands of a run take beside training, about


@dataclass(frozen=True)
class Step:
    """A shearling command.

    Attributes:
        label: of its seconds and its log.
        argv: behind ``shearling``.
        done: a file that is there when it has ended well.
        stdout: where what it prints goes, once it has ended well.
    """

    label: str
    argv: tuple[str, ...]
    done: Path
    stdout: Path | None = None


@dataclass(frozen=True)
class Job:
    """Commands one after the other, after other jobs.

    Attributes:
        name: of the job.
        steps: its commands.
        needs: jobs that come before it.
        work: tokens to train on, weighed by what one costs.
        shared: begun for the first that needs it, and not by itself.
    """

    name: str
    steps: tuple[Step, ...]
    needs: tuple[str, ...] = ()
    work: float = 0.0
    shared: bool = False

    @property
    def done(self) -> bool:
        """Whether all of its commands have ended well."""
        return all(step.done.exists() for step in self.steps)

    @property
    def left(self) -> float:
        """The work of what has not ended; a half-trained model counts as untrained."""
        training = [step for step in self.steps if step.label in ("gates", "healing")]
        return self.work * sum(not s.done.exists() for s in training) / max(1, len(training))


@dataclass
class _Running:
    job: Job
    step: Step
    process: subprocess.Popen[bytes]
    logs: tuple[IO[bytes], IO[bytes]]
    began: float  # the job, in this call
    left: float  # the job's work then
    started: float  # the step
    stopped: bool = False


@dataclass
class Machine:
    """What runs jobs.

    Attributes:
        logs: a folder for what commands say, and for their seconds.
        most_jobs: how many at once.
        ends: when all must have ended (of ``time.perf_counter``).
        most: seconds for one job.
        rate: tokens a second that all jobs together are thought to train on, until one has ended.
        threads: of the processor, for each command.
        seconds: job -> command -> seconds that it took, over all calls.
    """

    logs: Path
    most_jobs: int
    ends: float
    most: float
    rate: float
    threads: int = 2
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    _jobs: dict[str, Job] = field(default_factory=dict)
    _running: dict[str, _Running] = field(default_factory=dict)
    _over: set[str] = field(default_factory=set)  # failed or stopped, in this call
    _paces: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Go on with the seconds of earlier calls."""
        self.logs.mkdir(parents=True, exist_ok=True)
        file = self.logs / "seconds.json"
        self.seconds = json.loads(file.read_text()) if file.exists() else {}

    def hurry(self) -> None:
        """Stop: what runs is to save itself."""
        self.ends = min(self.ends, time.perf_counter() + SAVING)

    def run(self, jobs: list[Job], ended: Callable[[str], None]) -> list[str]:
        """Do them, telling ``ended`` of each that ended well; the names of those that did not."""
        self._jobs = {job.name: job for job in jobs}
        try:
            while True:
                now = time.perf_counter()
                late = now > self.ends - SAVING
                for running in list(self._running.values()):
                    if running.process.poll() is not None:
                        if self._end(running):
                            ended(running.job.name)
                    elif not running.stopped and (late or now - running.began > self.most):
                        running.stopped = True
                        running.process.terminate()
                while not late and len(self._running) < self.most_jobs:
                    job = self._next()
                    if job is None:
                        break
                    self._start(job, time.perf_counter(), job.left)
                if not self._running or now > self.ends:
                    break
                time.sleep(0.1)
        finally:
            for running in self._running.values():
                running.process.kill()
                running.process.wait()
        return [job.name for job in jobs if not job.done]

    def _next(self) -> Job | None:
        """The first job that can be begun, or what it waits for."""
        for job in self._jobs.values():
            taken = job.done or job.name in self._over or job.name in self._running
            if job.shared or taken or not self._fits(job):
                continue
            waiting = self._waiting(job)
            if self._over.intersection(waiting):
                continue
            for name in waiting:
                if name not in self._running and not self._waiting(self._jobs[name]):
                    return self._jobs[name]
            if not waiting:
                return job
        return None

    def _waiting(self, job: Job) -> list[str]:
        """What has to be done before a job still, deepest first."""
        names: list[str] = []
        for name in job.needs:
            if not self._jobs[name].done:
                names += [*self._waiting(self._jobs[name]), name]
        return names

    def _fits(self, job: Job) -> bool:
        """Whether the time left can hold it, going by what those that ended have taken."""
        training = sum(bool(running.job.work) for running in self._running.values())
        pace = max(self._paces) if self._paces else (training + 1) / self.rate
        left = self.ends - SAVING - time.perf_counter()
        return (STARTING if job.work else 5) + pace * job.left < left

    def _start(self, job: Job, began: float, left: float) -> None:
        """Begin the first of a job's commands that has not ended well."""
        step = next(step for step in job.steps if not step.done.exists())
        stem = f"{job.name}-{step.label}".replace(" ", "-")
        step.done.parent.parent.mkdir(parents=True, exist_ok=True)
        logs = (self.logs / f"{stem}.out").open("wb"), (self.logs / f"{stem}.err").open("ab")
        own = {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(
            [sys.executable, "-m", "shearling.cli", *step.argv], stdout=logs[0], stderr=logs[1],
            env=os.environ | own,
        )  # fmt: skip
        self._tell(f"{job.name}: {step.label}")
        self._running[job.name] = _Running(
            job, step, process, logs, began, left, time.perf_counter()
        )

    def _end(self, running: _Running) -> bool:
        """Take note of a command that ended; whether its job has ended well with it."""
        job, step = running.job, running.step
        del self._running[job.name]
        now = time.perf_counter()
        for log in running.logs:
            log.close()
        spent = self.seconds.setdefault(job.name, {})
        spent[step.label] = round(spent.get(step.label, 0.0) + now - running.started, 1)
        write_json(self.logs / "seconds.json", self.seconds)
        if step.stdout is not None and running.process.returncode == 0:
            step.stdout.parent.mkdir(parents=True, exist_ok=True)
            Path(running.logs[0].name).replace(step.stdout)
        if not step.done.exists():
            self._over.add(job.name)
            told = Path(running.logs[1].name).read_text(errors="replace")[-600:]
            why = "stopped" if running.stopped else f"failed ({running.process.returncode}): {told}"
            self._tell(f"{job.name}: {step.label} {why}")
            return False
        if not job.done and not running.stopped:
            self._start(job, running.began, running.left)
            return False
        if running.left and job.done:
            took = now - running.began
            self._paces.append(max(took / 2, took - STARTING) / running.left)
        self._tell(f"{job.name}: ended, {now - running.began:.0f} s")
        return job.done

    def _tell(self, sentence: str) -> None:
        left = self.ends - time.perf_counter()
        print(f"[{left:.0f} s left] {sentence}", flush=True)


__all__ = ["Job", "Machine", "Step"]
