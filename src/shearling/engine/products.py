"""Matrix products in float32 on CPUs that torch's default library leaves half idle.

torch multiplies float32 matrices with MKL, which takes its AVX-512 kernels on Intel's processors
only: on an AMD EPYC of the Zen 5 generation it reached 100-140 GFLOP/s on two cores, where oneDNN,
which torch carries as well, reached 260-410 (LOG.md, 2026-11-22). Same precision, same operands,
another order of summation. Results do not depend on timing: which library is used follows from
the processor alone, or from ``SHEARLING_ONEDNN=0`` or ``1``.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

PACKED = 8  # a block's worth


@cache
def preferred() -> bool:
    """Whether oneDNN is to be used: an AVX-512 processor that is not Intel's."""
    asked = os.environ.get("SHEARLING_ONEDNN")
    available = torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    )
    if asked is not None:
        return available and asked == "1"
    return available and "AVX512" in torch.backends.cpu.get_cpu_capability() and not _intel()


@contextmanager
def fast_products(packed: int | None = PACKED) -> Generator[None]:
    """Route ``torch.nn.functional.linear`` on float32 CPU tensors through oneDNN where preferred.

    Stock models need no change for it. Gradients flow, and are products of the same kind.

    Args:
        packed: how many weights are kept in oneDNN's own order as well, those used last; with
            None all, as a model wants that is run whole again and again.
    """
    if not preferred():
        yield
        return
    with _OneDnn(packed):
        yield


class _OneDnn(TorchFunctionMode):
    def __init__(self, packed: int | None) -> None:
        super().__init__()
        self._packed = _PackedWeights(packed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and _eligible(*args, **kwargs):
            return self._linear(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (input, weight, bias)
        ):
            return _Differentiable.apply(input, weight, bias)
        return _product(input, self._packed.of(weight), bias)


class _PackedWeights:
    """The last few weights in the order of bytes that oneDNN's kernels read.

    Otherwise each product would put its weight in that order again, a fifth of its time. Blocks
    are run one after the other on many states, so that a block's worth of weights is enough.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._held: OrderedDict[int, tuple[weakref.ref[Tensor], tuple[int, int], Tensor]] = (
            OrderedDict()
        )

    def of(self, weight: Tensor) -> Tensor:
        """The packed weight; that very tensor's, and as it is now."""
        if weight.is_inference():  # does not tell whether it was changed
            return weight
        held = self._held.get(id(weight))
        state = (weight.data_ptr(), weight._version)
        if held is None or held[0]() is not weight or held[1] != state:
            with torch.inference_mode(False), torch.no_grad():
                packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
            held = (weakref.ref(weight), state, packed)
            self._held[id(weight)] = held
        self._held.move_to_end(id(weight))
        while self._most is not None and len(self._held) > self._most:
            self._held.popitem(last=False)
        return held[2]


def _eligible(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return (
        input.dtype == weight.dtype == torch.float32
        and input.device.type == weight.device.type == "cpu"
        and input.numel() > 0
        and type(weight) in (Tensor, torch.nn.Parameter)  # a quantised tensor multiplies itself
    )


def _product(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x (..., in) times w (out, in) transposed, plus b (out)."""
    return torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")


class _Differentiable(torch.autograd.Function):
    """linear, its three gradients as products of the same library."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.has_bias = b is not None
        return _product(x, w, b)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        g = gradients[0]
        g_NO, x_NI = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        needs_x, needs_w, needs_b = ctx.needs_input_grad
        return (
            _product(g.contiguous(), w.t().contiguous()) if needs_x else None,
            _product(g_NO.t().contiguous(), x_NI.t().contiguous()) if needs_w else None,
            g_NO.sum(0) if ctx.has_bias and needs_b else None,
        )


def _intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True  # unknown: stay with torch's default
