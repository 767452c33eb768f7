"""What a writer is to give where a norm behind it undoes its size."""

from __future__ import annotations

import torch

from shearling.repair.behind_norm import LEAST_COSINE, at_size_of

DRAWN = torch.Generator().manual_seed(2)
OWN = torch.randn(3, 7, 5, generator=DRAWN)
GAIN = torch.rand(5, generator=DRAWN) + 0.5


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of each sequence, every token of the source alike, channels as the norm lets them through."""
    rows = [
        sum(float((x * y * GAIN**2).sum() / o.square().sum()) for x, y, o in zip(*s, strict=True))
        for s in zip(a, b, OWN, strict=True)
    ]
    return torch.tensor(rows)


def test_nothing_is_gained_by_shrinking() -> None:
    now = torch.tensor([0.3, 1.0, 2.5])[:, None, None] * OWN + 0.2 * torch.randn(
        OWN.shape, generator=DRAWN
    )
    target = at_size_of(OWN, now, GAIN)
    sizes = (target / OWN).flatten(1)
    torch.testing.assert_close(sizes, sizes[:, :1].expand_as(sizes))
    assert (product(target - now, now).abs() < 1e-4 * product(now, now)).all()
    torch.testing.assert_close(at_size_of(OWN, OWN, GAIN), OWN)
    # Twice as much of the same is no other target behind the norm.
    torch.testing.assert_close(at_size_of(OWN, 2 * now, GAIN), 2 * target)


def test_outputs_that_are_not_alike_do_not_blow_it_up() -> None:
    target = at_size_of(OWN, -OWN, GAIN)
    torch.testing.assert_close(target, OWN / LEAST_COSINE)
