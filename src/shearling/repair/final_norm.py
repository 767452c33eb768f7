"""The final norm's gain, fitted after a repair: what the head reads of a stream that is not exact.

A repaired stream still errs, and a head that reads it at full strength is too sure of itself. The
gain g is the one vector between the two that a stock checkpoint keeps apart from both, and the mean
divergence of the next-token distributions

    g = argmin  mean_t KL(softmax(W x_t) || softmax(W diag(g) y_t))

is convex in it (x, y: the source's and the cut's normed states, W the head; soft-capping aside).
Minimised by L-BFGS on some thousand tokens; kept only if tokens that it has not seen say so. With
p what the source says, it is the mean of log sum exp z_t - p_t . z_t and a constant, the logits z
affine in g: p . z and its slope are had once, and an evaluation runs the cut's head alone. Before a
large vocabulary both softmaxes are over the words that stand for it (shearling.engine.words), of
fewer tokens, and the descent ends with the first step that is not worth it. On SmolLM2 the fit
takes 1.6 % off a cut model's perplexity, and nothing off the source's own (LOG.md, 2026-11-22).

Shapes: B sequences of a batch, S positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shearling.engine.ranks import ALONE, Ranks
from shearling.engine.stream import BlockStream
from shearling.engine.words import is_large
from shearling.files.progress import Progress, silent

TOKENS = 6144  # a vector of some hundred numbers is settled by less
FEWER_TOKENS = 2048  # with a large vocabulary
WORTH = 1e-4  # nats; with a large vocabulary, a step that gains less is the last
STEPS = 8
STAGE = "fitting the final norm"
ROUNDING = 1e-9  # nats; the cut and the source say the same

Triple = tuple[Tensor, Tensor, Tensor]  # tokens (B, S), the source's last state, the cut's


@dataclass(frozen=True, slots=True)
class FittedGain:
    """A gain, and what it is worth.

    Attributes:
        gain_D: as the checkpoint holds it.
        before, after: the held-out divergence without it and with it, in nats a token.
        words: how many words of a large vocabulary that is over; None over all.
    """

    gain_D: Tensor
    before: float
    after: float
    words: int | None = None


def gain_name(stream: BlockStream) -> str | None:
    """The name of the final norm's gain in a checkpoint, or None if there is none."""
    found = [
        row.name
        for row in stream.checkpoint.layout.stored
        if row.role == "norm" and not row.in_block
    ]
    return found[-1] if found else None


def enough(vocab: int) -> int:
    """How many tokens settle the gain before a head of so many words."""
    return FEWER_TOKENS if is_large(vocab) else TOKENS


def some(numbers: Sequence[int], tokens: int, wanted: int) -> list[int]:
    """As many of the batches, each of so many ``tokens``, as make up ``wanted``; evenly spread."""
    wanted = max(1, wanted // tokens)
    step = max(1, len(numbers) // wanted)
    return list(numbers[::step])[:wanted]


def some_rows(count: int, rows: int, length: int, wanted: int) -> Tensor:
    """Which of so many sequences of a length to take (N): whole batches of ``rows``, as `some`."""
    parts = torch.arange(count).split(rows)
    chosen_N = torch.zeros(count, dtype=torch.bool)
    for number in some(range(len(parts)), rows * length, wanted):
        chosen_N[parts[number]] = True
    return chosen_N


def fit_gain(
    source: BlockStream,
    cut: BlockStream,
    fit: Sequence[Triple],
    held: Sequence[Triple],
    *,
    ranks: Ranks = ALONE,
    progress: Progress = silent,
) -> FittedGain | None:
    """The gain that brings what the cut says nearest to what the source does.

    Args:
        source: the model the cut comes from.
        cut: the repaired model; its gain is left as it was.
        fit, held: this rank's states of sequences to fit on, and to judge by.
        ranks: who share them.
        progress: told the evaluations done, of as many as there may be.

    Returns:
        None where there is no gain to fit, or where the held-out tokens are better off without.
    """
    name = gain_name(cut)
    if name is None:
        return None
    words = source.likely_words(((h_BSD, ids_BS) for ids_BS, h_BSD, _ in fit), ranks=ranks)
    with source.abridged(words), cut.abridged(words):
        return _fitted(_Fit(source, cut, fit, held, ranks), cut.outside(name), progress)


@dataclass(frozen=True)
class _Fit:
    """What a gain is fitted on, and judged by."""

    source: BlockStream
    cut: BlockStream
    fit: Sequence[Triple]
    held: Sequence[Triple]
    ranks: Ranks

    def judged(self) -> float:
        """The held-out divergence with the gain as it is."""
        total = int(self.ranks.total(_tokens(self.held)))
        return self.ranks.total(
            _divergence(self.source, self.cut, self.held, total, backward=False)
        )


def _fitted(on: _Fit, parameter: nn.Parameter, progress: Progress) -> FittedGain | None:
    """As :func:`fit_gain`, of the gain ``parameter``."""
    before, words = parameter.detach().clone(), on.cut.words
    with torch.inference_mode(False), torch.enable_grad():
        parameter.requires_grad_(True)
        # Line searches may take a few more evaluations than there are steps.
        optimiser = torch.optim.LBFGS(
            [parameter], max_iter=STEPS, max_eval=2 * STEPS, line_search_fn="strong_wolfe",
            tolerance_change=1e-9 if words is None else WORTH,
        )  # fmt: skip
        try:
            unfitted = on.judged()
            if unfitted < ROUNDING:
                return None
            objective = _Objective(on.source, on.cut, on.fit, parameter, on.ranks)
            optimiser.step(_closure(objective, optimiser, progress))
            progress(STAGE, 2 * STEPS, 2 * STEPS)
            fitted = on.judged()
            after = on.ranks.same(parameter.detach().clone())
        finally:
            parameter.requires_grad_(False)
            parameter.data.copy_(before)
            parameter.grad = None
    if fitted >= unfitted:
        return None
    return FittedGain(after, unfitted, fitted, None if words is None else len(words))


def _closure(
    objective: _Objective, optimiser: torch.optim.LBFGS, progress: Progress
) -> Callable[[], float]:
    done = 0

    def evaluate() -> float:
        nonlocal done
        done += 1
        progress(STAGE, min(done, 2 * STEPS - 1), 2 * STEPS)
        optimiser.zero_grad()
        return objective.total()

    return evaluate


class _Objective:
    """The mean divergence in nats a token; its gradient is left on the gain."""

    def __init__(
        self, source: BlockStream, cut: BlockStream, states: Sequence[Triple],
        gain: nn.Parameter, ranks: Ranks,
    ) -> None:  # fmt: skip
        self.source, self.cut, self.states, self.gain = source, cut, states, gain
        self.ranks = ranks
        self.tokens = int(ranks.total(_tokens(states)))
        self.said = self._ask() if cut.checkpoint.plain_head and states else None

    def total(self) -> float:
        """Over the states of all ranks."""
        value = self._mine() if self.states else 0.0
        if self.gain.grad is None:  # this rank has none of the states
            self.gain.grad = torch.zeros_like(self.gain)
        self.ranks.add(self.gain.grad)
        return self.ranks.total(value)

    def _mine(self) -> float:
        """This rank's part."""
        if self.said is None:  # the logits are not affine in the gain
            return _divergence(self.source, self.cut, self.states, self.tokens, backward=True)
        start_D, slope_D, value = self.said
        for ids, _, c in _slices(self.cut, self.states):
            sums = self.cut.logits(c.clone(), ids).logsumexp(-1).sum() / self.tokens
            sums.backward()
            value += float(sums.detach())
        assert self.gain.grad is not None
        self.gain.grad -= slope_D
        moved_D = self.gain.detach().double() - start_D.double()
        return value - float(slope_D.double() @ moved_D)

    def _ask(self) -> tuple[Tensor, Tensor, float]:
        """The gain now, the slope of mean p . z in it, and mean p . log p less mean p . z now."""
        value = 0.0
        for ids, h, c in _slices(self.cut, self.states):
            with torch.no_grad():
                log_p_TV = self.source.logits(h.clone(), ids).flatten(0, 1).log_softmax(-1)
                p_TV = log_p_TV.exp()
                value += float((p_TV * log_p_TV).sum()) / self.tokens
            said = (p_TV * self.cut.logits(c.clone(), ids).flatten(0, 1)).sum() / self.tokens
            said.backward()
            value -= float(said.detach())
        assert self.gain.grad is not None
        slope_D = self.gain.grad.clone()
        self.gain.grad = None
        return self.gain.detach().clone(), slope_D, value


def _tokens(states: Sequence[Triple]) -> int:
    return sum(ids_BS.numel() for ids_BS, _, _ in states)


def _slices(stream: BlockStream, states: Sequence[Triple]) -> Iterator[tuple[Tensor, ...]]:
    """As many sequences at a time as logits are to be alive of."""
    for batch in states:
        yield from stream.slices(*batch)


def _divergence(
    source: BlockStream, cut: BlockStream, states: Sequence[Triple], total: int, *, backward: bool
) -> float:
    """Nats over ``total`` tokens; with ``backward``, gradients are left on the gain."""
    mean = 0.0
    for ids, h, c in _slices(source, states):
        with torch.no_grad():
            wanted_TV = source.logits(h.clone(), ids).flatten(0, 1).log_softmax(-1)
        with torch.set_grad_enabled(backward):
            found_TV = cut.logits(c.clone(), ids).flatten(0, 1).log_softmax(-1)
            divergence = (
                nn.functional.kl_div(found_TV, wanted_TV, reduction="sum", log_target=True) / total
            )
            if backward:
                divergence.backward()
        mean += float(divergence.detach())
    return mean
