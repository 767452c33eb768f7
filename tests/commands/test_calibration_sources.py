"""``--calibration`` several times, and ``--written-from``, as users give them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import shearling
from shearling import cli
from shearling.errors import ShearlingError
from shearling.pruning.prune import Running, Size, prune
from shearling.recipes.plan import plan_recipe
from shearling.recipes.read import read_recipe
from shearling.recipes.stage import Given, Stage
from shearling.recipes.work import StageWork, prune_model
from tiny_tokenizer import CHAT, write_llama


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    write_llama(root / "model", layers=4, template=CHAT)
    write_llama(root / "base", layers=4)
    texts = [{"text": f"{n} sheep in the fell, {n * n} in the pen. " * 3} for n in range(30)]
    answer = {"role": "assistant", "content": "a lamb " * 9}
    talks = [
        {"messages": [{"role": "user", "content": f"{n} ewes?"}, answer]} for n in range(1, 30)
    ]
    for name, lines in (("web", texts), ("talks", talks)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return root


def run(*arguments: Any) -> Any:
    found = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if found.exception is not None:
        raise found.exception
    return json.loads(found.stdout)


def values(stage: Stage) -> tuple[str, ...]:
    """The calibration text that a stage is made from."""
    (given,) = stage.inputs["calibration"]
    assert isinstance(given, Given)
    return given.values


FEW = ("--samples", 8, "--length", 64, "--json")


def test_score_tells_its_sources(here: Path) -> None:
    both = ("--calibration", f"web={here / 'web.jsonl'}:0.75",
            "--calibration", f"chat={here / 'talks.jsonl'}:0.25")  # fmt: skip
    found = run("score", here / "model", "--by", "perplexity", *both, *FEW)
    assert found["calibration"] == {
        "sources": [
            {"name": "web", "file": "web.jsonl", "share": 0.75, "windows": 6},
            {"name": "chat", "file": "talks.jsonl", "share": 0.25, "windows": 2},
        ],
        "samples": 8, "length": 64, "seed": 0, "bos": False,
    }  # fmt: skip


def test_one_named_source_scores_as_the_file_does(here: Path) -> None:
    plain, named = (
        run("score", here / "model", "--by", "perplexity", "--calibration", given, *FEW)
        for given in (here / "web.jsonl", f"web={here / 'web.jsonl'}")
    )
    assert plain["scores"] == named["scores"]
    assert plain["calibration"]["file"] == "web.jsonl"
    assert named["calibration"]["sources"][0]["windows"] == 8


def test_prune_as_a_command_an_api_and_a_recipe(here: Path, tmp_path: Path) -> None:
    """All three take the same, and make the same model."""
    specs = [f"web={here / 'web.jsonl'}:0.6", f"chat={here / 'talks.jsonl'}:0.4"]
    given = [part for spec in specs for part in ("--calibration", spec)]
    manifest = run(
        "prune", here / "model", "--shape", "layers=3", *given, "--written-from", "both",
        "--output", tmp_path / "command", *FEW,
    )  # fmt: skip
    told = manifest["options"]["calibration"]
    assert told["written_from"] == "both"
    assert [one["name"] for one in manifest["options"]["repair"]["sources"]] == ["web", "chat"]
    sources = (
        shearling.TextSource(here / "web.jsonl", "web", 0.6),
        shearling.TextSource(here / "talks.jsonl", "chat", 0.4),
    )
    text = shearling.CalibrationText(sources=sources, samples=8, length=64, written_from="both")
    source = shearling.Checkpoint.open(here / "model")
    made = prune(
        source, tmp_path / "api", Size(shape="layers=3"), calibration=text,
        running=Running(notify=lambda sentence: None),
    )  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"shearling: 1\nsource: {here / 'model'}\n"
        f"data: {{text: {here / 'web.jsonl'}, calibration: "
        f"{{web: '{here / 'web.jsonl'}:0.6', chat: '{here / 'talks.jsonl'}:0.4'}}}}\n"
        "target: {shape: {layers: 3}}\n"
        "method: {samples: 8, length: 64, written_from: both}\n"
        "evaluate: null\nreport: null\n"
    )
    stages = plan_recipe(read_recipe(str(recipe)))
    (stage,) = (one for one in stages if one.kind.name == "prune")
    assert stage.options["text"]["shares"] == [0.6, 0.4]
    inputs = {
        "model": (str(here / "model"),),
        "calibration": values(stage),
    }
    prune_model(StageWork(tmp_path / "stage", inputs, stage.told, device="cpu"))
    fingerprints = {
        shearling.Checkpoint.open(tmp_path / n).fingerprint for n in ("command", "stage")
    }
    assert fingerprints == {made.fingerprint}


def test_a_recipe_with_one_file_is_what_it_was(here: Path, tmp_path: Path) -> None:
    """No new option in what a stage is told: a run that is there is not made anew."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"shearling: 1\nsource: {here / 'model'}\ndata: {{text: {here / 'web.jsonl'}, "
        f"calibration: {here / 'web.jsonl'}}}\ntarget: {{layers: 3}}\n"
    )
    (stage,) = (one for one in plan_recipe(read_recipe(str(recipe))) if one.kind.name == "prune")
    assert set(stage.options["text"]) == {"length", "seed", "bos", "samples", "copies", "written"}
    assert values(stage) == (str(here / "web.jsonl"),)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("model", ["web=web.jsonl:0.9", "chat=talks.jsonl:0.3"], "sum to 1.2 .0.9 . 0.3."),
        ("model", ["web=web.jsonl:0.99", "chat=talks.jsonl:0.01"], "--samples 100 or more"),
        ("model", ["web=web.jsonl", "web=talks.jsonl"], "two calibration sources are called 'web'"),
        ("model", ["web=web.jsonl", "chat=nothing.jsonl"], "There is no text at nothing.jsonl"),
        ("base", ["talks.jsonl"], "Line 1 of talks.jsonl is a conversation, .* no chat template"),
        ("base", ["web.jsonl", "--written-from", "both"], "its tokenizer has none; take"),
        ("model", ["web.jsonl", "--written-from", "chat"], "one of text, template, both"),
    ],
)  # fmt: skip
def test_what_is_refused(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    model: str, options: list[str], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(here)
    more = options[options.index("--written-from") :] if "--written-from" in options else []
    given = [part for one in options[: len(options) - len(more)] for part in ("--calibration", one)]
    with pytest.raises(ShearlingError, match=said):
        run("prune", model, "--layers", 3, *given, *more, "--output", tmp_path / "out", *FEW)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("model", ["web=web.jsonl:0.99", "chat=talks.jsonl:0.01"], "--samples 100 or more"),
        ("base", ["talks.jsonl"], "Line 1 of talks.jsonl is a conversation, .* no chat template"),
        ("base", ["a=web.jsonl", "b=talks.jsonl"], "calibration source b: Line 1 of talks.jsonl"),
        ("base", ["web.jsonl", "--written-from", "both"], "its tokenizer has none; take"),
        ("model", ["empty.jsonl"], "empty.jsonl holds no text"),
    ],
)  # fmt: skip
def test_it_is_refused_in_a_dry_run_and_before_anything_is_timed(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    model: str, options: list[str], said: str,
) -> None:  # fmt: skip
    from shearling.targets import timing

    monkeypatch.chdir(here)
    monkeypatch.setattr(timing, "EngineTimer", lambda *_: pytest.fail("shapes were timed"))
    (here / "empty.jsonl").write_text("\n")
    more = options[options.index("--written-from") :] if "--written-from" in options else []
    files = options[: len(options) - len(more)]
    given = [part for one in files for part in ("--calibration", one)]
    asked = ("prune", model, *given, *more, "--output", tmp_path / "out", *FEW)
    with pytest.raises(ShearlingError, match=said):
        run(*asked, "--layers", 3, "--dry-run")
    with pytest.raises(ShearlingError, match=said):
        run(*asked, "--speed", "1.2x")


def test_a_recipe_is_refused_before_its_first_stage(here: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for text, said in (("talks", "no chat template"), ("nothing", "holds no text")):
        (here / "nothing.txt").write_text(" ")
        file = here / ("talks.jsonl" if text == "talks" else "nothing.txt")
        recipe.write_text(
            f"{{shearling: 1, source: {here / 'base'}, target: {{layers: 3}}, "
            f"data: {{text: {here / 'web.jsonl'}, calibration: {file}}}}}"
        )
        with pytest.raises(ShearlingError, match=said):
            plan_recipe(read_recipe(str(recipe)))


def test_the_api_wants_a_file_or_sources(here: Path) -> None:
    with pytest.raises(ShearlingError, match="a file or several sources; give one of the two"):
        shearling.CalibrationText()
    with pytest.raises(ShearlingError, match="a file or several sources"):
        shearling.CalibrationText(file=here / "web.jsonl", sources=(shearling.TextSource(here),))


def test_a_vocabulary_is_chosen_by_all_sources(here: Path) -> None:
    from shearling.repair.calibration import Calibration

    model = shearling.Checkpoint.open(here / "model")
    sources = tuple(shearling.TextSource(here / f"{n}.jsonl", n, 0.5) for n in ("web", "talks"))
    texts = Calibration(sources).documents(model)
    assert len(texts) == 59
    assert texts[-1] == "<user>29 ewes?<assistant>" + ("a lamb " * 9).rstrip()
