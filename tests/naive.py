"""References for what shearling computes cleverly: whole stock models, one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Skip(nn.Module):
    """A removed block: the identity."""

    def forward(self, h_BSD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return h_BSD


def stock(path: Path) -> Any:
    """The whole model as stock transformers loads it, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def blocks(model: Any) -> nn.ModuleList:
    """The model's blocks: the one list that is as long as the model is deep."""
    depth = model.config.num_hidden_layers
    (found,) = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    return found


def stock_without(path: Path, removed: Iterable[int]) -> Any:
    """A fresh stock model in which some blocks do nothing."""
    model = stock(path)
    for index in removed:
        blocks(model)[index] = Skip()
    return model


def token_nll(model: Any, ids_BS: Tensor) -> Tensor:
    """Nats (B, S-1) of every token after the first, from log_softmax in double precision."""
    log_p = model(input_ids=ids_BS, use_cache=False).logits.double().log_softmax(-1)
    return -log_p[:, :-1].gather(-1, ids_BS[:, 1:, None])[..., 0]


def mean_nll(path: Path, ids_BS: Tensor, removed: Iterable[int] = ()) -> float:
    with torch.no_grad():
        return float(token_nll(stock_without(path, removed), ids_BS).mean())


def perplexity(path: Path, ids_BS: Tensor, removed: Iterable[int] = ()) -> float:
    return math.exp(mean_nll(path, ids_BS, removed))
