"""Parts of the record that train: healing, learning what to keep, teachers and references."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record_common import (
    checkpoint_hashes,
    command,
    digest,
    exact,
    file_hashes,
    guarded,
    result,
    write_text,
    write_variant,
)

FAMILIES = ("llama", "gemma2", "opt")
DOMAINS = {"fell": 180, "meadow": 120, "pen": 60}
EVEN = ("weights.fell=0.5", "weights.meadow=0.25", "weights.pen=0.25")
SHORT = ("batch=4", "lr=1e-2", "eval_every=3")
SHAPES = {"llama": "layers=3,hidden=20,heads=6,mlp=20", "gemma2": "layers=3,hidden=27,mlp=20"}


def training(family: str, scratch: Path) -> dict[str, Any]:
    """Everything that trains a model of one family."""
    model = write_variant(family, scratch / "model", num_hidden_layers=3)
    teacher = write_variant(family, scratch / "teacher")
    store = scratch / "store"
    found: dict[str, Any] = {"pack": guarded(scratch, lambda: _pack(model, store, scratch))}
    found["reference"] = references(model, teacher, store, scratch)
    found["teach"] = _teach(teacher, store, scratch)
    found["heal"] = _heal(model, teacher, store, scratch)
    found["learn"] = _learn(family, teacher, store, scratch)
    return found


def _pack(model: Path, store: Path, scratch: Path) -> Any:
    files = [
        write_text(scratch / f"{name}.jsonl", documents, seed, name)
        for seed, (name, documents) in enumerate(DOMAINS.items())
    ]
    more = ("--length", 24, "--held-out", 0.2, "--workers", 1)
    command("pack", *files, "--tokenizer", model, "--output", store, *more)
    return file_hashes(store)


def references(model: Path, teacher: Path, store: Path, scratch: Path) -> dict[str, Any]:
    """Losses measured, given, and predicted by a law."""
    middle = teacher.parent / "middle"
    write_variant(_family(teacher), middle, num_hidden_layers=4)
    ways: dict[str, tuple[Any, ...]] = {
        "measured": (teacher, "--store", store, "--sequences", 20, "--no-stream"),
        "streamed": (teacher, "--store", store, "--sequences", 20, "--stream"),
        "given": ("--given", "fell=1.5,meadow=2,pen=2.5"),
        "no-law": (teacher, middle, model, "--store", store, "--target-params", "0.7x"),
    }
    found: dict[str, Any] = {}
    for way, arguments in ways.items():

        def run(way: str = way, arguments: tuple[Any, ...] = arguments) -> Any:
            return result("reference", *arguments, "--output", scratch / f"{way}.json")

        found[way] = guarded(scratch, run)
    found["law"] = guarded(scratch, lambda: _law(scratch))
    return found


def _law(scratch: Path) -> Any:
    """A scaling law through losses of our own making, in the form of those that were measured."""
    file = json.loads((scratch / "measured.json").read_text("utf-8"))
    given: list[Any] = []
    for size in (20000, 8000, 3000, 1000):
        losses = {name: 1 + 0.1 * i + (9 + i) / size**0.3 for i, name in enumerate(DOMAINS)}
        losses["fell"] += 0.01 * (size == 3000)  # no law fits it exactly
        how = file["how"] | {"parameters": size, "model": {"name": f"{size}"}}
        given += ["--losses", scratch / f"{size}.json"]
        given[-1].write_text(json.dumps(file | {"how": how, "losses": losses}), encoding="utf-8")
    return result("reference", *given, "--target-params", "12k", "--output", scratch / "law.json")


def _family(model: Path) -> str:
    """The variant that a directory was written as."""
    kind = json.loads((model / "config.json").read_text("utf-8"))["model_type"]
    return next(family for family in FAMILIES if family == kind)


def _teach(teacher: Path, store: Path, scratch: Path) -> dict[str, Any]:
    found = {}
    for way in ("--no-stream", "--stream"):

        def run(way: str = way) -> Any:
            output = scratch / f"cache{way}"
            command("teach", teacher, "--data", store, "--output", output, "--top", 7, way)
            return file_hashes(output)

        found[way[2:]] = guarded(scratch, run)
    return found


def _heal(model: Path, teacher: Path, store: Path, scratch: Path) -> dict[str, Any]:
    """Healing by every recipe, mix and way to save memory."""
    reference = ("--reference", scratch / "measured.json")
    distil = ("--recipe", "distill")
    wise, cached = ("--teacher", teacher), ("--teacher-cache", scratch / "cache--no-stream")
    both = ("--recipe", "cpt-then-lora")
    ways: dict[str, tuple[Any, ...]] = {
        "cpt": (),
        "cpt-micro": ("micro=2",),
        "cpt-checkpointing": ("checkpointing=true",),
        "cpt-bfloat16": ("dtype=bfloat16",),
        "cpt-optimiser": ("weight_decay=0.3", "clip=0.1", "warmup=0.4", "final=0.5", "seed=3"),
        "lora": ("--recipe", "lora", "rank=4", "alpha=8"),
        "cpt-then-lora": (*both, "lora_lr=1e-3"),
        "distill": (*distil, *wise),
        "distill-mixed": (*distil, *wise, "temperature=2.0", "text_share=0.3", "hidden_share=0.1"),
        "distill-cached": (*distil, *cached),
        "distill-cached-text": (*distil, *cached, "text_share=0.3"),
        "constant": ("mix=constant",),
        "constant-weights": ("mix=constant", *EVEN),
        "dynamic": ("mix=dynamic", "update_every=2", *reference),
        "dynamic-bounded": ("mix=dynamic", "update_every=1", "floor=0.2", "cap=0.4", *reference),
        "dynamic-weights": ("mix=dynamic", "update_every=2", *EVEN, *reference),
        "dynamic-teacher": ("mix=dynamic", "update_every=2", "eval_sequences=5", *wise),
        "dynamic-distill": ("mix=dynamic", "update_every=2", *distil, *wise, *reference),
    }
    found = {}
    for way, arguments in ways.items():
        output = scratch / "healed" / way
        given = ("heal", model, "--data", store, "--tokens", "700", *SHORT, *arguments)
        found[way] = guarded(scratch, _trained(output, *given))
    return found


def _learn(family: str, model: Path, store: Path, scratch: Path) -> dict[str, Any]:
    """Learning what to keep by every recipe, kind of gates and constraint."""
    reference = ("--reference", scratch / "measured.json")
    warm, wise = ("--recipe", "warm"), ("--teacher", model)
    ways: dict[str, tuple[Any, ...]] = {
        "scores": (),
        "scores-distil": ("--distil", *wise),
        "scores-unrepaired": ("refit=false", "mix=dynamic", "update_every=2", *reference),
        "warm": warm,
        "warm-lagrangian": (*warm, "constraint=lagrangian"),
        "warm-top-k": (*warm, "gates=top-k"),
        "warm-top-k-lagrangian": (*warm, "gates=top-k", "constraint=lagrangian"),
        "warm-cold-start": (*warm, "warm_start=false", "seed=2"),
        "warm-unrepaired": (*warm, "refit=false", "rise=0.5", "spread=5", "micro=2"),
        "warm-distil": (*warm, "--distil", *wise, "hidden_share=0.1"),
        "sheared": ("--recipe", "sheared", "update_every=2", *reference),
        "sheared-own-losses": ("--recipe", "sheared", "update_every=2"),
    }
    shape = SHAPES.get(family, "layers=3,hidden=28,heads=7,mlp=20")
    short = (*SHORT, "samples=8", "sample_length=16")
    found = {}
    for way, arguments in ways.items():
        output = scratch / "learned" / way
        given = ("learn", model, "--shape", shape, "--data", store, "--tokens", "700")
        found[way] = guarded(scratch, _trained(output, *given, *short, *arguments))
    return found


def _trained(output: Path, *arguments: Any) -> Callable[[], Any]:
    """A run's history, manifest and weights; gates where there are any."""

    def run() -> Any:
        manifest = result(*arguments, "--output", output)
        for stage in (manifest, manifest.get("parent") or {}):
            told = json.dumps(stage.get("options"), sort_keys=True)
            stage["options"] = digest(told.encode())
        found = {"hashes": checkpoint_hashes(output), "manifest": manifest}
        for log in sorted(output.rglob("log.jsonl")):
            found[str(log.relative_to(output))] = _history(log)
        for start in sorted(output.rglob("start.safetensors")):
            found["start"] = file_hashes(start.parent)[start.name]
        return found

    return run


def _history(log: Path) -> dict[str, Any]:
    """A log by columns: losses in full, everything else as a hash, and the last line of a kind."""
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    found: dict[str, Any] = {}
    for kind in sorted({line["kind"] for line in lines}):
        rows = [exact(line) for line in lines if line["kind"] == kind]
        text = json.dumps(rows, sort_keys=True)
        found[kind] = {"all": digest(text.encode()), "last": rows[-1]}
        for column in ("loss", "gradient_norm"):
            if column in rows[0]:
                found[kind][column] = " ".join(str(row[column]) for row in rows)
    return found


__all__ = ["FAMILIES", "training"]
