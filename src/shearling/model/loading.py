"""What stock transformers makes of a model directory: safetensors only, and no code but its own.

Every configuration, tokenizer and model of the package comes from here. Nothing is fetched, no
pickle is read, and code that a directory names is never run, nor is anybody asked.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from shearling.errors import ShearlingError, in_words
from shearling.files.quiet import no_progress_bars
from shearling.files.reading import read_json
from shearling.model import remote_code
from shearling.model.adapters import check_no_adapter
from shearling.model.dtypes import dtype_of
from shearling.model.memory import check_fits
from shearling.model.sanity import (
    check_depth,
    check_ids_of,
    check_model_numbers,
    check_tokenizer_files,
    remedy,
)
from shearling.model.stored import stored_tensors
from shearling.model.wrapping import Wrapping, plain_config, wrapping_of
from shearling.table.families.wrappers import is_known

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MOST_THREADS = 4096  # beyond what processors have; each takes memory, and torch makes them all
_LOCAL: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


def load_config(path: Path | str) -> PretrainedConfig:
    """transformers' reading of the config.json in a local model directory.

    Raises:
        ShearlingError: no model directory, or a configuration that transformers refuses or would
            run code for.
    """
    from transformers import AutoConfig

    path = _model_directory(path)
    raw = read_json(path / "config.json")
    remote_code.check_config(path, raw)
    check_depth(path, raw)
    file = path / "config.json"
    with in_words(lambda why: f"{file} is refused by transformers: {why}; {remedy(raw)}."):
        config = AutoConfig.from_pretrained(path, **_LOCAL)
        for key in remote_code.IMPLEMENTATIONS:
            if key in raw:  # a wish of the machine that the model was saved on
                setattr(config, f"_{key.removeprefix('_')}", None)
    return config


def load_tokenizer(directory: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer in a local directory, in which no model need be.

    Raises:
        ShearlingError: there is none that transformers can read without running code.
    """
    from transformers import AutoTokenizer

    directory = Path(directory)
    check_tokenizer_files(directory)
    with in_words(lambda why: _no_tokenizer(directory, why)):
        if not directory.is_dir():
            raise OSError("there is no such directory")
        tokenizer = AutoTokenizer.from_pretrained(directory, **_LOCAL)
        if tokenizer is None:
            raise OSError("transformers knows none for this kind of model")
    return tokenizer


def _no_tokenizer(directory: Path, why: str) -> str:
    named = remote_code.tokenizer_class(directory)
    if named is not None:
        return (
            f"{directory / remote_code.TOKENIZER_CONFIG} names {named}, code that is never run, "
            "and transformers itself cannot read the tokenizer; give a directory with a "
            "tokenizer.json and a tokenizer_config.json that names a tokenizer it knows."
        )
    return (
        f"{directory} has no tokenizer that transformers can read ({why}); give a directory "
        "with tokenizer.json and tokenizer_config.json."
    )


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
    kind = dtype_of(dtype)
    with in_words(lambda why: f"The device {device!r} cannot be used: {why}"):
        torch.empty(0, device=device)  # before minutes are spent on reading weights
    _check_library(path)
    check_fits(path, kind, device=device)
    # Wrong sizes are to be reported, and refused below.
    model, report = stock_model(path, kind, ignore_mismatched_sizes=True)
    # A weight that transformers could not find was drawn at random: no measurement on it counts.
    bad = sorted(report["missing_keys"]) + sorted(name for name, *_ in report["mismatched_keys"])
    if bad:
        raise ShearlingError(
            f"The model in {path} lacks {len(bad)} weights of the shape its configuration asks "
            f"for, the first being {bad[0]}; give a complete checkpoint."
        )
    _compute_in(model, kind)
    check_ids_of(model, path)
    return model.to(device).eval().requires_grad_(False)


def stock_model(path: Path, dtype: torch.dtype, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The causal language model of a directory, as stock transformers gives it, on the CPU.

    Args:
        path: the directory.
        dtype: of its weights.
        options: further ones of transformers' ``from_pretrained``.

    Returns:
        The model, and what transformers says of its loading: ``missing_keys``,
        ``unexpected_keys``, ``mismatched_keys``.

    Raises:
        ShearlingError: it would need code that is never run, or holds an adapter, which
            transformers would add; transformers cannot load it, or one of its weights is no
            finite number.
    """
    check_no_adapter(path)
    wrapping = _wrapping(path)
    with _loading(path):
        loaded = (
            _alone(path, dtype, options)
            if wrapping is None
            else _within(path, wrapping, dtype, options)
        )
    check_model_numbers(loaded[0], path)
    return loaded


def _products_of(dtype: torch.dtype | None) -> dict[str, Any]:
    """How experts are run: all at once by default, which torch cannot do in double precision."""
    return {"experts_implementation": "eager"} if dtype == torch.float64 else {}


def _alone(path: Path, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    # With output_loading_info this is a pair, which its annotation does not say.
    return AutoModelForCausalLM.from_pretrained(
        path, config=load_config(path), dtype=dtype, use_safetensors=True,
        output_loading_info=True, **_LOCAL, **_products_of(dtype), **options,
    )  # fmt: skip


def _within(path: Path, wrapping: Wrapping, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """The language model alone, of its own class."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = plain_config(wrapping.text, path)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return kind.from_pretrained(
        None, config=config, state_dict=_own_weights(path, wrapping), dtype=dtype,
        output_loading_info=True, **_products_of(dtype), **options,
    )  # fmt: skip


@contextmanager
def _loading(path: Path) -> Generator[None]:
    with (
        in_words(
            lambda why: f"The model in {path} cannot be loaded: {why}; repair or fetch it again."
        ),
        no_progress_bars(),
    ):
        yield


def stock_wrapper(path: Path, dtype: torch.dtype, **options: Any) -> tuple[Any, dict[str, Any]]:
    """As :func:`stock_model`, a language model with all that it is wrapped in."""
    from transformers import AutoModelForImageTextToText

    with _loading(path):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path, config=load_config(path), dtype=dtype, use_safetensors=True,
            output_loading_info=True, **_LOCAL, **_products_of(dtype), **options,
        )  # fmt: skip
    return loaded


def _wrapping(path: Path) -> Wrapping | None:
    """What lies around the language model in a directory, if it is of a kind that we know."""
    known = is_known(read_json(path / "config.json"))
    return wrapping_of(path, stored_tensors(path)) if known else None


def _own_weights(path: Path, wrapping: Wrapping) -> dict[str, Tensor]:
    """The language model's tensors, mapped from their files."""
    by_file: dict[Path, list[str]] = {}
    for name, tensor in stored_tensors(path).items():
        by_file.setdefault(tensor.file, []).append(name)
    weights = {}
    for file, names in by_file.items():
        with safe_open(file, "pt") as shard:
            for name in names:
                if (inner := wrapping.inside(name)) is not None:
                    tensor = shard.get_tensor(name)
                    weights[inner] = tensor.mT if name in wrapping.turned else tensor
    return weights


def build_model(config: Any, dtype: torch.dtype | None = None) -> Any:
    """transformers' own model of a configuration, with weights as it draws them.

    Args:
        config: as :func:`load_config` gives it.
        dtype: of its weights; None leaves torch's default.

    Raises:
        ShearlingError: transformers can read such a configuration, and cannot build it.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    options |= _products_of(dtype)
    name = config.name_or_path or "the model"
    with in_words(
        lambda why: (
            f"The configuration of {name} describes a model that transformers cannot "
            f"build ({why}); repair its config.json first."
        )
    ):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)


def longest_input(config: PretrainedConfig) -> int | None:
    """Positions the model was made for, or None where its configuration names no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_length(length: int, config: PretrainedConfig, name: str) -> None:
    """Refuse sequences of more tokens than a model has positions for (ShearlingError)."""
    limit = longest_input(config)
    if limit is not None and length > limit:
        raise ShearlingError(
            f"sequences of {length} tokens are longer than the {limit} positions of {name}; give a "
            f"--length of at most {limit}."
        )


def check_positive(**values: int | None) -> None:
    """Raise a ShearlingError that names the first of ``values`` that is given and is below 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ShearlingError(f"{name} is {value}, but it must be at least 1.")


def check_threads(threads: int | None) -> None:
    """Refuse a number of CPU threads below 1, or above what any machine has.

    Raises:
        ShearlingError: the number is named.
    """
    check_positive(threads=threads)
    if threads is not None and threads > MOST_THREADS:
        raise ShearlingError(
            f"threads is {threads}, but it must be at most {MOST_THREADS:,}; give as many as there "
            "are cores."
        )


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
    check_no_adapter(path)
    if not (path / "config.json").is_file():
        raise ShearlingError(
            f"{path} is not a model directory; give one that holds config.json and "
            f"*.safetensors, as save_pretrained writes it."
        )
    return path
