"""One process, one GPU, or torchrun over many nodes: how one model is trained by several ranks.

Who the ranks are and how they add up is in :mod:`shearling.engine.ranks`.

Order, which is fixed: the model is built without storage, blocks and the whole are sharded
(FSDP2), storage is made, weights are read straight from safetensors, each rank its own part.
Several GPUs (NCCL, HSDP over nodes) were written from documentation and never run; two gloo
processes on a CPU take the same code in tests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from shearling.engine.place import hold_to
from shearling.engine.ranks import Ranks, join_ranks


@dataclass(frozen=True)
class World(Ranks):
    """Ranks that train one model.

    Attributes:
        mesh: of FSDP: one dimension on one node; (nodes, ranks of a node) on several, so that
            weights are sharded inside a node and replicated between them; None for one process.
        allowed: bytes of its GPU that each may use at most; None for all that are free.
    """

    mesh: DeviceMesh | None = None
    allowed: int | None = None

    def summed(self, number: Tensor) -> Tensor:
        """The sum over ranks of a number on the device, which is not waited for."""
        if self.size > 1:
            dist.all_reduce(number)
        return number


def join(device: str = "auto", allowed: int | None = None) -> World:
    """The world that torchrun describes, or one process alone.

    Args and errors are those of :func:`shearling.engine.ranks.join_ranks`; ``allowed`` is kept to
    from here on.
    """
    ranks = join_ranks(device)
    if ranks.device.type == "cuda":
        hold_to(ranks.device, allowed)
    mesh = None
    if ranks.size > 1:
        if ranks.size > ranks.local:
            names, sizes = ("nodes", "ranks"), (ranks.size // ranks.local, ranks.local)
        else:
            names, sizes = ("ranks",), (ranks.size,)
        mesh = init_device_mesh(ranks.device.type, sizes, mesh_dim_names=names)
    return World(ranks.rank, ranks.size, ranks.device, ranks.local, ranks.patient, mesh, allowed)


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


def reshard(module: nn.Module) -> None:
    """Give back what a forward pass without a backward one left gathered of a sharded module."""
    if isinstance(module, FSDPModule):
        module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A parameter put together from all ranks, which all have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
