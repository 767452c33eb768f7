"""Repair of a mixture: every surviving expert's last matrix solved anew, one after the other.

With experts gone, the router sends their tokens to others. What a block's experts give together is
linear in all of their last matrices at once; solving for all at once would take matrices of all
their neurons together, so that each is solved by itself, on the tokens that now reach it, towards
what the source's block gave less what all others give now (block coordinate descent). Each step is
the ridge regression of :mod:`shearling.engine.moments`, centred on the weights there are, its
strength chosen on held-out tokens, and taken only where these gain. An expert that every token
meets is solved like the others. Between two sweeps the router's rows may move
(:mod:`shearling.repair.router`), if held-out tokens gain by that.

Shapes: T tokens of a batch, D hidden, K neurons of an expert, R tokens that reach an expert, P
experts that a token is sent to, E surviving experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from shearling.engine.experts import Experts, Routing
from shearling.engine.moments import Moments, correct
from shearling.engine.ranks import Ranks
from shearling.engine.states import States
from shearling.repair.router import given_by, products, rerouted, steps

SHARED = -1  # its number among the experts
SWEEPS = 2  # over the experts of a block; more gain nothing (LOG.md, 2026-11-27)
_MISSING, _SHARED = "experts missing", "shared expert's inputs"


@dataclass(frozen=True, slots=True)
class ExpertOptions:
    """How the experts of a mixture are repaired.

    Attributes:
        router: whether the router's rows may move too.
        merge: whether experts that go are first folded into those that stay
            (:mod:`shearling.repair.merging`).
    """

    router: bool = False
    merge: bool = False


@dataclass(frozen=True, slots=True)
class Lack:
    """What a block's experts lack on the tokens of one batch.

    Attributes:
        routing: which tokens they get.
        missing_TD: what is to be added to what they give.
        weight_T: how much each token counts.
        held: whether it is held out.
    """

    routing: Routing
    missing_TD: Tensor
    weight_T: Tensor
    held: bool


@dataclass(frozen=True, slots=True)
class Mended:
    """How a block's experts were repaired.

    Attributes:
        corrections: expert -> what to add to its last matrix (D, K).
        strength: of the penalty, in the middle of all that were repaired; None where none was.
        error_before, error_after: weighted share of the stream's squared norm that was, and is,
            missing on held-out tokens.
        router_ED: what to add to the router's rows; None if they stay.
    """

    corrections: dict[int, Tensor]
    strength: float | None
    error_before: float
    error_after: float
    router_ED: Tensor | None = None


class ExpertRepair:
    """The experts of one block, and what they lack on all tokens.

    Args:
        experts: their modules; whoever asks has them compute with what is found (:func:`apply`).
        states: where what is missing waits.
        ranks: who share the tokens.
        start: strength to begin the search with.
        importance_D: how often errors count a channel's square; once each if not given.
    """

    def __init__(
        self, experts: Experts, states: States, ranks: Ranks, start: float,
        importance_D: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Nothing is known yet."""
        self.experts, self.states, self.ranks, self.start = experts, states, ranks, start
        self.importance_D = importance_D
        self.batches: list[Lack] = []
        self.strengths: list[float] = []

    def add(self, lack: Lack) -> None:
        """Take in a batch."""
        number = len(self.batches)
        self.states.put(_MISSING, number, lack.missing_TD)
        empty = lack.missing_TD.new_empty(0)
        routing = lack.routing
        if routing.shared_TK is not None:
            self.states.put(_SHARED, number, routing.shared_TK)
            routing = replace(routing, shared_TK=None)
        self.batches.append(Lack(routing, empty, lack.weight_T, lack.held))

    def solve(self, *, router: bool = False) -> Mended:
        """Repair every expert in turn, the one that most tokens reach first."""
        before = self._error()
        corrections: dict[int, Tensor] = {}
        router_ED = None
        order = self._by_load()
        for sweep in range(SWEEPS):
            for expert in order:
                self._repair(expert, corrections)
            if router and not sweep:
                router_ED = self._move_router(corrections)
        after = self._error()
        for number in range(len(self.batches)):
            self.states.drop(_MISSING, number)
            self.states.drop(_SHARED, number)
        middle = sorted(self.strengths)[len(self.strengths) // 2] if self.strengths else None
        return Mended(corrections, middle, before, after, router_ED)

    def _repair(self, expert: int, corrections: dict[int, Tensor]) -> None:
        weight_DK = writer_of(self.experts, expert)
        fit, held = (Moments(weight_DK.float(), self.importance_D) for _ in range(2))
        for _, lack, tokens_R, missing_TD, x_RK in self._inputs(expert):
            moments = held if lack.held else fit
            moments.add(x_RK, missing_TD[tokens_R], lack.weight_T[tokens_R])
        for moments in (fit, held):
            moments.add_up(self.ranks)
        if not held.tokens or not fit.tokens:
            return
        solved = correct(fit, held, bias=False, start=self.start, ranks=self.ranks)
        if solved.strength is None or solved.error_after >= solved.error_before:
            return
        self.start = solved.strength
        self.strengths.append(solved.strength)
        change_KD = solved.weight_KD.float()
        for number, _, tokens_R, missing_TD, x_RK in self._inputs(expert):
            missing_TD = missing_TD.index_add(0, tokens_R, x_RK @ change_KD, alpha=-1)
            self.states.put(_MISSING, number, missing_TD)
        known = corrections.get(expert)
        corrections[expert] = change_KD.T if known is None else known + change_KD.T

    def _move_router(self, corrections: dict[int, Tensor]) -> Tensor | None:
        """Move the router's rows (E, D) if held-out tokens, routed anew, gain; None if not."""
        experts = Corrected(self.experts, corrections)
        lacks, start_ED = list(enumerate(self.batches)), experts.rows.float()
        fit = [
            products(
                experts, lack.routing, self.states.get(_MISSING, number), lack.weight_T,
                self.importance_D,
            )
            for number, lack in lacks
            if not lack.held
        ]  # fmt: skip
        given = {n: given_by(experts, lack.routing) for n, lack in lacks if lack.held}
        least, chosen_ED = self._error(), None
        for change_ED in steps(experts, fit, self.ranks):
            routings = {
                n: rerouted(experts, start_ED + change_ED, lack.routing)
                for n, lack in lacks
                if lack.held
            }
            changes = {n: given_by(experts, r) - given[n] for n, r in routings.items()}
            error = self._error(changes)
            if error < least:
                least, chosen_ED = error, change_ED
        if chosen_ED is None:
            return None
        for number, lack in lacks:
            routing = rerouted(experts, start_ED + chosen_ED, lack.routing)
            change_TD = given_by(experts, routing) - given_by(experts, lack.routing)
            self.states.put(_MISSING, number, self.states.get(_MISSING, number) - change_TD)
            self.batches[number] = replace(lack, routing=routing)
        return chosen_ED

    def _inputs(self, expert: int) -> Iterator[tuple[int, Lack, Tensor, Tensor, Tensor]]:
        """By batch: its number, it, tokens that reach the expert, what is missing, inputs.

        Inputs (R, K) carry the router's weight.
        """
        for number, lack in enumerate(self.batches):
            if expert == SHARED:
                x_RK = self.states.get(_SHARED, number).float()
                tokens_R = torch.arange(len(x_RK), device=x_RK.device)
            else:
                reached = lack.routing.reached(expert)
                tokens_R = reached.tokens_R
                if not len(tokens_R):
                    continue
                a_RK = self.experts.neurons(expert, lack.routing.x_TD[tokens_R])
                x_RK = a_RK.float() * reached.weights_R.float()[:, None]
            yield number, lack, tokens_R, self.states.get(_MISSING, number), x_RK

    def _error(self, changes: Mapping[int, Tensor] | None = None) -> float:
        """Mean over held-out tokens of w ||missing||^2, with ``changes`` of what experts give."""
        total, tokens = 0.0, 0.0
        for number, lack in enumerate(self.batches):
            if lack.held:
                missing_TD = self.states.get(_MISSING, number)
                if changes is not None:
                    missing_TD = missing_TD - changes[number]
                square_D = (lack.weight_T @ missing_TD.square()).double()
                if self.importance_D is not None:
                    square_D = square_D * self.importance_D
                total += float(square_D.sum())
                tokens += len(missing_TD)
        total, tokens = self.ranks.totals([total, tokens])
        return total / max(1.0, tokens)

    def _by_load(self) -> Sequence[int]:
        loads_E = torch.zeros(self.experts.count, dtype=torch.float64)
        for lack in self.batches:
            loads_E += lack.routing.loads(self.experts.count)
        self.ranks.add(loads_E)
        shared = [SHARED] if self.experts.shared is not None else []
        return [*shared, *loads_E.argsort(descending=True, stable=True).tolist()]


class Corrected(Experts):
    """Experts whose last matrices are corrected, before the corrections are in their modules."""

    def __init__(self, experts: Experts, corrections: Mapping[int, Tensor]) -> None:
        """Take over the modules."""
        self.mixture, self.router = experts.mixture, experts.router
        self.module, self.shared = experts.module, experts.shared
        self.corrections = corrections

    def written(self, expert: int, a_RK: Tensor) -> Tensor:
        """What an expert gives (R, D) for what enters its last matrix."""
        out_RD = super().written(expert, a_RK)
        change_DK = self.corrections.get(expert)
        return out_RD if change_DK is None else out_RD + a_RK.float() @ change_DK.T


def writer_of(experts: Experts, expert: int) -> Tensor:
    """The last matrix (D, K) of an expert, or of the shared one."""
    if expert == SHARED:
        assert experts.shared is not None
        return experts.shared.get_parameter("weight")
    return experts.writer(expert)


def apply(experts: Experts, expert: int, sums_DK: Tensor) -> None:
    """Have an expert compute with another last matrix (D, K)."""
    if expert == SHARED:
        with torch.no_grad():
            writer_of(experts, SHARED).copy_(sums_DK)
        return
    stacked: nn.Parameter = experts.module.down_proj
    own = sums_DK.T if experts.module.is_transposed else sums_DK
    with torch.no_grad():
        stacked[expert].copy_(own.to(stacked.dtype))
