from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from judge_stub import longer, shown
from shearling.errors import ShearlingError
from shearling.evaluate.generation import Sampling
from shearling.judge.endpoint import Judge
from shearling.judge.prompts import read_prompts
from shearling.judge.run import VERDICTS, Match, run
from shearling.judge.sides import open_side

SAMPLING = Sampling(max_new_tokens=5)


def judged(a, b, prompts, stub, folder, *, model: str | None = "stub-judge", retries=2) -> dict:
    sides = [open_side(str(side), folder, SAMPLING, "float32") for side in (a, b)]
    judge = Judge(stub.address, model, retries=retries)
    match = Match(*sides, read_prompts(prompts), SAMPLING, folder)
    return run(match, judge, concurrency=3)


def kept(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / VERDICTS).read_text().splitlines()]


def test_both_orders_are_asked_and_counted(stub, answers, prompts, tmp_path):
    a = answers("a", "long answer", "x", "same", "ab", "12")
    b = answers("b", "short", "much longer", "same", "longer", "34")
    result = judged(a, b, prompts(5), stub, tmp_path / "k")
    counts = {k: result[k] for k in ("prompts", "wins", "ties", "losses", "unreadable")}
    assert counts == {"prompts": 5, "wins": 1, "ties": 2, "losses": 2, "unreadable": 0}
    assert (result["identical"], result["first_preferred"]) == (1, 0.5)
    assert result["win_rate"] == pytest.approx(0.4)
    assert result["interval"][0] < 0.4 < result["interval"][1]
    assert result["kind"] == "judgement"
    assert (result["judge"], result["endpoint"]) == ("stub-judge", "127.0.0.1")
    assert (result["a"]["name"], result["b"]["name"]) == ("a", "b")
    # identical answers are not shown to the judge; all others are, both ways round
    pairs = {shown(asked) for asked in stub.requests}
    assert len(stub.requests) == len(pairs) == 8
    assert {(prompt, second, first) for prompt, first, second in pairs} == pairs
    assert {asked["model"] for asked in stub.requests} == {"stub-judge"}
    assert {asked["temperature"] for asked in stub.requests} == {0}
    assert {(line["prompt"], line["order"]) for line in kept(tmp_path / "k")} == {
        (f"p{i}", order) for i in (0, 1, 3, 4) for order in ("AB", "BA")
    }


def test_swapping_the_sides_mirrors_the_result(stub, answers, prompts, tmp_path):
    a, b = answers("a", "long answer", "x", "ab"), answers("b", "short", "longer", "abc")
    one = judged(a, b, prompts(3), stub, tmp_path / "k")
    other = judged(b, a, prompts(3), stub, tmp_path / "k")
    assert (one["wins"], one["losses"]) == (other["losses"], other["wins"]) == (1, 2)
    assert one["interval"] == pytest.approx([1 - bound for bound in other["interval"][::-1]])


def test_a_judge_that_likes_the_first_answer_gives_ties(stub, answers, prompts, tmp_path):
    stub.judge = lambda *_: "Verdict: A"
    result = judged(answers("a", "1", "2"), answers("b", "3", "4"), prompts(2), stub, tmp_path)
    assert (result["wins"], result["ties"], result["losses"]) == (0, 2, 0)
    assert (result["win_rate"], result["first_preferred"]) == (0.5, 1.0)


def test_unreadable_verdicts_are_counted_not_guessed(stub, answers, prompts, tmp_path):
    stub.judge = lambda prompt, *texts: (
        "Who could say?" if prompt == "p0" and texts[0] == "xx" else longer(prompt, *texts)
    )
    a, b = answers("a", "xx", "yyy"), answers("b", "x", "y")
    result = judged(a, b, prompts(2), stub, tmp_path)
    assert (result["unreadable"], result["unreadable_verdicts"], result["wins"]) == (1, 1, 1)
    assert result["win_rate"] == 1.0
    assert [line["reply"] for line in kept(tmp_path) if line["verdict"] is None] == [
        "Who could say?"
    ]


def test_faults_that_pass_are_tried_again(stub, answers, prompts, tmp_path):
    faults = iter([429, 500])
    stub.judge = lambda *shown: next(faults, None) or longer(*shown)
    result = judged(answers("a", "long"), answers("b", "s"), prompts(1), stub, tmp_path)
    assert result["wins"] == 1
    assert len(stub.requests) == 4
    assert sum(count > 0 for count in stub.retries) == 2


def test_a_rerun_asks_only_what_is_missing(stub, answers, prompts, tmp_path):
    a = answers("a", *("a" * (i + 2) for i in range(6)))
    b = answers("b", *("b" for _ in range(6)))
    stub.judge = lambda prompt, *texts: 500 if prompt == "p3" else longer(prompt, *texts)
    folder = tmp_path / "k"
    with pytest.raises(ShearlingError) as failed:
        judged(a, b, prompts(6), stub, folder, retries=1)
    done = len(kept(folder))
    assert f"{done} of 12 verdicts are kept in {folder / VERDICTS}" in str(failed.value)
    assert "run the same command again" in str(failed.value)
    stub.judge = longer
    stub.requests.clear()
    result = judged(a, b, prompts(6), stub, folder)
    assert len(stub.requests) == 12 - done > 0
    assert result["wins"] == 6
    stub.requests.clear()
    again = judged(a, b, prompts(6), stub, folder)
    assert stub.requests == []
    assert again["win_rate"] == result["win_rate"] == 1.0
    # another answer is another question
    judged(answers("c", *"cccccc"), b, prompts(6), stub, folder)
    assert len(stub.requests) == 12


def test_what_will_not_pass_is_not_tried_again(stub, answers, prompts, tmp_path):
    stub.judge = lambda *_: 401
    with pytest.raises(ShearlingError, match=r"failed \(.*401.*0 of 2 verdicts"):
        judged(answers("a", "1"), answers("b", "2"), prompts(1), stub, tmp_path)
    assert not any(stub.retries)


def test_the_key_is_never_written(stub, answers, prompts, tmp_path, monkeypatch):
    key = "sk-very-secret"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    stub.judge = lambda *_: "You sent $KEY.\nVerdict: A"
    folder = tmp_path / "k"
    result = judged(answers("a", "1"), answers("b", "2"), prompts(1), stub, folder)
    assert kept(folder)[0]["reply"].startswith("You sent Bearer ***")  # so it was sent
    stub.judge = lambda *_: 403
    with pytest.raises(ShearlingError, match=r"Bearer \*\*\*") as failed:
        judged(answers("c", "3"), answers("b", "2"), prompts(1), stub, folder)
    written = "".join(file.read_text() for file in folder.iterdir())
    assert key not in json.dumps(result) + str(failed.value) + written


def test_a_temperature_that_is_refused_is_left_out(stub, answers, prompts, tmp_path):
    stub.refuses_temperature = True
    result = judged(answers("a", "long"), answers("b", "s"), prompts(1), stub, tmp_path)
    assert (result["wins"], result["judge_options"]) == (1, {})


def test_the_only_model_of_an_endpoint_is_the_judge(stub, answers, prompts, tmp_path):
    a, b = answers("a", "long"), answers("b", "s")
    assert judged(a, b, prompts(1), stub, tmp_path, model=None)["judge"] == "stub-judge"
    stub.models = ["one", "two"]
    with pytest.raises(ShearlingError, match=r"has 2 models \(one, two\); name the judge"):
        judged(a, b, prompts(1), stub, tmp_path, model=None)


def test_an_endpoint_that_is_not_there(stub, answers, prompts, tmp_path):
    stub.close()
    with pytest.raises(ShearlingError, match=r"127\.0\.0\.1 failed \(it cannot be reached"):
        judged(answers("a", "1"), answers("b", "2"), prompts(1), stub, tmp_path, retries=0)


def test_a_key_is_needed_beyond_loopback(stub):
    with pytest.raises(ShearlingError, match=r"judge\.example wants a key, but .* MY_KEY is empty"):
        Judge("https://judge.example/v1", "m", key_env="MY_KEY")
    with pytest.raises(ShearlingError, match="ftp://x is no address"):
        Judge("ftp://x", "m")


def test_a_file_that_lacks_an_answer(stub, answers, prompts, tmp_path):
    with pytest.raises(ShearlingError, match=r"b\.jsonl has no answer to the prompt 'p1'"):
        judged(answers("a", "1", "2"), answers("b", "1"), prompts(2), stub, tmp_path)
    assert stub.requests == []
