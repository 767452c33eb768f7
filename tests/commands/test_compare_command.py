"""``shearling compare`` as a user runs it: what it finds, measures, writes and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import shearling.evaluate.benchmark
from shearling.commands.compare import compare
from shearling.errors import ShearlingError
from tiny_tokenizer import write_llama

app = typer.Typer()
app.command()(compare)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a text and a suite."""
    root = tmp_path_factory.mktemp("compare")
    write_llama(root / "large", layers=3)
    write_llama(root / "small", layers=2)
    (root / "fell.txt").write_text("The sheep went up the fell, and the dog went after. " * 20)
    (root / "mine.yaml").write_text(
        "texts: [{file: fell.txt, window: 16, max_windows: 3}]\n"
        "degeneration: {file: fell.txt, prompts: 2, prompt_tokens: 8, new_tokens: 8}\n"
    )
    return root


@pytest.fixture
def run(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run on both models; returns what ``--json`` printed."""

    def command(*more: Any, models: tuple[str, ...] = ("large", "small")) -> Any:
        arguments = [*(place / model for model in models), "--output", tmp_path / "page.html"]
        capsys.readouterr()
        app([str(one) for one in (*arguments, *more, "--json")], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    return command


def text_options(place: Path) -> tuple[Any, ...]:
    return ("--text", place / "fell.txt", "--window", 16, "--max-windows", 4)


def test_nothing_asked_for_is_a_page_of_what_there_is(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    found = run()
    assert found["measured"] == 0
    assert found["pick"] is None
    assert found["baseline"] == "large"
    assert "No verdict yet" in (tmp_path / "page.html").read_text()
    assert not (tmp_path / "page.results").exists()


def test_what_is_missing_is_measured_once(
    run: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    options = (*text_options(place), "--prompt", "The sheep", "--max-new-tokens", 4)
    planned = run(*options, "--dry-run")["jobs"]
    assert [(one["model"], one["kind"]) for one in planned] == [
        ("large", "evaluation"), ("large", "generations"),
        ("small", "evaluation"), ("small", "generations"),
    ]  # fmt: skip
    assert not (tmp_path / "page.html").exists()
    assert not (tmp_path / "page.results").exists()
    found = run(*options)
    assert found["measured"] == 4
    assert all(Path(one["file"]).is_file() for one in planned)
    assert [set(one["figures"]) for one in found["models"]] == [
        {"size on disk", "perplexity on fell"}
    ] * 2
    page = (tmp_path / "page.html").read_text()
    assert "Perplexity on fell" in page
    assert page.count('class="said"') == 2
    again = run(*options)
    assert again["measured"] == 0
    assert again["models"] == found["models"]
    assert (tmp_path / "page.html").read_text() == page
    # a prompt more is continued alone
    more = run(*options, "--prompt", "The dog", "--dry-run")["jobs"]
    assert [one["what"] for one in more] == ["1 prompts continued by up to 4 tokens"] * 2
    # and all anew in another type
    options = ("--prompt", "The sheep", "--max-new-tokens", 4, "--dtype", "bfloat16", "--dry-run")
    assert [one["kind"] for one in run(*options)["jobs"]] == ["generations"] * 2
    # another text of the same name is another text
    (tmp_path / "fell.txt").write_text("Rain fell on the fell. " * 30)
    other = run("--text", tmp_path / "fell.txt", "--window", 16, "--dry-run")["jobs"]
    assert [one["kind"] for one in other] == ["evaluation"] * 2


def test_abilities_are_measured_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from shearling.evaluate.abilities import measure

    monkeypatch.setattr(measure, "ABILITIES", measure.ABILITIES[3:5])
    models = [write_llama(tmp_path / f"llama-{n}", layers=n, positions=256) for n in (2, 1)]

    def run(*more: Any) -> Any:
        arguments = [*models, "--suite", "abilities", "--limit", 2, *more, "--json"]
        capsys.readouterr()
        app([str(one) for one in arguments], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    first = run("--output", tmp_path / "page.html")
    assert first["measured"] == 2
    assert first["deciding"] == ["share of abilities left"]
    before, after = first["models"]
    assert before["figures"]["share of abilities left"] == 1.0
    assert list(before["abilities"]) == []
    assert set(after["abilities"]) == {"sums", "differences", "free writing"}
    page = (tmp_path / "page.html").read_text()
    assert "of the source’s abilities are left on average" in page
    assert run("--output", tmp_path / "page.html")["measured"] == 0
    # as well where others measured it, and not with other items
    elsewhere = ("--results", tmp_path / "page.results", "--output", tmp_path / "other.html")
    assert run(*elsewhere)["measured"] == 0
    assert len(run(*elsewhere, "--seed", 3, "--dry-run")["jobs"]) == 2


def test_a_run_that_was_stopped_goes_on(
    run: Callable[..., Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shearling.evaluate.measure

    measured = shearling.evaluate.measure.evaluate_text

    def stops(subject: Any, *arguments: Any, **options: Any) -> Any:
        if subject.name == "small":
            raise RuntimeError("the power went")
        return measured(subject, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(shearling.evaluate.measure, "evaluate_text", stops)
        with pytest.raises(RuntimeError, match="the power went"):
            run(*text_options(place))
    left = run(*text_options(place), "--dry-run")["jobs"]
    assert [one["model"] for one in left] == ["small"]


def test_results_that_others_wrote_are_found(
    run: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    first = run(*text_options(place))
    (tmp_path / "page.results").rename(tmp_path / "elsewhere")
    options = (*text_options(place), "--results", tmp_path / "elsewhere")
    found = run(*options)
    assert found["measured"] == 0
    assert found["models"] == first["models"]
    # with all of the text: as many tokens as every other model was read on
    whole = ("--text", place / "fell.txt", "--window", 16, "--results", tmp_path / "elsewhere")
    assert run(*whole, "--dry-run")["jobs"] == []
    assert len(run(*whole, "--max-windows", 5, "--dry-run")["jobs"]) == 2


def test_a_suite(run: Callable[..., Any], place: Path) -> None:
    planned = run("--suite", place / "mine.yaml", "--dry-run")["jobs"]
    assert [one["kind"] for one in planned] == ["evaluation", "degeneration"] * 2
    assert run("--suite", place / "mine.yaml")["measured"] == 4
    assert run("--suite", place / "mine.yaml")["measured"] == 0


def test_all_are_timed_together(
    run: Callable[..., Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shearling.model.checkpoint import Checkpoint
    from shearling.model.manifest import identity

    def timed(models: list[str], workload: Any, **_: Any) -> dict[str, Any]:
        spread = {"median": 9.0, "min": 8.9, "max": 9.1}
        runs = [
            {"model": identity(Checkpoint.open(model)), "batch": batch, "engine": "transformers"}
            | {"prompt": workload.prompts[0], "new": workload.news[0], "repeats": 3}
            | {"prefill_tokens_per_s": spread, "decode_tokens_per_s": spread}
            for model in models
            for batch in workload.batches
        ]
        machine: dict[str, Any] = {"cpu": "a", "threads": workload.threads}
        machine |= {"dtype": workload.dtype, "device": workload.device}
        return {"kind": "bench", "created": "2026-11-22", "machine": machine, "runs": runs}

    monkeypatch.setattr(shearling.evaluate.benchmark, "bench_models", timed)
    found = run("--bench", "--threads", 1)
    assert found["measured"] == 1
    assert found["fastest"] == "large"  # as fast as the other, and the first
    assert run("--bench", "--threads", 1)["measured"] == 0
    for other in (("--batch", "1,2"), ("--threads", 2), ("--dtype", "bfloat16")):
        planned = run("--bench", "--threads", 1, *other, "--dry-run")["jobs"]
        assert [one["kind"] for one in planned] == ["bench"], other


def test_another_baseline(run: Callable[..., Any], place: Path) -> None:
    assert run("--baseline", "small")["baseline"] == "small"
    assert run("--baseline", place / "small")["models"][0]["name"] == "small"
    with pytest.raises(ShearlingError, match="--baseline other is none of the models given"):
        run("--baseline", "other")


def test_the_same_model_twice(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr("shearling.commands.compare.warn", warned.append)
    assert len(run(models=("large", "small", "large"))["models"]) == 2
    assert warned == []  # the very same words: nothing to tell
    assert len(run(models=("large", "../" + "compare0" + "/large"))["models"]) == 1
    assert "is the same model as" in warned[0]


def test_prompts_from_a_file(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "One"}\n\n{"prompt": "Two\\nlines"}\n')
    (tmp_path / "prompts.txt").write_text("One\nTwo\nThree\n")
    for name, count in (("prompts.jsonl", 2), ("prompts.txt", 3)):
        jobs = run("--prompts", tmp_path / name, "--dry-run")["jobs"]
        assert {one["what"] for one in jobs} == {f"{count} prompts continued by up to 64 tokens"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompts", "empty.txt"), r"empty\.txt is empty; give a prompt a line"),
        (("--prompts", "bad.jsonl"), "entry 2 has no text in a field 'prompt'"),
        (("--prompts", "none.txt"), r"none\.txt cannot be read"),
        (("--text", "none.txt"), "--text .*none.txt is not there"),
        (("--results", "none"), "--results .*none is not a directory"),
        (("--suite", "nonesuch"), "--suite nonesuch is neither built in"),
        (("--bench", "--batch", "one"), "--batch 'one' was given"),
    ],
)
def test_what_cannot_be_used_is_said(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    Path("bad.jsonl").write_text('{"prompt": "One"}\n{"text": "Two"}\n')
    with pytest.raises(ShearlingError, match=message):
        run(*options)


def test_a_damaged_result_is_named(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "page.results").mkdir()
    (tmp_path / "page.results/evaluation-x.json").write_text("{")
    with pytest.raises(ShearlingError, match=r"evaluation-x\.json is not whole JSON"):
        run()
    assert not (tmp_path / "page.html").exists()
