"""Result files about five models of SmolLM2-135M's size, as several commands would leave them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sample_run import BLOCK, EMBEDDING, SampleRun

from shearling.report.decide.selection import ComparedModel
from shearling.report.records.collect import read_directory
from shearling.report.records.records import Records

NAMES = ("SmolLM2-135M", "depth-24", "depth-24-healed", "depth-20", "int8")
BLOCKS = (30, 24, 24, 20, 30)
BYTES = (2.0, 2.0, 2.0, 2.0, 1.06)  # a parameter
FASTER = (1.0, 1.24, 1.24, 1.46, 0.93)
ACCURACY = (0.0, -0.052, -0.011, -0.13, -0.002)  # against the source's
PERPLEXITY = (17.3, 24.9, 17.9, 61.0, 17.4)
TASKS = {"arc_easy": (0.585, 2376), "openbookqa": (0.344, 500), "piqa": (0.681, 1838)}


@dataclass
class FiveModels:
    """Writes results; the files of each model lie in a directory of their own."""

    root: Path
    names: tuple[str, ...] = NAMES
    models: list[dict[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        self.models = [
            {"name": name, "fingerprint": f"{place:x}a7f" * 16}
            for place, name in enumerate(self.names)
        ]
        self.sample = SampleRun(self.root)
        self.sample.source = self.models[0]

    def write(self, name: str, kind: str, **values: Any) -> Path:
        return self.sample.write(name, kind, **values)

    def parameters(self, place: int) -> int:
        return EMBEDDING + BLOCK * BLOCKS[place]

    def candidates(self, *places: int) -> list[ComparedModel]:
        """The models as a command would have opened them; all of them by default."""
        return [
            ComparedModel(
                name=self.names[place],
                fingerprint=self.models[place]["fingerprint"],
                parameters=self.parameters(place),
                bytes=int(self.parameters(place) * BYTES[place]),
                shape=self.sample.shape(BLOCKS[place]),
                where=self.names[place],
            )
            for place in places or range(len(self.names))
        ]

    def records(self) -> Records:
        records = Records()
        read_directory(self.root, records, set())
        return records

    def write_all(self) -> FiveModels:
        for place in range(len(self.models)):
            self.write_evaluation(place)
            self.write_tasks(place)
            self.write_degeneration(place)
            self.write_generations(place)
        self.write_bench()
        self.write_manifests()
        self.sample.write_scores()
        self.sample.write_damage()
        self.write_healing()
        self.write_judgement()
        return self

    def write_evaluation(self, place: int, text: str = "wikitext", **changes: Any) -> None:
        values = {"window": 512, "windows": 32, "bos": False, "tokens": 16_352, "seconds": 9.0}
        figures = {"nll": math.log(PERPLEXITY[place]), "perplexity": PERPLEXITY[place]}
        self.write(
            f"{place}/evaluation-{text}.json", "evaluation", model=self.models[place],
            text=f"{text}.txt", **(values | figures | changes),
        )  # fmt: skip

    def write_tasks(self, place: int, *, stderr: bool = True, **names: float) -> None:
        """``names``: other accuracies than the usual."""
        tasks: dict[str, dict[str, Any]] = {}
        for name, (accuracy, questions) in TASKS.items():
            value = names.get(name, accuracy + ACCURACY[place])
            metrics: dict[str, Any] = {"acc": value - 0.02, "acc_norm": value}
            if stderr:
                error = math.sqrt(value * (1 - value) / questions)
                metrics |= {"acc_stderr": error, "acc_norm_stderr": error}
            tasks[name] = {"metrics": metrics, "primary": "acc_norm", "shots": 0} | {
                "samples": questions,
                "limit": None,
                "seconds": 61.0,
            }
        average = sum(one["metrics"]["acc_norm"] for one in tasks.values()) / len(tasks)
        self.write(
            f"{place}/tasks-mine.json", "tasks", model=self.models[place], suite="mine",
            tasks=tasks, average=average, versions={"lm_eval": "0.4.13"},
        )  # fmt: skip

    def write_degeneration(self, place: int) -> None:
        worse = -ACCURACY[place]
        people = {"distinct": {"1": 0.41, "2": 0.86, "3": 0.97}} | {"repetition_4": 0.02}
        self.write(
            f"{place}/degeneration.json", "degeneration", model=self.models[place],
            text="wikitext.txt", prompts=64, prompt_tokens=32, new_tokens=128,
            sampling={"temperature": 0.0, "top_p": 1.0, "seed": 0},
            distinct={"1": 0.3 - worse, "2": 0.61 - 2 * worse, "3": 0.72 - 2 * worse},
            repetition_4=0.21 + 2 * worse, loops=0.14 + 3 * worse,
            reference=people | {"loops": 0.0},
        )  # fmt: skip

    def write_generations(self, place: int) -> None:
        self.sample.write_generations(str(place), self.models[place], 1 if place in (0, 4) else 2)

    def write_bench(self, **changes: Any) -> None:
        def spread(median: float) -> dict[str, float]:
            return {"median": median, "min": median * 0.985, "max": median * 1.01}

        runs = [
            {"model": model, "engine": "transformers", "batch": 1, "prompt": 128, "new": 64}
            | {"repeats": 5, "prefill_tokens_per_s": spread(612.0 * faster)}
            | {"decode_tokens_per_s": spread(17.3 * faster), "peak_memory_bytes": 826_277_888}
            | {"first_token_ms": spread(209 / faster), "ms_per_token": spread(58 / faster)}
            for model, faster in zip(self.models, FASTER, strict=True)
        ]
        machine = {"cpu": "AMD EPYC 7B13", "threads": 2, "device": "cpu", "dtype": "float32"}
        values = {"machine": machine, "runs": runs, "ratios": []} | changes
        self.write("bench.json", "bench", **values)

    def write_manifests(self) -> None:
        order = self.sample.order
        for place in (1, 2, 3, 4):
            kept = sorted(order[30 - BLOCKS[place] :])
            parameters = self.parameters(place)
            changes: dict[str, Any] = {
                "stage": "prune",
                "bytes": int(parameters * BYTES[place]),
                "parameters": parameters,
            }
            if place == 2:
                parent = json.loads((self.root / "1/shearling.json").read_text())
                source: dict[str, Any] = {**self.models[1], "shape": self.sample.shape(24)}
                source |= {"parameters": parameters, "bytes": 2 * parameters}
                changes |= {"stage": "heal", "keep": {}, "proof": None, "parent": parent}
                changes |= {"source": source, "source_shape": self.sample.shape(24)}
            if place == 4:
                changes |= {"stage": "quantize", "keep": {}, "seed": None}
                changes |= {"options": {"to": "int8", "bits": 8, "stored_bits": 8}}
                changes |= {"proof": {"identical": True, "max_abs_difference": 0.31, "tokens": 64}}
            self.sample.write_manifest(f"{place}", self.models[place], kept, **changes)

    def write_healing(self) -> None:
        looks = [
            {
                "tokens": tokens,
                "seconds": tokens / 900,
                "losses": {"c4": 3.4 - 0.4 * tokens / 4e5, "code": 1.9 - 0.3 * tokens / 4e5},
                "weights": {"c4": 0.7, "code": 0.3},
            }
            for tokens in (0, 100_000, 200_000, 400_000)
        ]
        self.write(
            "2/healing/healing.json", "healing", model=self.models[2], recipe="cpt", looks=looks,
            reference=None,
        )  # fmt: skip

    def write_judgement(self) -> None:
        self.write(
            "judgement.json", "judgement", a=self.models[2], b=self.models[0], judge="a judge",
            prompts=200, wins=84, ties=21, losses=95, win_rate=0.4725, interval=[0.404, 0.541],
        )  # fmt: skip
