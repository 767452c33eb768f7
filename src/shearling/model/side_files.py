"""What is copied from a model's directory beside its weights and configuration, and what never is.

One list for everything that writes a model: a cut, a healed and a quantised one hold the same.
"""

from __future__ import annotations

import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from shearling.files.reading import read_json
from shearling.files.writer import write_json
from shearling.model.remote_code import NOT_COPIED, without_code

# Names in lower case. What gives ids to text, in every form: a cut vocabulary rewrites these.
TOKENIZER = (
    "tokenizer*", "tekken.json", "*.tiktoken", "vocab*.json", "vocab*.txt", "vocab.*", "merges.txt",
    "added_tokens.json", "spiece.model", "sentencepiece*.model", "*.spm", "bpe.codes",
    "encoder.json",
)  # fmt: skip
# What is copied as it is, whatever becomes of the vocabulary.
OTHERS = (
    "special_tokens_map.json", "chat_template*", "additional_chat_templates/*.jinja",
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "licen[cs]e*", "notice*", "copying*", "use_policy*",
)  # fmt: skip
# Never, whatever it is called: weights in any format, code, adapters, the state of a training.
NEVER = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.gguf", "*.ggml",
    "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.tflite", "*.npz", "*.npy", "*.index.json",
    "*.py", "*.pyc", "*.so", "*.sh", "adapter_*", "consolidated*", "optimizer*", "scheduler*",
    "trainer_state*", "training_args*", "rng_state*", "events.out*",
)  # fmt: skip
# What is fetched of a model on the hub: the above, the configuration, and the weights that are
# loaded or an adapter, in patterns that do distinguish cases and match in folders as well.
HUB = (
    *TOKENIZER, *OTHERS, "LICEN[CS]E*", "NOTICE*", "COPYING*", "USE_POLICY*", "config.json",
    "shearling.json", "*.safetensors", "*.index.json", "adapter_config.json",
)  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.index.json", "adapter_*")
HUB_NEVER = (
    *(pattern for pattern in NEVER if pattern not in _WEIGHTS), "original/*", "onnx/*", "metal/*",
    "openvino/*", "checkpoint-*", "runs/*",
)  # fmt: skip


def side_files(directory: Path, *, tokenizer: bool = True) -> list[Path]:
    """Files of a model directory that belong into every model made from it, in a fixed order.

    Args:
        directory: the model's.
        tokenizer: with the files of the tokenizer itself, or without.
    """
    patterns = (*TOKENIZER, *OTHERS) if tokenizer else OTHERS
    candidates = [*directory.iterdir(), *directory.glob("additional_chat_templates/*")]
    return sorted(
        file
        for file in candidates
        if file.is_file() and _is(file, directory, patterns) and not _is(file, directory, NEVER)
    )


def tokenizer_files(directory: Path) -> list[Path]:
    """Those of a directory's side files that give ids to text, in a fixed order."""
    others = set(side_files(directory, tokenizer=False))
    return [file for file in side_files(directory) if file not in others]


def copy_side_files(source: Path, target: Path, *, tokenizer: bool = True) -> None:
    """Copy a model's side files byte for byte, but for the names of code and kernels in them.

    Args:
        source: the model's directory; nothing in it is changed.
        target: an existing directory.
        tokenizer: with the files of the tokenizer itself, or without.
    """
    for file in side_files(source, tokenizer=tokenizer):
        copy_without_code(file, target / file.relative_to(source))


def copy_without_code(file: Path, target: Path) -> None:
    """Copy a file; a configuration loses the names of code, which is not copied, and of kernels."""
    target.parent.mkdir(parents=True, exist_ok=True)
    held = file.read_bytes() if file.name.endswith("config.json") else b""
    if any(f'"{key}"'.encode() in held for key in NOT_COPIED):
        write_json(target, without_code(read_json(file)))
    else:
        shutil.copyfile(file, target)


def _is(file: Path, directory: Path, patterns: tuple[str, ...]) -> bool:
    name = file.relative_to(directory).as_posix().lower()
    # Only a pattern with a slash speaks of a folder's files, though "*" would match one.
    return any(
        fnmatchcase(name, pattern)
        for pattern in patterns
        if ("/" in pattern) == ("/" in name) or pattern in NEVER
    )
