"""What a shape costs: exact integers from the table.

Units: parameters, floating-point operations (a multiplication and an addition are two), bytes.
"""

from __future__ import annotations

from shearling.table.layout import Layout
from shearling.table.values import Shape


def parameters(layout: Layout, shape: Shape) -> int:
    """Every parameter, tied ones once."""
    return layout.count(shape)


def flops_per_token(layout: Layout, shape: Shape, context: int = 0) -> int:
    """Operations to run one token forward with ``context`` tokens before and including it.

    Matrix products (the head's included, tied or not; of a router's experts those that a token is
    sent to), convolutions, the two products of attention, and the three of a linear attention's
    state (what it holds of the key, what is put there, what the query reads);
    norms, activations and softmax, which are of lower order, are left out.
    """
    products = sum(
        layout.numbers(row, shape, active=True)
        for row in layout.rows
        if row.role in ("linear", "conv", "head")
    )
    widths = (blocks * width for blocks, _, width in _attending(layout, shape))
    attention = 2 * shape["heads"] * sum(widths) * context
    return 2 * (products + attention + 3 * _states(layout, shape))


def kv_cache_bytes(layout: Layout | None, shape: Shape, tokens: int, itemsize: int = 2) -> int:
    """Keys and values of ``tokens`` tokens, of all blocks that keep such.

    Sliding windows would need less. A linear attention keeps a state instead
    (:func:`state_bytes`).

    Args:
        layout: the table; None for blocks that are all alike.
        shape: sizes.
        tokens: how many are kept.
        itemsize: bytes of a number.
    """
    alike = _attending(layout, shape)
    if "latent" in shape:  # and the rotary part of the keys, one for all heads
        blocks = sum(blocks for blocks, _, _ in alike)
        return blocks * (shape["latent"] + shape["rotary_dim"]) * tokens * itemsize
    numbers = sum(blocks * groups * width for blocks, groups, width in alike)
    return 2 * numbers * tokens * itemsize


def _attending(layout: Layout | None, shape: Shape) -> list[tuple[int, int, int]]:
    """Blocks of attention that are alike: how many, their heads of keys, and a head's width."""
    blocks = shape["layers"] if layout is None else layout.blocks_with("heads", shape)
    alike = [(blocks, shape.get("kv_heads", shape["heads"]), shape["head_dim"])]
    if layout is None or "global_head_dim" not in shape:
        return alike
    wider = layout.blocks_with("global_head_dim", shape)
    own = (wider, shape["global_kv_heads"], shape["global_head_dim"])
    return [(blocks - wider, *alike[0][1:]), own]


def state_bytes(layout: Layout, shape: Shape, itemsize: int = 2) -> int:
    """What blocks of linear attention keep of a sequence, however long it is.

    A matrix for each head, and the last few inputs of the convolution.
    """
    kernels = sum(layout.numbers(row, shape) for row in layout.rows if row.role == "conv")
    return (_states(layout, shape) + kernels) * itemsize


def _states(layout: Layout, shape: Shape) -> int:
    """Numbers in the states of linear attention, all blocks and heads."""
    if "linear_heads" not in shape:
        return 0
    each = shape["linear_heads"] * shape["linear_key_dim"] * shape["linear_value_dim"]
    return layout.blocks_with("linear_heads", shape) * each
