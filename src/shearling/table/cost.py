"""What a shape costs: exact integers from the table.

Units: parameters, floating-point operations (a multiplication and an addition are two), bytes.
"""

from __future__ import annotations

from shearling.table.axes import Layout
from shearling.table.values import Shape


def parameters(layout: Layout, shape: Shape) -> int:
    """Every parameter, tied ones once."""
    return layout.count(shape)


def flops_per_token(layout: Layout, shape: Shape, context: int = 0) -> int:
    """Operations to run one token forward with ``context`` tokens before and including it.

    Matrix products (the head's included, tied or not; of a router's experts those that a token is
    sent to) and the two products of attention;
    norms, activations and softmax, which are of lower order, are left out.
    """
    products = sum(
        layout.numbers(row, shape, active=True)
        for row in layout.rows
        if row.role in ("linear", "head")
    )
    attention = 2 * shape["layers"] * shape["heads"] * shape["head_dim"] * context
    return 2 * (products + attention)


def kv_cache_bytes(shape: Shape, tokens: int, itemsize: int = 2) -> int:
    """Keys and values of ``tokens`` tokens, all blocks; sliding windows would need less."""
    if "latent" in shape:  # and the rotary part of the keys, one for all heads
        return shape["layers"] * (shape["latent"] + shape["rotary_dim"]) * tokens * itemsize
    groups = shape.get("kv_heads", shape["heads"])
    return 2 * shape["layers"] * groups * shape["head_dim"] * tokens * itemsize
