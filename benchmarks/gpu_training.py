"""Training on a GPU: our steps against a bare PyTorch loop, in turns, and what fits in its memory.

    python benchmarks/gpu_training.py [--tiny] [--limit SECONDS] [--output FILE] [--rows A,B]
        [--card 80]

A model of 1.3 billion random weights (hidden 2,048, 24 blocks, vocabulary 32,000), sequences of
2,048 tokens. The bare loop is forward under bfloat16 autocast, cross-entropy, backward, clipping
and fused AdamW, its batches on the device already. Each row takes turns with it in the same
process, and has a time limit of its own; rows are written as they are done. The last row heals a
model of 6.4 billion parameters with a teacher of 8 billion. ``--tiny`` runs all of it at small
sizes on a CPU, to see that it runs; ``--card`` holds back what a larger card has more than so many
gigabytes. Writes results/gpu_training.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from shearling.data.store import Store
from shearling.engine.devices import own_device
from shearling.gates.attach import attach
from shearling.gates.bank import GateBank
from shearling.gates.learner import Learner
from shearling.model.checkpoint import Checkpoint
from shearling.train.build import blocks
from shearling.train.loop import Trainer
from shearling.train.objective import Objective
from shearling.train.optimiser import groups
from shearling.train.options import Options
from shearling.train.parallel import World
from shearling.train.setup import Training, fitted, mixed, prepare_blocks

RESULTS = Path(__file__).parent / "results"
STEPS = 2  # of a turn
TURNS = 6  # at most; the first warms up


@dataclass(frozen=True)
class Sizes:
    """Of a llama."""

    hidden: int = 2048
    layers: int = 24
    heads: int = 16
    kv_heads: int = 16
    mlp: int = 5504
    vocab: int = 32_000
    length: int = 2048


LARGE = Sizes()
TINY = Sizes(32, 2, 4, 2, 48, 256, 16)
LLAMA_8B = Sizes(4096, 32, 32, 8, 14_336, 128_256, 2048)
STUDENT = Sizes(4096, 32, 32, 8, 10_240, 128_256, 2048)  # 6.4 billion parameters


@dataclass
class Bench:
    """Where it runs, and what it has found.

    Attributes:
        device: what computes.
        scratch: for checkpoints' headers and a store of random tokens.
        limit: seconds of a row.
        output: the JSON.
        micro, batch: sequences at a time, and of a step.
    """

    device: torch.device
    scratch: Path
    sizes: Sizes
    limit: float
    output: Path
    micro: int = 2
    batch: int = 8
    result: dict[str, Any] = field(default_factory=dict)

    def note(self, name: str, row: dict[str, Any]) -> None:
        """Write a row down at once."""
        self.result.setdefault("rows", {})[name] = row
        self.save()
        print(f"{name}: {json.dumps(row)}", flush=True)

    def save(self) -> None:
        """Write all there is."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(self.result, indent=2) + "\n")


def main() -> None:
    """Run every row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--limit", type=float, default=40.0)
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_training.json")
    parser.add_argument("--rows", default=",".join([*ROWS, LARGEST]), help="which to take")
    parser.add_argument("--card", type=float, help="GB of the card to be taken to be there")
    given = parser.parse_args()
    rows = given.rows.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        held = held_back(given.card)
        result = run(Path(scratch), rows, tiny=given.tiny, limit=given.limit, output=given.output)
        print(f"{len(result['rows'])} rows; {held.numel() / 1e9:.0f} GB were held back")


def held_back(card: float | None) -> torch.Tensor:
    """Memory that nobody may have, so that a card of so many GB is left."""
    if card is None:
        return torch.empty(0)
    free, _ = torch.cuda.mem_get_info()
    return torch.empty(max(0, int(free - card * 1e9)), dtype=torch.uint8, device="cuda")


def run(
    scratch: Path, rows: list[str], *, tiny: bool, limit: float, output: Path
) -> dict[str, Any]:
    """The rows asked for, each written to ``output`` as soon as it is done."""
    device = torch.device("cpu") if tiny else own_device()
    if not tiny and device.type != "cuda":
        raise SystemExit("gpu_training.py needs a GPU; --tiny runs small sizes on a CPU")
    bench = Bench(device, scratch, TINY if tiny else LARGE, limit, output)
    torch.manual_seed(0)
    source = checkpoint(bench, bench.sizes)
    rate = matrix_rate(device, 256 if tiny else 8192)
    bench.result = {
        "device": str(device) if tiny else torch.cuda.get_device_name(device),
        "torch": torch.__version__, "parameters": source.parameters,
        "matrix_tflops": rate / 1e12, "batch": bench.batch, "micro": bench.micro,
        "length": bench.sizes.length,
    }  # fmt: skip
    bench.save()
    against_bare(bench, source, rows, tiny=tiny)
    free()
    if LARGEST in rows:
        attempt(bench, LARGEST, lambda: memory_row(bench, tiny=tiny))
    return bench.result


def against_bare(bench: Bench, source: Checkpoint, rows: list[str], *, tiny: bool) -> None:
    """The rows that take turns with the bare loop."""
    wanted = {name: make for name, make in ROWS.items() if name in rows}
    if not wanted:
        return
    bare = Bare(bench, source)
    for name, make in wanted.items():
        if not (tiny and make is compiled):  # a minute on a CPU, for nothing
            attempt(bench, name, partial(compared, bench, source, bare, make))


def attempt(bench: Bench, name: str, row: Callable[[], dict[str, Any]]) -> None:
    """A row, or why there is none."""
    started = time.perf_counter()
    try:
        found = row()
    except Exception as error:
        found = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
    bench.note(name, found | {"seconds_of_row": round(time.perf_counter() - started, 1)})
    free()


def matrix_rate(device: torch.device, size: int) -> float:
    """FLOPs a second of a large bfloat16 product."""
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        waited(device)
        started = time.perf_counter()
        torch.mm(a, b)
        waited(device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times[2:])


class Bare:
    """The loop that others are compared with."""

    def __init__(self, bench: Bench, source: Checkpoint) -> None:
        """A model and its optimiser."""
        self.bench, self.model = bench, random_model(source, bench.device)
        fused = {"fused": True} if bench.device.type == "cuda" else {}
        self.optimiser = torch.optim.AdamW(
            groups(self.model, 0.1), lr=1e-4, betas=(0.9, 0.95), **fused
        )
        sizes = bench.sizes
        self.ids = torch.randint(sizes.vocab, (bench.batch, sizes.length), device=bench.device)
        self.count = bench.batch * (sizes.length - 1)

    def step(self) -> None:
        """One update."""
        for ids in self.ids.split(self.bench.micro):
            with torch.autocast(self.bench.device.type, torch.bfloat16):
                logits = self.model(input_ids=ids, use_cache=False).logits
            loss = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
            )
            (loss / self.count).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


def healing(bench: Bench, source: Checkpoint, **changed: Any) -> Trainer:
    """Our step."""
    return made(bench, source, options(bench, **changed))


def own_choice(bench: Bench, source: Checkpoint) -> Trainer:
    """Our step with as many sequences at a time as memory is found to hold."""
    return made(bench, source, options(bench, micro=None, checkpointing=None))


def compiled(bench: Bench, source: Checkpoint) -> Trainer:
    """Our step, its blocks compiled."""
    return made(bench, source, options(bench, compile=True))


def gated(bench: Bench, source: Checkpoint) -> Trainer:
    """Our step with gates on every axis."""
    shape = source.shape
    after = shape.with_(
        layers=shape["layers"] - 1, hidden=shape["hidden"] // 8 * 7, mlp=shape["mlp"] // 8 * 6
    )
    bank = GateBank(source.layout, shape, after)
    learner = Learner(bank.to(bench.device), constraint="projection", rise=100, lr=0.2)
    return made(bench, source, options(bench), learner=learner)


def distilled(bench: Bench, source: Checkpoint) -> Trainer:
    """Towards a teacher of the same size."""
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    teacher = random_model(source, bench.device, dtype).requires_grad_(False)
    return made(bench, source, options(bench, recipe="distill"), teacher=teacher)


LARGEST = "8B teacher 6.4B student"
ROWS: dict[str, Callable[[Bench, Checkpoint], Trainer]] = {
    "healing": healing,
    "gates": gated,
    "distillation": distilled,
    "healing at its own micro": own_choice,
    "healing compiled": compiled,
}


def options(bench: Bench, **changed: Any) -> Options:
    """Of a run that is long enough."""
    dtype = "bfloat16" if bench.device.type == "cpu" else "auto"
    tokens = bench.batch * bench.sizes.length * 1000
    given = {
        "tokens": tokens, "batch": bench.batch, "micro": bench.micro, "checkpointing": False,
        "dtype": dtype,
    }  # fmt: skip
    return Options.model_validate(given | changed)


def made(
    bench: Bench, source: Checkpoint, given: Options, *, learner: Learner | None = None,
    teacher: Any = None,
) -> Trainer:  # fmt: skip
    """A trainer as `shearling heal` makes it, of random weights that no file holds."""
    world, store = World(device=bench.device), random_store(bench, source)
    training = Training(source, store, given, world=world, notify=print)
    model = random_model(source, bench.device, training.numbers.kept)
    if learner is not None:
        attach(source, model, learner.bank, once=bench.device.type == "cuda")
    fitting = fitted(training, empty_still=False, gated=learner is not None)
    prepare_blocks(blocks(source, model), fitting, given)
    objective = Objective(model, plain_head=source.plain_head, teacher=teacher, learner=learner)
    return Trainer(
        objective, store, given, mixed(store, given, None), bench.scratch / "run", {}, world,
        notify=print, micro=fitting.micro,
    )  # fmt: skip


def compared(
    bench: Bench, source: Checkpoint, bare: Bare, make: Callable[[Bench, Checkpoint], Trainer]
) -> dict[str, Any]:
    """Turns of the bare loop and of ours, until the time is up."""
    ends = time.perf_counter() + bench.limit
    before = allocated(bench.device)
    trainer = make(bench, source)
    pairs: list[tuple[float, float]] = []
    peak = 0
    for turn in range(TURNS):
        plain = seconds_of(bench.device, bare.step)
        reset_peak(bench.device)
        ours = seconds_of(bench.device, trainer.advance)
        peak = max(peak, peak_bytes(bench.device) - before)
        if turn:
            pairs.append((plain, ours))
        if time.perf_counter() > ends and pairs:
            break
    trainer.settle()
    trainer._reader.close()
    plain, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
    tokens = bench.batch * bench.sizes.length
    flops = flops_of_token(source, bench.sizes)
    rate = bench.result["matrix_tflops"] * 1e12
    return {
        "tokens_per_s": tokens / ours, "bare_tokens_per_s": tokens / plain,
        "speed_over_bare": statistics.median(a / b for a, b in pairs),
        "share_of_matrix_rate": tokens / ours * flops / rate,
        "bare_share_of_matrix_rate": tokens / plain * flops / rate,
        "peak_bytes": peak, "micro": trainer.micro, "turns": len(pairs),
    }  # fmt: skip


def memory_row(bench: Bench, *, tiny: bool) -> dict[str, Any]:
    """Whether a large student heals beside its teacher on one card."""
    try:
        import torchao
    except ImportError:
        return {"not run": "torchao, which has adamw8bit, is not installed"}
    if tiny:
        return {"not run": "torchao compiles its step, which takes a minute on a CPU"}
    ends = time.perf_counter() + bench.limit
    large = Bench(bench.device, bench.scratch / "large", STUDENT, bench.limit, bench.output)
    reset_peak(bench.device)
    before, (room, _) = allocated(bench.device), torch.cuda.mem_get_info()
    parent = checkpoint(large, LLAMA_8B)
    teacher = random_model(parent, bench.device, torch.bfloat16).requires_grad_(False)
    student = checkpoint(large, STUDENT)
    given = options(
        large, recipe="distill", optimizer="adamw8bit", weight_dtype="bfloat16", micro=None,
        checkpointing=None,
    )  # fmt: skip
    trainer = made(large, student, given, teacher=teacher)
    times = []
    while not times or (time.perf_counter() < ends and len(times) < 4):
        times.append(seconds_of(bench.device, trainer.advance, steps=1))
    trainer.settle()
    trainer._reader.close()
    return {
        "torchao": torchao.__version__, "student": student.parameters,
        "teacher": parent.parameters, "micro": trainer.micro,
        "peak_bytes": peak_bytes(bench.device) - before, "seconds_of_steps": times,
        "free_bytes_at_first": room,
        "tokens_per_s": large.batch * large.sizes.length / min(times),
    }  # fmt: skip


def flops_of_token(source: Checkpoint, sizes: Sizes) -> float:
    """Six for each weight that multiplies, and causal attention's products."""
    multiplying = source.parameters - sizes.vocab * sizes.hidden
    return 6.0 * multiplying + 6.0 * sizes.layers * sizes.length * sizes.hidden


def seconds_of(device: torch.device, step: Callable[[], None], steps: int = STEPS) -> float:
    """Seconds a step."""
    waited(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    waited(device)
    return (time.perf_counter() - started) / steps


def checkpoint(bench: Bench, sizes: Sizes) -> Checkpoint:
    """A model directory whose weights are a hole in a file: only its header is ever read."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = bench.scratch / f"llama-{sizes.mlp}"
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        hidden_size=sizes.hidden, num_hidden_layers=sizes.layers, intermediate_size=sizes.mlp,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocab, max_position_embeddings=sizes.length, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {
            "dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return Checkpoint.open(folder)


def random_model(
    source: Checkpoint, device: torch.device, dtype: torch.dtype = torch.float32
) -> Any:
    """Of a checkpoint's geometry, its weights made on the device."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(source.config, dtype=dtype)
    model.config.use_cache = False
    return model.eval()


def random_store(bench: Bench, source: Checkpoint) -> Store:
    """A token store of random tokens."""
    folder, sizes = bench.scratch / f"store-{bench.sizes.vocab}", bench.sizes
    if not folder.exists():
        draw = np.random.default_rng(0)
        parts = {"train": 8 * bench.batch, "held_out": 1}
        for part, rows in parts.items():
            (folder / "noise" / part).mkdir(parents=True)
            tokens = draw.integers(0, sizes.vocab, (rows, sizes.length)).astype("<u4")
            tokens.tofile(folder / "noise" / part / "tokens.bin")
        manifest = {
            "kind": "token-store", "version": 1, "length": sizes.length, "dtype": "uint32",
            "tokenizer": {"name": "none", "sha256": "0" * 64},
            "domains": {"noise": {part: {"sequences": rows} for part, rows in parts.items()}},
        }  # fmt: skip
        (folder / "store.json").write_text(json.dumps(manifest))
    return Store.open(folder)


def waited(device: torch.device) -> None:
    """All that the device was told is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device: torch.device) -> int:
    """Bytes in use on the device."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_bytes(device: torch.device) -> int:
    """Most bytes in use since the last reset."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    """Count anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def free() -> None:
    """Give back what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
