"""Proof that a written checkpoint is the source with what was removed masked.

Both are run on the same random tokens. What a cut removes is silenced in the source, which must
then give the logits that the written model gives, rounding aside.

Shapes: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shearling.engine.place import Place
from shearling.engine.stream import BlockStream
from shearling.engine.views.masked import masked_logits
from shearling.engine.walk import logits_of
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.model.checkpoint import Checkpoint
from shearling.model.dtypes import name_of
from shearling.model.loading import stock_model, stock_wrapper
from shearling.model.proof_tokens import proof_tokens
from shearling.table.values import Cut, Keep

TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Proof:
    """How far the written checkpoint's logits are from the source's with removed units masked.

    Attributes:
        max_abs_difference: largest difference of two logits.
        max_relative_difference: the same, over the source's largest absolute logit.
        tokens: positions compared.
        loaded_with: what read the result.
        computed_in: the precision in which both were run.
        passed: whether the relative difference is within 1e-4.
    """

    max_abs_difference: float
    max_relative_difference: float
    tokens: int
    loaded_with: str
    computed_in: str
    passed: bool


@torch.inference_mode()
def prove(
    checkpoint: Checkpoint,
    keep: Keep | Cut,
    written: Checkpoint,
    *,
    changed: Collection[str] = (),
    place: Place | None = None,
    tokens: int = 32,
    progress: Progress = silent,
) -> Proof:
    """Compare the written model's logits with those of the source with removed units masked.

    The source is run block by block from its own files. The written model is loaded by stock
    transformers, or, when it does not fit in memory or ``place`` streams, block by block as well,
    its tensors having been matched with its configuration one by one.

    Args:
        checkpoint: the source.
        keep: what survives of it.
        written: the result.
        changed: names of the result's tensors that are no cuts of the source's; the masked source
            takes them from the result, so that they prove their place but not their values.
        place: see ``cut``.
        tokens: length of the two sequences compared.
        progress: told how far the work is.

    Raises:
        ShearlingError: ``keep`` is not possible, or the result does not load cleanly.
    """
    ids_BS = proof_tokens(written, tokens)
    expanded = checkpoint.layout.cut(keep, checkpoint.shape)
    vocab = expanded.keep.model.get("vocab")
    source_ids_BS = ids_BS if vocab is None else torch.tensor(vocab)[ids_BS]
    replaced = _Stored(written, frozenset(changed))
    place = place or Place.best(checkpoint)
    place.for_proof().settle()

    def compare(dtype: torch.dtype) -> Proof:
        """The logits of both, with blocks that compute in ``dtype``, and how far they differ."""
        progress("proving the cut", 0, 2)
        expected_BSV = masked_logits(
            checkpoint, expanded, source_ids_BS, replaced=replaced, place=place.for_proof(dtype)
        )
        progress("proving the cut", 1, 2)
        whole = place.holds(written, dtype)
        run = _stock_logits if whole else _streamed_logits
        found_BSV = run(written, ids_BS, place.for_proof(dtype))
        progress("proving the cut", 2, 2)
        difference = float((found_BSV - expected_BSV).abs().max())
        relative = difference / max(float(expected_BSV.abs().max()), 1e-30)
        return Proof(
            max_abs_difference=difference,
            max_relative_difference=relative,
            tokens=ids_BS.numel(),
            loaded_with=_loader(written) if whole else "block by block",
            computed_in=name_of(dtype),
            passed=relative <= TOLERANCE,
        )

    proof = compare(torch.float32)
    # A narrower matrix is summed in another order, and many blocks amplify the rounding: to 3e-5
    # over SmolLM2's thirty, cut to 480 channels at random. In double precision, where that is
    # exactly 0, only a fault is left.
    return proof if proof.passed else compare(torch.float64)


@dataclass(frozen=True)
class _Stored(Mapping[str, Tensor]):
    """Some of a checkpoint's tensors, each read when it is asked for."""

    checkpoint: Checkpoint
    names: frozenset[str]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return next(tensor for _, tensor in self.checkpoint.read([name]))

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _streamed_logits(checkpoint: Checkpoint, ids_BS: Tensor, place: Place) -> Tensor:
    """Logits (B, S, V), block by block."""
    return logits_of(BlockStream(checkpoint, place), ids_BS)


def _loader(written: Checkpoint) -> str:
    """The class of transformers that loads a model as its users do."""
    wrapped = written.wrapping is not None
    return "AutoModelForImageTextToText" if wrapped else "AutoModelForCausalLM"


def _stock_logits(checkpoint: Checkpoint, ids_BS: Tensor, place: Place) -> Tensor:
    """Logits (B, S, V) as stock transformers gives them, every tensor accounted for."""
    load = stock_model if checkpoint.wrapping is None else stock_wrapper
    model, info = load(checkpoint.path, place.dtype, **place.loading())
    wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys") if info[key]}
    if wrong:
        raise ShearlingError(
            f"the cut model does not load cleanly in transformers ({wrong}); "
            "nothing was written, please report this."
        )
    model = model.eval().to(place.device)
    return model(input_ids=ids_BS.to(place.device), use_cache=False).logits


def require(proof: Proof, output: Path) -> None:
    """Raise ShearlingError, in the name of the directory to be, unless the proof has passed."""
    if not proof.passed:
        raise ShearlingError(
            f"the proof of surgery failed for {output}: logits differ by "
            f"{proof.max_relative_difference:.1e} of the largest, {TOLERANCE:.0e} is allowed; "
            "nothing was written, please report this with the model's name."
        )
