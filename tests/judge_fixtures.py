"""A judge of our own, and files for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from judge_stub import Stub, longer


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    server = Stub(longer)
    yield server
    server.close()


@pytest.fixture
def answers(tmp_path: Path) -> Callable[..., Path]:
    """Name and answers -> a file of them, to the prompts p0, p1, …"""

    def write(name: str, *texts: str) -> Path:
        file = tmp_path / f"{name}.jsonl"
        lines = [json.dumps({"prompt": f"p{i}", "answer": text}) for i, text in enumerate(texts)]
        file.write_text("\n".join(lines) + "\n")
        return file

    return write


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[[int], Path]:
    """How many -> a file of the prompts p0, p1, …"""

    def write(count: int) -> Path:
        file = tmp_path / "prompts.txt"
        file.write_text("".join(f"p{i}\n" for i in range(count)))
        return file

    return write
