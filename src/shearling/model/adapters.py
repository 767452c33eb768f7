"""An adapter in a model's directory: merged into the weights when asked, refused otherwise.

To transformers such a directory is the model with its adapter where peft is installed, and without
it where it is not. Which of the two is cut is the user's to say. The merged model is written into
the cache, once; nothing is written into the directories that it is made of.
"""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shearling.errors import ShearlingError, in_words, told
from shearling.files.cache import cache_directory
from shearling.files.quiet import no_progress_bars
from shearling.files.reading import read_json
from shearling.files.writer import check_space, file_digest, new_directory, write_json
from shearling.model.weight_files import weight_files

if TYPE_CHECKING:
    from torch import Tensor

    from shearling.model.manifest import ModelManifest
    from shearling.model.subject import OpenedModel

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FORMAT = 1  # raised when the same files would be merged into something else
SHARD_BYTES = 10**9
# What float32 may make of the same sum in another order; tied weights are off by far more.
TOLERANCE = 1e-3


def has_adapter(path: Path) -> bool:
    """Whether transformers would look for an adapter in a directory."""
    return (path / CONFIG).is_file()


def check_no_adapter(path: Path) -> None:
    """Refuse a directory that holds an adapter.

    Raises:
        ShearlingError: it does; which model it belongs to, and what would work.
    """
    if not has_adapter(path):
        return
    if weight_files(path):
        raise ShearlingError(
            f"{path} holds an adapter ({CONFIG}) beside its weights, and is another model with it "
            "than without; give --merge-adapter to merge the two into a new one, or a directory "
            "without the adapter."
        )
    base = _base_name(path, read_json(path / CONFIG))
    raise ShearlingError(
        f"{path} holds an adapter ({CONFIG}) and no model: it belongs to {base}; give "
        f"--merge-adapter to merge the two into a new one, or give {base} itself."
    )


def merged(path: Path) -> Path:
    """The directory of a model with its adapter merged, made on the first call.

    Args:
        path: a directory with an adapter, beside the weights it belongs to or alone.

    Raises:
        ShearlingError: peft is not installed, the base model cannot be opened, the adapter does
            not fit it or cannot be merged, or there is too little memory or room on the disk.
    """
    from shearling.model.checkpoint import directory_name
    from shearling.model.subject import open_subject

    raw = read_json(path / CONFIG)
    _check_mergeable(path, raw)
    with _base_alone(path, raw) as folder:
        base = open_subject(folder)
        if isinstance(base.raw.get("quantization_config"), Mapping):
            raise ShearlingError(
                f"the adapter in {path} belongs to a quantised model, into which nothing can be "
                "merged; name the model that it was made from as base_model_name_or_path in its "
                f"{CONFIG}."
            )
        if getattr(base, "wrapping", None) is not None:
            raise ShearlingError(
                f"the adapter in {path} belongs to a language model inside a larger one, into "
                "which nothing is merged yet; merge it with peft, and give the result."
            )
        name = f"{directory_name(path)}-merged"
        target = cache_directory() / "merged" / _key(base, path)[:16] / name
        if not (target / "config.json").is_file():
            _write(base, path, raw, target)
    return target


def _write(base: OpenedModel, path: Path, raw: Mapping[str, Any], target: Path) -> None:
    """Merge, prove, and write the stock checkpoint with its manifest."""
    from shearling.model.checkpoint import directory_name
    from shearling.model.manifest import MANIFEST, WrittenProof
    from shearling.model.subject import open_subject

    check_space(target, base.bytes)
    state, proof = _merged_state(base, path)
    try:
        with new_directory(target) as staging:
            files = _save(base, state, path, staging)
            written = open_subject(staging)
            record = _manifest(base, written, target.name)
            adapter = {
                "name": directory_name(path), "type": raw["peft_type"],
                "base": raw.get("base_model_name_or_path"),
                "files": {name: file_digest(path / name) for name in (CONFIG, WEIGHTS)},
            }  # fmt: skip
            whole = replace(record, adapter=adapter, proof=WrittenProof(**proof), files=files)
            write_json(staging / MANIFEST, whole.to_json())
    except (OSError, ShearlingError):
        # Another process, such as another rank of this run, may have been as quick.
        if not (target / "config.json").is_file():
            raise


def _check_mergeable(path: Path, raw: Mapping[str, Any]) -> None:
    """Refuse what peft cannot merge, or would read from pickles or with a module of its choice."""
    if find_spec("peft") is None:
        raise ShearlingError(
            f"merging the adapter in {path} needs peft, which is not installed; run "
            "`pip install 'shearling[lora]'`."
        )
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    if not (path / WEIGHTS).is_file():
        pickled = (path / PICKLE).is_file()
        what = f"is pickled ({PICKLE}), which can run code when loaded" if pickled else "is absent"
        raise ShearlingError(f"the adapter of {path} {what}; give a directory with {WEIGHTS}.")
    kinds = {str(kind.value): tuner for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    kind = raw.get("peft_type")
    tuner = kinds.get(kind) if isinstance(kind, str) else None
    # X-LoRA reads further adapters, from wherever its configuration says.
    if kind == "XLORA" or tuner is None or not issubclass(tuner, BaseTuner):
        raise ShearlingError(
            f"{path / CONFIG} is of the type {told(kind)}, which cannot be merged into weights; "
            "give an adapter such as LoRA."
        )
    if raw.get("megatron_config"):
        raise ShearlingError(
            f"{path / CONFIG} names Megatron's modules, which are never imported; remove "
            "megatron_config from it."
        )


def _base_name(path: Path, raw: Mapping[str, Any]) -> str:
    """What an adapter's configuration calls the model that it belongs to."""
    name = raw.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ShearlingError(
            f"{path} holds an adapter and no model, and {path / CONFIG} does not name the model "
            "that it belongs to; name it there as base_model_name_or_path."
        )
    return name


@contextmanager
def _base_alone(path: Path, raw: Mapping[str, Any]) -> Generator[Path]:
    """The model that an adapter belongs to, in a directory without the adapter.

    It is the one beside the adapter where there is one: so transformers has it, whatever the
    configuration names.
    """
    from shearling.model.checkpoint import directory_name
    from shearling.model.resolve import resolve

    if not weight_files(path):
        name = _base_name(path, raw)
        if Path(name).is_dir() and Path(name).samefile(path):
            raise ShearlingError(f"{path / CONFIG} names its own directory, which has no weights.")
        try:
            base = resolve(name)
        except ShearlingError as error:
            raise ShearlingError(f"the adapter in {path} is merged into {name}: {error}") from error
        yield base
        return
    with tempfile.TemporaryDirectory(prefix="shearling-") as temporary:
        folder = Path(temporary) / directory_name(path)
        folder.mkdir()
        for file in path.resolve().iterdir():
            if not file.name.startswith("adapter_"):
                (folder / file.name).symlink_to(file, target_is_directory=file.is_dir())
        yield folder


def _key(base: OpenedModel, path: Path) -> str:
    """Digest of all that the merged directory is made from."""
    from shearling.model.side_files import side_files

    adapter = [path / CONFIG, path / WEIGHTS, *side_files(path)]
    parts = [str(FORMAT), base.fingerprint]
    parts += [f"{file.name} {file_digest(file)}" for file in [*side_files(base.path), *adapter]]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _merged_state(base: OpenedModel, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by their names on disk, float32, and the proof that they are the adapted model."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    from shearling.model.loading import load_model
    from shearling.model.proof_tokens import proof_tokens

    ids_BS = proof_tokens(base)
    model = load_model(base.path, dtype="float32")
    with (
        in_words(  # whatever peft's many methods raise
            lambda why: (
                f"the adapter in {path} cannot be merged into {base.name} by peft ({why}); "
                "give an adapter of that model."
            )
        ),
        no_progress_bars(),
        torch.inference_mode(),
    ):
        adapted = _adapted(model, path)
        expected_BSV = adapted(ids_BS).logits
        whole = adapted.merge_and_unload()
        merged_BSV = whole(ids_BS).logits
    difference = float((merged_BSV - expected_BSV).abs().max())
    relative = difference / max(float(expected_BSV.abs().max()), 1e-30)
    if not relative <= TOLERANCE:
        raise ShearlingError(
            f"{base.name} with the adapter in {path} merged has other logits than with the adapter "
            f"beside it ({relative:.1e} of the largest); it may change weights that are tied, so "
            "that no plain checkpoint holds it."
        )
    proof = {
        "max_abs_difference": difference, "max_relative_difference": relative,
        "tokens": ids_BS.numel(), "loaded_with": "peft", "passed": True,
    }  # fmt: skip
    return revert_weight_conversion(whole, whole.state_dict()), proof


def _adapted(model: Any, path: Path) -> Any:
    """The model with its adapter, every tensor of which has found its place."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        adapted = PeftModel.from_pretrained(model, str(path), torch_device="cpu")
        known = {*get_peft_model_state_dict(adapted, save_embedding_layers=False)}
    known |= {*adapted.state_dict()}
    with safe_open(path / WEIGHTS, "pt") as file:
        unknown = sorted({*file.keys()} - known)
    if unknown:
        raise ShearlingError(
            f"{path / WEIGHTS} holds {len(unknown)} tensors that have no place in the model, such "
            f"as {unknown[0]}; give the model that the adapter was made for."
        )
    return adapted.eval()


def _save(
    base: OpenedModel, state: Mapping[str, Tensor], path: Path, staging: Path
) -> dict[str, str]:
    """Write the tensors that the base has, in its types, and its files; the adapter's tokenizer."""
    from shearling.files.writer import write_weights
    from shearling.model.dtypes import torch_dtype
    from shearling.model.side_files import copy_side_files, copy_without_code, tokenizer_files
    from shearling.model.stored import stored_tensors

    stored = stored_tensors(base.path)
    absent = sorted(name for name in stored if name not in state)
    if absent:
        raise ShearlingError(
            f"{base.name} stores {absent[0]}, which transformers calls otherwise, so that nothing "
            "can be merged into it here; merge the adapter with peft itself."
        )

    def load(names: list[str]) -> dict[str, Tensor]:
        return {name: state[name].to(torch_dtype(stored[name].dtype)).clone() for name in names}

    sizes = {name: tensor.bytes for name, tensor in stored.items()}
    files = write_weights(staging, sizes, load, shard_bytes=SHARD_BYTES)
    copy_without_code(base.path / "config.json", staging / "config.json")
    copy_side_files(base.path, staging, tokenizer=not tokenizer_files(path))
    copy_side_files(path, staging)
    return files


def _manifest(base: OpenedModel, written: OpenedModel, name: str) -> ModelManifest:
    """What every stage says of the model that it made."""
    from shearling.model.manifest import ModelManifest, made_from, made_of

    facts = made_from(base)
    facts["versions"] |= {"peft": version("peft")}
    return ModelManifest(stage="merge", **facts, **made_of(written, name), keep={})
