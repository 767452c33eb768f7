"""Products through oneDNN are those of torch's default library, gradients included."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from shearling.engine import products
from shearling.engine.products import fast_products

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch carries no oneDNN"
)


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SHEARLING_ONEDNN", "1")
    products.preferred.cache_clear()
    yield
    products.preferred.cache_clear()


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@given(
    lead=st.lists(st.integers(1, 5), max_size=2),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    bias=st.booleans(),
)
def test_values_and_gradients(lead: list[int], sizes: tuple[int, int], bias: bool) -> None:
    generator = torch.Generator().manual_seed(sum(sizes))
    shapes = [(*lead, sizes[0]), (sizes[1], sizes[0]), *([(sizes[1],)] if bias else [])]
    operands = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    results = []
    for dtype in (torch.float64, torch.float32):  # float64 is never routed: an exact reference
        given = [t.to(dtype, copy=True).requires_grad_() for t in operands]
        with fast_products():
            out = functional.linear(*given)
            out.square().sum().backward()
        results.append([out.detach(), *(t.grad for t in given)])
    for exact, found in zip(*results, strict=True):
        assert exact is not None
        assert found is not None
        assert close(found, exact.float())


def test_is_really_routed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(products, "_product", lambda x, w, b=None: seen.append(w) or x)
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    with fast_products():
        functional.linear(x, w)
        functional.linear(x.bfloat16(), w.bfloat16())
    functional.linear(x, w)
    assert len(seen) == 1


def test_views_that_are_not_contiguous() -> None:
    x, w = torch.randn(6, 9, 5)[:, 1:7], torch.randn(5, 8).t()
    with torch.inference_mode(), fast_products():
        found = functional.linear(x, w)
    assert close(found, x @ w.t())


def test_packed_weights_are_those_of_the_tensor_as_it_is() -> None:
    x = torch.randn(4, 6)
    with torch.no_grad(), fast_products():
        for _ in range(3 * products.PACKED):  # weights come and go, and addresses with them
            w = torch.nn.Parameter(torch.randn(5, 6))
            assert close(functional.linear(x, w), x @ w.t())
            w.mul_(2)
            assert close(functional.linear(x, w), x @ w.t())
            w.data = torch.randn(5, 6)
            assert close(functional.linear(x, w), x @ w.t())


def test_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHEARLING_ONEDNN", "0")
    products.preferred.cache_clear()
    assert not products.preferred()


@pytest.mark.parametrize(("vendor", "used"), [("GenuineIntel", False), ("AuthenticAMD", True)])
def test_follows_the_processor(monkeypatch: pytest.MonkeyPatch, vendor: str, used: bool) -> None:
    monkeypatch.delenv("SHEARLING_ONEDNN")
    products.preferred.cache_clear()
    monkeypatch.setattr(Path, "read_text", lambda _self: f"vendor_id : {vendor}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert products.preferred() is used
