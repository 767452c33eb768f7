"""A stock model run block by block, from memory or from disk.

Everything outside the blocks (embeddings, rotary tables, masks, final norm, head, soft-capping)
is transformers' own code: the model is built without blocks, and stand-ins in their places note
what the model hands to each block and, at the end, put a given state in its hands. Blocks are
loaded one at a time, run on as many states as there are, and freed; where that is, and in which
type they compute, says a :class:`shearling.engine.place.Place`.

Shapes: B sequences of a batch, S positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from shearling.engine.branches import Branch, Entrance, branches, run_until, watching
from shearling.engine.calls import Call, cast
from shearling.engine.pieces import Pieces, together
from shearling.engine.place import Place
from shearling.engine.ranks import ALONE, Ranks
from shearling.engine.weights import BlockWeights, ordinary_tensors
from shearling.engine.words import HEAD_ROWS, Words, asked, chances, is_large
from shearling.model.checkpoint import Checkpoint
from shearling.model.loading import build_model, check_length
from shearling.model.sanity import check_ids


class _StandIn(nn.Module):
    """Takes a block's place: notes what it is handed, and returns the state it was given."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.call: Call | None = None
        self.seen: Tensor | None = None
        self.state: Tensor | None = None

    def forward(self, h_BSD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.seen, self.call = h_BSD, Call(args, kwargs, None, self.index)
        return h_BSD if self.state is None else self.state


class BlockStream:
    """A checkpoint taken apart at its blocks.

    Args:
        checkpoint: the model.
        place: where it runs.
    """

    def __init__(self, checkpoint: Checkpoint, place: Place) -> None:
        """Build the outside of the model and load its weights; blocks come later."""
        place.announce()
        self._open(checkpoint, place, None)

    def _open(self, checkpoint: Checkpoint, place: Place, like: nn.Module | None) -> None:
        self.checkpoint, self.place = checkpoint, place
        self.depth = checkpoint.shape["layers"]
        outer_dtype = torch.promote_types(place.dtype, torch.float32)
        with ordinary_tensors():
            self._model = _outside(checkpoint, outer_dtype, like).to(place.device)
        self._weights = BlockWeights(checkpoint, _block_shells(checkpoint, place.dtype), place)
        self._stand_ins = [_StandIn(index) for index in range(self.depth)]
        self._put(self._stand_ins)
        self._calls: dict[tuple[int, ...], list[Call]] = {}
        self.pieces, self._head_pieces = Pieces(place), Pieces(place)
        self.words: Words | None = None
        self._halves: list[tuple[Branch, ...]] = []
        if place.dtype != outer_dtype and checkpoint.family.additive(checkpoint.config):
            self._halves = [branches(checkpoint, block) for block in range(self.depth)]

    def beside(self, checkpoint: Checkpoint, place: Place) -> BlockStream:
        """A stream of a model that is the same outside its blocks.

        The embedding and the head, which can be a third of the memory a stream takes, are shared.
        """
        stream = BlockStream.__new__(BlockStream)
        stream._open(checkpoint, place, self._model)
        return stream

    def release(self) -> None:
        """Let go of the blocks' weights, for others to have the memory; a walk loads them again."""
        self._weights.release()

    @property
    def shells(self) -> list[nn.Module]:
        """Every block's modules, whether their weights are loaded or not."""
        return self._weights.shells

    def batches(self, ids_NS: Tensor) -> list[Tensor]:
        """Split sequences into batches of as many tokens as the place runs at a time."""
        return list(ids_NS.split(self.rows(ids_NS.shape[1])))

    def rows(self, length: int) -> int:
        """Sequences of so many tokens that run at a time."""
        return max(1, self.place.batch_tokens // length)

    def begin(self, ids_BS: Tensor) -> tuple[Tensor, list[Call]]:
        """The state that enters the first block, and the call for every block."""
        self._check_tokens(ids_BS)
        with ordinary_tensors():
            self._run(ids_BS, None, logits_to_keep=1)
        h_BSD = self._stand_ins[0].seen
        assert h_BSD is not None
        # Calls depend on the batch's shape alone: there is no padding and no cache.
        key = tuple(ids_BS.shape)
        if key not in self._calls:
            calls = [s.call for s in self._stand_ins if s.call is not None]
            if self.place.dtype != h_BSD.dtype:
                with ordinary_tensors():
                    calls = cast(calls, self.place.dtype)
            self._calls[key] = calls
        return h_BSD, self._calls[key]

    def calls_for(self, ids_BS: Tensor) -> list[Call]:
        """The call for every block, for tokens of this shape."""
        known = self._calls.get(tuple(ids_BS.shape))
        return self.begin(ids_BS)[1] if known is None else known

    def run(self, block: nn.Module, call: Call, h_BSD: Tensor) -> Tensor:
        """The state (B, S, D) behind a block, of the type of the state before it.

        A block of a narrower type adds what its halves write to the state as it is, in the state's
        own type, wherever a block's output is such a sum: rounding then does not pile up.

        Where memory does not suffice, it is run on fewer sequences at a time.
        """
        return together(
            self.pieces.run(lambda h: self.run_at_once(block, self._call(call, h), h), h_BSD)
        )

    def run_until(self, block: nn.Module, call: Call, h_BSD: Tensor) -> None:
        """Run a block that is being watched, as far as it is wanted."""
        self.pieces.run(lambda h: run_until(block, self._call(call, h), h), h_BSD)

    def run_from(
        self, block: nn.Module, call: Call, h_BSD: Tensor, entrance: Entrance, x_BSK: Tensor
    ) -> None:
        """The same from a writer on whose inputs (B, S, K) are known."""

        def run(h_BSD: Tensor, x_BSK: Tensor) -> None:
            with entrance.entered(x_BSK):
                run_until(block, self._call(call, h_BSD), h_BSD)

        self.pieces.run(run, h_BSD, x_BSK)

    def _call(self, call: Call, h_BSD: Tensor) -> Call:
        """The call for as many sequences as the state has."""
        rows, length = h_BSD.shape[:2]
        if self.pieces.rows is None:
            return call
        return self.calls_for(torch.zeros(rows, length, dtype=torch.long))[call.index]

    def run_at_once(self, block: nn.Module, call: Call, h_BSD: Tensor) -> Tensor:
        """The same for a whole batch, come what may."""
        if not self._halves:
            return call(block, h_BSD).to(h_BSD.dtype)
        halves = self._halves[call.index]
        with watching(block, halves) as seen:
            call(block, h_BSD)
        for half in halves:
            h_BSD = h_BSD + seen.contributions[half.axis]
        return h_BSD

    def logits(self, h_BSD: Tensor, ids_BS: Tensor) -> Tensor:
        """Logits (B, S, V) of the state that left the last block; (B, S, W) of :meth:`abridged`."""
        return self._run(ids_BS, h_BSD, logits_to_keep=0)

    def likely_words(
        self, text: Iterable[tuple[Tensor, Tensor]], needed: Tensor | None = None,
        ranks: Ranks = ALONE, *, tokens: int | None = None, elsewhere: bool = False,
    ) -> Words | None:  # fmt: skip
        """The words that stand for the vocabulary on a text; None where it is small.

        Args:
            text: this rank's batches: states (B, S, D) that left the last block, and tokens (B, S).
            needed: words that must be among them, of any shape.
            ranks: who share the text, and get the same words.
            tokens: of all ranks together; counted if not given, all states at once in memory.
            elsewhere: they are to serve other text as well.
        """
        vocab = self.checkpoint.shape["vocab"]
        if not is_large(vocab):
            return None
        if tokens is None:
            text = list(text)
            tokens = int(ranks.total(sum(ids_BS.numel() for _, ids_BS in text)))
        every, likely = asked(tokens, elsewhere=elsewhere)
        with ordinary_tensors():
            chances_V = chances(self._some_logits(text, every), vocab, self.place.device)
            if needed is not None:
                chances_V[needed.flatten().to(chances_V.device)] = torch.inf
            ranks.add(chances_V)
            return Words.of(chances_V, likely)

    def _some_logits(self, text: Iterable[tuple[Tensor, Tensor]], every: int) -> Iterator[Tensor]:
        """Logits (1, P, V) at every so many-th position of each sequence, no two at the same."""
        begin = 0
        for h_BSD, ids_BS in text:
            for h, ids in zip(h_BSD.split(1), ids_BS.split(1), strict=True):
                at_P = torch.arange(begin % every, ids.shape[1], every, device=h.device)
                begin += 1
                for at in at_P.split(HEAD_ROWS):
                    if len(at):
                        yield self._run(ids, h, logits_to_keep=at)

    @contextmanager
    def abridged(self, words: Words | None) -> Generator[None]:
        """Let some words stand for the vocabulary meanwhile; with None, nothing changes.

        Logits are then of these words, the logarithm of how many each stands for added, so that
        softmax and cross-entropy over them are estimates of those over all.
        """
        if words is None:
            yield
            return
        model: Any = self._model
        whole = model.get_output_embeddings()
        with ordinary_tensors():
            model.set_output_embeddings(words.head(whole))
        self.words = words
        try:
            yield
        finally:
            model.set_output_embeddings(whole)
            self.words = None

    def outside(self, name: str) -> nn.Parameter:
        """A parameter that lies outside the blocks, by its name in the checkpoint."""
        return self._model.get_parameter(self.checkpoint.homes[name].parameter)

    def stored(self, name: str) -> Tensor:
        """A tensor of the model in the type that it is stored in, on the device."""
        return self._weights.stored(name)

    def slices(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """As many sequences (of tensors B, S, ...) at a time as logits are to be alive of."""
        vocab = self.checkpoint.shape["vocab"] if self.words is None else len(self.words)
        rows = self.place.rows(tensors[0].shape[1], vocab)
        yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)

    def nll(self, h_BSD: Tensor, ids_BS: Tensor) -> Tensor:
        """Negative log-likelihoods (B, S-1), in nats, of each token after the first.

        The logits of one slice of the batch are alive at a time.
        """
        # The last position predicts nothing; leaving it to the head to drop saves copying logits.
        predicting = torch.arange(ids_BS.shape[1] - 1, device=h_BSD.device)
        ids_BS = ids_BS.to(h_BSD.device)
        targets_BS = ids_BS if self.words is None else self.words.places(ids_BS)
        return torch.cat(
            [
                nll
                for slices in self.slices(h_BSD, ids_BS, targets_BS)
                for nll in self.run_head(
                    lambda h, ids, targets: token_nll(
                        self._run(ids, h, logits_to_keep=predicting), targets[:, 1:]
                    ),
                    *slices,
                )
            ]
        )

    def run_head(self, function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
        """Call ``function``, which makes logits, on all sequences or on fewer at a time."""
        return self._head_pieces.run(function, *tensors)

    @contextmanager
    def block(self, index: int, then: int | None = None) -> Generator[nn.Module]:
        """Block ``index`` with its weights, freed on leaving unless the model is resident.

        ``then`` is fetched meanwhile, where there is something to be gained by it.
        """
        with self._weights.ready(index, then) as block:
            yield block

    @contextmanager
    def whole(self) -> Generator[nn.Module]:
        """The stock model itself, all blocks in their places; only where it is resident."""
        assert self.place.weights == "resident", "a model that is streamed is never whole"
        blocks = [self._weights.held(index) for index in range(self.depth)]
        self._put(blocks)
        hooks = self._bridges(blocks)
        try:
            yield self._model
        finally:
            for hook in hooks:
                hook.remove()
            self._put(self._stand_ins)

    def _bridges(self, blocks: list[nn.Module]) -> list[RemovableHandle]:
        """Hooks by which blocks of a narrower type stand in a model whose rest is wider.

        All that enters a block is given its type, and what leaves the last is given the model's:
        norms and heads differ in what they make of two types.
        """
        outer_dtype = torch.promote_types(self.place.dtype, torch.float32)
        if outer_dtype == self.place.dtype:
            return []

        def narrowed(tensor: Tensor) -> Tensor:
            return tensor.to(self.place.dtype) if tensor.is_floating_point() else tensor

        hooks = [
            block.register_forward_pre_hook(
                lambda _, args, kwargs: tree_map_only(Tensor, narrowed, (args, kwargs)),
                with_kwargs=True,
            )
            for block in blocks
        ]
        widened = blocks[-1].register_forward_hook(lambda *told: told[-1].to(outer_dtype))
        return [*hooks, widened]

    def _put(self, blocks: list[Any]) -> None:
        parent, _, leaf = self.checkpoint.family.blocks.rpartition(".")
        setattr(self._model.get_submodule(parent), leaf, nn.ModuleList(blocks))

    def _run(self, ids_BS: Tensor, state: Tensor | None, logits_to_keep: int | Tensor) -> Tensor:
        for stand_in in self._stand_ins:
            stand_in.state = state
        ids_BS = ids_BS.to(self.place.device)
        try:
            out = self._model(input_ids=ids_BS, use_cache=False, logits_to_keep=logits_to_keep)
            return out.logits if self.words is None else out.logits + self.words.log_counts_W
        finally:
            for stand_in in self._stand_ins:
                stand_in.state = None

    def _check_tokens(self, ids_BS: Tensor) -> None:
        check_length(ids_BS.shape[1], self.checkpoint.config, self.checkpoint.name)
        check_ids(ids_BS, self.checkpoint.shape["vocab"], self.checkpoint.name)


def token_nll(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Negative log-likelihoods (B, S) of the target at each position, in nats and float32."""
    logits = logits_BSV.flatten(0, 1).float()
    nll = nn.functional.cross_entropy(logits, targets_BS.flatten(), reduction="none")
    return nll.view(targets_BS.shape)


def _outside(checkpoint: Checkpoint, dtype: torch.dtype, like: nn.Module | None) -> nn.Module:
    """The stock model without blocks, its weights loaded; frozen, in evaluation mode.

    Matrices are shared with ``like``, vectors (the final norm's) are copies.
    """
    import copy

    from transformers.initialization import no_init_weights

    depth_key = checkpoint.family.keys["layers"]
    config = copy.deepcopy(checkpoint.config)
    setattr(config, depth_key, 0)
    with no_init_weights():
        model = build_model(config, dtype)
    # Gemma looks block types up by number while it walks the (stand-in) blocks. Gemma 4 notes when
    # it is built at which block those begin that share keys: behind the last, as there are none.
    setattr(model.config, depth_key, checkpoint.shape["layers"])
    for module in model.modules():
        if hasattr(module, "first_kv_shared_layer_idx"):
            module.first_kv_shared_layer_idx = checkpoint.shape["layers"]
    renamed = checkpoint.family.renamed
    if like is not None:
        state = like.state_dict().items()
        weights = {name: tensor if tensor.ndim > 1 else tensor.clone() for name, tensor in state}
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
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model = build_model(checkpoint.config, dtype)
    blocks = list(model.get_submodule(checkpoint.family.blocks).children())
    return [block.requires_grad_(False).eval() for block in blocks]
