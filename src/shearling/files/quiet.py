"""Keeping other libraries' bars and notices off the terminal, where ours are shown."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def no_progress_bars() -> Generator[None]:
    """Switch transformers' bars off, and back on as they were."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def no_torchao_notices() -> None:
    """Drop what torchao, which transformers imports if it is there, says of GPUs' kernels."""
    for speaker in ("torchao", "torch.utils._pytree"):
        logging.getLogger(speaker).setLevel(logging.ERROR)
