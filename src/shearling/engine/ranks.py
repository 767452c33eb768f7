"""Several processes under ``torchrun``: who we are, and how we share sequences and add up sums.

Every process (a *rank*) runs the same code. A walk takes a rank's share of the sequences through
the blocks; sums over tokens are added up over the ranks, so that all go on from the same numbers,
and the first rank alone writes. One process is a rank of its own, for which nothing here does
anything.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shearling.engine.devices import own_device
from shearling.errors import ShearlingError

_CPU = torch.device("cpu")
PATIENCE = timedelta(days=7)  # while one rank writes a model, the others wait for it
LATE = 120.0  # seconds after which a new file is seen on other nodes, if ever


@dataclass(frozen=True)
class Ranks:
    """Who we are among how many.

    Attributes:
        rank, size: this process, and how many there are.
        device: where this process computes.
        local: how many processes share this machine.
        patient: a process group on the host in which ranks wait for one another for days, and
            exchange numbers without asking their devices; None for the default one.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU
    local: int = 1
    patient: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks and writes."""
        return self.rank == 0

    def of(self, sequences: int) -> Ranks:
        """Those who share so many sequences.

        With fewer sequences than ranks every rank is by itself, and runs all of them.
        """
        return self if sequences >= self.size else ALONE

    def mine(self, count: int, *, backward: bool = False) -> list[int]:
        """Numbers, out of ``count``, that are this rank's; dealt out in turn.

        Args:
            count: how many there are.
            backward: begin with the last rank, so that two short lists burden different ranks.
        """
        return list(range(self.size - 1 - self.rank if backward else self.rank, count, self.size))

    def share(self, rows: Tensor, *, backward: bool = False) -> Tensor:
        """The rows of a tensor that are this rank's, as :meth:`mine` says."""
        return rows if self.size == 1 else rows[self.mine(len(rows), backward=backward)]

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """All rows in their order, on the host, put together from what ranks made of their shares.

        Args:
            rows: what this rank made (its number of rows, ...).
            count: rows of all ranks together.
        """
        if self.size == 1:
            return rows
        most = -(-count // self.size)
        padded = torch.zeros(most, *rows.shape[1:], dtype=rows.dtype)
        padded[: len(rows)] = rows.cpu()
        sent = padded.view(torch.uint8)  # gloo does not know every type
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent, group=self.patient)
        dealt = torch.stack([part.view(rows.dtype) for part in received], 1)
        return dealt.flatten(0, 1)[:count]

    def add(self, *sums: Tensor) -> None:
        """Add tensors up over the ranks, in place and where they lie; all ranks then hold the sum.

        Ranks that are to wait for long use :meth:`totals`.
        """
        if self.size == 1:
            return
        for tensor in sums:
            whole = tensor.contiguous()
            dist.all_reduce(whole)
            if whole is not tensor:
                tensor.copy_(whole)

    def same(self, tensor: Tensor) -> Tensor:
        """What the first rank holds, of a tensor of that shape and type."""
        if self.size > 1:
            tensor = tensor.contiguous()
            dist.broadcast(tensor, 0)
        return tensor

    def totals(self, values: Sequence[float]) -> list[float]:
        """The sums over ranks of some numbers, in float64; devices are not asked."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def total(self, value: float) -> float:
        """The sum over ranks of a number, in float64; devices are not asked."""
        return self.totals([value])[0]

    def least(self, value: float) -> float:
        """The least of all ranks' numbers."""
        return self._reduced([value], dist.ReduceOp.MIN)[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        return self.total(float(flag)) > 0

    def agreed(self, value: Any) -> Any:
        """What the first rank says, of anything that JSON can hold."""
        if self.size == 1:
            return value
        said = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor(len(said))
        dist.broadcast(length, 0, group=self.patient)
        sent = said if self.first else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(sent, 0, group=self.patient)
        return json.loads(bytes(sent.tolist()))

    def barrier(self) -> None:
        """Wait until every rank is here, however long one of them works alone."""
        if self.size > 1:
            dist.barrier(group=self.patient)

    def wait_for(self, path: Path) -> None:
        """Wait until the first rank is here, having written ``path``, and this one sees it.

        Raises:
            ShearlingError: it is not to be seen on this node.
        """
        self.barrier()
        until = time.monotonic() + LATE
        while self.size > 1 and not path.exists():  # file systems of several nodes may be late
            if time.monotonic() > until:
                raise ShearlingError(
                    f"{path} was written by the first process, but cannot be seen by process "
                    f"{self.rank}; name an output on a file system that all nodes share."
                )
            time.sleep(0.2)

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, how, group=self.patient)
        return tensor.tolist()


ALONE = Ranks()


def join_ranks(device: str = "auto") -> Ranks:
    """The processes that torchrun started, or one process alone.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; several processes of a machine take the
            GPU of their own number.

    Raises:
        ShearlingError: a device that is not there, or fewer GPUs than processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    mine = own_device(device, int(os.environ.get("LOCAL_RANK", "0")), local)
    if mine.type == "cuda":
        torch.cuda.set_device(mine)
    if size == 1:
        return Ranks(device=mine)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if mine.type == "cuda" else "gloo")
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Ranks(dist.get_rank(), size, mine, local, patient)


def leave() -> None:
    """End what ``join_ranks`` began."""
    if dist.is_initialized():
        dist.destroy_process_group()
