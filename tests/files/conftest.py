"""Files are flushed to the disk here, as they are for users."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _flushing() -> None:
    """In the place of that of tests/conftest.py, which leaves it out."""
