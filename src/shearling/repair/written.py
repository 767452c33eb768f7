"""Calibration text from the source model itself, each piece from a few tokens of a real one.

Rewritten copies (shearling.repair.rewritten) stay on the calibration text's subjects; what the
model writes freely covers what else it knows. On SmolLM2 it took a cut model from 57.2 to 52.7
perplexity on a domain that the calibration text is not of (LOG.md, 2026-11-22). Calibration
on a model's own text goes back to Williams et al., arXiv 2410.17170.

Shapes: N sequences of P tokens to start from, S in the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shearling.data.bos import TokenWindows
from shearling.engine.sampling import PREFIX, sequences_at_once, writing
from shearling.engine.stream import BlockStream
from shearling.engine.walk import last_states
from shearling.engine.words import POSITIONS, Words, is_large
from shearling.files.progress import Progress, silent
from shearling.repair.openings import Openings

HEARD = 4 * POSITIONS  # tokens that are read to learn which words are likely


@torch.no_grad()  # in inference mode, weights could not be packed
def write(
    stream: BlockStream,
    windows: TokenWindows,
    sequences: int,
    *,
    words: Words | None = None,
    seed: int = 0,
    openings: Openings | None = None,
    progress: Progress = silent,
) -> Tensor:
    """Sequences that the model writes, each from ``PREFIX`` neighbouring tokens of a window.

    With ``openings``, all or half of them begin behind the chat template instead; the others are
    what they are without, but for the rounding of products.

    Where windows begin with BOS, so does each sequence, before those tokens.

    The model is resident, and on a processor its weights are there a second time in the order
    that fast products want. Every token is drawn from the model's whole distribution; an end of
    text does not end a sequence, as in packed text. What is drawn does not depend on how many are
    written at once, but for the rounding of products.

    Args:
        stream: the model that writes.
        windows: (N, S) of real text.
        sequences: how many to write.
        words: those that stand for a large vocabulary (:mod:`shearling.engine.words`), if they are
            known; asked of the model, if not. Of a small one, every word may be drawn.
        seed: of every draw.
        openings: what sequences begin with, where it is not the text alone.
        progress: told the tokens done.

    Returns:
        Tokens (sequences, S); sequence n belongs to window n modulo N.
    """
    ids_NS = windows.ids_NS
    length, opened = ids_NS.shape[1], windows.bos is not None
    prefix = min(PREFIX + opened, length)
    if sequences == 0 or prefix == length:
        return ids_NS[:0]
    words = words or _words(stream, ids_NS)
    generator = torch.Generator().manual_seed(seed)
    starts = _starts(ids_NS[:, opened:], sequences, prefix - opened, generator)
    starts = TokenWindows.of(starts, windows.bos).ids_NS
    written_NS = torch.cat([starts, ids_NS.new_empty(sequences, length - prefix)], 1)
    at_NT = torch.rand(sequences, length - prefix, generator=generator)
    given_NT = torch.zeros_like(at_NT, dtype=torch.bool)
    if openings is not None:
        given_NT = openings.put(written_NS, len(ids_NS), prefix)
    most = sequences_at_once(stream.checkpoint, stream.place, length)
    ranks = stream.place.ranks.of(sequences)
    written_NS, at_NT, given_NT = (ranks.share(of_N) for of_N in (written_NS, at_NT, given_NT))
    batches = -(-len(written_NS) // most)
    steps, parts = length - prefix, []
    with writing(stream, words) as write_batch:
        split = (of_N.tensor_split(batches) for of_N in (written_NS, at_NT, given_NT))
        for number, (ids_BS, at_BT, given_BT) in enumerate(zip(*split, strict=True)):

            def tell(step: int, done: int = number * steps) -> None:
                progress("writing calibration text", done + step, batches * steps)

            given = None if openings is None else given_BT
            parts.append(write_batch(ids_BS, at_BT, tell, given))
    return ranks.gather(torch.cat(parts), sequences)


def _words(stream: BlockStream, ids_NS: Tensor) -> Words | None:
    """Those that stand for a large vocabulary, by the model's word on some of the text."""
    if not is_large(stream.checkpoint.shape["vocab"]):
        return None
    wanted = -(-HEARD // ids_NS.shape[1])
    some_NS = ids_NS[:: max(1, len(ids_NS) // wanted)][:wanted]
    batches = stream.batches(some_NS)
    with stream.place.running():
        text = zip(last_states(stream, batches), batches, strict=True)
        return stream.likely_words(text, tokens=some_NS.numel(), elsewhere=True)


def _starts(ids_NS: Tensor, sequences: int, prefix: int, generator: torch.Generator) -> Tensor:
    """Neighbouring tokens (sequences, prefix), from all windows alike and anywhere in them."""
    rows = torch.arange(sequences) % len(ids_NS)
    first = torch.randint(ids_NS.shape[1] - prefix + 1, (sequences, 1), generator=generator)
    return ids_NS[rows[:, None], first + torch.arange(prefix)]
