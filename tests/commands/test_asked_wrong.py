"""What the parser refuses: one sentence that names option, value and what was expected."""

from __future__ import annotations

import sys

import pytest

from shearling.cli import main

ASKED = [
    ("bench m --repeats 2.5", "--repeats 2.5 was given, but a whole number was expected", "bench"),
    ("bench m --repeats x", "--repeats x was given, but a whole number was expected", "bench"),
    ("bench m --repeats 0", "--repeats 0 was given, but at least 1 was expected", "bench"),
    ("eval m --temperature=-1", "--temperature -1 was given, but at least 0 was expected", "eval"),
    ("eval m --top-p 1.5", "--top-p 1.5 was given, but at most 1 was expected", "eval"),
    ("eval m --top-p a", "--top-p a was given, but a number was expected", "eval"),
    ("eval m --text t --window 1", "--window 1 was given, but at least 2 was expected", "eval"),
    ("pack x --tokenizer t --output o --held-out 2", "--held-out 2 was given, but at most 0.999 "
     "was expected", "pack"),
    ("inspect", "MODEL was not given, but `shearling inspect` needs it", "inspect"),
    ("pack x", "--tokenizer was not given, but `shearling pack` needs it", "pack"),
    ("bench m --repeat 3", "--repeat was given, but `shearling bench` has no such option; the "
     "nearest is --repeats", "bench"),
    ("bench m --repeats", "--repeats was given alone, but a value behind it was expected", "bench"),
    ("inspect m --json=3", "--json was given with a value, but takes none", "inspect"),
    ("inspect a b", "b was given, but `shearling inspect` takes MODEL and no more", "inspect"),
    ("inspekt a", "inspekt was given, but there is no such command; the nearest is inspect", ""),
    ("--nope", "--nope was given, but `shearling` has no such option", ""),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "said", "command"), ASKED)
def test_one_sentence_says_what_is_wrong(
    asked: str, said: str, command: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["shearling", *asked.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    helps = f"shearling {command}".strip()
    assert err == f"shearling: {said}; see `{helps} --help`.\n"


def test_without_a_command_help_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["shearling"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert "Commands:" in out + err
