"""``--bos/--no-bos``: every command follows the tokenizer, and says so."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import naive
from shearling import cli
from shearling.data.documents import documents
from shearling.data.text import calibration_windows
from shearling.errors import ShearlingError
from tiny_tokenizer import BOS, write_llama


def run(*arguments: Any) -> None:
    cli.app([str(argument) for argument in arguments], standalone_mode=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer puts BOS before a text, a smaller one, and text."""
    root = tmp_path_factory.mktemp("bos")
    write_llama(root / "model", layers=3, adds_bos=True)
    write_llama(root / "small", layers=2, adds_bos=True)
    texts = [f"{n} sheep in the fell, {n * n} in the pen. " * 2 for n in range(60)]
    (root / "fell.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    for bos in ("--bos", "--no-bos"):
        run(
            "pack", root / "fell.jsonl", "--tokenizer", root / "model", "--output",
            root / f"store{bos}", "--length", 24, "--held-out", 0.2, "--workers", 1, bos,
        )  # fmt: skip
    return root


def found(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    capsys.readouterr()
    run(*arguments, "--json")
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("option", "bos"), [((), True), (("--bos",), True), (("--no-bos",), False)]
)
def test_eval(place: Path, capsys: pytest.CaptureFixture[str], option: Any, bos: bool) -> None:
    told = found(
        capsys, "eval", place / "small", "--text", place / "fell.jsonl", "--window", 16,
        "--max-windows", 3, *option,
    )  # fmt: skip
    tokenizer: Any = AutoTokenizer.from_pretrained(place / "small")
    stock = AutoModelForCausalLM.from_pretrained(place / "small")
    text = "\n\n".join(documents(place / "fell.jsonl"))[:200]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    losses = []
    for start in (0, 16, 32):
        row = torch.tensor([[BOS] * bos + ids[start : start + 16]])
        logits = stock(row).logits[0, :-1].double()
        losses += (-logits.log_softmax(-1)[range(len(logits)), row[0, 1:]]).tolist()
    assert (told["bos"], told["tokens"]) == (bos, len(losses))
    assert told["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_repetition_is_counted_behind_bos(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from shearling.evaluate.degeneration import Beginnings, Sampling, degeneration, repetition

    tokenizer: Any = AutoTokenizer.from_pretrained(place / "small")
    stock = AutoModelForCausalLM.from_pretrained(place / "small").eval()
    texts = documents(place / "fell.jsonl")
    for bos in (None, False):
        told = degeneration(
            stock, tokenizer, texts, Beginnings(count=2, tokens=5, bos=bos), Sampling(12)
        )
        written = []
        for text in texts[:2]:
            head = [BOS] * (bos is None) + tokenizer(text, add_special_tokens=False)["input_ids"][
                :5
            ]
            out = stock.generate(torch.tensor([head]), max_new_tokens=12, do_sample=False)
            written.append([t for t in out[0, len(head) :].tolist() if t != 257])
        assert told["bos"] is (bos is None)
        assert told["distinct"] == repetition(written)["distinct"]


def test_score(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ("--calibration", place / "fell.jsonl", "--samples", 4, "--length", 20)
    for option, bos in (((), True), (("--no-bos",), False)):
        told = found(capsys, "score", place / "model", "--by", "perplexity", *text, *option)
        tokenizer: Any = AutoTokenizer.from_pretrained(place / "model")
        rows = calibration_windows(
            documents(place / "fell.jsonl"), tokenizer, samples=4, length=20, seed=0, bos=bos
        ).ids_NS
        assert all((row[0] == BOS) is bos for row in rows.tolist())
        values = [naive.perplexity(place / "model", rows, [block]) for block in range(3)]
        assert told["scores"] == pytest.approx(values, rel=1e-4)
        assert told["calibration"]["bos"] is bos
        assert math.isfinite(told["seconds"])


def test_prune_says_it_in_the_manifest_and_in_the_report(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = ("--shape", "mlp=30", "--calibration", place / "fell.jsonl", "--samples", 8)
    for name, option, bos in (("with", (), True), ("without", ("--no-bos",), False)):
        told = found(
            capsys, "prune", place / "small", "--output", tmp_path / name, "--length", 20,
            *cut, *option,
        )  # fmt: skip
        assert told["options"]["calibration"]["bos"] is bos
        run("report", tmp_path / name, "--output", tmp_path / f"{name}.html")
        page = (tmp_path / f"{name}.html").read_text()
        said = re.search(r"written \d+, bos( no)?", page)
        assert said is not None
        assert (said[1] is None) is bos


def test_training_takes_a_store_as_the_model_reads_text(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, opened, plain = place / "small", place / "store--bos", place / "store--no-bos"
    healing = ("heal", small, "--tokens", "200", "batch=4", "--output", tmp_path / "healed")
    learning = (
        "learn", place / "model", "--shape", "mlp=20", "--tokens", "200", "batch=4", "samples=8",
        "sample_length=16", "--output", tmp_path / "learned", "--dry-run",
    )  # fmt: skip
    teaching = ("teach", place / "model", "--top", 5, "--output", tmp_path / "cache", "--dry-run")
    for command in (healing, learning, teaching):
        with pytest.raises(ShearlingError, match=r"store--no-bos do not begin .* puts <s> before"):
            run(*command, "--data", plain)
        with pytest.raises(ShearlingError, match=r"store--bos begin .* --no-bos was given"):
            run(*command, "--data", opened, "--no-bos")
    run(*learning, "--data", opened)
    run(*teaching, "--data", plain, "--no-bos")
    measured = ("reference", small, "--output", tmp_path / "losses.json", "--store")
    with pytest.raises(ShearlingError, match="store--no-bos do not begin"):
        run(*measured, plain)
    run(*measured, opened)
    with pytest.raises(ShearlingError, match=r"losses\.json .* begin with BOS .* do not begin"):
        run(*healing, "--data", plain, "--no-bos", "mix=dynamic", "--reference",
            tmp_path / "losses.json")  # fmt: skip
    manifest = found(capsys, *healing, "--data", opened)
    assert manifest["options"]["bos"] is True
