"""A judge of our own, and files for it."""

import pytest

from judge_fixtures import answers, prompts, stub

pytest.importorskip("openai", reason="the extra judge is not installed")

__all__ = ["answers", "prompts", "stub"]
