"""Chat templates rendered: programs that a tokenizer brings along, bounded in time and memory.

transformers runs them in a sandbox that reaches nothing outside; it does not stop one that loops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shearling.files.bounds import bounded

SECONDS = 5  # a conversation takes milliseconds
BYTES = 10**9


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, ask: bool = False) -> str:
    """A conversation as the tokenizer's chat template has it.

    Args:
        tokenizer: with a chat template.
        messages: ``role`` and ``content`` of each.
        ask: whether the beginning of an answer follows.

    Raises:
        TimeoutError, ValueError: the template takes more than SECONDS or BYTES.
        Exception: whatever a template raises.
    """
    return bounded(
        lambda: str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
        ),
        seconds=SECONDS,
        num_bytes=BYTES,
    )
