"""``shearling pack`` and ``heal`` as a user runs them, from text to a healed model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from shearling import cli
from shearling.errors import ShearlingError
from shearling.train import steering
from shearling.train.loop import Trainer
from shearling.train.reference import Reference
from tiny_tokenizer import write_llama


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a larger one, two domains of text, and their store."""
    root = tmp_path_factory.mktemp("heal")
    write_llama(root / "model", layers=2)
    write_llama(root / "source", layers=4)
    for name in ("fell", "pen"):
        lines = [
            json.dumps({"text": f"{n} sheep in the {name}. " * (n % 5 + 1)}) for n in range(60)
        ]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    run(
        "pack", root / "fell.jsonl", root / "pen.jsonl", "--tokenizer", root / "model",
        "--output", root / "store", "--length", 24, "--held-out", 0.2, "--workers", 1,
    )  # fmt: skip
    return root


def run(*arguments: Any) -> None:
    cli.app([str(argument) for argument in arguments], standalone_mode=False)


def heal(place: Path, output: str, *more: Any) -> None:
    run(
        "heal", place / "model", "--data", place / "store", "--tokens", "600", "--output",
        place / output, "batch=4", "lr=1e-2", "eval_every=3", *more,
    )  # fmt: skip


def test_from_text_to_a_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heal(place, "healed")
    out = capsys.readouterr().out
    assert "nats a token, held out" in out
    assert "fell" in out
    assert AutoModelForCausalLM.from_pretrained(place / "healed").config.num_hidden_layers == 2
    tokenizer: Any = AutoTokenizer.from_pretrained(place / "healed")
    assert tokenizer("sheep")["input_ids"]


def test_json(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heal(place, "taught", "--recipe", "distill", "--teacher", place / "source", "--json")
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["stage"] == "heal"
    assert manifest["teacher"]["name"] == "source"
    assert manifest["options"]["recipe"] == "distill"


def test_a_teacher_kept_on_disk(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("teach", place / "source", "--data", place / "store", "--output", place / "cache")
    run(*arguments, "--top", 7, "--dry-run", "--json")
    expected = json.loads(capsys.readouterr().out)
    assert not (place / "cache").exists()
    run(*arguments, "--top", 7, "--dry-run")
    assert "GB, about 0.0 h on two CPU cores (assumed)" in capsys.readouterr().out
    run(*arguments, "--top", 7)
    assert f"{expected['sequences']:,} sequences, 0.19 MB" in capsys.readouterr().out
    run(*arguments, "--top", 7, "--json")  # which is there
    cache = json.loads(capsys.readouterr().out)
    assert (cache["kind"], cache["top"]) == ("teacher-cache", 7)
    heal(place, "kept", "--recipe", "distill", "--teacher-cache", place / "cache", "--json")
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["teacher"]["name"] == "source"
    assert manifest["teacher"]["cache"] == cache["fingerprint"]
    heal(place, "none", "--recipe", "distill", "--teacher-cache", place / "cache", "--dry-run")
    assert f"\n{'teacher':<12} {'0 B':>11} a rank" in capsys.readouterr().out


def test_a_reference_of_another_tokenizer(place: Path, tmp_path: Path) -> None:
    how = {"method": "measured", "store": {"tokenizer": "0" * 64}}
    Reference({"fell": 1.0, "pen": 1.0}, how).save(tmp_path / "other.json")
    with pytest.raises(ShearlingError, match=r"other.json were measured with another tokenizer"):
        heal(place, "none", "mix=dynamic", "--reference", tmp_path / "other.json")
    assert not (place / "none").exists()


def test_a_dynamic_mix(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        "reference", place / "source", "--store", place / "store", "--output",
        place / "reference.json",
    )  # fmt: skip
    heal(
        place, "mixed", "mix=dynamic", "update_every=2", "--reference", place / "reference.json",
    )  # fmt: skip
    heal(place, "measured", "mix=dynamic", "update_every=2", "--teacher", place / "source")
    capsys.readouterr()
    found = [json.loads((place / n / "shearling.json").read_text()) for n in ("mixed", "measured")]
    assert found[0]["final_weights"] == pytest.approx(found[1]["final_weights"], rel=1e-3)
    assert found[0]["final_weights"]["fell"] != pytest.approx(0.5, abs=1e-3)


def test_a_measured_reference_is_the_run_s(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other threads give other last digits; a run goes on with what it began with."""
    write_llama(tmp_path / "other", layers=3)
    arguments = (
        "mixed", "mix=dynamic", "update_every=2", "save_every=2", "--teacher", place / "source",
    )  # fmt: skip
    (tmp_path / "one").mkdir()
    for name in ("model", "source", "store"):
        (tmp_path / "one" / name).symlink_to(place / name)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_look", lambda trainer: _stop_at(trainer, 3))
        with pytest.raises(_Stopped):
            heal(tmp_path / "one", *arguments)
    measure = steering.measure
    monkeypatch.setattr(
        steering, "measure", lambda *a, **k: {d: x + 1e-7 for d, x in measure(*a, **k).items()}
    )
    with pytest.raises(ShearlingError, match="another teacher and reference"):
        heal(tmp_path / "one", *arguments[:-1], tmp_path / "other")
    heal(tmp_path / "one", *arguments)
    manifest = json.loads((tmp_path / "one" / "mixed" / "shearling.json").read_text())
    assert manifest["teacher"]["name"] == "source"


def test_a_reference_file_is_compared(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("mix=dynamic", "save_every=2", "--reference")
    for name, loss in (("first", 1.0), ("second", 1.0 + 1e-7)):
        Reference({"fell": loss, "pen": 1.0}, {"method": "given"}).save(tmp_path / name)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_look", lambda trainer: _stop_at(trainer, 3))
        with pytest.raises(_Stopped):
            heal(place, "filed", *given, tmp_path / "first")
    with pytest.raises(ShearlingError, match="a run with another reference"):
        heal(place, "filed", *given, tmp_path / "second")


class _Stopped(Exception):
    pass


def _stop_at(trainer: Trainer, step: int) -> None:
    if trainer.step == step:
        raise _Stopped


def test_what_is_ignored_is_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the manifest names no teacher that taught nothing."""
    Reference({"fell": 1.0, "pen": 1.0}, {"method": "given"}).save(place / "given.json")
    heal(
        place, "plain", "--reference", place / "given.json", "--teacher", place / "source",
        "temperature=3", "text_share=0.9", "rank=64", "floor=0.3", "update_every=50",
    )  # fmt: skip
    told = capsys.readouterr().err
    assert "--reference ignored: only mix=dynamic" in told
    assert "--teacher ignored: nothing is distilled" in told
    assert "temperature, text_share ignored: of use with recipe=distill alone." in told
    assert "rank ignored: of use with recipe=lora alone." in told
    assert "floor ignored: of use with mix=dynamic alone." in told
    manifest = json.loads((place / "plain" / "shearling.json").read_text())
    assert manifest.get("teacher") is None
    heal(place, "steered", "mix=dynamic", "floor=0.3", "--reference", place / "given.json")
    assert "ignored" not in capsys.readouterr().err


def test_dry_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heal(place, "nothing", "--dry-run")
    assert "B a rank" in capsys.readouterr().out
    heal(place, "nothing", "--dry-run", "--json")
    assert json.loads(capsys.readouterr().out)["steps"] == 7
    assert not (place / "nothing").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--recipe", "distill"), "give --teacher"),
        (("depth=2",), "depth is not an option of healing"),
        (("--recipe", "dpo"), "recipe"),
        (("mix=dynamic",), "--reference"),
        (("--teacher-cache", "nowhere"), "nowhere is no cache of a teacher"),
    ],
)
def test_errors(
    place: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    arguments = [
        "shearling", "heal", str(place / "model"), "--data", str(place / "store"), "--tokens",
        "600", "--output", str(place / "none"), *more,
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (place / "none").exists()
