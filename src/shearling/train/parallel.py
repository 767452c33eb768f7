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

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """Who we are among how many.

    Attributes:
        rank, size: this process, and how many there are.
        device: where this process computes.
        mesh: of FSDP: one dimension on one node; (nodes, ranks of a node) on several, so that
            weights are sharded inside a node and replicated between them; None for one process.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks and writes."""
        return self.rank == 0

    def total(self, value: float) -> float:
        """The sum over ranks of a number, in float64."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return float(tensor)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        return self.total(float(flag)) > 0


def join() -> World:
    """The world that torchrun describes, or one process alone."""
    cuda = torch.cuda.is_available()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size == 1:
        return World(device=device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    each = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    kind = "cuda" if cuda else "cpu"
    if size > each:
        mesh = init_device_mesh(kind, (size // each, each), mesh_dim_names=("nodes", "ranks"))
    else:
        mesh = init_device_mesh(kind, (size,), mesh_dim_names=("ranks",))
    return World(dist.get_rank(), size, device, mesh)


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
