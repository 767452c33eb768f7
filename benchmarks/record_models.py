"""Parts of the record that train nothing: scores, cuts, repairs and measurements."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record_common import (
    block_criteria,
    checkpoint_hashes,
    command,
    digest,
    exact,
    file_hashes,
    guarded,
    real_model,
    result,
    sizes,
    unit_criteria,
    write_text,
    write_variant,
)

AXES = ("hidden", "heads", "kv_heads", "mlp")
SHRUNK = (("heads", "mlp"), ("hidden",), ("layers", "mlp"), ("layers", *AXES))
REPAIR = ("--samples", 16, "--length", 17, "--written", 8)
DETAILS = (
    "axis",
    "calibration",
    "criterion",
    "model",
)  # of a file of scores: the same in all of them
SHALLOW = ("--protect-first", 1, "--protect-last", 1)  # five blocks: the + forms would protect six


def variant(name: str, scratch: Path) -> dict[str, Any]:
    """All of one tiny model."""
    model = write_variant(name, scratch / name)
    text = write_text(scratch / "text.jsonl", 120, 1)
    other = write_text(scratch / "other.jsonl", 60, 2)
    return {
        "inspect": guarded(scratch, lambda: result("inspect", model)),
        "source": checkpoint_hashes(model),
        "blocks": _blocks(model, text, scratch),
        "units": _units(model, text, scratch),
        "cuts": _cuts(name, model, text, scratch),
        "measured": _measured(model, scratch / "cuts" / "repaired-depth", other, scratch),
    }


def scored(*arguments: Any) -> Any:
    """What a scoring gives, without what is the same of every one."""
    found = json.loads(command("score", *arguments, "--json"))
    return exact({key: value for key, value in found.items() if key not in DETAILS})


def _blocks(model: Path, text: Path, scratch: Path) -> dict[str, Any]:
    how = ("--calibration", text, "--samples", 12, "--length", 17)
    found: dict[str, Any] = {}
    for by in block_criteria():
        more = SHALLOW if by.endswith("+") else ()
        more += ("--remove", 2) if by in ("greedy", "repair") else ()
        arguments = (model, "--by", by, *more, *(how if "magnitude" not in by else ()))
        for stream in ("--no-stream", "--stream"):
            found[f"{by} {stream[2:]}"] = _guarded_score(scratch, *arguments, stream)
    return found


def _units(model: Path, text: Path, scratch: Path) -> dict[str, Any]:
    how = ("--calibration", text, "--samples", 12, "--length", 17)
    found: dict[str, Any] = {}
    for by in unit_criteria():
        for axis in AXES:
            arguments = (model, "--by", by, "--axis", axis, *how)
            found[f"{by} {axis}"] = _guarded_score(scratch, *arguments, "--no-stream")
            if by == "fisher-energy":
                found[f"{by} {axis} stream"] = _guarded_score(scratch, *arguments, "--stream")
    return found


def _guarded_score(scratch: Path, *arguments: Any) -> Any:
    return guarded(scratch, lambda: scored(*arguments))


def _cuts(name: str, model: Path, text: Path, scratch: Path) -> dict[str, Any]:
    """Every way to cut and to repair."""
    scoring = ("--calibration", text, "--samples", 12, "--length", 17, "--no-refit")
    repair = ("--calibration", text, *REPAIR)
    width, hidden, mixed, all_ = (sizes(name, *axes) for axes in SHRUNK)
    ways: dict[str, tuple[Any, ...]] = {
        "named-blocks": ("--remove", "1,3"),
        "depth": ("--layers", 3, *scoring),
        "depth-influence-f16": (
            "--layers",
            4,
            "--by",
            "influence",
            "--shard-size",
            0.001,
            *scoring,
        ),
        "params": ("--params", "0.8x", *scoring),
        "width": ("--shape", width, *scoring),
        "width-flap-stream": ("--shape", width, "--by", "flap", *scoring, "--stream"),
        "groups": ("--shape", sizes(name, "kv_heads") or "heads=5", *scoring),
        "hidden": ("--shape", hidden, "--no-rotate", *scoring),
        "rotated": ("--shape", hidden, "--rotate", *scoring),
        "mixed": ("--shape", all_, "--no-rotate", *scoring),
        "vocabulary": ("--shape", "vocab=270", *scoring),
        "vocabulary-mixed": ("--shape", f"vocab=275,{mixed}", *scoring),
        "repaired-depth": ("--layers", 3, *repair),
        "repaired-depth-stream": ("--layers", 3, *repair, "--stream"),
        "repaired-width": ("--shape", width, *repair),
        "repaired-mixed": ("--shape", all_, "--no-rotate", *repair),
        "repaired-rotated": ("--shape", all_, *repair, "--copies", 2),
        "odd-hidden": ("--shape", "hidden=35", *scoring),
        "odd-heads": ("--shape", "heads=8", *scoring),
    }
    found = {}
    for way, arguments in ways.items():
        stream = () if "--stream" in arguments else ("--no-stream",)
        run = _pruning(model, scratch / "cuts" / way, *arguments, *stream)
        found[way] = guarded(scratch, run)
    return found


def _pruning(model: Path, output: Path, *arguments: Any) -> Callable[[], Any]:
    def run() -> Any:
        manifest = result("prune", model, "--output", output, *arguments)
        return {"hashes": checkpoint_hashes(output), "manifest": manifest}

    return run


def _measured(model: Path, repaired: Path, text: Path, scratch: Path) -> dict[str, Any]:
    """Perplexity, repetition and continuations of the source and of a repaired cut."""
    more = ("--degeneration", "--max-new-tokens", 12, "--prompt", "The sheep", "--bos")
    windows = ("--text", text, "--window", 24, "--max-windows", 16)
    both = {"source": model, "repaired": repaired}
    found = {}
    for name, path in both.items():
        found[name] = _guarded_eval(scratch, path, *windows, *more)
        hot = ("--temperature", 0.8, "--top-p", 0.9, "--seed", 3)
        found[f"{name} sampled"] = _guarded_eval(scratch, path, *windows, *more[:3], *hot)
    found["bfloat16"] = _guarded_eval(scratch, model, *windows, "--dtype", "bfloat16")
    return found


def _guarded_eval(scratch: Path, *arguments: Any) -> Any:
    return guarded(scratch, lambda: result("eval", *arguments))


def demo(scratch: Path) -> dict[str, Any]:
    """What the one command writes for a tiny model, damage curves among it."""
    model = write_variant("llama", scratch / "model", max_position_embeddings=256)
    text = write_text(scratch / "text.jsonl", 400, 4)
    output = scratch / "demo"

    def run() -> Any:
        command("demo", "--model", model, "--text", text, "--output", output, "--layers", 3)
        for gone in (*output.glob("*.html"), *output.glob("bench*")):
            gone.unlink()
        return file_hashes(output)

    return {"files": guarded(scratch, run)}


def quantized(scratch: Path) -> dict[str, Any]:
    """Rounded models, whose files are hashed, with their perplexities."""
    even = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = write_variant("llama", scratch / "model", intermediate_size=96, **even)
    text = write_text(scratch / "text.jsonl", 60, 5)
    found = {}
    for to in ("int8", "int4"):

        def run(to: str = to) -> Any:
            output = scratch / to
            more = ("--text", text, "--window", 24, "--max-windows", 8)
            said = result("quantize", model, "--to", to, "--output", output, *more)
            return {"said": said, "hashes": checkpoint_hashes(output)}

        found[to] = guarded(scratch, run)
    return found


def real(scratch: Path) -> dict[str, Any]:
    """SmolLM2-135M at a few windows."""
    from pydoc_data.topics import topics

    chapters = [topics[name] for name in sorted(topics)]
    texts = {"calibration": chapters[::2], "evaluation": chapters[1::2]}
    for name, parts in texts.items():
        lines = "".join(json.dumps({"text": part}) + "\n" for part in parts)
        (scratch / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    model, text = real_model(), scratch / "calibration.jsonl"
    how = ("--calibration", text, "--samples", 8, "--length", 64, "--no-stream")
    found: dict[str, Any] = {"texts": digest(json.dumps(texts).encode())}
    for by in ("magnitude+", "perplexity", "influence", "taylor+"):
        found[f"blocks {by}"] = _guarded_score(scratch, model, "--by", by, *how)
    for by, axis in (("fisher-energy", "mlp"), ("flap", "heads")):
        found[f"units {by} {axis}"] = _guarded_score(
            scratch, model, "--by", by, "--axis", axis, *how
        )
    output = scratch / "cut"
    shape = ("--shape", "layers=26,mlp=1208", "--by", "influence,wanda-sp", "--written", 4)
    found["cut"] = guarded(scratch, _pruning(Path(model), output, *shape, *how))
    windows = ("--text", scratch / "evaluation.jsonl", "--window", 64, "--max-windows", 12)
    for name, path in (("source", model), ("cut", output)):
        found[f"perplexity {name}"] = _guarded_eval(scratch, path, *windows)
    shutil.rmtree(output, ignore_errors=True)
    return found


__all__ = ["demo", "quantized", "real", "variant"]
