"""Damaged files, our own and others': each is read, or refused by one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzzing import Format, attempts
from input_formats import input_formats
from own_formats import own_formats

MUTATIONS = 100
FORMATS = [*own_formats(), *input_formats()]


@pytest.mark.parametrize("form", FORMATS, ids=[form.kind for form in FORMATS])
def test_a_damaged_file_is_read_or_refused(form: Format, tmp_path: Path) -> None:
    outcome = attempts(form, MUTATIONS, tmp_path)
    assert outcome.tracebacks == []
    assert outcome.refused + outcome.read == MUTATIONS
    assert outcome.refused > MUTATIONS // 10, "the mutations do no harm"
    assert outcome.slowest < 10
