"""A model ready to be trained: weights float32 by default, sharded if there are several ranks.

One process loads it as any user would. Several build it without storage, shard it, and read each
its own part straight from the checkpoint's safetensors, so that no rank ever holds the whole.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader

from shearling.model.checkpoint import Checkpoint
from shearling.model.loading import build_model, stock_model
from shearling.model.tensors import StoredTensors
from shearling.train.objective import stock
from shearling.train.parallel import World


def empty(checkpoint: Checkpoint) -> Any:
    """The stock model without storage for its weights."""
    with torch.device("meta"):
        model = build_model(checkpoint.config, torch.float32)
    model.config.use_cache = False
    return model


def loaded(checkpoint: Checkpoint, world: World, dtype: torch.dtype = torch.float32) -> Any:
    """The stock model, whole, on this process's device."""
    model, _ = stock_model(checkpoint.path, dtype)
    model.config.use_cache = False
    return model.to(world.device)


def blocks(checkpoint: Checkpoint, model: nn.Module) -> list[nn.Module]:
    """The model's blocks, in order; peft's wrapping looked through."""
    return list(stock(model).get_submodule(checkpoint.family.blocks).children())


def fill(checkpoint: Checkpoint, model: Any, world: World) -> None:
    """Give an empty, sharded model storage, and read its weights, each rank its own part."""
    model.to_empty(device=world.device)
    model.tie_weights()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = checkpoint.tensors
    assert isinstance(tensors, StoredTensors), "what is trained lies on disk"
    state = {}
    for name, home in checkpoint.homes.items():
        parameter = parameters[home.parameter].detach()
        of_all = name in tensors.parts  # the file holds those of all experts in one
        state[tensors.stored.get(name, name)] = parameter if of_all else home.of(parameter)
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(checkpoint.path)))
    _fill_buffers(checkpoint, model)


def _fill_buffers(checkpoint: Checkpoint, model: Any) -> None:
    """Rotary tables and the like, which no file holds, from a real model without blocks."""
    config = copy.deepcopy(checkpoint.config)
    setattr(config, checkpoint.family.keys["layers"], 0)
    config.vocab_size = 8
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    real = dict(build_model(config, torch.float32).named_buffers())
    for name, buffer in model.named_buffers():
        assert name in real, f"{name} is not known outside the blocks"
        buffer.copy_(real[name])
