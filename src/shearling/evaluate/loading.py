"""A model directory read the way its users will read it: stock transformers, safetensors only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shearling.errors import ShearlingError
from shearling.quiet import no_progress_bars

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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

    Args:
        path: directory with config.json and safetensors; no other weights, no remote code.
        dtype: float32, bfloat16 or float16, whatever the checkpoint's own.
        device: a torch device, such as cpu or cuda:0.

    Raises:
        ShearlingError: no model directory, an unknown dtype or device, weights that are missing,
            misshapen or damaged.
    """
    path = _model_directory(path)
    if dtype not in DTYPES:
        raise ShearlingError(f"The dtype {dtype!r} is not known here; give {', '.join(DTYPES)}.")
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
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ShearlingError(_one_line(f"The model in {path} cannot be loaded", error)) from error
    # A weight that transformers could not find was drawn at random: no measurement on it counts.
    bad = sorted(report["missing_keys"]) + sorted(name for name, *_ in report["mismatched_keys"])
    if bad:
        raise ShearlingError(
            f"The model in {path} lacks {len(bad)} weights of the shape its configuration asks "
            f"for, the first being {bad[0]}; give a complete checkpoint."
        )
    try:
        return model.to(device).eval().requires_grad_(False)
    except (RuntimeError, AssertionError) as error:
        raise ShearlingError(_one_line(f"The device {device!r} cannot be used", error)) from error


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
