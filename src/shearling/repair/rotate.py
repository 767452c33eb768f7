"""The residual stream turned into its principal axes, so that cutting channels costs least.

An RMSNorm without gain commutes with every orthogonal matrix, so that a model whose norms' gains
are folded into what reads them computes the same in any basis of its stream (SliceGPT, Ashkboos et
al., arXiv 2401.15024, theorem 1). That paper turns every block by a matrix of its own, which a
stock architecture has no place for; here one matrix Q serves the whole model: with g the gain
before a reader,

    reader W -> W diag(g) Q / h    writer W, bias b -> Q^T W, Q^T b    embedding E -> E Q    g -> h

Any gain h would do. It takes the size of the readers' columns, so that what is left of these is of
one size, as it is where gains were trained: an optimiser that moves all weights alike would else
move the axes of most energy, which are read through the smallest columns, far too much.

Q holds the principal axes of the states at every norm, tokens weighted by the inverse of their
energy, most energy first. A cut then keeps the first K channels, and norms over K channels instead
of D are scaled by sqrt(D / K) to divide by what they would have divided by (epsilon aside).

A head tied to the embedding has no matrix of its own to fold the final gain into. Within the span
of the K axes that stay, any basis is as good; the one in which that gain, as an operator on the
span, is diagonal lets it stay a gain. What such a head loses is what it read through directions
that are cut.

Shapes: B sequences of a batch, S positions, T = B S tokens; D hidden, K of them to be kept, R rows
and C columns of a matrix.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearling.engine.pieces import Pieced
from shearling.engine.place import Place
from shearling.engine.states import States
from shearling.engine.stream import BlockStream
from shearling.engine.views.rotated import (
    STREAM,
    Norms,
    norms_of,
    retie,
    tied_heads,
    turn,
    write,
)
from shearling.engine.walk import Text, check_state, forward, logits_of
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.model.checkpoint import Checkpoint
from shearling.model.proof_tokens import proof_tokens

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Rotation:
    """What a rotation gives.

    Attributes:
        cuttable: the rotated model in the source's architecture; the first channels are to stay.
        exact: the rotated model, the source's equal; the same as ``cuttable``, but for a tied
            source, of which this one's head is a matrix of its own.
        figures: for the manifest.
    """

    cuttable: Checkpoint
    exact: Checkpoint
    figures: Mapping[str, Any]


def refusal(checkpoint: Checkpoint) -> str | None:
    """Why this model's stream cannot be rotated, as it follows on "because"; None if it can."""
    name, rows = checkpoint.family.model_type, checkpoint.layout.rows
    if checkpoint.family.post_norms:
        return (
            f"{name} norms what a block writes before it joins the stream, with a gain that is "
            "bound to the channels as they are"
        )
    for row in rows:
        stem = row.name.rpartition(".")[0]
        biased = any(other.name == f"{stem}.bias" for other in rows)
        centred = row.bare or biased or checkpoint.family.centred
        if row.role == "norm" and row.dims == (STREAM,) and centred:
            return (
                f"{name} has LayerNorms, which subtract the mean over the channels as they are; "
                "only a model with RMSNorms computes the same in another basis"
            )
    if norms_of(checkpoint.layout) is None:
        return f"{name} does not have one norm before attention, one before the MLP and a last one"
    return None


def require_rotatable(checkpoint: Checkpoint) -> None:
    """Raise ShearlingError, with the reason, unless the stream can be rotated."""
    reason = refusal(checkpoint)
    if reason is not None:
        raise ShearlingError(
            f"{checkpoint.name} cannot be rotated, because {reason}; use --no-rotate."
        )


@torch.no_grad()
def rotate(
    source: BlockStream,
    ids_NS: Tensor,
    keep: int,
    directory: Path,
    *,
    shard_bytes: int = 10**9,
    progress: Progress = silent,
) -> Rotation:
    """Turn a model's residual stream into its principal axes, and prove that it still is the same.

    Memory is that of one block or shard, and of a few matrices of D x D.

    Args:
        source: the model; never written to.
        ids_NS: calibration tokens (N, S).
        keep: how many channels are to stay, K; the basis of a tied model depends on it.
        directory: where the rotated weights are put, of the source's types; a new one.
        shard_bytes: largest size of a weight file.
        progress: told how far the work is.

    Raises:
        ShearlingError: the architecture cannot be rotated, states are not finite, no room on the
            disk, or the proof fails.
    """
    started = time.perf_counter()
    checkpoint = source.checkpoint
    require_rotatable(checkpoint)
    norms = norms_of(checkpoint.layout)
    assert norms is not None
    named = checkpoint.read(norms.names(checkpoint.shape["layers"]))
    gains = {name: weight.double() + checkpoint.family.gain_offset for name, weight in named}
    tied = bool(tied_heads(checkpoint.layout))
    with source.place.running():
        covariance_DD = _covariance(source, ids_NS, norms, progress)
        basis_DD, share = _basis(covariance_DD, keep, gains[norms.head] if tied else None)
        turned = turn(checkpoint, norms, basis_DD, gains)
        proof = _prove(checkpoint, turned, source.place, progress)
        exact = write(turned, directory, shard_bytes, progress)
    cuttable = exact
    if tied:
        gain_D = torch.einsum("dk,d,dk->k", basis_DD, gains[norms.head], basis_DD)
        cuttable = retie(exact, norms.head, gain_D, directory)
    figures = {
        "kept_energy": share,
        "tied_head": tied,
        "tokens": ids_NS.numel(),
        "proof": proof,
        "seconds": round(time.perf_counter() - started, 2),
    }
    return Rotation(cuttable, exact, figures)


def _covariance(stream: BlockStream, ids_NS: Tensor, norms: Norms, tell: Progress) -> Tensor:
    """Second moments (D, D) of the states at all norms, each token's of trace 1 at each."""
    width = stream.checkpoint.shape["hidden"]
    sum_DD = torch.zeros(width, width, dtype=torch.float64, device=stream.place.device)

    def add(h_BSD: Tensor) -> None:
        h_TD = h_BSD.flatten(0, 1)
        h_TD = h_TD.to(torch.promote_types(h_TD.dtype, torch.float32))
        h_TD = h_TD / h_TD.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        sum_DD.add_(h_TD.T @ h_TD)

    prefix = f"{stream.checkpoint.family.blocks}.{{}}."
    inside = [n.removeprefix(prefix).removesuffix(".weight") for n in (norms.heads, norms.mlp)]
    with States(stream.place) as states:
        text = Text(stream, states).begin(stream.batches(ids_NS))
        for step in forward(text, "finding the stream's axes", tell):
            seen = Pieced()
            hooks = [
                step.block.get_submodule(path).register_forward_pre_hook(
                    lambda _, args, path=path, seen=seen: seen.__setitem__(path, args[0])
                )
                for path in inside
            ]
            for run in step.passes:
                for path in inside:
                    add(seen[path])
                check_state(step.index, run.after_BSD)
                if step.index == stream.depth - 1:
                    add(run.after_BSD)
            for hook in hooks:
                hook.remove()
    return sum_DD.cpu()


def _basis(covariance_DD: Tensor, keep: int, gain_D: Tensor | None) -> tuple[Tensor, float]:
    """Q (D, D), most energy first, and the first K's share of it; with a tied head's gain, the
    first K are turned within their span so that it is diagonal there.
    """
    energy_D, basis_DD = torch.linalg.eigh(covariance_DD)
    energy_D, basis_DD = energy_D.flip(0), basis_DD.flip(1)
    share = float(energy_D[:keep].sum() / energy_D.sum())
    if gain_D is not None:
        first_DK = basis_DD[:, :keep]
        _, turn_KK = torch.linalg.eigh(first_DK.T @ (gain_D[:, None] * first_DK))
        basis_DD = torch.cat([first_DK @ turn_KK, basis_DD[:, keep:]], 1)
    return basis_DD, share


def _prove(
    source: Checkpoint, turned: Checkpoint, place: Place, progress: Progress
) -> dict[str, Any]:
    """How far the rotated model's logits are from the source's, before rounding.

    In single precision, or, where rounding adds up over many blocks, in double.

    Raises:
        ShearlingError: farther than ``TOLERANCE`` of the largest.
    """
    ids_BS = proof_tokens(source)
    relative, dtype = math.inf, torch.float32
    for dtype in (torch.float32, torch.float64):
        progress("proving the rotation", 0, 2)
        expected_BSV = logits_of(BlockStream(source, place.for_proof(dtype)), ids_BS)
        progress("proving the rotation", 1, 2)
        found_BSV = logits_of(BlockStream(turned, place.for_proof(dtype)), ids_BS)
        progress("proving the rotation", 2, 2)
        largest = max(float(expected_BSV.abs().max()), 1e-30)
        relative = float((found_BSV - expected_BSV).abs().max()) / largest
        if relative <= TOLERANCE:
            break
    if not relative <= TOLERANCE:
        raise ShearlingError(
            f"the rotated {source.name} gives logits that differ from its own by {relative:.1e} of "
            f"the largest, {TOLERANCE:.0e} is allowed; use --no-rotate, and please report this."
        )
    computed_in = str(dtype).removeprefix("torch.")
    return {
        "max_relative_difference": relative, "tokens": ids_BS.numel(), "computed_in": computed_in,
    }  # fmt: skip
