"""What a model makes of its head's product before it calls it logits.

transformers knows three settings: Cohere multiplies by ``logit_scale``, Granite divides by
``logits_scaling``, Gemma soft-caps with ``final_logit_softcapping``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_plain(config: Any) -> bool:
    """Whether logits are the head's product and no more; from a resolved text config."""
    return _scale(config) == 1 and _cap(config) is None


def finish(config: Any, product_TV: Tensor) -> Tensor:
    """Logits from the head's product."""
    scale, cap = _scale(config), _cap(config)
    logits_TV = product_TV if scale == 1 else product_TV * scale
    return logits_TV if cap is None else torch.tanh(logits_TV / cap) * cap


def _scale(config: Any) -> float:
    return getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)


def _cap(config: Any) -> float | None:
    return getattr(config, "final_logit_softcapping", None)
