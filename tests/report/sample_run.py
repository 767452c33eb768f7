"""Result files such as a run on SmolLM2-135M leaves behind, at any depth."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMMON = {"shearling": "0.1.0", "created": "2026-11-20T14:03:12Z"}
EMBEDDING, BLOCK = 28_312_128, 3_540_096  # parameters; SmolLM2-135M: 30 blocks make 134.5 M
PROMPTS = (
    ("The sheep went up the hill because", " the grass was greener there.", " the the hill was."),
    ("def is_even(n):", "\n    return n % 2 == 0\n", "\n    return n == 0\n    return n\n    re"),
)


@dataclass
class SampleRun:
    """Writes a run directory; a test may change or remove single files of it."""

    root: Path
    blocks: int = 30
    cut: int = 6
    source: dict[str, str] = field(
        default_factory=lambda: {"name": "SmolLM2-135M", "fingerprint": "9f2c" * 16}
    )

    def __post_init__(self) -> None:
        self.order = sorted(range(self.blocks), key=lambda index: self.score(index))
        self.kept = sorted(self.order[self.cut :])
        self.pruned = {"name": f"SmolLM2-{len(self.kept)}", "fingerprint": "41d7" * 16}

    def score(self, index: int) -> float:
        """Perplexity without a block: the first is vital, the middle hardly missed."""
        if index == 0:
            return 79_812.4
        if index == 1:
            return 398.6
        bowl = 4 * (index / (self.blocks - 1) - 0.55) ** 2
        return 37.1 + 58 * bowl**1.5 + 6 * (math.sin(7.3 * index) + 1)

    def write(self, name: str, kind: str, **values: Any) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"kind": kind, **COMMON, **values}), encoding="utf-8")
        return path

    def write_all(self) -> Path:
        self.write_scores()
        self.write_damage()
        for model, where, factor in ((self.source, "source", 1.0), (self.pruned, "results", 2.6)):
            self.write_evaluation(where, model, "encyclopedia", 35.9 * factor, 16_368)
            self.write_evaluation(where, model, "source code", 11.84 * factor**0.8, 16_368)
            self.write_generations(where, model, 1 if factor == 1 else 2)
        self.write_bench()
        self.write_manifest("pruned", self.pruned, self.kept)
        (self.root / "pruned/config.json").write_text('{"model_type": "llama"}')
        return self.root

    def shape(self, layers: int) -> dict[str, int]:
        return {"layers": layers, "hidden": 576, "heads": 9, "kv_heads": 3} | {
            "head_dim": 64,
            "mlp": 1536,
            "vocab": 49152,
        }

    def write_scores(self) -> None:
        common = {"model": self.source, "axis": "layers", "order": self.order, "seconds": 41.0}
        self.write(
            "scores-perplexity.json",
            "scores",
            criterion="perplexity",
            scores=[self.score(index) for index in range(self.blocks)],
            protected=[0, 1, self.blocks - 1],
            baseline_perplexity=35.9,
            calibration={"text": "encyclopedia", "windows": 32, "window": 512, "seed": 0},
            **common,
        )
        self.write(
            "scores-block-influence.json",
            "scores",
            criterion="block influence",
            scores=[0.03 + 0.4 / (1 + index) + 0.02 * (index % 5) for index in range(self.blocks)],
            protected=[],
            baseline_perplexity=None,
            calibration={"text": "encyclopedia", "windows": 32, "window": 512, "seed": 0},
            **common,
        )

    def write_damage(self) -> None:
        steps = range(self.cut + 5)
        curves = [
            {
                "criterion": name,
                "removed": [self.order[:step] for step in steps],
                "perplexity": [35.9 * math.exp(rate * step**1.15) for step in steps],
            }
            for name, rate in (
                ("block influence", 0.16),
                ("perplexity", 0.1222),
                ("taylor+", 0.2),
                ("random", 0.41),
            )
        ]
        self.write(
            "damage.json",
            "damage",
            model=self.source,
            text="encyclopedia",
            window=512,
            windows=32,
            curves=curves,
        )

    def write_evaluation(
        self, where: str, model: dict[str, str], text: str, perplexity: float, tokens: int
    ) -> None:
        self.write(
            f"{where}/evaluation-{text}.json",
            "evaluation",
            model=model,
            text=text,
            window=512,
            windows=32,
            bos=False,
            tokens=tokens,
            nll=math.log(perplexity),
            perplexity=perplexity,
            seconds=21.0,
        )

    def write_generations(self, where: str, model: dict[str, str], column: int) -> None:
        self.write(
            f"{where}/generations.json",
            "generations",
            model=model,
            sampling={"method": "greedy"},
            max_new_tokens=48,
            samples=[{"prompt": one[0], "text": one[column]} for one in PROMPTS],
        )

    def write_bench(self) -> None:
        def spread(median: float) -> dict[str, float]:
            return {"median": median, "min": median * 0.97, "max": median * 1.02}

        runs = [
            {
                "model": model,
                "batch": batch,
                "prompt": 128,
                "new": 64,
                "repeats": 3,
                "prefill_tokens_per_s": spread(612.3 * batch**0.4 * faster),
                "decode_tokens_per_s": spread(17.31 * batch**0.7 * faster),
                "peak_memory_bytes": int(826_277_888 * (1 + 0.05 * batch) / faster),
            }
            for batch in (1, 8)
            for model, faster in ((self.source, 1.0), (self.pruned, 1.21))
        ]
        machine = {"cpu": "AMD EPYC 7B13, 2 threads", "device": "cpu", "dtype": "float32"}
        self.write("bench.json", "bench", machine=machine, runs=runs)

    def write_manifest(
        self, directory: str, model: dict[str, str], kept: list[int], **changes: Any
    ) -> Path:
        parameters = EMBEDDING + BLOCK * self.blocks
        smaller = EMBEDDING + BLOCK * len(kept)
        values = {
            "model": model,
            "stage": "cut",
            "source": {
                **self.source,
                "shape": self.shape(self.blocks),
                "parameters": parameters,
                "bytes": 2 * parameters,
            },
            "keep": {"layers": kept},
            "shape": self.shape(len(kept)),
            "source_shape": self.shape(self.blocks),
            "parameters": smaller,
            "source_parameters": parameters,
            "bytes": 2 * smaller,
            "options": {"criterion": "perplexity", "remove": self.cut, "dtype": "bfloat16"},
            "seed": 0,
            "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
            "proof": {
                "max_abs_difference": 3.1e-06,
                "max_relative_difference": 2.2e-07,
                "tokens": 64,
                "loaded_with": "AutoModelForCausalLM",
                "passed": True,
            },
            "files": {},
            "seconds": 7.4,
            "parent": None,
        }
        return self.write(f"{directory}/shearling.json", "manifest", **{**values, **changes})
