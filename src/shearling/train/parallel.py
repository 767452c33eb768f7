"""One process, one GPU, or torchrun over many nodes: everything that knows of ranks is here.

Order, which is fixed: the model is built without storage, blocks and the whole are sharded
(FSDP2), storage is made, weights are read straight from safetensors, each rank its own part.
The GPU paths (NCCL, bfloat16, HSDP over nodes) were written from documentation and never run; two
gloo processes on a CPU take the same code in tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from shearling.train.device import chosen

_CPU = torch.device("cpu")
PATIENCE = timedelta(days=7)  # while one rank scores a model, the others wait for it


@dataclass(frozen=True)
class World:
    """Who we are among how many.

    Attributes:
        rank, size: this process, and how many there are.
        device: where this process computes.
        mesh: of FSDP: one dimension on one node; (nodes, ranks of a node) on several, so that
            weights are sharded inside a node and replicated between them; None for one process.
        patient: a process group on the host in which ranks wait for one another for days, and
            add up numbers without asking their devices; None for the default one.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU
    mesh: DeviceMesh | None = None
    patient: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks and writes."""
        return self.rank == 0

    def total(self, value: float) -> float:
        """The sum over ranks of a number, in float64; devices are not asked."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def least(self, value: float) -> float:
        """The least of all ranks' numbers."""
        return self._reduced(value, dist.ReduceOp.MIN)

    def _reduced(self, value: float, how: Any) -> float:
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, how, group=self.patient)
        return float(tensor)

    def summed(self, number: Tensor) -> Tensor:
        """The sum over ranks of a number on the device, which is not waited for."""
        if self.size > 1:
            dist.all_reduce(number)
        return number

    def barrier(self) -> None:
        """Wait until every rank is here, however long one of them works alone."""
        if self.size > 1:
            dist.barrier(group=self.patient)

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        return self.total(float(flag)) > 0


def join(device: str = "auto") -> World:
    """The world that torchrun describes, or one process alone.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; several ranks of a machine take the GPU
            of their own number.

    Raises:
        ShearlingError: a device that is not there.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    mine = chosen(device, int(os.environ.get("LOCAL_RANK", "0")))
    if mine.type == "cuda":
        torch.cuda.set_device(mine)
    if size == 1:
        return World(device=mine)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if mine.type == "cuda" else "gloo")
    each = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if size > each:
        names, sizes = ("nodes", "ranks"), (size // each, each)
    else:
        names, sizes = ("ranks",), (size,)
    mesh = init_device_mesh(mine.type, sizes, mesh_dim_names=names)
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    return World(dist.get_rank(), size, mine, mesh, patient)


def leave() -> None:
    """End what ``join`` began."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(
    module: nn.Module, blocks: Iterable[nn.Module], world: World, dtype: torch.dtype, *,
    apart: Iterable[nn.Parameter] = (),
) -> None:  # fmt: skip
    """Shard a module in place, each block a unit of its own; nothing for one process.

    Parameters ``apart`` stay whole on every rank, which has to see to their gradients itself.
    """
    if world.mesh is None:
        return
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
    )
    for block in blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=policy)
    fully_shard(module, mesh=world.mesh, mp_policy=policy, ignored_params=set(apart))


def sharded(module: nn.Module) -> bool:
    """Whether ``shard`` did anything to a module."""
    return isinstance(module, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A parameter put together from all ranks, which all have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
