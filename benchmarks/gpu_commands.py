"""The rows of benchmarks/gpu.py that run whole commands, each as a user gives it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpu_rows import GIB, LLAMA_2_7B, TINY, Bench, empty_cache, write_model
from shearling.model.checkpoint import Checkpoint
from shearling.model.resolve import resolve

SMOLLM2 = {
    "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
    "max_position_embeddings": 2048,
}  # fmt: skip


def text_file(bench: Bench) -> Path:
    """The documentation of this repository, one record a file."""
    docs = Path(__file__).resolve().parents[1]
    texts = [file.read_text() for file in sorted([*docs.glob("*.md"), *docs.glob("docs/*.md")])]
    file = bench.scratch / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def default_prune(bench: Bench) -> dict[str, Any]:
    """``shearling prune --params 0.8x`` with all defaults, start-up included."""
    return _command(bench, bench.path, "--params", "0.8x")


def default_prune_small(bench: Bench) -> dict[str, Any]:
    """The same of SmolLM2's shape, with random weights."""
    path = bench.scratch / "smollm2-shape"
    write_model(path, TINY if bench.tiny else SMOLLM2)
    return _command(bench, path, "--params", "0.8x")


def default_prune_capped(bench: Bench) -> dict[str, Any]:
    """The same within 1.3 times the weights."""
    return _command(bench, bench.path, "--params", "0.8x", "--memory", "17.5GB")


def default_prune_shallow(bench: Bench) -> dict[str, Any]:
    """Eight blocks of the same width with 12 GB, read one by one: what a block takes."""
    path = bench.scratch / "llama-7b-shallow"
    write_model(path, TINY if bench.tiny else LLAMA_2_7B | {"num_hidden_layers": 8})
    return _command(bench, path, "--params", "0.8x", "--memory", "12GB", "--stream")


def default_prune_pinned(bench: Bench) -> dict[str, Any]:
    """The same with 12 GiB of the device."""
    return _command(bench, bench.path, "--params", "0.8x", "--memory", "12GB")


def smollm2(bench: Bench) -> dict[str, Any]:
    """SmolLM2-135M itself: the default prune, and one without text of its own against a CPU's.

    Without a GPU it writes the other side of that comparison, for ``--reference``.
    """
    if bench.pieces is None or not list(bench.pieces.glob("smol.[0-9]*")):
        return {"not run": "SmolLM2's file is not in --pieces"}
    model = bench.scratch / "smollm2.gguf"
    if not model.exists():
        pieces = sorted(bench.pieces.glob("smol.[0-9]*"))
        model.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    text, shape = bench.pieces / "cal.jsonl", ("--shape", "layers=28,mlp=1243")
    alone = _command(bench, model, *shape, "--written", "0", text=text, then=_compared)
    if not torch.cuda.is_available():
        return alone
    whole = _command(bench, model, *shape, text=text, then=_perplexities)
    if bench.reference is not None:
        (there,) = [json.loads(bench.reference.read_text())["smollm2"]]
        alone["against_cpu"] = _against(alone, there)
        alone.pop("neurons")
    return {"without written text": alone, "all defaults": whole}


def _compared(bench: Bench, output: Path) -> dict[str, Any]:
    """Its perplexities, its blocks, and which neurons of them stayed."""
    source = Checkpoint.open(resolve(str(bench.scratch / "smollm2.gguf")))
    result = Checkpoint.open(output)
    removed = json.loads((output / "shearling.json").read_text())["options"]["removed"]
    blocks = [i for i in range(source.shape["layers"]) if i not in removed]
    neurons = []
    for after, before in enumerate(blocks):
        name = "model.layers.{}.mlp.up_proj.weight"  # repair leaves its rows as they are
        there = {row.tobytes(): i for i, row in enumerate(_rows(source, name.format(before)))}
        neurons.append([there[row.tobytes()] for row in _rows(result, name.format(after))])
    return {"removed": removed, "neurons": neurons} | _perplexities(bench, output)


def _rows(checkpoint: Checkpoint, name: str) -> Any:
    return dict(checkpoint.read([name]))[name].float().numpy()


def _perplexities(bench: Bench, output: Path) -> dict[str, Any]:
    """On 12 windows of 512 tokens of text that calibration never saw."""
    from shearling.evaluate.perplexity import Windows, evaluate

    assert bench.pieces is not None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = bench.pieces / "held.jsonl"
    return {"held_out_perplexity": evaluate(output, text, Windows(512, 12), device=device)[
        "perplexity"
    ]}  # fmt: skip


def _against(here: dict[str, Any], there: dict[str, Any]) -> dict[str, Any]:
    shared = [
        len(set(a) & set(b)) / len(a)
        for a, b in zip(here["neurons"], there["neurons"], strict=True)
    ]
    return {
        "same_blocks": here["removed"] == there["removed"],
        "same_neurons": sum(shared) / len(shared), "worst_block": min(shared),
        "perplexity_over_cpu": here["held_out_perplexity"] / there["held_out_perplexity"],
        "cpu_seconds": there["seconds"],
    }  # fmt: skip


def _command(
    bench: Bench, model: Path, *more: str, text: Path | None = None,
    then: Callable[[Bench, Path], dict[str, Any]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One command as a user gives it: its seconds, and the device's memory while it ran."""
    output = bench.scratch / "out"
    subprocess.run(["rm", "-rf", output], check=True)
    text = text or text_file(bench)
    small = ("--samples", "8", "--length", "64", "--written", "8") if bench.tiny else ()
    peak = _DevicePeak()
    command = [
        sys.executable, "-m", "shearling.cli", "prune", str(model), *more, "--calibration",
        str(text), "--output", str(output), *small,
    ]  # fmt: skip
    seconds, said = _said(command)
    used = peak.stop()
    manifest = json.loads((output / "shearling.json").read_text())
    more_figures = then(bench, output) if then else {}
    subprocess.run(["rm", "-rf", output], check=True)
    return {
        "seconds": seconds, "device_peak_gib": used, "shape": manifest["shape"],
        "proof": manifest["proof"], "said": said,
    } | more_figures  # fmt: skip


def _said(command: list[str]) -> tuple[float, list[str]]:
    """Run a command: its seconds, and its messages with the second at which each came."""
    started = time.perf_counter()
    said = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as it:
        assert it.stderr is not None
        try:
            for line in it.stderr:
                said.append(f"{time.perf_counter() - started:.1f} {line.strip()}")
                print(said[-1], flush=True)
        except BaseException:
            it.kill()
            raise
    if it.returncode:
        raise RuntimeError("\n".join(said[-20:]))
    return round(time.perf_counter() - started, 1), said


class _DevicePeak:
    """The most memory in use on the device, asked for every 50 ms; of all processes."""

    def __init__(self) -> None:
        self.most, self._going = 0, torch.cuda.is_available()
        empty_cache()
        self._before = self._used()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """GiB above what was in use before."""
        self._going = False
        self._thread.join()
        return round((self.most - self._before) / GIB, 2)

    def _used(self) -> int:
        if not torch.cuda.is_available():
            return 0
        free, total = torch.cuda.mem_get_info()
        return total - free

    def _watch(self) -> None:
        while self._going:
            self.most = max(self.most, self._used())
            time.sleep(0.05)


# Row -> seconds that it may take, and its function.
ROWS: dict[str, tuple[float, Callable[[Bench], dict[str, Any]]]] = {
    "default_prune": (150, default_prune),
    "default_prune_small": (60, default_prune_small),
    "default_prune_capped": (200, default_prune_capped),
    "default_prune_pinned": (300, default_prune_pinned),
    "default_prune_shallow": (100, default_prune_shallow),
    "smollm2": (150 if torch.cuda.is_available() else 3600, smollm2),
}
