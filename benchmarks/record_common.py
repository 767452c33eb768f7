"""What the parts of the record share: running the command, exact figures, hashes, fixtures.

Everything of shearling's that the record imports is imported here; the rest is the command line.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import json
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

LONG = 12  # numbers in a list that is recorded as they are; longer ones become a hash and a sum
# What depends on the time, the place or the machine, wherever in a file it stands.
DROPPED = {
    "created", "device", "machine", "path", "peak_mib", "shearling", "tokens_per_s",
    "transformers_version", "versions",
}  # fmt: skip
# And what a file says again: of its source, of the model measured, of its own weights' hashes.
DROPPED |= {"files", "kind", "source", "source_shape", "source_parameters"}
SIZES = {"layers": 3, "hidden": 29, "heads": 6, "kv_heads": 2, "mlp": 13}
# What a configuration can say of hidden size and heads: a multiple, or the very product.
MULTIPLE = ("llama-biases", "gemma2", "gemma3")
PRODUCT = ("gpt_neox", "gpt_neox-serial", "opt", "opt-projected", "opt-bare")
MERGES = (
    "t h", "th e", "Ġ the", "e e", "s h", "sh ee", "shee p", "Ġ sheep", "o o", "w oo", "woo l",
    "Ġ wool", "g a", "t e", "ga te", "Ġ gate", "w e", "n t", "we nt", "Ġ went", "i n", "i ng",
    "f e", "l l", "fe ll", "Ġ fell", "h r", "th r", "o u", "ou gh", "g h", "p e", "pe n", "Ġ pen",
)  # fmt: skip
WORDS = ("sheep", "gate", "wool", "went", "through", "the", "hill", "grazing", "Ærø", "fell")
VOCAB = 300  # bytes, merges, two special tokens, and rows of padding


def block_criteria() -> tuple[str, ...]:
    from shearling.scoring.registry import names

    return names("blocks")


def unit_criteria() -> tuple[str, ...]:
    from shearling.scoring.registry import names

    return names("units")


def real_model() -> str:
    from shearling.commands.demo_run import demo_model

    return demo_model()


def command(*arguments: Any) -> str:
    """Run shearling in this process, and return what it printed on stdout."""
    out, words = io.StringIO(), [str(argument) for argument in arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        _application().main(words, standalone_mode=False)
    return out.getvalue()


@functools.cache
def _application() -> Any:
    """The parser of the command line, which takes longer to build than a tiny model to score."""
    from typer.main import get_command

    from shearling.cli import app

    return get_command(app)


def result(*arguments: Any) -> Any:
    """The JSON that a command prints, made exact."""
    return exact(json.loads(command(*arguments, "--json")))


def guarded(scratch: Path, run: Callable[[], Any]) -> Any:
    """What ``run`` gives, or else what it was refused with."""
    try:
        return run()
    except (Exception, SystemExit) as error:
        name = type(error).__name__
        kind = "refused" if name == "ShearlingError" else f"failed: {name}"
        return f"{kind}: {' '.join(str(error).split())}".replace(str(scratch), "SCRATCH")[:600]


def exact(value: Any) -> Any:
    """A JSON value without what differs from run to run; floats in hexadecimal."""
    if isinstance(value, Mapping):
        kept = {str(key): exact(each) for key, each in value.items() if not _drops(str(key))}
        return {key: each for key, each in kept.items() if each is not _NOTHING}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _listed(value)
    return value.hex() if isinstance(value, float) else value


_NOTHING = object()


def _drops(key: str) -> bool:
    return key in DROPPED or "seconds" in key or key.endswith("_per_s")


def _listed(values: Sequence[Any]) -> Any:
    """A list as it is, or what tells it from any other."""
    numbers = _numbers(values)
    if numbers is None:
        return [exact(each) for each in values]
    text = " ".join(n.hex() if isinstance(n, float) else str(n) for n in numbers)
    if len(numbers) <= LONG and len(numbers) == len(values):
        return f"[{text}]"
    shape = "x".join(map(str, dict.fromkeys((len(values), len(numbers)))))
    return f"{shape} numbers, {digest(text.encode())}, sum {_hex(math.fsum(numbers))}"


def _hex(value: Any) -> str:
    return value.hex()


def _numbers(values: Sequence[Any]) -> list[int | float] | None:
    """The numbers of a list, or of lists in a list; None if there is anything else."""
    flat: list[Any] = []
    for each in values:
        flat.extend(each if isinstance(each, list | tuple) else [each])
    return flat if flat and all(isinstance(each, int | float) for each in flat) else None


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def checkpoint_hashes(directory: Path) -> dict[str, str]:
    """Hashes of a model directory: its weights by name, its configuration, its tokenizer."""
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    config = json.loads((directory / "config.json").read_text("utf-8"))
    config.pop("transformers_version", None)
    found = {"weights": whole.hexdigest()[:16]}
    found["config"] = digest(json.dumps(config, sort_keys=True).encode())
    for name in ("tokenizer.json", "generation_config.json"):
        if (directory / name).is_file():
            data = json.loads((directory / name).read_text("utf-8"))
            data.pop("transformers_version", None)
            found[name] = digest(json.dumps(data, sort_keys=True).encode())
    return found


def file_hashes(directory: Path) -> dict[str, Any]:
    """Every file under a directory: JSON made exact, any other by its hash."""
    found: dict[str, Any] = {}
    for file in sorted(each for each in directory.rglob("*") if each.is_file()):
        name = str(file.relative_to(directory))
        if file.suffix == ".json":
            found[name] = exact(json.loads(file.read_text("utf-8")))
        else:
            found[name] = digest(file.read_bytes())
    return found


def tokenizer() -> Any:
    """Bytes, a few merges, a BOS and an EOS: small, and its vocabulary can be cut."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pairs: list[Any] = [tuple(merge.split()) for merge in MERGES]
    known = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [pair for pair in pairs if _spelt(pair, known)]
    vocab = {symbol: i for i, symbol in enumerate([*known, "<s>", "</s>"])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def _spelt(pair: tuple[str, ...], known: list[str]) -> bool:
    """Whether both parts are tokens already; their union then is one too."""
    if not set(pair) <= set(known):
        return False
    known.append("".join(pair))
    return True


def write_variant(variant: str, path: Path, **changes: Any) -> Path:
    """A tiny random model of a family with its tokenizer; odd geometry, random norms and biases."""
    tiny_models: Any = importlib.import_module("tiny_models")

    kept = tiny_models.VARIANTS[variant]
    saved = tokenizer()
    ids = {"bos_token_id": saved.bos_token_id, "eos_token_id": saved.eos_token_id}
    tiny_models.VARIANTS[variant] = (kept[0], kept[1] | {"vocab_size": VOCAB} | ids | changes)
    try:
        tiny_models.tiny_model(variant).save_pretrained(path)
    finally:
        tiny_models.VARIANTS[variant] = kept
    saved.save_pretrained(path)
    return path


def write_text(path: Path, documents: int, seed: int, word: str = "pen") -> Path:
    """Documents of a few words each, drawn from a seed."""
    draw = random.Random(seed)
    words = [*WORDS, word]
    lines = [
        json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(12, 60)))})
        for _ in range(documents)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def sizes(variant: str, *axes: str) -> str:
    """An odd legal shape that differs from the source's on ``axes``, and where it must."""
    found = dict(SIZES)
    if variant in PRODUCT:
        found |= {"hidden": 28, "heads": 7}
        found.pop("kv_heads")
        coupled = {"hidden", "heads"} if {"hidden", "heads"} & set(axes) else set()
        axes = tuple(axis for axis in found if axis in {*axes, *coupled})
    elif variant in MULTIPLE:
        found["hidden"] = 28 if len(axes) > 1 else 27
    if len(axes) > 2 and variant not in PRODUCT:
        found["heads"] = 4
    return ",".join(f"{axis}={found[axis]}" for axis in axes if axis in found)


__all__ = [
    "block_criteria", "checkpoint_hashes", "command", "digest", "exact", "file_hashes", "guarded",
    "real_model", "result", "sizes", "unit_criteria", "write_text", "write_variant",
]  # fmt: skip
