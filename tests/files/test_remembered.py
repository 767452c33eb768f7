"""A file's digest is kept until the file changes, however its times are set."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from shearling.files import remembered
from shearling.files.remembered import known_digest


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "SETTLED_SECONDS", 0.0)
    (tmp_path / "file").write_bytes(b"sheep" * 1000)
    return tmp_path / "file"


def test_it_is_that_of_the_bytes_and_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = hashlib.sha256(b"sheep" * 1000).hexdigest()
    assert known_digest(file) == expected
    monkeypatch.setattr(remembered, "file_digest", None)  # nothing is read now
    assert known_digest(file) == expected


def test_a_change_is_seen_though_the_time_is_set_back(file: Path) -> None:
    before, stat = known_digest(file), file.stat()
    time.sleep(0.05)  # more than a tick of the file system's clock
    file.write_bytes(b"goats" * 1000)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert known_digest(file) == hashlib.sha256(b"goats" * 1000).hexdigest() != before


def test_a_damaged_note_is_none(file: Path, tmp_path: Path) -> None:
    before = known_digest(file)
    for note in (tmp_path / "cache" / "digests").iterdir():
        note.write_text('{"sha256": 1}')
    assert known_digest(file) == before
