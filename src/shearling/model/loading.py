"""A model directory read the way its users will read it: stock transformers, safetensors only."""

from __future__ import annotations

import logging
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shearling.errors import ShearlingError
from shearling.files.quiet import no_progress_bars
from shearling.model.checkpoint import read_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What follows the type computed in; all else keeps its size. Types not named take a byte.
_FLOATS = ("F64", "F32", "F16", "BF16")
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4} | dict.fromkeys(
    ("F16", "BF16", "I16", "U16"), 2
)


def load_config(path: Path | str) -> PretrainedConfig:
    """The text model's configuration in a local model directory.

    Raises:
        ShearlingError: ``path`` is no model directory, or transformers does not know the model.
    """
    path = _model_directory(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ShearlingError(_one_line(f"The configuration in {path} cannot be used", error)) from (
            error
        )
    return config.get_text_config()


def load_model(path: Path | str, *, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """The model of a local directory, for inference: evaluation mode, weights without gradients.

    Weights that are quantised stay so; ``dtype`` is then what the rest is in and is computed in.

    Args:
        path: directory with config.json and safetensors; no other weights, no remote code.
        dtype: float32, bfloat16 or float16, whatever the checkpoint's own.
        device: a torch device, such as cpu or cuda:0.

    Raises:
        ShearlingError: no model directory, an unknown dtype or device, weights that are missing,
            misshapen or damaged, a model that does not fit in memory, or a quantised one whose
            library is not installed.
    """
    path = _model_directory(path)
    if dtype not in DTYPES:
        raise ShearlingError(f"The dtype {dtype!r} is not known here; give {', '.join(DTYPES)}.")
    _check_library(path)
    check_fits(path, dtype, device=device)
    try:
        with no_progress_bars():
            # With output_loading_info this is a pair, which its annotation does not say.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # so that they are reported, and refused below
                output_loading_info=True,
            )
            model, report = loaded
    except (
        OSError, ValueError, KeyError, RuntimeError, ImportError, AssertionError, SafetensorError
    ) as error:  # fmt: skip
        raise ShearlingError(_one_line(f"The model in {path} cannot be loaded", error)) from error
    # A weight that transformers could not find was drawn at random: no measurement on it counts.
    bad = sorted(report["missing_keys"]) + sorted(name for name, *_ in report["mismatched_keys"])
    if bad:
        raise ShearlingError(
            f"The model in {path} lacks {len(bad)} weights of the shape its configuration asks "
            f"for, the first being {bad[0]}; give a complete checkpoint."
        )
    _compute_in(model, DTYPES[dtype])
    try:
        return model.to(device).eval().requires_grad_(False)
    except (RuntimeError, AssertionError) as error:
        raise ShearlingError(_one_line(f"The device {device!r} cannot be used", error)) from error


def check_fits(
    model: Any, dtype: str | torch.dtype, *, extra_bytes: int = 0, device: str = "cpu"
) -> None:
    """Refuse a model that does not fit in the memory that is free, before it is loaded.

    Args:
        model: a model directory, or anything with a ``path`` that is one, such as a checkpoint.
        dtype: what its floating-point weights will be in; quantised ones keep their size.
        extra_bytes: what is needed besides: caches, states, another model.
        device: where it goes, such as cpu or cuda:0; memory of other kinds is not checked.

    Raises:
        ShearlingError: it needs more than there is, with both figures.
    """
    path = Path(getattr(model, "path", model))
    kind = DTYPES[dtype] if isinstance(dtype, str) else dtype
    needed = loaded_bytes(path, kind) + extra_bytes
    free = _free_bytes(device)
    if free is None or needed <= free:
        return
    half = loaded_bytes(path, torch.bfloat16) + extra_bytes
    smaller = f"use bfloat16 ({half / 1e9:.1f} GB), " if half < free else ""
    raise ShearlingError(
        f"The model in {path} needs about {needed / 1e9:.1f} GB in "
        f"{str(kind).removeprefix('torch.')}, but {free / 1e9:.1f} GB of memory on {device} are "
        f"free; {smaller}free some, or give a smaller model."
    )


def loaded_bytes(path: Path, dtype: torch.dtype | None = None) -> int:
    """Bytes of a directory's weights in memory, from the headers of its safetensors alone.

    Args:
        path: the directory.
        dtype: what floating-point weights become; None leaves them as they are stored.
    """
    total = 0
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - a handle is not a mapping
                    view = shard.get_slice(name)
                    kind = view.get_dtype()
                    size = _BYTES.get(kind, 1)
                    if dtype is not None and kind in _FLOATS:
                        size = dtype.itemsize
                    total += size * math.prod(view.get_shape())
        except SafetensorError as error:
            raise ShearlingError(_one_line(f"The model in {path} cannot be loaded", error)) from (
                error
            )
    return total


def load_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local model directory.

    Raises:
        ShearlingError: ``path`` is no model directory or holds no tokenizer that can be read.
    """
    path = _model_directory(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ShearlingError(_one_line(f"The tokenizer in {path} cannot be used", error)) from error
    if tokenizer is None:
        raise ShearlingError(f"The directory {path} holds no tokenizer; give one that does.")
    return tokenizer


def longest_input(config: PretrainedConfig) -> int | None:
    """Positions the model was made for, or None where its configuration names no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_positive(**values: int | None) -> None:
    """Raise a ShearlingError that names the first of ``values`` that is given and is below 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ShearlingError(f"{name} is {value}, but it must be at least 1.")


def _free_bytes(device: str) -> int | None:
    """Free memory of a CPU or a CUDA device; None where we cannot tell."""
    if device == "cpu":
        return psutil.virtual_memory().available
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.mem_get_info(torch.device(device))[0]
    return None


def _check_library(path: Path) -> None:
    """Refuse weights quantised by torchao where it is missing."""
    found = read_json(path / "config.json").get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != "torchao":
        return
    require_torchao(f"The model in {path} is quantised by torchao")


def require_torchao(why: str) -> None:
    """Import torchao without its remarks on kernels of other machines.

    Raises:
        ShearlingError: it is not installed; ``why`` begins the sentence.
    """
    if find_spec("torchao") is None:
        raise ShearlingError(
            f"{why}, which is not installed; run `pip install 'shearling[quantize]'`."
        )
    logging.getLogger("torchao").setLevel(logging.ERROR)


def _compute_in(model: Any, dtype: torch.dtype) -> None:
    """Have quantised weights take part in products of ``dtype``, where they insist on their own.

    torchao's int8 goes by the input; its int4 unpacks to the type it was quantised from.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if type(parameter).__name__ == "IntxUnpackedToInt8Tensor" and parameter.dtype != dtype:
                changed = torch.nn.Parameter(parameter.to(dtype=dtype), requires_grad=False)
                setattr(module, name, changed)


def _model_directory(path: Path | str) -> Path:
    path = Path(path)
    if not (path / "config.json").is_file():
        raise ShearlingError(
            f"{path} is not a model directory; give one that holds config.json and "
            f"*.safetensors, as save_pretrained writes it."
        )
    return path


def _one_line(what: str, error: Exception) -> str:
    return f"{what}: {' '.join(str(error).split()) or type(error).__name__}"
