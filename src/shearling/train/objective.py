"""What is minimised: the text's negative log-likelihood, or the distance from a teacher.

An objective holds the model and is itself the module that is sharded, so that one forward call
reaches every parameter. It gives sums over tokens, which add up over micro-batches and ranks.

Shapes: B sequences, S positions, T predicted tokens, D hidden, V vocabulary, K tokens kept of a
cached distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from shearling.data.store import IGNORED
from shearling.data.teacher import Kept, log_mass_outside
from shearling.model.head import finish

if TYPE_CHECKING:
    from shearling.train.parallel import World

CHUNK = 512  # tokens whose logits are alive at a time, at least; on a CPU no more than that
LOGITS_BYTES = 2**30  # of one chunk's float32 logits on a GPU, whose products want many rows


@dataclass(frozen=True)
class Counting:
    """Which predictions of a micro-batch count, told by whoever knows without asking the device.

    A plain object, so that FSDP leaves it alone.

    Attributes:
        places: their numbers (T,) among all B * (S - 1), on the model's device; None where all do.
    """

    places: Tensor | None

    @staticmethod
    def of(labels_BS: Tensor) -> Counting:
        """From labels; a GPU is waited for if they lie there."""
        counting = (labels_BS[:, 1:] != IGNORED).flatten()
        return Counting(None if counting.all() else counting.nonzero().flatten())

    def rows(self, values: Tensor) -> Tensor:
        """Those of ``values`` (B * (S - 1), ...) that count."""
        return values if self.places is None else values[self.places]


@dataclass(frozen=True)
class Distillation:
    """How a model learns from a teacher.

    Attributes:
        temperature: divides both models' logits; the sum is multiplied by its square, as is usual,
            so that gradients keep their size.
        text_share: weight of the text's own loss beside a teacher; the divergence has the rest.
        hidden_share: weight of the squared error between states, each of the teacher's having a
            norm of 1, averaged over the places compared: the state that the head reads, and
            those that enter the blocks.
        stands_for: for each block of the model, its number in the teacher; only the last states
            are compared without.
    """

    temperature: float = 1.0
    text_share: float = 0.0
    hidden_share: float = 0.0
    stands_for: tuple[int, ...] | None = None


class TrainedGates(Protocol):
    """What the loop asks of gates that are trained along (:mod:`shearling.gates.learner`)."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the gates and their multipliers."""
        ...

    def groups(self) -> list[dict[str, Any]]:
        """Groups for the optimiser."""
        ...

    def draw(self, step: int) -> None:
        """Have the model compute with the gates of a step."""
        ...

    def gather(self, step: int, world: World) -> None:
        """Bring the step's gradients to the parameters."""
        ...

    def settle(self, step: int) -> None:
        """Keep parameters and sizes where they are to be, after ``step`` steps."""
        ...

    def settled(self, step: int) -> AbstractContextManager[None]:
        """Have the model compute without chance."""
        ...

    def record(self, step: int) -> dict[str, Any]:
        """For the log: numbers that may still be on their way (0-dim tensors), by name."""
        ...

    def largest(self) -> dict[str, Tensor]:
        """What ``check`` is to be told, once it has arrived from the device."""
        ...

    def check(self, largest: Mapping[str, float]) -> None:
        """Raise ShearlingError if something runs away."""
        ...


class Objective(nn.Module):
    """The text's negative log-likelihood, or the forward KL divergence from a teacher.

    Distillation is Hinton et al.'s (1503.02531): KL(teacher || model) of next-token distributions.

    Args:
        model: a stock causal language model.
        plain_head: whether logits are the head's product of the last state and no more; then they
            are never all in memory.
        teacher: of the same vocabulary, never trained; None for the text's own loss.
        distillation: how it is learned from a teacher.
        learner: of gates that the model computes with; the loop sees to it.
    """

    def __init__(
        self, model: Any, *, plain_head: bool, teacher: nn.Module | None = None,
        distillation: Distillation | None = None, learner: TrainedGates | None = None,
    ) -> None:  # fmt: skip
        """Hold the models."""
        super().__init__()
        self.model, self.teacher, self.learner = model, teacher, learner
        self.plain_head = plain_head
        self.distillation = distillation or Distillation()

    def forward(
        self, ids_BS: Tensor, labels_BS: Tensor, kept: Kept | None = None, *,
        counting: Counting | None = None, held_out: bool = False,
    ) -> Tensor:  # fmt: skip
        """Sum over the labels that count (0-dim, float32), in nats.

        Held-out text is judged by its own loss, whatever is minimised. ``kept`` is what a teacher
        that is not here said of the same tokens; ``counting`` is read from the labels if not given.
        """
        if (kept is not None or self.teacher is not None) and not held_out:
            counting = counting or Counting.of(labels_BS)
            if kept is not None:
                return self._divergence_from(kept, ids_BS, labels_BS, counting)
            return self._divergence(ids_BS, labels_BS, counting)
        if not self.plain_head:
            logits_BSV = self.model(input_ids=ids_BS, use_cache=False).logits[:, :-1]
            return _summed_nll(logits_BSV.flatten(0, 1).float(), labels_BS[:, 1:].flatten())
        h_TD, labels_T = predicting(last_state(self.model, ids_BS), labels_BS)
        return head_loss(self.model, h_TD, labels_T)

    def _divergence(self, ids_BS: Tensor, labels_BS: Tensor, counting: Counting) -> Tensor:
        own, theirs = self._places()
        with torch.no_grad():
            wanted = states(self.teacher, ids_BS, theirs)
        own_states = states(self.model, ids_BS, own)
        wanted_TD, _ = predicting(wanted[-1], labels_BS, counting)
        h_TD, labels_T = predicting(own_states[-1], labels_BS, counting)
        model: Any = self.model
        head = model.get_output_embeddings()
        total = in_chunks(self._chunk, h_TD, head.weight, head.bias, wanted_TD, labels_T)
        if self.distillation.hidden_share:
            pairs = zip(own_states, wanted, strict=True)
            errors = [_error(*(predicting(h, labels_BS, counting)[0] for h in p)) for p in pairs]
            total = total + self.distillation.hidden_share * torch.stack(errors).mean()
        return total

    def _places(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Blocks of the model and of the teacher whose entering states are compared."""
        stands_for = self.distillation.stands_for
        if not self.distillation.hidden_share or stands_for is None:
            return (), ()
        return tuple(range(1, len(stands_for))), stands_for[1:]

    def _chunk(
        self, h_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, wanted_TD: Tensor,
        labels_T: Tensor,
    ) -> Tensor:  # fmt: skip
        """The summed loss of a few tokens, whose logits fit in memory."""
        assert self.teacher is not None
        temperature = self.distillation.temperature
        with torch.no_grad():
            wanted_TV = logits(self.teacher, wanted_TD).float() / temperature
            wanted_TV = wanted_TV.log_softmax(-1)
        found_TV = finished(self.model, functional.linear(h_TD, weight_VD, bias_V)).float()
        divergence = functional.kl_div(
            (found_TV / temperature).log_softmax(-1), wanted_TV,
            reduction="sum", log_target=True,
        )  # fmt: skip
        return self._with_text(divergence * temperature**2, found_TV, labels_T)

    def _divergence_from(
        self, kept: Kept, ids_BS: Tensor, labels_BS: Tensor, counting: Counting
    ) -> Tensor:
        h_TD, labels_T = predicting(last_state(self.model, ids_BS), labels_BS, counting)
        model: Any = self.model
        head = model.get_output_embeddings()
        wanted = (
            counting.rows(each)
            for each in (kept.ids.flatten(0, 1), kept.logp.flatten(0, 1), kept.rest.flatten())
        )
        return in_chunks(self._cached_chunk, h_TD, head.weight, head.bias, *wanted, labels_T)

    def _cached_chunk(
        self, h_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, ids_TK: Tensor,
        logp_TK: Tensor, rest_T: Tensor, labels_T: Tensor,
    ) -> Tensor:  # fmt: skip
        """The summed loss of a few tokens under a teacher's K likeliest tokens.

        With p the teacher's and q the model's distribution, k over the tokens kept and r all
        others as one outcome, of mass p_r and q_r:

            KL = sum_k p_k (log p_k - log q_k) + p_r (log p_r - log q_r)

        Merging outcomes only lowers a divergence: this is at most KL(p || q), and is it where all
        of the vocabulary is kept, or where q shares what p_r there is as p does. What rounding to
        float16 added or took is divided away.
        """
        ids_TK, p_TK = ids_TK.long(), logp_TK.float().exp()
        total_T = p_TK.sum(-1) + rest_T
        p_TK, rest_T = p_TK / total_T.unsqueeze(-1), rest_T / total_T
        found_TV = finished(self.model, functional.linear(h_TD, weight_VD, bias_V)).float()
        norm_T = found_TV.logsumexp(-1)
        crossed_T = (p_TK * (found_TV.gather(-1, ids_TK) - norm_T.unsqueeze(-1))).sum(-1)
        if ids_TK.shape[1] < found_TV.shape[1]:
            crossed_T = crossed_T + rest_T * (log_mass_outside(found_TV, ids_TK) - norm_T)
        entropy = torch.special.entr(p_TK).sum() + torch.special.entr(rest_T).sum()
        return self._with_text(-entropy - crossed_T.sum(), found_TV, labels_T)

    def _with_text(self, divergence: Tensor, found_TV: Tensor, labels_T: Tensor) -> Tensor:
        """Beside the divergence, the text's own share of the loss."""
        share = self.distillation.text_share
        if not share:
            return divergence
        return (1 - share) * divergence + share * _summed_nll(found_TV, labels_T)


def in_chunks(
    loss: Callable[..., Tensor], h_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None,
    *others: Tensor,
) -> Tensor:  # fmt: skip
    """The sum of ``loss(h, weight, bias, *others)`` over chunks of tokens; ``others`` go with them.

    Differentiable in the first three. Nothing but one chunk's logits is ever in memory.
    """
    size = CHUNK
    if h_TD.device.type != "cpu":
        size = max(CHUNK, LOGITS_BYTES // (4 * len(weight_VD)))
    if torch.is_grad_enabled():
        return _InChunks.apply(loss, size, h_TD, weight_VD, bias_V, *others)
    split = [each.split(size) for each in (h_TD, *others)]
    parts = [loss(h, weight_VD, bias_V, *rest) for h, *rest in zip(*split, strict=True)]
    return torch.stack(parts).sum() if parts else h_TD.new_zeros((), dtype=torch.float32)


class _InChunks(torch.autograd.Function):
    """A sum over tokens behind the head, its gradients taken chunk by chunk in the forward pass.

    No more than one chunk's logits are ever alive, and none are computed twice; recomputing them
    in the backward pass (torch.utils.checkpoint) fails under FSDP2 with torch 2.13. Under autocast
    states and head are cast once, not for every chunk; gradients of the head add up in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, loss: Callable[..., Tensor], size: int, h_TD: Tensor, weight_VD: Tensor,
        bias_V: Tensor | None, *others: Tensor,
    ) -> Tensor:  # fmt: skip
        """The sum over chunks of ``size`` tokens."""
        given: tuple[Any, ...] = (h_TD, weight_VD, bias_V)
        leaves: list[Any] = [None if t is None else _cast(t.detach()) for t in given]
        needed = [i for i in range(3) if ctx.needs_input_grad[i + 2]]
        sums = {i: torch.zeros_like(given[i], dtype=_summed_in(given[i])) for i in needed if i > 0}
        of_h = []
        total = h_TD.new_zeros((), dtype=torch.float32)
        split = [each.split(size) for each in (leaves[0], *others)]
        for h, *rest in zip(*split, strict=True):
            with torch.enable_grad():
                inputs: list[Any] = [
                    h.detach(),
                    *(t if t is None else t.detach() for t in leaves[1:]),
                ]
                for i in needed:
                    inputs[i].requires_grad_(True)
                loss_sum = loss(*inputs, *rest)
            total += loss_sum.detach()
            if needed:
                gradients = torch.autograd.grad(loss_sum, [inputs[i] for i in needed])
                for i, gradient in zip(needed, gradients, strict=True):
                    of_h.append(gradient) if i == 0 else sums[i].add_(gradient)
        ctx.gradients = {**sums, **({0: torch.cat(of_h)} if of_h else {})}
        ctx.dtypes = [None if t is None else t.dtype for t in given]
        ctx.others = len(others)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients taken in the forward pass, scaled."""
        gradients = [ctx.gradients.get(i) for i in range(3)]
        scaled = [
            None if g is None else (g * outer[0]).to(dtype)
            for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return None, None, *scaled, *[None] * ctx.others


def _cast(tensor: Tensor) -> Tensor:
    """As autocast would, if it is on and this is what it casts."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype == torch.float32:
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def _summed_in(tensor: Any) -> torch.dtype:
    return torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype


def last_state(model: Any, ids_BS: Tensor) -> Tensor:
    """What the head reads (B, S, D): the state behind the final norm."""
    return states(model, ids_BS, ())[0]


def states(model: Any, ids_BS: Tensor, blocks: tuple[int, ...]) -> list[Tensor]:
    """The states (B, S, D) that enter some blocks, and at the end the one that the head reads."""
    outputs = decoder(model)(input_ids=ids_BS, use_cache=False, output_hidden_states=bool(blocks))
    return [*(outputs.hidden_states[block] for block in blocks), outputs.last_hidden_state]


def _error(h_TD: Tensor, wanted_TD: Tensor) -> Tensor:
    """Squared distance over the squared norm of what is wanted, summed over tokens."""
    error_T = (h_TD - wanted_TD).float().square().sum(-1)
    return (error_T / wanted_TD.float().square().sum(-1).clamp_min(1e-12)).sum()


def stock(model: Any) -> Any:
    """The stock model inside peft's wrapping, or the model itself."""
    return getattr(model, "get_base_model", lambda: model)()


def decoder(model: Any) -> nn.Module:
    """The stock model without its head."""
    plain = stock(model)
    return getattr(plain, plain.base_model_prefix)


def predicting(
    h_BSD: Tensor, labels_BS: Tensor, counting: Counting | None = None
) -> tuple[Tensor, Tensor]:
    """States (T, D) and the labels (T,) they are to predict; only those that count, if told."""
    h_TD, labels_T = h_BSD[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten()
    if counting is None:
        return h_TD, labels_T
    return counting.rows(h_TD), counting.rows(labels_T)


def head_loss(model: Any, h_TD: Tensor, labels_T: Tensor) -> Tensor:
    """Summed negative log-likelihood (nats), without the logits of all tokens in memory."""
    head = model.get_output_embeddings()
    # Not torch's linear_cross_entropy: with its options it takes 4 to 20 times as long on a CPU.
    return in_chunks(_chunk_nll, h_TD, head.weight, head.bias, labels_T)


def _chunk_nll(h_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_T: Tensor) -> Tensor:
    return _summed_nll(functional.linear(h_TD, weight_VD, bias_V).float(), labels_T)


def logits(model: Any, h_TD: Tensor) -> Tensor:
    """Logits (T, V) of last states."""
    return finished(model, model.get_output_embeddings()(h_TD))


def finished(model: Any, product_TV: Tensor) -> Tensor:
    """Logits, from the head's product: scaled and soft-capped where the model does so."""
    return finish(model.config.get_text_config(), product_TV)


def _summed_nll(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    return functional.cross_entropy(logits_TV, labels_T, ignore_index=IGNORED, reduction="sum")


def counted(labels_BS: Tensor) -> int:
    """How many tokens are predicted and count."""
    return int((labels_BS[:, 1:] != IGNORED).sum())
