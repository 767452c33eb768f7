"""Text that a model writes on a vLLM server: its own distribution, whatever interrupted it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fake_engines
import naive
from places import place
from shearling.cli import app
from shearling.data.authors import ResidentAuthor
from shearling.data.own_text import OwnText, OwnTextRun
from shearling.errors import ShearlingError
from shearling.evaluate.engines import serving, vllm_server
from shearling.evaluate.engines.serving import ServingOptions
from shearling.evaluate.engines.vllm_author import VllmAuthor
from shearling.model.checkpoint import Checkpoint
from tiny_tokenizer import BOS, byte_tokenizer, write_llama
from vllm_stand_in import StandIn

EOS = BOS + 1
LENGTH, SEQUENCES = 20, 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("written") / "model", layers=2, adds_bos=True)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[StandIn]]:
    """Servers that were started; none may be left."""
    monkeypatch.setattr(vllm_server, "_ASK_SECONDS", 0.02)
    monkeypatch.setattr(serving, "VllmServer", StandIn)
    StandIn.started.clear()
    yield StandIn.started
    assert not any(server.running for server in StandIn.started)


def run(model: Path, output: Path, *, at_a_time: int = 2, **options: Any) -> OwnTextRun:
    wanted = OwnText(**{"tokens": SEQUENCES * LENGTH, "length": LENGTH, "seed": 3} | options)
    author = VllmAuthor(ServingOptions(Path("vllm"), at_a_time=at_a_time))
    return OwnTextRun(Checkpoint.open(model), wanted, output, author)


def written(model: Path, output: Path, **options: Any) -> bytes:
    run(model, output, **options).write()
    return output.read_bytes()


def documents_of(ids: list[int]) -> list[str]:
    pieces: list[list[int]] = [[]]
    for token in ids:
        pieces.append([]) if token in (BOS, EOS) else pieces[-1].append(token)
    decoded = [str(byte_tokenizer().decode([n for n in piece if n < BOS])) for piece in pieces]
    decoded[-1] = decoded[-1].rstrip("\ufffd")
    return [text for text in decoded if text.strip()]


def test_a_plain_loop_draws_the_same(model: Path, tmp_path: Path, stand_in: list[StandIn]) -> None:
    """One request for each sequence, with a seed of its own; ends of text do not end it."""
    output = tmp_path / "own.jsonl"
    found = [json.loads(line)["text"] for line in written(model, output).splitlines()]
    (server,) = stand_in
    assert len(server.requests) == SEQUENCES
    seeds = [int(body["seed"]) for body in server.requests]
    assert len(set(seeds)) == SEQUENCES
    assert max(seeds) > 2**40
    expected: dict[int, list[str]] = {}
    for seed in seeds:
        generator, ids = torch.Generator().manual_seed(seed), [BOS]
        while len(ids) < LENGTH:
            with torch.no_grad():
                logits_V = naive.stock(model)(input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int(torch.multinomial(logits_V.softmax(-1), 1, generator=generator)))
        expected[seed] = documents_of(ids)
    draws_BT = run(model, tmp_path / "again.jsonl").batch(0, SEQUENCES)[1].double()
    in_order = [int(row[0] * 2**24) + (int(row[1] * 2**24) << 24) for row in draws_BT]
    assert found == [text for seed in in_order for text in expected[seed]]
    assert server.option("--max-model-len") == str(LENGTH)
    assert server.option("--max-num-seqs") == "2"


def test_how_many_at_a_time_and_interruptions_change_nothing(model: Path, tmp_path: Path) -> None:
    whole = written(model, tmp_path / "whole.jsonl")
    assert written(model, tmp_path / "batch.jsonl", at_a_time=9) == whole
    assert written(model, tmp_path / "seed.jsonl", seed=4) != whole
    output = tmp_path / "out.jsonl"

    def stopping(_: str, done: float, total: float) -> None:
        if done > 3 * LENGTH:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, output).write(stopping)
    assert run(model, output).done == 2
    begun = run(model, output)
    other = OwnTextRun(begun.source, begun.wanted, output, ResidentAuthor(place()))
    with pytest.raises(ShearlingError, match="begun with another engine"):
        other.write()
    assert written(model, output) == whole


def test_an_answer_that_is_short_is_no_text(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: Callable[..., list[int]] = StandIn.drawn_after
    monkeypatch.setattr(StandIn, "drawn_after", lambda *given: drawn(*given)[:-1])
    with pytest.raises(ShearlingError, match="18 tokens came where 19 were asked for"):
        written(model, tmp_path / "own.jsonl")
    assert not (tmp_path / "own.jsonl").exists()


def test_the_command(model: Path, tmp_path: Path, stand_in: list[StandIn]) -> None:
    output, program = tmp_path / "own.jsonl", fake_engines.vllm(tmp_path / "bin")
    arguments = [
        "write", str(model), "--tokens", "50", "--length", str(LENGTH), "--output", str(output),
        "--engine", "vllm", "--vllm", str(program), "--device", "cpu",
    ]  # fmt: skip
    planned = CliRunner().invoke(app, [*arguments, "--dry-run"], catch_exceptions=False).stdout
    assert "3 sequences of 20 tokens" in planned
    assert "vllm writes on cpu, in float32" in planned
    assert not stand_in
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    told = json.loads(done.stdout)
    assert (told["engine"], told["sequences"]) == ("vllm", 3)
    assert output.is_file()
    assert len(stand_in) == 1
    refused = CliRunner().invoke(app, [*arguments[:-6], "--engine", "gpt4all"])
    assert "text is written with transformers or vllm" in str(refused.exception)
