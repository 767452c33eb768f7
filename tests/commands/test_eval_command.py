"""``shearling eval``: texts, tasks and repetition, of one model and of several."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from shearling.commands.eval import evaluate
from shearling.errors import ShearlingError
from shearling.evaluate.tasks.lines import told_apart
from shearling.model import memory
from tiny_tokenizer import write_llama

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("eval")
    for layers in (2, 1):
        write_llama(path / f"llama-{layers}", layers=layers)
    texts = [
        {"text": f"{i} sheep, and {i * i} shepherds watch them by night. " * 2} for i in range(9)
    ]
    (path / "sheep.jsonl").write_text("\n".join(map(json.dumps, texts)))
    rows = [
        {"question": f"{i}?", "choices": ["ram", "ewe", "a lamb"], "label": i % 3}
        for i in range(12)
    ]
    (path / "flock.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "mine.yaml").write_text(
        "texts: [{file: sheep.jsonl, window: 16, max_windows: 3}]\n"
        "tasks: [{file: flock.jsonl, metric: acc}]\n"
        "degeneration: {file: sheep.jsonl, prompts: 2, prompt_tokens: 5, new_tokens: 9}\n"
    )
    return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path / "cache"))
    app = typer.Typer()
    app.command()(evaluate)

    def command(*arguments: object) -> Any:
        found = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if isinstance(found.exception, ShearlingError):
            raise found.exception
        assert found.exit_code == 0, found.output + repr(found.exception)
        return SimpleNamespace(out=found.stdout, err=found.stderr)

    return command


def test_a_lone_text_is_one_evaluation(run: Run, place: Path, tmp_path: Path) -> None:
    common = (place / "llama-2", "--text", place / "sheep.jsonl", "--window", 16)
    found = json.loads(
        run(*common, "--max-windows", 2, "--prompt", "A ram", "--max-new-tokens", 3, "--json",
            "--output", tmp_path / "out").out
    )  # fmt: skip
    samples = found.pop("generations")
    assert (found["kind"], found["text"], found["windows"]) == ("evaluation", "sheep.jsonl", 2)
    assert [sample["prompt"] for sample in samples["samples"]] == ["A ram"]
    written = {file.name: json.loads(file.read_text()) for file in (tmp_path / "out").iterdir()}
    assert written == {"evaluation-sheep.json": found, "generations.json": samples}


def test_a_suite_on_two_models(run: Run, place: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    models = (place / "llama-2", place / "llama-1")
    arguments = (*models, "--suite", place / "mine.yaml", "--output", tmp_path / "out")
    shown = run(*arguments)
    names = ["degeneration-sheep.json", "evaluation-sheep.json", "tasks-mine.json"]
    files = {
        model.name: {
            f.name: json.loads(f.read_text()) for f in (tmp_path / "out" / model.name).iterdir()
        }
        for model in models
    }
    assert [sorted(found) for found in files.values()] == [names, names]
    for name, found in files.items():
        assert {file["model"]["name"] for file in found.values()} == {name}
        tasks = found["tasks-mine.json"]
        task = tasks["tasks"]["flock"]
        assert (task["samples"], task["primary"], task["limit"]) == (12, "acc", None)
        assert set(task["metrics"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
        assert tasks["average"] == task["metrics"]["acc"]
        assert {"lm_eval", "datasets", "torch", "transformers"} <= set(tasks["versions"])
        assert len(task["prompt_sha256"]) == len(task["data_sha256"]) == 64
        assert found["degeneration-sheep.json"]["new_tokens"] == 9
    for part in ("llama-1:", "perplexity", "flock", "12 questions", "average", "repeated 4-grams"):
        assert part in shown.out
    assert "cache" not in shown.err
    again = run(*arguments, "--json")
    assert "1 of 1 tasks of llama-2 come from the cache" in again.err
    results = json.loads(again.out)["results"]
    assert [(r["model"]["name"], r["kind"]) for r in results[:3]] == [
        ("llama-2", "evaluation"), ("llama-2", "tasks"), ("llama-2", "degeneration"),
    ]  # fmt: skip
    kept = files["llama-2"]["tasks-mine.json"]["tasks"]
    assert results[1]["tasks"] == kept
    alone = run(models[0], "--tasks", place / "flock.jsonl", "--fresh", "--limit", 5, "--json")
    one = json.loads(alone.out)
    assert (one["kind"], one["suite"], one["tasks"]["flock"]["samples"]) == ("tasks", "custom", 5)
    assert "cache" not in alone.err
    # Of 12 questions the first five were asked.
    assert one["tasks"]["flock"]["prompt_sha256"] != kept["flock"]["prompt_sha256"]


def test_a_dry_run_runs_nothing(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setattr("shearling.model.loading.load_model", None)
    arguments = (place / "llama-1", "--suite", place / "mine.yaml", "--dry-run")
    plan = json.loads(run(*arguments, "--json").out)
    assert [task["file"] for task in plan["tasks"]] == [str(place / "flock.jsonl")]
    assert plan["models"][0]["cached"] == []
    assert plan["models"][0]["bytes"] > 4 * 36 * 260
    shown = run(*arguments).out
    for part in ("perplexity on", "task", "repetition in 2", "llama-1: about"):
        assert part in shown
    assert "hub" not in run(place / "llama-1", "--suite", "shortened", "--dry-run").err


def test_abilities_of_two_models(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shearling.evaluate.abilities import measure

    monkeypatch.setattr(measure, "ABILITIES", measure.ABILITIES[2:6])
    models = [
        write_llama(tmp_path / f"llama-{layers}", layers=layers, positions=512) for layers in (2, 1)
    ]
    arguments = (*models, "--suite", "abilities", "--limit", 2, "--output", tmp_path / "out")
    assert "abilities, 2 items of each" in run(*arguments, "--dry-run").out
    shown = run(*arguments)
    assert "ignored" not in shown.err
    files = [json.loads((tmp_path / "out" / m.name / "abilities.json").read_text()) for m in models]
    names = ["looking up", "sums", "differences", "spelling", "free writing"]
    assert [list(file["abilities"]) for file in files] == [names, names]
    assert files[0]["asked_sha256"] == files[1]["asked_sha256"]
    lines = shown.out.splitlines()
    head = lines.index("left of the abilities of llama-2, by likelihood (95 %), the worst first:")
    assert lines.index("llama-2:") < lines.index("llama-1:") < head
    left = [float(line.split("%")[0].split()[-1]) for line in lines[head + 1 : head + 6]]
    assert left == sorted(left)
    assert lines[head + 6].split()[0] == "all"
    seeded = run(models[0], "--suite", "abilities", "--limit", 2, "--seed", 1, "--batch", 3,
                 "--json")  # fmt: skip
    other = json.loads(seeded.out)
    assert (other["kind"], other["seed"]) == ("abilities", 1)
    assert other["asked_sha256"] != files[0]["asked_sha256"]


@pytest.mark.parametrize("prompt", ["One sheep", ""])
def test_a_prompt_alone_is_enough(run: Run, place: Path, prompt: str) -> None:
    """An empty one is continued from BOS."""
    found = run(place / "llama-1", "--prompt", prompt, "--max-new-tokens", 2, "--json")
    result = json.loads(found.out)
    assert result["kind"] == "generations"
    assert [one["prompt"] for one in result["samples"]] == [prompt]


def test_a_served_engine_without_tasks_is_ignored(run: Run, place: Path) -> None:
    found = run(place / "llama-1", "--prompt", "x", "--max-new-tokens", 2, "--engine", "vllm")
    assert "--engine ignored: it is for tasks" in found.err


def test_what_is_ignored_is_said(run: Run, place: Path) -> None:
    found = run(place / "llama-1", "--prompt", "x", "--max-new-tokens", 2, "--text",
                place / "sheep.jsonl", "--window", 16, "--max-windows", 1, "--shots", 2,
                "--limit", 3)  # fmt: skip
    assert "--shots ignored" in found.err
    assert "--limit ignored" in found.err
    assert "--max-new-tokens ignored" not in found.err
    found = run(place / "llama-1", "--text", place / "sheep.jsonl", "--window", 16,
                "--max-windows", 1, "--temperature", 0.7, "--top-p", 0.5, "--max-new-tokens",
                9)  # fmt: skip
    told = "--temperature, --top-p, --max-new-tokens ignored: they are for --prompt and --degen"
    assert told in found.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to measure; give --text FILE, --tasks NAME,…, --suite NAME or --prompt"),
        (("--degeneration",), "--degeneration continues a text"),
        (("--suite", "absent"), "--suite absent is neither built in"),
        (("--suite", "abilities"), "more than the model's 64 positions"),
        (("--text", "{place}/sheep.jsonl", "--dtype", "int3"), "'int3' is not known"),
        (("--text", "{place}/absent.txt"), "There is no text"),
        (("--tasks", "{place}/absent.jsonl"), "There is no task file"),
        (("--tasks", "{place}/sheep.jsonl"), "Line 1 of .* lacks question and choices and label"),
        (("--text", "{place}/sheep.jsonl", "--output", "{place}/mine.yaml"), "is a file"),
    ],
)
def test_refuses(run: Run, place: Path, arguments: tuple[str, ...], message: str) -> None:
    if "--tasks" in arguments:
        pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    with pytest.raises(ShearlingError, match=message):
        run(place / "llama-1", *(argument.format(place=place) for argument in arguments))


def test_a_model_that_does_not_fit_is_refused_with_the_estimate(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SimpleNamespace(available=300_000_000)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: free)
    with pytest.raises(ShearlingError, match=r"-1 needs about 537\.0 MB .* but 300\.0 MB of m"):
        run(place / "llama-1", "--text", place / "sheep.jsonl", "--window", 16)


def test_models_of_one_name_are_told_apart() -> None:
    names = ["m", "m", "n", "m"]
    assert told_apart(names, ["a/b/m", "a/c/m", "n", "x/b/m"]) == ["a/b/m", "a/c/m", "n", "x/b/m"]
    assert told_apart(["m", "m"], ["b/m", "c/m"]) == ["b/m", "c/m"]
    assert told_apart(["m", "m", "m"], ["b/m", "b/m", "c/m"]) == ["b/m (1)", "b/m (2)", "c/m"]
    assert told_apart(["m", "m"], ["m", "m"]) == ["m (1)", "m (2)"]
    assert told_apart(["m", "n"], ["m", "n"]) == ["m", "n"]
