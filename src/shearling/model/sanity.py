"""Whether what a model's files say can be true, before and after libraries make something of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from shearling.errors import ShearlingError, in_words
from shearling.files.reading import LARGEST, check_size
from shearling.model.weight_files import weight_files

_DEPTHS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
    "num_decoder_layers",
)  # fmt: skip
DEEPEST = 1000  # more blocks than this are believed only where there are as many tensors
# Sizes of things that a model of tokens has none or few of, and that must be at least one.
_COUNTS = {"num_labels": 10**6, "max_position_embeddings": 10**12}
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_depth(path: Path, raw: Mapping[str, Any]) -> None:
    """Refuse a number of blocks that the stored tensors cannot be of.

    transformers makes lists and modules of as many as a configuration says: of ten million for
    minutes.

    Args:
        path: the model's directory.
        raw: its config.json.

    Raises:
        ShearlingError: there are more blocks than tensors; both numbers are named.
    """
    for part in (raw, *(value for value in raw.values() if isinstance(value, Mapping))):
        for key, most in _COUNTS.items():
            size = part.get(key)
            if isinstance(size, int) and not 1 <= size <= most:
                raise ShearlingError(
                    f"{path / 'config.json'} says {key}={_short(size)}, but it must be from 1 to "
                    f"{most:,}; repair the configuration."
                )
        for key in _DEPTHS:
            depth = part.get(key)
            if isinstance(depth, int) and depth > DEEPEST and depth > (num := _num_tensors(path)):
                raise ShearlingError(
                    f"{path / 'config.json'} says {key}={_short(depth)}, but the weights beside it "
                    f"are {num:,} tensors, fewer than one a block; repair the configuration."
                )


def _num_tensors(path: Path) -> int:
    num = 0
    for file in weight_files(path):
        with (
            in_words(
                lambda why, file=file: f"{file} is truncated or corrupt ({why}); fetch it again."
            ),
            safe_open(file, "pt") as shard,
        ):
            num += len(shard.keys())
    return num


def _short(number: int) -> str:
    return f"{number:,}" if number < 10**30 else "a number of more than thirty digits"


def remedy(raw: Mapping[str, Any]) -> str:
    """What to do about a configuration that transformers refuses, as the end of a sentence."""
    hidden, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    whole = isinstance(hidden, int) and isinstance(heads, int) and heads > 0
    if raw.get("model_type") == "llama" and whole and hidden % heads:
        return (
            "where head_dim is given, the same weights load as Mistral, which computes the same: "
            'set "model_type": "mistral", "architectures": ["MistralForCausalLM"] and '
            '"sliding_window": null'
        )
    return "repair the configuration first"


def check_tokenizer_files(directory: Path) -> None:
    """Refuse a tokenizer whose files are too large to be parsed in memory.

    A parsed tokenizer takes many times its file; the largest there are have some 50 MB.

    Raises:
        ShearlingError: the file is named, with both sizes.
    """
    patterns = ("*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja", "*.spm")
    for file in sorted(file for pattern in patterns for file in directory.glob(pattern)):
        check_size(file, LARGEST)


def check_numbers(name: str, tensor: Tensor, where: Path | str) -> None:
    """Refuse a weight that holds NaN or infinity; every tensor is read through once.

    Types that cannot be computed with, such as those of quantised weights, pass.

    Raises:
        ShearlingError: the tensor is named.
    """
    if tensor.dtype not in _FLOATS or tensor.is_meta or not tensor.numel():
        return
    least, most = tensor.detach().aminmax()  # NaN comes through; nothing else is allocated
    if not bool(torch.isfinite(least) & torch.isfinite(most)):
        raise ShearlingError(
            f"the tensor {name} of {where} holds numbers that are infinite or none (NaN); fetch "
            "the checkpoint again, or give one from before that happened."
        )


def check_model_numbers(model: Any, path: Path) -> None:
    """:func:`check_numbers` for every plain parameter of a loaded model.

    Raises:
        ShearlingError: as there; with the type that the model was loaded in, which may be too
            narrow for its numbers.
    """
    for name, parameter in _plain(model):
        check_numbers(name, parameter, f"{path}, loaded as {str(parameter.dtype).split('.')[-1]},")


def _plain(model: Any) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if type(parameter.data) is Tensor:  # not a quantised one, which is another class
            yield name, parameter


def check_ids_of(model: Any, path: Path) -> None:
    """Have a stock model refuse tokens that its embedding has no row of.

    Raises:
        ShearlingError: when the model is run on such tokens.
    """
    embedding = model.get_input_embeddings()
    num_rows = getattr(embedding, "num_embeddings", None)
    if num_rows is None:
        return

    def check(_: Any, args: tuple[Any, ...]) -> None:
        # A model's own next token, one at a time, is within its vocabulary.
        if args and isinstance(args[0], Tensor) and args[0].shape[-1] > 1:
            check_ids(args[0], num_rows, path.name)

    embedding.register_forward_pre_hook(check)


def check_ids(ids: Tensor, num_rows: int, model: str) -> None:
    """Refuse token ids that are not among 0 to ``num_rows`` - 1.

    Raises:
        ShearlingError: the id is named.
    """
    if not ids.numel():
        return
    least, most = (int(bound) for bound in ids.aminmax())
    if least < 0 or most >= num_rows:
        raise ShearlingError(
            f"the text gives the token {least if least < 0 else most}, but {model} knows 0 to "
            f"{num_rows - 1}; put the tokenizer that belongs to the model beside its weights."
        )
