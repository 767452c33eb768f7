"""Where what was made once is kept: converted models, digests, answers of tasks."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """``$SHEARLING_CACHE``, or the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SHEARLING_CACHE") or Path(base) / "shearling")
