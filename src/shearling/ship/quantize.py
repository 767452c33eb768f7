"""Weights in eight or four bits, by torchao: rounded, written, and proved by loading them back.

Matrices of the blocks are rounded; embeddings, the head, norms and biases stay as they are. The
directory holds safetensors alone and loads in stock transformers, with torchao installed. int8 has
one scale a row unless groups are asked for; int4 one scale a group of inputs. torchao's only int4
that both a CPU runs and safetensors hold keeps each value in a byte (0.18, tried on every layout).

Shapes: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.files.quiet import no_progress_bars
from shearling.files.reading import read_json
from shearling.files.writer import (
    check_output,
    check_outside,
    check_space,
    file_digest,
    new_directory,
    order_metadata,
    write_json,
)
from shearling.model.checkpoint import Checkpoint
from shearling.model.dtypes import DTYPES, dtype_of, name_of, torch_dtype
from shearling.model.loading import load_model, require_torchao, stock_model
from shearling.model.manifest import MANIFEST, ModelManifest, WrittenProof, made_from
from shearling.model.memory import check_fits, loaded_bytes
from shearling.model.proof_tokens import proof_tokens
from shearling.model.refs import ModelRef
from shearling.model.remote_code import without_code
from shearling.model.side_files import copy_side_files
from shearling.model.subject import Subject, open_subject

BITS = {"int8": 8, "int4": 4}
GROUPS = (32, 64, 16, 128)  # of int4, the first that divides the most weights


@dataclass(frozen=True, slots=True)
class QuantizePlan:
    """What becomes of a model's tensors.

    Attributes:
        to: int8 or int4.
        group: inputs that share a scale; None for a whole row.
        dtype: what is not quantised is stored in.
        quantized: modules whose weights are rounded.
        kept: modules whose weights could be but are not, since the group does not divide their
            inputs, with how many inputs they have.
        weights: how many weights are rounded.
        bytes: what all tensors take on disk.
    """

    to: str
    group: int | None
    dtype: str
    quantized: tuple[str, ...]
    kept: Mapping[str, int]
    weights: int
    bytes: int

    @property
    def remark(self) -> str | None:
        """A sentence on what stays unquantised, or None."""
        if not self.kept:
            return None
        kinds = sorted({f"{name.split('.')[-1]} ({n} inputs)" for name, n in self.kept.items()})
        return (
            f"{', '.join(kinds)} stays in {self.dtype}: its inputs are no multiple of the group "
            f"of {self.group}"
        )


@dataclass(frozen=True, slots=True)
class RoundingProof:
    """What loading the written directory has shown, on two sequences of random tokens.

    Attributes:
        identical: its logits are those of the model that was quantised in memory, bit for bit.
        max_abs_difference: largest difference of a logit from the source's.
        max_relative_difference: the same, over the source's largest absolute logit.
        divergence: of the next-token distributions from the source's, mean, in nats.
        tokens: positions compared.
        loaded_with: what read the result.
        computed_in: the precision in which all were run.
    """

    identical: bool
    max_abs_difference: float
    max_relative_difference: float
    divergence: float
    tokens: int
    loaded_with: str
    computed_in: str


def open_source(model: str | Path) -> Checkpoint:
    """Open what is to be quantised.

    Raises:
        ShearlingError: it is quantised already, or shearling does not know its architecture.
    """
    subject = open_subject(model)
    if not isinstance(subject, Subject):
        return subject
    if subject.quantization is not None:
        how = subject.quantization.get("quant_method", "some method")
        raise ShearlingError(
            f"{model} is quantised already (by {how}); give the checkpoint that it was made from."
        )
    return Checkpoint.open(model)  # which says what it does not know


def plan(
    source: Checkpoint, to: str, *, group: int | None = None, dtype: str | None = None
) -> QuantizePlan:
    """Which matrices would be rounded, and what the result would take on disk.

    Args:
        source: the model.
        to: int8 or int4.
        group: inputs that share a scale; None is a whole row for int8, and for int4 the first of
            ``GROUPS`` that divides the inputs of the most weights.
        dtype: what the rest is stored in, float32, bfloat16 or float16; None keeps the source's.

    Raises:
        ShearlingError: an unknown ``to`` or ``dtype``, or a group that divides nothing.
    """
    if to not in BITS:
        raise ShearlingError(f"--to {to} is not known; give {' or '.join(BITS)}.")
    if dtype is not None:
        dtype_of(dtype)
    if group is not None and group < 2:
        raise ShearlingError(f"a group of {group} inputs was asked for; give at least 2.")
    matrices = _matrices(source)
    if group is None and to == "int4":
        group = max(GROUPS, key=lambda g: sum(o * i for o, i in matrices.values() if i % g == 0))
    rounded = {name: s for name, s in matrices.items() if group is None or s[1] % group == 0}
    if not rounded:
        raise ShearlingError(_no_group(source, matrices, group or 0))
    stored = dtype or _dtype(source)
    return QuantizePlan(
        to,
        group,
        stored,
        tuple(rounded),
        {name: inputs for name, (_, inputs) in matrices.items() if name not in rounded},
        sum(outputs * inputs for outputs, inputs in rounded.values()),
        _bytes(source, rounded, to, group, stored),
    )


def check(source: Checkpoint, output: Path, wanted: QuantizePlan) -> None:
    """Refuse what cannot work before any work is done: torchao, disk, memory, the output's name."""
    if source.wrapping is not None:
        raise ShearlingError(
            f"{source.name} is a language model inside a {source.wrapping.kind.model_type}, which "
            "is not quantised yet; `shearling export` writes its language model as GGUF."
        )
    require_torchao(f"--to {wanted.to} needs torchao")
    check_output(output)
    check_outside(output, source.path)
    check_space(output, wanted.bytes)
    # The source and its quantised copy are never alive together.
    check_fits(source.path, wanted.dtype)


@torch.inference_mode()
def quantize(
    source: Checkpoint, output: Path, wanted: QuantizePlan, *, progress: Progress = silent
) -> dict[str, Any]:
    """Write a quantised copy of a model, and prove that it loads as what it was in memory.

    Args:
        source: the model; never written to.
        output: a new directory; it appears whole, or not at all.
        wanted: what :func:`plan` gave.
        progress: told how far the work is.

    Returns:
        The manifest.

    Raises:
        ShearlingError: see :func:`check`; or the result does not load as what it was.
    """
    started = time.perf_counter()
    check(source, output, wanted)
    ids_BS = proof_tokens(source)
    stages = len(("source", "rounded", "written", "read back"))
    progress("quantising", 0, stages)
    with new_directory(output) as staging:
        dense_BSV = _logits(load_model(source.path, dtype=wanted.dtype), ids_BS)
        progress("quantising", 1, stages)
        model = _rounded(source, wanted)
        memory_BSV = _logits(model, ids_BS)
        progress("quantising", 2, stages)
        files = _write(source, model, staging)
        del model
        progress("quantising", 3, stages)
        found_BSV = _logits(load_model(staging, dtype=wanted.dtype), ids_BS)
        proof = _proof(dense_BSV, memory_BSV, found_BSV, wanted)
        _require(proof, output)
        written = open_subject(staging)
        manifest = replace(
            _manifest(source, wanted, ModelRef(output.resolve().name, written.fingerprint)),
            bytes=loaded_bytes(staging),
            proof=WrittenProof(**asdict(proof)),
            files=files,
            seconds=round(time.perf_counter() - started, 2),
        ).to_json()
        write_json(staging / MANIFEST, manifest)
        progress("quantising", stages, stages)
    return manifest


def _matrices(source: Checkpoint) -> dict[str, tuple[int, int]]:
    """Module -> (outputs, inputs) of every matrix product but the head's."""
    return {
        name.removesuffix(".weight"): (
            row.dims[0].size(source.shape),
            row.dims[1].size(source.shape),
        )
        for name, (row, _) in source.layout.places(source.shape).items()
        if row.role == "linear"
    }


def _no_group(source: Checkpoint, matrices: Mapping[str, tuple[int, int]], group: int) -> str:
    """Why nothing can be rounded in groups, and the nearest group that can."""
    inputs = sorted({i for _, i in matrices.values()})
    legal = [d for d in range(2, max(inputs) + 1) if any(i % d == 0 for i in inputs)]
    nearest = min(legal, key=lambda d: abs(d - group))
    sizes = ", ".join(map(str, inputs))
    return (
        f"no matrix of {source.name} has inputs that are a multiple of the group of {group} (they "
        f"have {sizes}); the nearest group that divides one of them is {nearest}."
    )


def _dtype(source: Checkpoint) -> str:
    """What most of the source is stored in; of float64, float32."""
    held = dict.fromkeys(source.dtypes.values(), 0)
    for name, size in source.sizes.items():
        held[source.dtypes[name]] += size
    name = name_of(torch_dtype(max(held, key=lambda kind: held[kind])))
    return name if name in DTYPES else "float32"


def _bytes(
    source: Checkpoint,
    rounded: Mapping[str, tuple[int, int]],
    to: str,
    group: int | None,
    dtype: str,
) -> int:
    """What the tensors take: a byte a rounded weight, a scale and a zero a group, and the rest."""
    rest = source.parameters - sum(outputs * inputs for outputs, inputs in rounded.values())
    # A row's scale of int8 is a float32, a group's of int4 of the model's own type.
    scale = 4 if to == "int8" else DTYPES[dtype].itemsize
    groups = sum(outputs * (inputs // (group or inputs)) for outputs, inputs in rounded.values())
    weights = sum(outputs * inputs for outputs, inputs in rounded.values())
    return weights + groups * (scale + 1) + rest * DTYPES[dtype].itemsize


def _logits(model: Any, ids_BS: Tensor) -> Tensor:
    """Logits (B, S, V) in float32."""
    return model(input_ids=ids_BS, use_cache=False).logits.float()


def _rounded(source: Checkpoint, wanted: QuantizePlan) -> Any:
    """The model with its matrices rounded, by transformers and torchao."""
    from torchao.quantization import (
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerGroup,
        PerRow,
    )
    from transformers import TorchAoConfig

    if wanted.to == "int8":
        granularity = PerRow() if wanted.group is None else PerGroup(wanted.group)
        # The recommended settings of inductor concern compiled models, and are torch's globals.
        how: Any = Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)
    else:
        how = IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # ty: ignore[missing-attribute] - made as torch is imported
            granularity=PerGroup(wanted.group or 0),
            # SmolLM2-135M in groups of 32 is then 0.33 nats from the source, symmetric 0.43.
            mapping_type=MappingType.ASYMMETRIC,
        )
    options = TorchAoConfig(how, modules_to_not_convert=["lm_head", *wanted.kept])
    loaded, _ = stock_model(source.path, DTYPES[wanted.dtype], quantization_config=options)
    model = loaded.eval().requires_grad_(False)
    rounded = {
        name
        for name, module in model.named_modules()
        if type(getattr(module, "weight", None)).__module__.startswith("torchao")
    }
    if rounded != set(wanted.quantized):
        other = min(rounded ^ set(wanted.quantized))
        raise ShearlingError(
            f"torchao {version('torchao')} did not round what was planned, {other} being the first "
            "difference; nothing was written, please report this with the model's name."
        )
    return model


def _write(source: Checkpoint, model: Any, staging: Path) -> dict[str, str]:
    """Write weights, configuration and side files; SHA-256 of the weight files."""
    with no_progress_bars():
        model.save_pretrained(staging, max_shard_size="5GB")
    # All but what quantisation adds is as in the source, so that whoever read that can read this.
    saved = read_json(staging / "config.json")
    config = {key: value for key, value in without_code(source.raw).items() if key != "torch_dtype"}
    config |= {key: saved[key] for key in ("dtype", "quantization_config")}
    write_json(staging / "config.json", config)
    (staging / "generation_config.json").unlink(missing_ok=True)
    copy_side_files(source.path, staging)
    files = sorted(staging.glob("*.safetensors"))
    for file in files:
        order_metadata(file)
    return {file.name: file_digest(file) for file in files}


def _proof(
    dense_BSV: Tensor, memory_BSV: Tensor, found_BSV: Tensor, wanted: QuantizePlan
) -> RoundingProof:
    difference = float((found_BSV - dense_BSV).abs().max())
    dense, rounded = dense_BSV.double().log_softmax(-1), found_BSV.double().log_softmax(-1)
    divergence = float((dense.exp() * (dense - rounded)).sum(-1).mean())
    return RoundingProof(
        identical=torch.equal(memory_BSV, found_BSV),
        max_abs_difference=difference,
        max_relative_difference=difference / max(float(dense_BSV.abs().max()), 1e-30),
        divergence=divergence,
        tokens=dense_BSV.shape[0] * dense_BSV.shape[1],
        loaded_with="AutoModelForCausalLM",
        computed_in=wanted.dtype,
    )


def _require(proof: RoundingProof, output: Path) -> None:
    if not proof.identical:
        raise ShearlingError(
            f"the quantised model does not load as what it was in memory ({output} was not "
            "written); please report this with the model's name and the version of torchao."
        )


def _manifest(source: Checkpoint, wanted: QuantizePlan, model: ModelRef) -> ModelManifest:
    """What is known before the result is."""
    facts = made_from(source)
    return ModelManifest(
        stage="quantize",
        **facts | {"versions": facts["versions"] | {"torchao": version("torchao")}},
        model=model,
        shape=dict(source.shape),
        parameters=source.parameters,
        bytes=0,
        source_bytes=source.bytes,
        options={
            "to": wanted.to,
            "bits": BITS[wanted.to],
            "stored_bits": 8,
            "group": wanted.group,
            "dtype": wanted.dtype,
            "matrices": len(wanted.quantized),
            "weights": wanted.weights,
            "kept": dict(wanted.kept),
        },
    )
