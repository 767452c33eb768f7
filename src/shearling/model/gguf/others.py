"""GGUF files of architectures that have no family here: read by transformers, if it reads all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError, reason
from shearling.files.quiet import no_progress_bars
from shearling.model.gguf.header import GgufFile

_LOCAL = {"trust_remote_code": False, "local_files_only": True}
# What its reader passes over, and what changes a model's sums where it is there.
_DROPPED = (
    "rope.scaling.factor", "rope.scale_linear", "attention.scale", "attn_logit_softcapping",
    "final_logit_softcapping", "logit_scale", "embedding_scale", "residual_scale",
    "attention.clamp_kqv", "attention.max_alibi_bias",
)  # fmt: skip
_STATED = {"gpt-oss", "gpt_oss"}  # whose scaling it does read


def convert_by_transformers(file: GgufFile, directory: Path) -> None:
    """Have transformers read a GGUF file, and write what it read.

    Raises:
        ShearlingError: transformers does not read it, or passes over something that matters.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _require_read_whole(file)
    gguf = file.path
    try:
        with no_progress_bars():
            # With output_loading_info this is a pair, which its annotation does not say.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                output_loading_info=True,
                **_LOCAL,
            )
            model, report = loaded
            _require_all_loaded(file, report)
            tokenizer: Any = AutoTokenizer.from_pretrained(
                gguf.parent, gguf_file=gguf.name, **_LOCAL
            )
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    except ShearlingError:
        raise
    except Exception as error:  # whatever the readers raise, struct.error among it
        why = reason(error)
        lacking = isinstance(error, ImportError) or "pip install" in why
        remedy = "install shearling[gguf]" if lacking else "give the model's safetensors instead"
        raise ShearlingError(
            f"{gguf} cannot be converted by transformers ({why}); {remedy}."
        ) from error


def _require_all_loaded(file: GgufFile, report: Mapping[str, Any]) -> None:
    """Refuse a file that lacks tensors: transformers draws such at random, and says little."""
    lacking = sorted(report["missing_keys"])
    lacking += sorted(name for name, *_ in report["mismatched_keys"])
    if lacking:
        raise ShearlingError(
            f"{file.path} lacks {len(lacking)} tensors that a {file.architecture} model has, the "
            f"first being {lacking[0]}; fetch it again, or give the model's safetensors instead."
        )


def _require_read_whole(file: GgufFile) -> None:
    """Refuse what transformers would pass over."""
    if file.architecture in _STATED:
        return
    dropped = [f"{file.architecture}.{key}" for key in _DROPPED if file.get(key)]
    dropped += [name for name in file.tensors if name.startswith("rope_")]
    if dropped:
        raise ShearlingError(
            f"{file.path} holds {dropped[0]}, which transformers passes over when it reads a "
            f"{file.architecture} file; give the model's safetensors instead."
        )
