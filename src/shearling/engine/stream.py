"""A stock model run block by block, from memory or from disk.

Everything outside the blocks (embeddings, rotary tables, masks, final norm, head, soft-capping)
is transformers' own code: the model is built without blocks, and stand-ins in their places note
what the model hands to each block and, at the end, put a given state in its hands. Blocks are
loaded one at a time, run on as many states as there are, and freed.

Shapes: B sequences of a batch, S positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h
LOGITS_BYTES = 16 * 2**20  # what a processor keeps close; more is slower
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Call:
    """What the model hands a block besides the state: masks, positions, rotary tables."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, h_BSD: Tensor) -> Tensor:
        """Run ``block`` on a state of the batch shape this call was recorded with."""
        return block(h_BSD, *self.args, **self.kwargs)


class _StandIn(nn.Module):
    """Takes a block's place: notes what it is handed, and returns the state it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.call: Call | None = None
        self.seen: Tensor | None = None
        self.state: Tensor | None = None

    def forward(self, h_BSD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.seen, self.call = h_BSD, Call(args, kwargs)
        return h_BSD if self.state is None else self.state


class BlockStream:
    """A checkpoint taken apart at its blocks.

    Args:
        checkpoint: the model.
        resident: hold all blocks in memory, or read each from disk whenever it is asked for.
            None decides by the memory that is free.
        dtype: what is computed in.
        like: a stream of a model that is the same outside its blocks; the embedding and the head,
            which can be a third of the memory a stream takes, are then shared with it.
        thrifty: give freed memory back to the system at once, so that the process stays small, at
            the price of having every larger array cleared anew; by default if not resident.
            Otherwise the process keeps what it once had. Both until the next stream says else.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        resident: bool | None = None,
        dtype: torch.dtype = torch.float32,
        like: BlockStream | None = None,
        thrifty: bool | None = None,
    ) -> None:
        """Build the outside of the model and load its weights; blocks come later."""
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.depth = checkpoint.shape["layers"]
        self.resident = fits(checkpoint, dtype) if resident is None else resident
        _keep_freed_memory(self.resident if thrifty is None else not thrifty)
        self._shells = _block_shells(checkpoint, dtype)
        self._loaded: dict[int, nn.Module] = {}
        with _ordinary_tensors():
            self._model = _outside(checkpoint, dtype, None if like is None else like._model)
        self._stand_ins = [_StandIn() for _ in range(self.depth)]
        parent, _, leaf = checkpoint.family.blocks.rpartition(".")
        setattr(self._model.get_submodule(parent), leaf, nn.ModuleList(self._stand_ins))
        self._calls: dict[tuple[int, ...], list[Call]] = {}

    def batches(self, ids_NS: Tensor) -> list[Tensor]:
        """Split sequences into batches of about 2,048 tokens, which fill the cores' caches."""
        rows = max(1, BATCH_TOKENS // ids_NS.shape[1])
        return list(ids_NS.split(rows))

    def begin(self, ids_BS: Tensor) -> tuple[Tensor, list[Call]]:
        """The state that enters the first block, and the call for every block."""
        self._check_tokens(ids_BS)
        with _ordinary_tensors():
            self._run(ids_BS, None, logits_to_keep=1)
        h_BSD = self._stand_ins[0].seen
        assert h_BSD is not None
        # Calls depend on the batch's shape alone: there is no padding and no cache.
        key = tuple(ids_BS.shape)
        if key not in self._calls:
            self._calls[key] = [s.call for s in self._stand_ins if s.call is not None]
        return h_BSD, self._calls[key]

    def logits(self, h_BSD: Tensor, ids_BS: Tensor) -> Tensor:
        """Logits (B, S, V) of the state that left the last block."""
        return self._run(ids_BS, h_BSD, logits_to_keep=0)

    def outside(self, name: str) -> nn.Parameter:
        """A parameter that lies outside the blocks, by its name in the checkpoint."""
        return self._model.get_parameter(self.checkpoint.family.renamed.get(name, name))

    def nll(self, h_BSD: Tensor, ids_BS: Tensor) -> Tensor:
        """Negative log-likelihoods (B, S-1), in nats, of each token after the first.

        The logits of one slice of the batch are alive at a time.
        """
        rows = max(1, LOGITS_BYTES // (4 * ids_BS.shape[1] * self.checkpoint.shape["vocab"]))
        # The last position predicts nothing; leaving it to the head to drop saves copying logits.
        predicting = torch.arange(ids_BS.shape[1] - 1)
        return torch.cat(
            [
                token_nll(self._run(ids, h, logits_to_keep=predicting), ids[:, 1:])
                for h, ids in zip(h_BSD.split(rows), ids_BS.split(rows), strict=True)
            ]
        )

    @contextmanager
    def block(self, index: int) -> Generator[nn.Module]:
        """Block ``index`` with its weights, freed on leaving unless the model is resident."""
        block = self._loaded.get(index) or self._load(index)
        if self.resident:
            self._loaded[index] = block
        try:
            yield block
        finally:
            if not self.resident:
                block.to("meta")

    def _load(self, index: int) -> nn.Module:
        names = self.checkpoint.block_names(index)
        block = self._shells[index]
        # Copies, so that the mapped file can be let go of: mapped pages count as memory in use.
        with _ordinary_tensors():
            weights = {
                names[name]: tensor.to(self.dtype, copy=True)
                for name, tensor in self.checkpoint.read(names)
            }
            block.load_state_dict(weights, strict=True, assign=True)
        assert not any(t.is_meta for t in (*block.parameters(), *block.buffers()))
        return block

    def _run(self, ids_BS: Tensor, state: Tensor | None, logits_to_keep: int | Tensor) -> Tensor:
        for stand_in in self._stand_ins:
            stand_in.state = state
        try:
            out = self._model(input_ids=ids_BS, use_cache=False, logits_to_keep=logits_to_keep)
            return out.logits
        finally:
            for stand_in in self._stand_ins:
                stand_in.state = None

    def _check_tokens(self, ids_BS: Tensor) -> None:
        limit = getattr(self.checkpoint.config, "max_position_embeddings", None)
        if limit is not None and ids_BS.shape[1] > limit:
            raise ShearlingError(
                f"sequences of {ids_BS.shape[1]} tokens are longer than the {limit} positions "
                f"of {self.checkpoint.name}; give a --length of at most {limit}."
            )
        largest, vocab = int(ids_BS.max()), self.checkpoint.shape["vocab"]
        if largest >= vocab:
            raise ShearlingError(
                f"the text gives the token {largest}, but {self.checkpoint.name} knows 0 to "
                f"{vocab - 1}; put the tokenizer that belongs to the model beside its weights."
            )


@contextmanager
def _ordinary_tensors() -> Generator[None]:
    """What is kept between walks serves inference and differentiation alike.

    Tensors made in inference mode could never take part in a backward pass.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def token_nll(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Negative log-likelihoods (B, S) of the target at each position, in nats and float32."""
    logits = logits_BSV.flatten(0, 1).float()
    nll = nn.functional.cross_entropy(logits, targets_BS.flatten(), reduction="none")
    return nll.view(targets_BS.shape)


def fits(checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    """Whether the model can be held in memory with as much again left free."""
    return 2 * checkpoint.parameters * dtype.itemsize < psutil.virtual_memory().available


def _keep_freed_memory(keep: bool) -> None:
    """Have glibc keep large arrays when they are freed, or give them back to the system at once.

    By default it learns to keep those of up to 32 MB, which serves neither end. Streamed, with
    blocks coming and going, the gaps between them add up: memory grew by 400 MB over 24 blocks of
    220 MB. In memory, every larger array is mapped and cleared anew: a third of a repair's
    processor time (LOG.md, 2026-11-22).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return
    if keep:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
    else:
        mallopt(_M_MMAP_MAX, 65536)  # glibc's default
        mallopt(_M_TRIM_THRESHOLD, 2**17)  # likewise
        mallopt(_M_MMAP_THRESHOLD, 2**20)


def _outside(checkpoint: Checkpoint, dtype: torch.dtype, like: nn.Module | None) -> nn.Module:
    """The stock model without blocks, its weights loaded; frozen, in evaluation mode.

    Matrices are shared with ``like``, vectors (the final norm's) are copies.
    """
    import copy

    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    depth_key = checkpoint.family.keys["layers"]
    config = copy.deepcopy(checkpoint.config)
    setattr(config, depth_key, 0)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    # Gemma looks block types up by number while it walks the (stand-in) blocks.
    setattr(model.config, depth_key, checkpoint.shape["layers"])
    renamed = checkpoint.family.renamed
    if like is not None:
        found = like.state_dict().items()
        weights = {name: tensor if tensor.ndim > 1 else tensor.clone() for name, tensor in found}
    else:
        weights = {
            renamed.get(name, name): tensor
            for name, tensor in checkpoint.read(checkpoint.outer_names())
        }
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=like is not None)
    tied = {renamed.get(row.name, row.name) for row in checkpoint.layout.rows if row.tied_to}
    assert set(missing) <= tied, missing
    assert not unexpected, unexpected
    model.tie_weights()
    return model.requires_grad_(False).eval()


def _block_shells(checkpoint: Checkpoint, dtype: torch.dtype) -> list[nn.Module]:
    """Every block on the meta device: all of its code, none of its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(checkpoint.config, dtype=dtype)
    blocks = list(model.get_submodule(checkpoint.family.blocks).children())
    return [block.requires_grad_(False).eval() for block in blocks]
