from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from shearling.commands.judge import judge
from shearling.errors import ShearlingError
from shearling.evaluate.generation import Sampling, generate
from shearling.files.progress import silent
from shearling.judge import sides
from shearling.model.loading import load_model, load_tokenizer
from tiny_tokenizer import CHAT, write_llama

app = typer.Typer()
app.command()(judge)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("judged") / "plain", layers=1)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("judged") / "chatty", layers=2, template=CHAT)


def call(*arguments: object) -> str:
    run = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    return run.stdout


def test_two_models_answer_once_and_are_judged(stub, model, chatty, prompts, tmp_path, monkeypatch):
    output = tmp_path / "out" / "j.json"
    options = [model, chatty, "--prompts", prompts(3), "--endpoint", stub.address]
    options += ["--output", output, "--max-new-tokens", 6]
    needed = json.loads(call(*options, "--json", "--dry-run"))
    assert needed == {"prompts": 3, "answers_of_a": 3, "answers_of_b": 3, "verdicts": 6}
    assert stub.requests == []
    assert not output.parent.exists()

    said = call(*options)
    result = json.loads(output.read_text())
    assert "win rate" in said
    assert f"wrote {output}" in said
    assert result["wins"] + result["ties"] + result["losses"] == result["prompts"] == 3
    assert result["sampling"]["max_new_tokens"] == 6
    asked = len(stub.requests)

    # what is kept is not made again: neither model is even loaded, and the judge not asked
    monkeypatch.setattr(sides, "load_model", None)
    assert json.loads(call(*options, "--json"))["win_rate"] == result["win_rate"]
    assert len(stub.requests) == asked


def test_answers_are_those_of_generate_in_the_chat_template(model, chatty, tmp_path):
    sampling = Sampling(max_new_tokens=6, temperature=0.9, seed=5)
    for path, asked in ((model, "p0"), (chatty, "<user>p0<assistant>")):
        side = sides.open_side(str(path), tmp_path, sampling, "float32")
        [answer] = side.answers(["p0"], silent)
        [expected] = generate(load_model(path), load_tokenizer(path), [asked], sampling)
        assert answer == expected["text"]


def test_answering_goes_on_where_it_was_left(model, tmp_path, monkeypatch):
    sampling = Sampling(max_new_tokens=4)
    asked = []

    def counting(model, tokenizer, prompts, **options):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.extend(prompts)
        return generate(model, tokenizer, prompts, **options)

    monkeypatch.setattr(sides, "generate", counting)
    side = sides.open_side(str(model), tmp_path, sampling, "float32")
    with pytest.raises(KeyboardInterrupt):
        side.answers(["a", "b", "c"], silent)
    again = sides.open_side(str(model), tmp_path, sampling, "float32")
    assert again.missing(["a", "b", "c"]) == 1
    monkeypatch.setattr(sides, "generate", generate)
    assert len(again.answers(["a", "b", "c"], silent)) == 3
    # other settings are other answers
    other = sides.open_side(str(model), tmp_path, Sampling(max_new_tokens=5), "float32")
    assert other.missing(["a", "b", "c"]) == 3


def test_a_prompt_that_is_too_long_is_found_before_any_answer(model, tmp_path):
    side = sides.open_side(str(model), tmp_path, Sampling(max_new_tokens=4), "float32")
    with pytest.raises(ShearlingError, match="longer than the model's 64"):
        side.answers(["a", "b" * 61], silent)
    assert side.missing(["a"]) == 1


def test_a_model_against_itself_ties_and_says_so(stub, model, prompts, tmp_path, capfd):
    output = tmp_path / "j.json"
    run = CliRunner().invoke(
        app,
        [
            str(model),
            str(model),
            "--prompts",
            str(prompts(2)),
            "--endpoint",
            stub.address,
            "--output",
            str(output),
            "--max-new-tokens",
            "3",
        ],
        catch_exceptions=False,
    )
    result = json.loads(output.read_text())
    assert (result["ties"], result["identical"], result["win_rate"]) == (2, 2, 0.5)
    assert "are the same" in run.stderr
    assert stub.requests == []


def test_repeated_prompts_are_judged_once(stub, answers, tmp_path):
    (tmp_path / "p.txt").write_text("p0\np0\n")
    a, b = answers("a", "long"), answers("b", "s")
    run = CliRunner().invoke(
        app,
        [
            str(a),
            str(b),
            "--prompts",
            str(tmp_path / "p.txt"),
            "--endpoint",
            stub.address,
            "--output",
            str(tmp_path / "j.json"),
            "--json",
        ],
    )
    assert json.loads(run.stdout)["prompts"] == 1
    assert "1 prompts of" in run.stderr
