"""Seeds of any size, for generators that take only some."""

from __future__ import annotations

import hashlib

LARGEST = 2**63 - 1  # what the commands take


def folded(seed: int, bits: int = 64) -> int:
    """A seed that a generator of so many bits takes.

    Args:
        seed: at least 0; combined ones, such as ``seed * 1_000_003 + step``, may have any size.
        bits: 64 for torch's generators, 32 for ``numpy.random.seed``.

    Returns:
        The seed itself where it fits, else a digest of it.
    """
    if seed < 2**bits:
        return seed
    digest = hashlib.blake2b(str(seed).encode(), digest_size=bits // 8).digest()
    return int.from_bytes(digest, "little")
