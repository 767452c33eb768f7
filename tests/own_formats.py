"""Every file of our own that is read, as formats to damage: a valid example and its reader each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from fuzzing import Format
from shearling.data.own_text import read_plan
from shearling.data.store import Store
from shearling.data.teacher import Cache
from shearling.judge.kept import KeptAnswer, KeptLines, KeptVerdict
from shearling.judge.prompts import read_answers, read_prompts
from shearling.model.manifest import ModelManifest, read_manifest
from shearling.report import collect
from shearling.scoring.scores import Scores
from shearling.train.finish import looks_at
from shearling.train.log import read as read_log
from shearling.train.reference import Point, Reference, given
from shearling.train.saving import read_state

LENGTH, TOP, VOCAB = 5, 3, 60
MODEL = {"name": "ewe", "fingerprint": "ab" * 32}
STAMP = {"shearling": "0.1.0", "created": "2026-11-22T10:57:46+00:00"}
SHAPE = {"layers": 4, "hidden": 8, "heads": 2, "kv_heads": 1, "head_dim": 4, "mlp": 6, "vocab": 60}
SPREAD = {"median": 3.0, "min": 2.0, "max": 4.0}
LOOKS = [
    {"losses": {"fell": 3.0}, "weights": {"fell": 1.0}, "tokens": 96 * n, "seconds": 1.5 * n}
    for n in range(3)
]
CALIBRATION = {"file": "text.jsonl", "samples": 8, "length": 16, "seed": 0}
PARENT: dict[str, Any] = {
    "kind": "manifest", "stage": "prune", **STAMP, "model": MODEL,
    "source": {"name": "ram", "fingerprint": "cd" * 32, "shape": SHAPE, "parameters": 900,
               "bytes": 3600},
    "keep": {"layers": [0, 1, 3], "heads": [[0], [1], [0]], "hidden": [0, 1, 2]},
    "shape": SHAPE | {"layers": 3}, "source_shape": SHAPE, "parameters": 700,
    "source_parameters": 900, "bytes": 2800, "versions": {"torch": "2.13.0"},
    "options": {"repair": {"steps": [{"strength": 0.1}], "tokens": 5}}, "seed": 0,
    "proof": {"max_abs_difference": 1e-6, "max_relative_difference": 1e-7, "tokens": 64,
              "loaded_with": "AutoModelForCausalLM", "passed": True},
    "repaired": ["a"], "files": {"model.safetensors": "ef" * 32}, "seconds": 1.5, "parent": None,
}  # fmt: skip
RESULTS: dict[str, dict[str, Any]] = {
    "evaluation": {"model": MODEL, "text": "fell", "window": 8, "windows": 2, "bos": False,
                   "tokens": 14, "nll": 2.0, "perplexity": 7.4, "seconds": 1.0},
    "tasks": {"model": MODEL, "suite": "mine", "average": 0.5, "versions": {}, "seed": 0, "tasks": {
        "pens": {"metrics": {"acc,none": 0.5, "acc_stderr,none": 0.1}, "primary": "acc,none",
                 "shots": 0, "samples": 4}}},
    "degeneration": {"model": MODEL, "text": "fell", "prompts": 2, "prompt_tokens": 4,
                     "new_tokens": 8, "sampling": {"method": "greedy"}, "distinct": {"1": 0.5},
                     "repetition_4": 0.1, "loops": 0.0, "reference": {"distinct": {"1": 0.9}}},
    "abilities": {"model": MODEL, "seed": 0, "limit": 2, "bos": False, "asked_sha256": "ab" * 32,
                  "sampling": {"temperature": 0.8}, "seconds": 1.0, "dtype": "float32",
                  "versions": {}, "abilities": {
                      "sums": {"exact": 0.5, "exact_interval": [0.1, 0.9], "nll": 1.5,
                               "nll_interval": [1.0, 2.0], "tokens": 3.0, "expected_tokens": 3.0,
                               "losses": [1.0, 2.0], "lengths": [3, 3]},
                      "free writing": {"repetition_4": 0.1, "tokens": 64.0, "losses": [0.1]}}},
    "judgement": {"a": MODEL, "b": MODEL | {"fingerprint": "cd" * 32}, "judge": "someone",
                  "wins": 3, "ties": 1, "losses": 2, "win_rate": 0.6, "interval": [0.2, 0.9]},
    "generations": {"model": MODEL, "sampling": {"method": "greedy"}, "max_new_tokens": 8,
                    "samples": [{"prompt": "The", "text": " sheep"}]},
    "damage": {"model": MODEL, "text": "fell", "window": 8, "windows": 2, "curves": [
        {"criterion": "taylor", "removed": [[], [1]], "perplexity": [7.0, 9.0]}]},
    "bench": {"machine": {"cpu": "a", "cores": 2}, "runs": [
        {"model": MODEL, "batch": 1, "prompt": 8, "new": 8, "repeats": 3,
         "prefill_tokens_per_s": SPREAD, "decode_tokens_per_s": SPREAD}], "ratios": [{"a": 1}]},
    "healing": {"model": MODEL, "recipe": "cpt", "looks": LOOKS, "reference": {"fell": 2.0}},
    "learning": {"model": MODEL, "gates": "top-k", "source_shape": SHAPE, "targets": {"mlp": 4},
                 "units": {"mlp": 6}, "looks": LOOKS, "histograms": {"mlp": [1, 2, 3]},
                 "steps": [{"step": 1, "tokens": 96, "loss": 3.0, "expected": {"mlp": 5.0},
                            "wanted": {"mlp": 5.0}, "multipliers": {}}],
                 "probability_lost": {"mlp": 0.1}, "keep": {"mlp": [[0, 1, 2, 3]] * 4}},
    "reference": {"losses": {"fell": 2.0}, "how": {
        "method": "measured", "model": MODEL, "parameters": 900, "store": {"tokenizer": "ab"}}},
    "scores": {"model": MODEL, "criterion": "taylor", "axis": "layers", "scores": [3.0, 1.0, 2.0],
               "order": [1, 2], "protected": [0], "baseline_perplexity": 7.0, "removal_order": [],
               "calibration": CALIBRATION, "seconds": 1.0},
    "unit-scores": {"model": MODEL, "criterion": "energy", "axis": "mlp", "seconds": 1.0,
                    "scores": [[1.0, 2.0], [3.0, 4.0]], "calibration": CALIBRATION},
    "manifest": PARENT | {"stage": "heal", "model": MODEL | {"fingerprint": "99" * 32},
                          "source": PARENT["source"] | MODEL | {"shape": PARENT["shape"]},
                          "keep": {}, "proof": None, "parent": PARENT,
                          "losses": {"before": {"fell": 3.0}, "after": {"fell": 2.0}},
                          "final_weights": {"fell": 1.0}},
    "comparison": {"title": "Ways", "note": "Dry.", "panel": ["removed", "axis"], "label": "by",
                   "panel_name": "{axis}, {removed}", "series": "repair", "order": ["none"],
                   "baseline": "dense", "measures": {"c4": "perplexity"}, "columns": {"s": "s"},
                   "rows": [{"by": "dense", "repair": "none", "c4": 3.0},
                            {"by": "flap", "repair": "none", "axis": "mlp", "removed": 2, "c4": 5,
                             "s": 1.0}],
                   "speed": [{"by": "dense", "batch": 1, "decode_tokens_per_s": 3.0},
                             {"axis": "mlp", "removed": 2, "batch": 1,
                              "prefill_tokens_per_s": SPREAD}]},
}  # fmt: skip


def dumped(values: object, name: str) -> Callable[[Path], object]:
    """Writes a JSON file."""
    return lambda folder: (folder / name).write_text(json.dumps(values), encoding="utf-8")


def result(kind: str) -> Format:
    """A result, as the report reads it."""
    name = f"{kind}.json"
    values = {"kind": kind, **STAMP, **RESULTS[kind]}
    beside = {"kind": "evaluation", **STAMP, **RESULTS["evaluation"]}

    def write(folder: Path) -> None:
        dumped(beside, "beside.json")(folder)
        dumped(values, name)(folder)

    return Format(kind, write, lambda folder: collect([folder]), name)


def one_file(
    kind: str, name: str, values: object, read: Callable[[Path], object], text: str = "json"
) -> Format:
    """A file that a command takes alone."""
    write = dumped(values, name)
    if text == "jsonl":
        assert isinstance(values, list)
        lines = "".join(json.dumps(line) + "\n" for line in values)

        def write(folder: Path) -> object:
            return (folder / name).write_text(lines, encoding="utf-8")

    return Format(kind, write, lambda folder: read(folder / name), name, text)


def write_store(folder: Path) -> None:
    """Two domains, one of them with a mask."""
    domains: dict[str, Any] = {}
    for domain, rows in (("fell", 7), ("pen", 2)):
        domains[domain] = {}
        for part in ("train", "held_out"):
            below = folder / domain / part
            below.mkdir(parents=True)
            ids = np.arange(rows * LENGTH, dtype="<u2") % VOCAB
            ids.tofile(below / "tokens.bin")
            domains[domain][part] = {"sequences": rows}
            if domain == "pen":
                np.ones(rows * LENGTH, dtype=np.uint8).tofile(below / "mask.bin")
                domains[domain][part]["mask_sha256"] = "0"
    manifest: Mapping[str, Any] = {
        "kind": "token-store", "version": 1, "length": LENGTH, "held_out": 0.1, "seed": 0,
        "dtype": "uint16", "tokenizer": {"name": "tiny", "sha256": "ab" * 32, "eos": "</s>"},
        "sources": {"fell": [{"file": "a.txt", "bytes": 3, "sha256": "cd"}]}, "domains": domains,
        "versions": {"shearling": "0.1.0"},
    }  # fmt: skip
    dumped(manifest, "store.json")(folder)


def read_store(folder: Path) -> None:
    """Every sequence of a store, for a model of as many tokens."""
    store = Store.open(folder).within(VOCAB)
    assert store.fingerprint
    for domain in store.domains:
        for part in ("train", "held_out"):
            sequences = store.sequences(domain, part)
            ids_NS, labels_NS = sequences[range(len(sequences))]
            assert ids_NS.shape == labels_NS.shape
            assert not ids_NS.numel() or 0 <= int(ids_NS.min()) <= int(ids_NS.max()) < VOCAB


def write_cache(folder: Path) -> None:
    """One domain of three sequences in two files."""
    files = {}
    draw = torch.Generator().manual_seed(0)
    for first, rows in ((0, 2), (2, 1)):
        name = f"fell/{first:08}.safetensors"
        (folder / "fell").mkdir(exist_ok=True)
        shape = (rows, LENGTH - 1, TOP)
        tensors = {
            "ids": torch.randint(0, VOCAB, shape, generator=draw).to(torch.uint16),
            "logp": -torch.rand(shape, generator=draw).half(),
            "rest": torch.rand(shape[:2], generator=draw),
        }
        save_file(tensors, folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": "0"}
    manifest = {
        "kind": "teacher-cache", "version": 1, "teacher": MODEL | {"shape": SHAPE},
        "store": {"name": "s", "fingerprint": "cd", "length": LENGTH}, "domains": {"fell": 3},
        "top": TOP, "vocab": VOCAB, "shard_rows": 2, "versions": {}, "files": files,
    }  # fmt: skip
    dumped(manifest, "teacher.json")(folder)


def read_cache(folder: Path) -> None:
    """All that a cache says."""
    cache = Cache.open(folder)
    rows = [
        (domain, row) for domain, count in cache.manifest.domains.items() for row in range(count)
    ]
    if len(rows) > 100 or cache.top > 100 or cache.manifest.store.length > 100:
        rows = rows[:1]
    kept = cache.read(rows)
    assert int(kept.ids.max()) < cache.vocab


def _manifest(folder: Path) -> None:
    values, manifest = read_manifest(folder), ModelManifest.load(folder)
    assert values is not None
    assert manifest is not None


def _given(file: Path) -> None:
    given(str(file))


def _points(file: Path) -> None:
    Reference.load(file)
    Point.load(file)


LOG = [
    {"kind": "eval", "step": 0, "tokens": 0, "losses": {"fell": 3.0}, "weights": {"fell": 1.0}},
    {"kind": "train", "step": 1, "tokens": 96, "lr": 1e-3, "loss": 3.0, "gradient_norm": 1.0,
     "seconds": 0.5, "tokens_per_s": 9.0},
    {"kind": "eval", "step": 1, "tokens": 96, "losses": {"fell": 2.9}, "weights": {"fell": 1.0}},
]  # fmt: skip
OWN_TEXT = {
    "kind": "own-text-plan", "version": 1, "model": "ewe", "fingerprint": "ab" * 32, "length": 24,
    "sequences": 7, "seed": 0, "head": [1], "template": False, "text_sha256": None, "batch": 2,
}  # fmt: skip
STATE = {
    "identity": {"model": "ab", "options": {"lr": 1e-3}},
    "mixture": {"seed": 0, "batch": 4, "sizes": {"fell": 7}, "step": 3, "taken": {"fell": 12}},
    "weights": {"kind": "constant", "weights": {"fell": 1.0}}, "step": 3,
}  # fmt: skip


def write_state(folder: Path) -> None:
    """A checkpoint's state."""
    (folder / "step-00000003").mkdir()
    dumped(STATE, "step-00000003/state.json")(folder)


def own_formats() -> list[Format]:
    """Every format of ours."""
    return [
        *(result(kind) for kind in RESULTS),
        one_file("scores, to cut by", "s.json", {"kind": "scores", **RESULTS["scores"]},
                 Scores.load),
        one_file("scores, by hand", "s.json", {"criterion": "c", "axis": "layers",
                                              "scores": [1.0, 2.0]}, Scores.load),
        one_file("unit scores, to cut by", "s.json",
                 {"kind": "unit-scores", **RESULTS["unit-scores"]}, Scores.load),
        one_file("reference, to mix by", "r.json", {"kind": "reference", **RESULTS["reference"]},
                 _points),
        one_file("losses, by hand", "r.json", {"fell": 2.0, "pen": 1.5}, _given),
        Format("manifest, of a source",
               dumped({"kind": "manifest", **RESULTS["manifest"]}, "shearling.json"), _manifest,
               "shearling.json"),
        Format("store", write_store, read_store, "store.json"),
        Format("store, tokens", write_store, read_store, "fell/train/tokens.bin", "bytes"),
        Format("store, mask", write_store, read_store, "pen/train/mask.bin", "bytes"),
        one_file("own text, plan", "plan.json", OWN_TEXT, read_plan),
        Format("teacher's cache", write_cache, read_cache, "teacher.json"),
        Format("teacher's cache, shard", write_cache, read_cache, "fell/00000000.safetensors",
               "bytes"),
        Format("checkpoint's state", write_state,
               lambda folder: read_state(folder / "step-00000003"), "step-00000003/state.json"),
        one_file("training log", "log.jsonl", LOG,
                 lambda file: (read_log(file.parent), looks_at([file.parent])), "jsonl"),
        one_file("judge's verdicts", "v.jsonl",
                 [{"key": f"k{n}", "prompt": "p", "order": "AB", "verdict": "first", "reply": "A"}
                  for n in range(3)], lambda file: KeptLines(file, KeptVerdict), "jsonl"),
        one_file("kept answers", "a.jsonl",
                 [{"key": f"k{n}", "prompt": "p", "answer": "a"} for n in range(3)],
                 lambda file: KeptLines(file, KeptAnswer), "jsonl"),
        one_file("prompts", "p.jsonl",
                 [{"prompt": "The"}, {"instruction": "Shear", "input": "it"}], read_prompts,
                 "jsonl"),
        one_file("answers", "a.jsonl", [{"prompt": "The", "answer": "sheep"}], read_answers,
                 "jsonl"),
    ]  # fmt: skip
