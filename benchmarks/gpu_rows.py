"""The rows of benchmarks/gpu.py: each a function that gives figures.

Shapes: N sequences of S tokens.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from shearling.engine.place import Need, Place, Wish
from shearling.engine.removals import removal_nll
from shearling.engine.stream import BlockStream
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.cut import cut
from shearling.pruning.proof import prove
from shearling.repair.refit import refit
from shearling.scoring.blocks.repair import repair as repair_criterion
from shearling.scoring.score_units import score_units
from shearling.table.values import Keep

LLAMA_2_7B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000,
    "max_position_embeddings": 4096,
}  # fmt: skip
TINY = {
    "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 352, "vocab_size": 300,
    "max_position_embeddings": 512,
}  # fmt: skip
GIB = 2**30


@dataclass
class Bench:
    """What the rows share.

    Attributes:
        scratch: where models are put.
        tiny: a small model in place of the 7B.
        pieces: a folder with SmolLM2's GGUF file in pieces, ``smol.00`` and so on, the text
            ``cal.jsonl`` to calibrate on and ``held.jsonl`` to evaluate on.
        reference: what row ``smollm2`` wrote on a CPU.
    """

    scratch: Path
    tiny: bool
    pieces: Path | None
    reference: Path | None = None

    @cached_property
    def path(self) -> Path:
        """The 7B model with random weights, made on the device and written once."""
        path = self.scratch / ("tiny" if self.tiny else "llama-7b")
        if not (path / "done").exists():
            write_model(path, TINY if self.tiny else LLAMA_2_7B)
            (path / "done").touch()
        return path

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The same, opened."""
        return Checkpoint.open(self.path)

    def place(self, dtype: str = "auto", need: Need | None = None, **changes: Any) -> Place:
        """The best place for it, with some things otherwise."""
        return replace(Place.best(self.checkpoint, Wish(dtype=dtype), need), **changes)

    def ids(self, sequences: int, length: int, seed: int = 0) -> Tensor:
        """Random tokens (N, S)."""
        generator = torch.Generator().manual_seed(seed)
        vocab = self.checkpoint.shape["vocab"]
        return torch.randint(vocab, (sequences, length), generator=generator)


def machine() -> dict[str, Any]:
    """The card and the versions."""
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "gpu": gpu, "cores": os.cpu_count(), "torch": torch.__version__,
        "transformers": transformers.__version__,
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
    }  # fmt: skip


def empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What ``work`` gives, its seconds, and the device's peak in GiB while it ran."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    started = time.perf_counter()
    result = work()
    synchronize()
    figures = {"seconds": round(time.perf_counter() - started, 3)}
    if torch.cuda.is_available():
        figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
    return result, figures


def write_model(path: Path, sizes: dict[str, Any]) -> None:
    """A Llama with random weights of bfloat16, and a tokenizer of one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, tie_word_embeddings=False)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path, max_shard_size="3GB")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(path)


# --- rows ----------------------------------------------------------------------------------------


def matrix_product(bench: Bench) -> dict[str, Any]:
    """The rate of a large bfloat16 product on random data: the floor of everything."""
    if not torch.cuda.is_available():
        return {"tflops": 0.1}
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize()
    started = time.perf_counter()
    for _ in range(20):
        a @ b
    synchronize()
    seconds = (time.perf_counter() - started) / 20
    return {"tflops": round(2 * 8192**3 / seconds / 1e12, 1)}


def correct(bench: Bench) -> dict[str, Any]:
    """A small model on the device against the processor, and every place against another."""
    path = bench.scratch / "small"
    write_model(path, TINY)
    checkpoint = Checkpoint.open(path)
    generator = torch.Generator().manual_seed(1)
    ids_NS = torch.randint(300, (16, 64), generator=generator)
    keep = Keep({"layers": (0, 1, 3, 4, 5)})
    removals = [frozenset(), *(frozenset({i}) for i in range(6))]

    def figures(place: Place) -> tuple[list[float], list[float], Any]:
        stream = BlockStream(checkpoint, place)
        nll = removal_nll(stream, ids_NS, removals)
        with tempfile.TemporaryDirectory() as folder:
            solved = refit(stream, keep, ids_NS, Path(folder))
        units = score_units(stream, "fisher-energy", ids_NS, ["mlp"])["mlp"]
        rows = getattr(units, "rows", None) or getattr(units, "values", None)
        return nll, [step.error_after for step in solved.steps], torch.tensor(rows)

    def furthest(a: Any, b: Any) -> float:
        pairs = [
            (torch.as_tensor(x).double(), torch.as_tensor(y).double())
            for x, y in zip(a, b, strict=True)
        ]
        return max(float(((x - y).abs() / y.abs().clamp_min(1e-3)).max()) for x, y in pairs)

    reference = figures(Place.cpu())
    device = Place.best(checkpoint).device
    base = Place(device, states="device")
    places = {
        "float32": base,
        "pinned, host": replace(base, weights="pinned", states="host"),
        "disk": replace(base, weights="disk", states="disk"),
        "tf32": replace(base, tf32=True),
        "bfloat16": replace(base, dtype=torch.bfloat16, tf32=True),
    }
    if device.type == "cpu":
        del places["pinned, host"]
    results = {name: figures(place) for name, place in places.items()}
    found = {name: furthest(result, reference) for name, result in results.items()}
    same = {
        f"{name} is float32's": furthest(results[name], results["float32"])
        for name in ("pinned, host", "disk")
        if name in results
    }
    top = {}
    for name, result in results.items():
        kept = [set(row.topk(280).indices.tolist()) for row in result[2]]
        wanted = [set(row.topk(280).indices.tolist()) for row in reference[2]]
        shared = [len(a & b) / 280 for a, b in zip(kept, wanted, strict=True)]
        top[name] = round(min(shared), 4)
    return {"furthest_from_cpu": found, **same, "same_neurons": top}


def naive(bench: Bench) -> dict[str, Any]:
    """A removal as the released script does it: built anew from its checkpoint, run with batch 1.

    The files are in the page cache and go straight to the device.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    ids_NS = bench.ids(10, 128)
    place = bench.place()
    device = place.device
    seconds = []
    for removed in (1, config_depth(bench) - 2):
        synchronize()
        started = time.perf_counter()
        original: Any = AutoModelForCausalLM.from_pretrained(
            bench.path, dtype=torch.bfloat16, **place.loading()
        )
        state = original.state_dict()
        config = AutoConfig.from_pretrained(bench.path)
        config.num_hidden_layers -= 1
        with torch.device(device):
            pruned: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        pruned.load_state_dict(_without(state, removed), strict=True)
        with torch.no_grad():
            for ids_S in ids_NS.to(device):
                logits = pruned(ids_S[None]).logits.float()
                float(torch.nn.functional.cross_entropy(logits[0, :-1], ids_S[1:]))
        synchronize()
        seconds.append(round(time.perf_counter() - started, 3))
        del original, pruned, state
        empty_cache()
    depth = config_depth(bench)
    return {"seconds_a_block": seconds, "seconds_all_blocks": round(min(seconds) * depth, 1)}


def config_depth(bench: Bench) -> int:
    return bench.checkpoint.shape["layers"]


def _without(state: dict[str, Tensor], removed: int) -> dict[str, Tensor]:
    found = {}
    for name, tensor in state.items():
        head, _, rest = name.partition("model.layers.")
        if rest and not head:
            number, _, inner = rest.partition(".")
            if int(number) == removed:
                continue
            name = f"model.layers.{int(number) - (int(number) > removed)}.{inner}"
        found[name] = tensor
    return found


def removals(bench: Bench) -> dict[str, Any]:
    """Perplexity of all removals, 10 x 128 tokens."""
    ids_NS = bench.ids(10, 128)
    shape = bench.checkpoint.shape
    depth = shape["layers"]
    wanted = [frozenset(), *(frozenset({block}) for block in range(depth))]
    layout = bench.checkpoint.layout
    block_runs = sum(index + 1 for index in range(depth)) + depth
    flops = 2 * ids_NS.numel() * (
        block_runs * layout.count_block(shape) + len(wanted) * shape["vocab"] * shape["hidden"]
    )  # fmt: skip
    found: dict[str, Any] = {
        "floor_seconds": round(flops / matrix_product(bench)["tflops"] / 1e12, 3)
    }
    nll = {}
    places = {
        "bfloat16": bench.place("bfloat16"),
        "tf32": bench.place("float32", tf32=True),
        "float32": bench.place("float32"),
        "bfloat16 streamed": bench.place("bfloat16", weights="disk", states="host"),
    }
    for name, place in places.items():
        stream = BlockStream(bench.checkpoint, place)
        removal_nll(stream, ids_NS[:1], [frozenset()])  # loads the weights that stay
        nll[name], found[name] = timed(lambda s=stream: removal_nll(s, ids_NS, wanted))
        if name == "bfloat16":
            again = [timed(lambda s=stream: removal_nll(s, ids_NS, wanted))[1] for _ in range(2)]
            found["bfloat16 again"] = [each["seconds"] for each in again]
        del stream
        empty_cache()
    for name in nll:
        found[name]["furthest_nll_from_float32"] = max(
            abs(a - b) for a, b in zip(nll[name], nll["float32"], strict=True)
        )
    return found


def fisher_energy(bench: Bench) -> dict[str, Any]:
    """fisher-energy of all neurons, 64 x 256 tokens."""
    ids_NS = bench.ids(64, 256)
    stream = BlockStream(bench.checkpoint, bench.place(states="device"))
    removal_nll(stream, ids_NS[:1], [frozenset()])
    return timed(lambda: score_units(stream, "fisher-energy", ids_NS, ["mlp"]))[1]


def runs_of_two(bench: Bench) -> dict[str, Any]:
    """The repair criterion for runs of two blocks, 64 x 256 tokens."""
    ids_NS = bench.ids(64, 256)
    stream = BlockStream(bench.checkpoint, bench.place(states="device"))
    removal_nll(stream, ids_NS[:1], [frozenset()])
    return timed(lambda: repair_criterion(stream, ids_NS, protected=(), remove=2))[1]


def _keep(bench: Bench) -> Keep:
    """Two blocks and 15 % of the neurons gone."""
    shape = bench.checkpoint.shape
    layers = tuple(i for i in range(shape["layers"]) if i not in (2, 3))
    kept = tuple(range(int(shape["mlp"] * 0.85)))
    return Keep({"layers": layers}, {"mlp": (kept,) * len(layers)})


def repair(bench: Bench) -> dict[str, Any]:
    """A repair on 384 x 256 tokens, then the cut and its proof."""
    sequences = 16 if bench.tiny else 384
    ids_NS, keep = bench.ids(sequences, 256), _keep(bench)
    place = bench.place(states="device")
    stream = BlockStream(bench.checkpoint, place)
    removal_nll(stream, ids_NS[:1], [frozenset()])
    output = bench.scratch / "repaired"
    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
        solved, figures = timed(partial(refit, stream, keep, ids_NS, Path(folder)))
        del stream
        empty_cache()
        marks: dict[str, float] = {}

        def mark(stage: str, done: float, total: float, /) -> None:
            marks.setdefault(stage, time.perf_counter())

        written, of_cut = timed(
            lambda: cut(
                bench.checkpoint, keep, output, replaced=solved.replaced, place=place, progress=mark
            )
        )
    proof = prove(bench.checkpoint, keep, written, changed=solved.replaced.keys(), place=place)
    subprocess.run(["rm", "-rf", output], check=True)
    return {
        "repair": figures, "cut_and_proof": of_cut,
        "error_after": [round(step.error_after, 4) for step in solved.steps][:4],
        "proof": proof.max_relative_difference, "proof_loaded_with": proof.loaded_with,
    }  # fmt: skip


# Row -> seconds that it may take, and its function; gpu_commands.py has those of whole commands.
ROWS: dict[str, tuple[float, Callable[[Bench], dict[str, Any]]]] = {
    "matrix_product": (20, matrix_product),
    "correct": (60, correct),
    "removals": (90, removals),
    "naive": (60, naive),
    "fisher_energy": (40, fisher_energy),
    "runs_of_two": (60, runs_of_two),
    "repair": (120, repair),
}
