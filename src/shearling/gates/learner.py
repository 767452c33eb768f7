"""Gates in training: noise, what drives sizes to their targets, and what to log.

Sheared LLaMA (2310.06694), equation 4: for every row of gates, with s the share that is closed on
average and t the share that is to be,

    min over gates, max over lambda, phi:   lambda (s - t) + phi (s - t)^2

The paper's text has a pair of multipliers for each block, its released code one for each axis; here
it is one for each row, since rows of a stock model have to be equally long. t rises linearly from
where s starts to the target. That takes the paper's 3,200 steps to settle (within 0.1 % of the
target in a simulation; within 1.5 % in 400). Short runs do better without multipliers: after each
step the parameters of a row are shifted by the one number that makes s equal to t.

A step's gates are drawn once, by seed and step alone, so that all ranks and micro-batches share
them. The model computes with copies that gather its gradients; ranks add theirs up, and only then
do they reach the parameters, to which every rank does the same.

Shapes: R rows of U units.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shearling.data.seeds import folded
from shearling.errors import ShearlingError
from shearling.gates import hard_concrete
from shearling.gates.bank import GateBank, top
from shearling.train.parallel import World

Kind = Literal["hard-concrete", "top-k"]
Constraint = Literal["projection", "lagrangian"]
TOO_LARGE = 1e5  # of a multiplier: nothing that converges comes near it
HALVINGS = 28  # of an interval of 18, in a bisection: what is left is under float32's precision


class Learner(nn.Module):
    """A bank of gates under training.

    Args:
        bank: the gates; the model they are attached to is none of our concern.
        kind: ``hard-concrete`` draws gates and needs a constraint; ``top-k`` opens exactly as
            many as are to be open, and passes gradients straight through (Bengio et al.,
            1308.3432).
        constraint: of sizes under ``hard-concrete``.
        seed: of the noise.
        rise: steps over which the target rises.
        lr: of the gates; ``multiplier_lr``: of the multipliers.
    """

    def __init__(
        self, bank: GateBank, *, kind: Kind = "hard-concrete",
        constraint: Constraint = "lagrangian", seed: int = 0, rise: int = 1, lr: float = 1.0,
        multiplier_lr: float = 1.0,
    ) -> None:  # fmt: skip
        """Multipliers start at zero, targets where the gates are now."""
        super().__init__()
        self.bank, self.kind = bank, kind
        self.seed, self.rise, self.lr, self.multiplier_lr = seed, max(1, rise), lr, multiplier_lr
        zeros = {axis: a.new_zeros(len(a)) for axis, a in bank.log_alpha.items()}
        self.projecting = kind == "hard-concrete" and constraint == "projection"
        lagrangian = zeros if kind == "hard-concrete" and not self.projecting else {}
        self.linear, self.quadratic = (
            nn.ParameterDict({axis: z.detach().clone() for axis, z in lagrangian.items()})
            for _ in range(2)
        )
        for axis, expected in bank.expected().items():
            self.register_buffer(f"start_{axis}", expected.detach().clone())
        self._drawn: dict[str, Tensor] = {}

    def groups(self) -> list[dict[str, Any]]:
        """AdamW's groups: gates descend, multipliers ascend."""
        plain = {"weight_decay": 0.0}
        groups = [{"params": list(self.bank.log_alpha.values()), "lr": self.lr} | plain]
        if multipliers := [*self.linear.values(), *self.quadratic.values()]:
            groups.append(
                {"params": multipliers, "lr": self.multiplier_lr, "maximize": True} | plain
            )
        return groups

    def draw(self, step: int) -> None:
        """Have the model compute with the gates of a step."""
        if self.kind == "top-k":
            counts = self._counts(step)
            self._drawn = {axis: _straight(a, counts[axis]) for axis, a in self._alphas()}
        else:
            generator = torch.Generator().manual_seed(folded(self.seed * 1_000_003 + step))
            self._drawn = {
                axis: hard_concrete.sample(a, _moved(torch.rand(a.shape, generator=generator), a))
                for axis, a in self._alphas()
            }
        self.bank.set({axis: z.detach().requires_grad_() for axis, z in self._drawn.items()})
        self.bank.fold()

    def gather(self, step: int, world: World) -> None:
        """Bring the step's gradients to the parameters, those of all ranks and the Lagrangian's."""
        self.bank.gather()
        gradients = []
        for axis, drawn in self._drawn.items():
            gradient = self.bank.values[axis].grad
            gradient = torch.zeros_like(drawn) if gradient is None else gradient
            if world.size > 1:  # like those of sharded weights: averaged
                dist.all_reduce(gradient)
                gradient /= world.size
            gradients.append(gradient)
        torch.autograd.backward(list(self._drawn.values()), gradients)
        if self.linear:
            self.penalty(step).backward()

    def penalty(self, step: int) -> Tensor:
        """The Lagrangian's terms, summed over all rows (0-dim)."""
        wanted, expected = self.wanted(step), self.bank.expected()
        terms = []
        for axis, rows in self.bank.rows.items():
            excess_R = (wanted[axis] - expected[axis]) / rows.units  # s - t
            terms += [self.linear[axis] * excess_R, self.quadratic[axis] * excess_R.square()]
        return torch.cat(terms).sum()

    def wanted(self, step: int) -> dict[str, Tensor]:
        """Axis -> how many of each row (R,) are to be open at a step, on average."""
        share = min(1.0, step / self.rise)
        return {
            axis: (1 - share) * self.get_buffer(f"start_{axis}") + share * rows.target
            for axis, rows in self.bank.rows.items()
        }

    def settle(self, step: int) -> None:
        """Keep parameters where gradients still move them, and sizes where they are to be.

        To be called when the optimiser has made ``step`` steps. A device is not waited for.
        """
        with torch.no_grad():
            for a in self.bank.log_alpha.values():
                a.clamp_(-hard_concrete.LARGEST, hard_concrete.LARGEST)
            if self.projecting:
                axes, alphas = zip(*self._alphas(), strict=True)
                wanted = self.wanted(step)
                shifted = projected(alphas, [wanted[axis] for axis in axes])
                for a, shifted_RU in zip(alphas, shifted, strict=True):
                    a.copy_(shifted_RU)

    def largest(self) -> dict[str, Tensor]:
        """Axis -> the largest of its multipliers (0-dim), for ``check`` once it has arrived."""
        return {axis: m_R.detach().abs().max() for axis, m_R in self.linear.items()}

    def check(self, largest: Mapping[str, float]) -> None:
        """Raise ShearlingError if the multipliers run away."""
        for axis, value in largest.items():
            if not value < TOO_LARGE:
                raise ShearlingError(
                    f"the multiplier of {axis} has grown to {value:.3g}: the gates do not follow "
                    "the target; lower multiplier_lr, or raise rise or tokens, and start again."
                )

    @contextmanager
    def settled(self, step: int) -> Generator[None]:
        """Have the model compute without chance, as many gates open as are expected to be."""
        before = self.bank.values
        with torch.no_grad():
            self.bank.set(self.bank.settled(self._counts(step)))
            try:
                yield
            finally:
                self.bank.set(before)

    def finish(self) -> None:
        """Set the gates of the result: exactly the target open, and as strong as they are."""
        with torch.no_grad():
            settled = self.bank.settled(self.bank.targets())
            if self.kind == "top-k":  # trained as 1
                settled = {axis: (z > 0).to(z) for axis, z in settled.items()}
            self.bank.set(settled)

    def record(self, step: int) -> dict[str, Any]:
        """Mean units open in a row of each axis, what is wanted, and the multipliers (0-dim)."""
        with torch.no_grad():
            expected = self._counts(step) if self.kind == "top-k" else self.bank.expected()
            wanted = self.wanted(step)
            return {
                "expected": _means(expected), "wanted": _means(wanted),
                "multipliers": _means({axis: m.detach() for axis, m in self.linear.items()}),
            }  # fmt: skip

    def lost(self) -> dict[str, float]:
        """Axis -> share of all open probability that lies on gates which the target closes."""
        with torch.no_grad():
            shares = {}
            for axis, a in self._alphas():
                mass = hard_concrete.open_probability(a)
                kept = mass * top(a, self.bank.targets()[axis])
                shares[axis] = float(1 - kept.sum() / mass.sum())
            return shares

    def _counts(self, step: int) -> dict[str, Tensor]:
        """How many of each row (R,) are open at a step: whole numbers, at least one."""
        of = self.wanted(step) if self.kind == "top-k" else self.bank.expected()
        return {axis: n.detach().round().clamp_min(1) for axis, n in of.items()}

    def _alphas(self) -> list[tuple[str, Tensor]]:
        return list(self.bank.log_alpha.items())


def projected(alphas_RU: Sequence[Tensor], wanted_R: Sequence[Tensor]) -> list[Tensor]:
    """Each row shifted by the number with which as many gates are open on average as are wanted.

    By bisection, to the precision of the numbers, for all rows of all axes at a time: on a GPU
    starting a kernel takes longer than its work. What cannot be reached between the largest and the
    smallest parameters that there may be is come as near to as possible.
    """
    limit = hard_concrete.LARGEST
    log_alpha_RU, unit_RU = _padded(alphas_RU)
    wanted_R1 = torch.cat(list(wanted_R))[:, None].to(log_alpha_RU)
    low_R1 = torch.full_like(wanted_R1, -2 * limit)
    high_R1 = -low_R1
    for _ in range(HALVINGS):
        middle_R1 = (low_R1 + high_R1) / 2
        moved_RU = (log_alpha_RU + middle_R1).clamp_(-limit, limit)
        open_R1 = (hard_concrete.open_probability(moved_RU) * unit_RU).sum(1, keepdim=True)
        few_R1 = open_R1 < wanted_R1
        low_R1 = torch.where(few_R1, middle_R1, low_R1)
        high_R1 = torch.where(few_R1, high_R1, middle_R1)
    by_R1 = ((low_R1 + high_R1) / 2).split([len(a) for a in alphas_RU])
    return [(a + by).clamp(-limit, limit) for a, by in zip(alphas_RU, by_R1, strict=True)]


def _padded(alphas_RU: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The rows of all axes under one another, and 1 where there is a unit, 0 behind a row's end."""
    widest = max(a.shape[1] for a in alphas_RU)
    ends = [(0, widest - a.shape[1]) for a in alphas_RU]
    rows_RU = [nn.functional.pad(a, end) for a, end in zip(alphas_RU, ends, strict=True)]
    units_RU = [
        nn.functional.pad(torch.ones_like(a), end) for a, end in zip(alphas_RU, ends, strict=True)
    ]
    return torch.cat(rows_RU), torch.cat(units_RU)


def _straight(log_alpha: Tensor, count_R: Tensor) -> Tensor:
    """1 for the highest and 0 else, with the gradient of a sigmoid."""
    soft = torch.sigmoid(log_alpha)
    return top(log_alpha.detach(), count_R) + soft - soft.detach()


def _means(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {axis: value.mean() for axis, value in values.items()}


def _moved(noise: Tensor, like: Tensor) -> Tensor:
    """Numbers drawn on the host, which are the same for every device, on one that does not wait."""
    return (noise.pin_memory() if like.is_cuda else noise).to(like, non_blocking=True)
