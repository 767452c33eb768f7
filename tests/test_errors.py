"""Sentences that users meet have an end."""

from __future__ import annotations

import pickle

import pytest

from shearling.errors import SENTENCE, WORD, ShearlingError


def test_a_name_of_any_length_is_shown_by_its_beginning() -> None:
    said = str(ShearlingError(f"Line 4 has the keys {'[' * 5000} and text; give another."))
    assert said.startswith("Line 4 has the keys [[[[")
    assert said.endswith("[… and text; give another.")
    assert len(said) < WORD + 100


def test_a_sentence_of_any_length_keeps_its_end() -> None:
    said = str(ShearlingError(f"Line 1 has the label {'{parent: ' * 900}; give a number."))
    assert len(said) == SENTENCE
    assert said.startswith("Line 1 has the label {parent: {parent")
    assert said.endswith("{parent: ; give a number.")


@pytest.mark.parametrize("length", [1, WORD])
def test_what_is_not_longer_is_shown_whole(length: int) -> None:
    said = f"there is no text at {'a' * (length - 1)}/ here, and this is many words" + " long" * 120
    assert str(ShearlingError(said)) == said


def test_it_comes_out_of_another_process_as_it_was() -> None:
    error = ShearlingError("9" * 999 + " was given.")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
