"""What fits where: models of known sizes on cards of known memory, by the estimates of a dry run.

No card and no weights are needed: the shapes are those of published models, their files have only
headers, and what the code counts is asked of cards that are not there (``on_card``, ``Peak``, and
``train.memory.fit``). Nothing is measured.

    python benchmarks/fits.py [directory for scratch]

writes results/fits.json and the tables of docs/gpu.md.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoConfig

from common import save
from expert_memory import TRUE, sparse_files
from shearling.engine.card import Card
from shearling.engine.peak import Peak
from shearling.engine.place import Wish, on_card
from shearling.errors import ShearlingError
from shearling.files.writer import new_directory, write_json
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.plan import parse_params, shape_for
from shearling.pruning.run import repair_need
from shearling.pruning.text import CalibrationText
from shearling.table.families import family_of
from shearling.train.device import Numbers
from shearling.train.memory import MemoryBudget, fit
from shearling.train.options import Options

DOCS = Path(__file__).resolve().parent.parent / "docs" / "gpu.md"
CARDS = (24, 48, 80, 141)  # GB
FREE = 0.98  # of a card: what its driver leaves
HOST = 512 * 10**9  # bytes of the machine's own memory, which is not what is short here
LENGTH, ROWS = 2048, 16  # of healing: tokens of a sequence, sequences of a step
LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu"}
MODELS: dict[str, dict[str, Any]] = {
    "Llama 3.2 1B": LLAMA | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "Llama 3.2 3B": LLAMA | {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "Llama 2 7B": LLAMA | {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
        "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "Llama 3.1 8B": LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "Qwen3 14B": {
        "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 17408,
        "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
    },
    "Qwen3 30B A3B": {"model_type": "qwen3_moe"} | TRUE,
    "Qwen3 32B": {
        "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600,
        "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
    },
    "Llama 3.1 70B": LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
WAITS = {"resident": "on the device", "pinned": "pinned", "disk": "in files"}
HEALS = {
    "adamw": Options(recipe="cpt", tokens=10**9, batch=ROWS),
    "adamw8bit": Options(
        recipe="cpt", tokens=10**9, batch=ROWS, optimizer="adamw8bit", weight_dtype="bfloat16"
    ),
    "lora": Options(recipe="lora", tokens=10**9, batch=ROWS),
}


def opened(directory: Path, name: str) -> Checkpoint:
    """A model of which there are headers."""
    values = dict(MODELS[name])
    config = AutoConfig.for_model(values.pop("model_type"), **values, dtype="bfloat16")
    family = family_of(config.model_type, name)
    with new_directory(directory) as staging:
        sparse_files(staging, family.layout(config).tensors(family.shape(config)))
        write_json(staging / "config.json", config.to_dict())
    return Checkpoint.open(directory)


def pruned(source: Checkpoint, memory: int, text: Path) -> dict[str, Any]:
    """Where a default ``prune --params 0.8x`` lies on a card, and its peak.

    Where that is more than the card has, with the ``--memory`` that the command then asks for.
    """
    with patch("shearling.engine.place.free_bytes", lambda d: HOST if d == "cpu" else memory):
        for share in (1.0, 0.8, 0.6):
            one = _pruned(source, memory, text, share)
            if one.get("peak_bytes", memory + 1) <= memory:
                return one
    return {"refused": f"takes {one.get('peak_bytes', 0) / 1e9:.1f} GB"}


def _pruned(source: Checkpoint, memory: int, text: Path, share: float) -> dict[str, Any]:
    wish = Wish() if share == 1 else Wish(memory=int(share * memory))
    card = Card(torch.device("cuda", 0), "a card", memory, memory)
    after = shape_for(source, parse_params("0.8x", source.parameters))
    try:
        place, calibration = _placed(source, card, wish, CalibrationText(file=text))
        if place.weights != "resident":  # as the command has it: no text of its own, more copies
            few = CalibrationText(file=text, written=0, copies=3)
            place, calibration = _placed(source, card, wish, few)
    except ShearlingError as error:
        return {"refused": str(error)}
    scored = calibration.samples * calibration.length
    need = repair_need(source, calibration)
    peak = Peak.of(source, place, need, after, scored=scored, repaired=True)
    return {
        "memory": wish.memory, "weights": place.weights, "states_wait": place.states,
        "batch_tokens": place.batch_tokens, **peak.as_json(),
    }  # fmt: skip


def _placed(source: Checkpoint, card: Card, wish: Wish, text: CalibrationText) -> tuple[Any, Any]:
    calibration, _ = text.settled(source, Wish("cpu"), lambda said: None, 1)
    need = repair_need(source, calibration)
    return on_card(source, card, torch.bfloat16, wish, need), calibration


def healed(source: Checkpoint, memory: int, options: Options) -> dict[str, Any]:
    """How many sequences of a step fit at a time, and whether activations are computed anew."""
    half = options.weight_dtype == "bfloat16"
    numbers = Numbers(torch.bfloat16, torch.bfloat16 if half else torch.float32)
    free = memory - source.parameters * numbers.kept.itemsize
    try:
        one = fit(source, options, MemoryBudget(free, LENGTH, ROWS, 1, numbers))
    except ShearlingError as error:
        return {"refused": str(error)}
    if one.micro * LENGTH < LENGTH:
        return {"refused": "not one sequence"}
    return {"micro": one.micro, "checkpointing": one.checkpointing}


def tables(figures: dict[str, Any]) -> tuple[str, str]:
    """Both, as Markdown."""
    head = "| | parameters | " + " | ".join(f"{card} GB" for card in CARDS) + " |"
    line = "|---|---:|" + "---|" * len(CARDS)
    prune = [head, line]
    heal = [head.replace("| | parameters", "| | optimiser"), line.replace("---:", "---")]
    for name, one in figures["models"].items():
        cells = [_pruned_cell(one["prune"][str(card)]) for card in CARDS]
        prune.append(f"| {name} | {one['parameters'] / 1e9:.1f} B | {' | '.join(cells)} |")
        for optimiser in HEALS:
            cells = [_healed_cell(one["heal"][optimiser][str(card)]) for card in CARDS]
            if set(cells) != {"–"}:
                heal.append(f"| {name} | {optimiser} | {' | '.join(cells)} |")
    return "\n".join(prune), "\n".join(heal)


def _pruned_cell(one: dict[str, Any]) -> str:
    if "refused" in one:
        return "–"
    states = "" if one["states_wait"] == "device" else f", states on the {one['states_wait']}"
    asked = f" (`--memory {one['memory'] / 1e9:.0f}GB`)" if one["memory"] else ""
    return f"{WAITS[one['weights']]}{states}: {one['peak_bytes'] / 1e9:.0f} GB{asked}"


def _healed_cell(one: dict[str, Any]) -> str:
    if "refused" in one:
        return "–"
    return f"{one['micro']}{' anew' if one['checkpointing'] else ''}"


def main() -> None:
    """Ask, write down, and fill the page."""
    figures: dict[str, Any] = {"cards_gb": CARDS, "free": FREE, "length": LENGTH, "models": {}}
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        text = Path(folder) / "text.txt"
        text.write_text("as the command needs one\n")
        for number, name in enumerate(MODELS):
            source = opened(Path(folder) / str(number), name)
            memory = {str(card): int(FREE * card * 10**9) for card in CARDS}
            figures["models"][name] = {
                "parameters": source.parameters,
                "prune": {card: pruned(source, free, text) for card, free in memory.items()},
                "heal": {
                    optimiser: {card: healed(source, free, how) for card, free in memory.items()}
                    for optimiser, how in HEALS.items()
                },
            }
    save("fits", figures, shown=False)
    page = DOCS.read_text()
    both = tables(json.loads(json.dumps(figures)))
    for mark, table in zip(("pruned", "healed"), both, strict=True):
        first, rest = page.split(f"<!-- {mark} -->\n")
        _, last = rest.split(f"<!-- end of {mark} -->")
        page = f"{first}<!-- {mark} -->\n\n{table}\n\n<!-- end of {mark} -->{last}"
    DOCS.write_text(page)


if __name__ == "__main__":
    main()
