"""What llama.cpp itself computes with exported files of every family, whole and cut.

``LLAMA_CPP`` names a directory of llama.cpp's source with ``llama-server`` built in it; other
tests have a stand-in for it. Sizes are such as llama.cpp can run: what else it wants of an
architecture is in the families' facts, and refused by a sentence (test_gguf_limits.py).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_cpp_driver import DRIVER

from shearling.model.checkpoint import Checkpoint
from shearling.pruning.cut import cut
from shearling.ship.computes import check_computes, check_counted
from shearling.ship.converter import arguments, linked
from shearling.ship.llama_run import SERVER, run_and_compare
from shearling.ship.readback import open_back, prove
from shearling.table.families import FAMILIES
from shearling.table.values import Keep
from tiny_models import HYBRIDS, MIXTURES, VARIANTS
from tiny_tokenizer import VOCAB, byte_tokenizer

HOME = Path(os.environ.get("LLAMA_CPP", ""))
REAL = (HOME / "convert_hf_to_gguf.py").is_file() and (HOME / "build" / "bin" / SERVER).is_file()
pytestmark = pytest.mark.skipif(not REAL, reason="LLAMA_CPP has no llama-server built in it")

# Nats: the mean over the likeliest tokens of four texts, and the largest, all in 32 bits. What is
# measured is 1e-6 to 2e-5, and 4e-4 to 8e-4 where llama.cpp has a table of GELU in 16 bits.
MEAN, LARGEST, TABLED = 1e-4, 1e-3, 20
GELU = ("gemma2", "gemma3", "gpt_neox")
SIZES = {
    "vocab_size": VOCAB + 3, "bos_token_id": 256, "eos_token_id": 257, "hidden_size": 48,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "intermediate_size": 40,
    "num_hidden_layers": 5,
}  # fmt: skip


@dataclass(frozen=True)
class Tried:
    """A model that is exported and run, and what is cut of it.

    Attributes:
        variant: in tiny_models.
        has: what its configuration has otherwise.
        lacks: keys that it has not.
        remove: blocks that go.
        shape: sizes after the cut.
    """

    variant: str
    has: dict[str, Any] = field(default_factory=dict)
    lacks: tuple[str, ...] = ()
    remove: tuple[int, ...] = (1,)
    shape: str = "hidden=40,heads=4,kv_heads=2,mlp=24"


WHOLE = "hidden=32,heads=4,kv_heads=2,mlp=24"  # heads fill the stream
SPARSE = "hidden=40,heads=4,kv_heads=2,experts=4,expert_mlp=8"
DELTA = {"rms_norm_eps": 1e-6, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
WIDE = DELTA | {"head_dim": 32, "attention_bias": False}  # as many channels as rotary sections
LLLG = ["sliding_attention"] * 3 + ["full_attention"]
TRIED = {
    "llama": Tried("llama"),
    "llama-tied": Tried("llama-tied"),
    "llama-biases": Tried("llama-biases", shape=WHOLE),
    "mistral": Tried("mistral", {"sliding_window": None}),
    "qwen2": Tried("qwen2", {"use_sliding_window": False}, shape=WHOLE),
    "qwen3": Tried("qwen3", {"attention_bias": False}),
    "gemma2": Tried("gemma2", {"query_pre_attn_scalar": 8}, remove=(3, 4), shape=WHOLE),
    "gemma3": Tried(
        "gemma3", {"query_pre_attn_scalar": 8, "sliding_window_pattern": 6, "num_hidden_layers": 8},
        remove=(6, 7), shape=WHOLE,
    ),
    "phi3": Tried("phi3", {"sliding_window": None}, shape=WHOLE),
    "smollm3": Tried(
        "smollm3", {"no_rope_layers": [1, 1, 1, 0] * 2, "num_hidden_layers": 8} | {
            "use_sliding_window": False}, remove=(1, 3, 5, 6),
    ),
    "ministral3": Tried(
        "ministral3", {"sliding_window": None} | {"rope_parameters": {
            "type": "yarn", "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0,
            "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.3, "mscale": 1.0,
            "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0,
        }},
    ),
    "olmo2": Tried("olmo2", shape=WHOLE),
    "olmo3": Tried(
        "olmo3", {"attention_bias": False, "num_hidden_layers": 8}, remove=(1, 4, 5, 7),
        shape=WHOLE,
    ),
    "granite": Tried("granite", shape=WHOLE),
    "granitemoehybrid": Tried(
        "granitemoehybrid", {"shared_intermediate_size": 40, "num_experts_per_tok": 0}, shape=WHOLE
    ),
    "glm4": Tried("glm4"),
    "cohere2": Tried("cohere2", {"num_hidden_layers": 8}, remove=(1, 3, 5, 6), shape=WHOLE),
    "exaone4": Tried(
        "exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 5}, shape=WHOLE
    ),
    "exaone4-slides": Tried(
        "exaone4", {"num_hidden_layers": 64, "layer_types": LLLG * 16}, remove=(), shape=WHOLE
    ),
    "ernie4_5": Tried("ernie4_5", {"use_bias": False}),
    "hunyuan_v1_dense": Tried("hunyuan_v1_dense", {
        "max_position_embeddings": 32768, "rope_parameters": {
            "rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0, "rope_theta": 10000.0,
        },
    }),
    "seed_oss": Tried("seed_oss", {"attention_out_bias": False, "mlp_bias": False}),
    "gpt_neox": Tried(
        "gpt_neox", lacks=("head_dim", "num_key_value_heads"), shape="hidden=32,heads=4,mlp=24"
    ),
    "mixtral": Tried("mixtral", shape=SPARSE),
    "qwen3_moe": Tried("qwen3_moe", shape=SPARSE),
    "qwen2_moe": Tried(
        "qwen2_moe", {"decoder_sparse_step": 1}, shape=SPARSE.replace("hidden=40", "hidden=32")
    ),
    "olmoe": Tried(
        "olmoe", {"num_key_value_heads": 6},
        shape="hidden=32,heads=4,kv_heads=4,experts=4,expert_mlp=8",
    ),
    "granitemoe": Tried("granitemoe", shape="hidden=32,heads=4,kv_heads=2,experts=4"),
    "gpt_oss": Tried(
        "gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        remove=(3, 4), shape="hidden=40,heads=4,kv_heads=2,experts=4",
    ),
    "gpt_oss-yarn": Tried(
        "gpt_oss", {"head_dim": 64, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "truncate": True, "original_max_position_embeddings": 4096,
        }},
        remove=(3, 4), shape="hidden=40,heads=4,kv_heads=2,experts=4",
    ),
    "glm4_moe": Tried("glm4_moe", shape="hidden=40,heads=4,kv_heads=2,experts=4"),
    "glm4_moe_lite": Tried(
        "glm4_moe_lite", {"num_key_value_heads": 6, "rope_interleave": True}, ("head_dim",),
        shape="hidden=40,heads=4,experts=4",
    ),
    "ernie4_5_moe": Tried(
        "ernie4_5_moe", {"moe_layer_end_index": 4, "intermediate_size": 72},
        shape="hidden=40,heads=3,experts=4",
    ),
    "minimax_m2": Tried(
        "minimax_m2", {"rotary_dim": 4, "intermediate_size": 20},
        shape="hidden=40,heads=4,kv_heads=2,experts=4,expert_mlp=8",
    ),
    "deepseek_v3": Tried(
        "deepseek_v3", {"num_key_value_heads": 6}, ("head_dim",),
        shape="hidden=40,heads=4,experts=9",
    ),
    "deepseek_v3-moonlight": Tried(
        "deepseek_v3-moonlight", {"num_key_value_heads": 6, "num_hidden_layers": 27}, ("head_dim",),
        shape="hidden=40,heads=4,experts=4",
    ),
    "qwen3_next": Tried("qwen3_next", DELTA, shape=SPARSE + ",linear_heads=2"),
    "qwen3_5": Tried("qwen3_5", WIDE, shape="hidden=40,heads=4,kv_heads=2,mlp=24,linear_heads=2"),
    "qwen3_5-alike": Tried(
        "qwen3_5-tied", WIDE,
        shape="hidden=40,heads=4,kv_heads=2,mlp=24,linear_heads=2",
    ),
    "qwen3_5_moe": Tried(
        "qwen3_5_moe", WIDE, shape=SPARSE + ",linear_heads=2"
    ),
}  # fmt: skip
Made = Callable[[str, str], tuple[Checkpoint, Path]]


def write_model(tried: Tried, path: Path) -> Checkpoint:
    """A tiny model of random values with a tokenizer."""
    import transformers

    kind, arguments = (VARIANTS | MIXTURES | HYBRIDS)[tried.variant]
    named = {k: v for k, v in {**arguments, **SIZES, **tried.has}.items() if k not in tried.lacks}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**named), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(path)
    write_tokenizer(path)
    return Checkpoint.open(path)


def write_tokenizer(path: Path) -> None:
    """One token a byte and one that is merged: llama.cpp opens no tokenizer without merges."""
    byte_tokenizer().save_pretrained(path)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    file = path / "tokenizer.json"
    raw = json.loads(file.read_text())
    more = {"Ġt": 258, "<unk>": 259, "<|endoftext|>": 260}  # the latter looked for in a Phi-3's
    raw["model"] |= {"vocab": raw["model"]["vocab"] | more, "merges": [["Ġ", "t"]]}
    file.write_text(json.dumps(raw))


def smaller(source: Checkpoint, tried: Tried, path: Path) -> Checkpoint:
    """A cut of it on all axes, of units at random."""
    draw, shape, axes = random.Random(0), source.shape, source.layout.axis
    sizes = {name: int(size) for name, size in (each.split("=") for each in tried.shape.split(","))}

    def kept(name: str) -> tuple[int, ...]:
        """Units of an axis in a block, equally many in each of the units around them."""
        axis, size = axes[name], sizes.get(name, shape[name])
        if axis.inside is None:
            return tuple(sorted(draw.sample(range(shape[name]), size)))
        around = chosen.get(axis.inside) or range(shape[axis.inside])
        every = shape[name] if axis.of_each else shape[name] // shape[axis.inside]
        now = size if axis.of_each else size // len(around)
        return tuple(
            unit * every + own for unit in around for own in sorted(draw.sample(range(every), now))
        )

    layers = tuple(block for block in range(shape["layers"]) if block not in tried.remove)
    blocks: dict[str, list[tuple[int, ...]]] = {}
    for _ in layers:
        chosen: dict[str, tuple[int, ...]] = {}
        for name in sorted(sizes.keys() - {"hidden"}, key=lambda name: bool(axes[name].inside)):
            chosen[name] = kept(name)
            blocks.setdefault(name, []).append(chosen[name])
    model = {"layers": layers, "hidden": kept("hidden")}
    return cut(source, Keep(model, {name: tuple(each) for name, each in blocks.items()}), path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Name, whole or cut -> a model and its file in float32; all converted by one process."""
    root = tmp_path_factory.mktemp("runs")
    models: dict[tuple[str, str], Checkpoint] = {}
    for name, tried in TRIED.items():
        whole = models[name, "whole"] = write_model(tried, root / f"{name}-whole")
        models[name, "cut"] = smaller(whole, tried, root / f"{name}-cut")
    with ExitStack() as held:
        asked = [
            [str(held.enter_context(linked(model))), "--outtype", "f32", "--outfile",
             str(root / f"{model.path.name}.gguf"), *arguments(model)]
            for model in models.values()
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, str(HOME)], input=json.dumps(asked),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(zip(models, json.loads(done.stdout.splitlines()[-1]), strict=True))

    def file_of(name: str, size: str) -> tuple[Checkpoint, Path]:
        assert not said[name, size]
        model = models[name, size]
        return model, root / f"{model.path.name}.gguf"

    return file_of


def test_every_family_that_llama_cpp_knows_is_tried() -> None:
    known = {name for name, family in FAMILIES.items() if family.llama_cpp is not None}
    import transformers

    kinds = {(VARIANTS | MIXTURES | HYBRIDS)[tried.variant][0] for tried in TRIED.values()}
    assert {getattr(transformers, kind)().model_type for kind in kinds} == known


@pytest.mark.parametrize("size", ["whole", "cut"])
@pytest.mark.parametrize("name", TRIED)
def test_llama_cpp_runs_the_model(
    made: Made, name: str, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = made(name, size)
    check_counted(model)
    proof = prove(model, file)
    assert proof.exact == proof.tensors
    check_computes(model, open_back(file))
    monkeypatch.setenv("LLAMA_ARG_THREADS", "1")  # more of them wait for each other
    ran = run_and_compare(model, file, exact=True)
    assert ran is not None
    assert (ran.program, ran.reason) == (SERVER, "")
    print(f"{name} {size}: {ran.tokens} tokens, {ran.mean:.2e} mean, {ran.largest:.2e} at most")
    rough = TABLED if name in GELU else 1
    assert ran.mean < MEAN * rough
    assert ran.largest < LARGEST * rough
