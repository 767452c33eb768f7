"""Every command that README and docs show is one the program takes, and most are run: tiny."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from transformers import MixtralConfig, MixtralForCausalLM

from doc_commands import GROUP, PAGES, ROOT, SCRIPTS, STAYS, Shown, every_command, ways
from every_command import Inputs, run
from shearling.recipes.read import read_recipe
from tiny_tokenizer import CHAT, VOCAB, byte_tokenizer

COMMANDS, WAYS = every_command(), ways()
# What a tiny model can do in place of what is shown: the last of an option counts.
SMALLER: dict[str, tuple[str, ...]] = {
    "score": ("--samples", "5", "--length", "16"),
    "prune": ("--samples", "5", "--length", "16", "--written", "2"),
    "eval": ("--window", "16", "--max-windows", "2", "--max-new-tokens", "4"),
    "compare": ("--window", "16", "--max-windows", "2", "--no-bench"),
    "bench": ("--batch", "1", "--prompt", "4", "--new", "2", "--repeats", "1"),
    "pack": ("--length", "24", "--held-out", "0.2", "--workers", "1"),
    "heal": ("--tokens", "200", "batch=2", "eval_sequences=1", "warmup=0"),
    "learn": ("--tokens", "200", "batch=2", "eval_sequences=1", "samples=4", "sample_length=16"),
    "write": ("--tokens", "40", "--length", "20"),
    "run": ("--dry-run",),
}
# Options that hold what a command reads, by what has to lie there.
MODELS = ("model", "models", "teacher", "tokenizer", "source")
TEXTS = ("calibration", "text", "begin_from", "files")
STORES = ("data", "store")
RECIPE = """{{shearling: 1, source: {model}, data: {{text: {text}, length: 24}},
target: {{params: 0.9x}}, heal: {{tokens: 200}}}}"""
SUITE = "texts: [{file: text.jsonl, window: 16, max_windows: 2}]"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"), layers=3, positions=1024, template=CHAT)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixture") / "mixture"
    config = MixtralConfig(
        hidden_size=36, num_attention_heads=9, num_key_value_heads=3, head_dim=4, vocab_size=VOCAB,
        intermediate_size=20, num_hidden_layers=3, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64, initializer_range=0.3, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_commands_are_shown_on_many_pages() -> None:
    assert len({shown.page for shown in COMMANDS}) > 15
    assert {shown.name for shown in COMMANDS} == set(GROUP.commands) - {
        "demo",
        "teach",
        "reference",
    }
    assert all(any(is_so(shown) for shown in COMMANDS) for is_so in STAYS.values())


@pytest.mark.parametrize("shown", COMMANDS, ids=lambda one: f"{one.page}: {one.name}")
def test_a_command_that_is_shown_is_one(shown: Shown) -> None:
    """Options it has, values of their types, and keys that a recipe or a training knows."""
    params = shown.parsed()
    if shown.name == "heal":
        from shearling.train.options import parse

        parse(params["recipe"], 10**6, params["settings"] or [])
    if shown.name == "run" and not params["recipe"].endswith(".yaml"):
        read_recipe(params["recipe"], params["settings"] or [])


@pytest.mark.parametrize("shown", WAYS, ids=lambda one: " ".join(one.way))
def test_a_command_that_is_shown_runs(
    shown: Shown, inputs: Inputs, mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for every way to call it, on a tiny model that bears the name that is shown."""
    monkeypatch.chdir(tmp_path)
    shown = Shown(shown.page, shown.name, tuple(small(one) for one in shown.arguments))
    experts = shown.page.endswith("experts.md")
    prepare(shown, inputs, mixture if experts else inputs.plain)
    run(shown.name, *shown.arguments, *resized(shown))
    if "--dry-run" not in (*shown.arguments, *SMALLER.get(shown.name, ())):
        output = shown.parsed()["output"] if "--output" in shown.arguments else None
        assert output is None or Path(output).exists()


def small(argument: str) -> str:
    """An argument as a tiny model can take it: no shell's variables, no root, fewer units."""
    argument = argument.replace("$shape", "layers=2,mlp=40").replace("$", "").removeprefix("/")
    argument = re.sub(r"^batch=\d+$", "batch=2", argument)
    argument = re.sub(r"layers=\d+(,hidden=\d+,heads=\d+)?,mlp=\d+", "layers=2,mlp=40", argument)
    argument = re.sub(r"^layers=\d+$", "layers=2", argument)
    return re.sub(r"^experts=\d+$", "experts=3", argument)


def resized(shown: Shown) -> list[str]:
    """What makes a command small, unless it says so itself."""
    params, more = shown.parsed(), list(SMALLER.get(shown.name, ()))
    if params.get("layers"):
        more += ["--layers", "2"]
    if params.get("suite"):  # abilities take seconds, and have tests of their own
        more += ["--suite", "mine.yaml"]
    given = {one.split("=")[0] for one in shown.arguments if "=" in one}
    return [one for one in more if "=" not in one or one.split("=")[0] not in given]


def prepare(shown: Shown, inputs: Inputs, model: Path) -> None:
    """Lay out what a command reads, under the names by which it does."""
    params = shown.parsed()
    Path("text.jsonl").symlink_to(inputs.text)
    if shown.name == "run":
        Path("recipe.yaml").write_text(RECIPE.format(model=model, text=inputs.text))
    Path("mine.yaml").write_text(SUITE)
    Path("scores.json").write_text(
        json.dumps({"criterion": "c", "axis": "layers", "scores": [1.0, 2.0, 3.0]})
    )
    for kind, source in ((MODELS, model), (TEXTS, inputs.text), (STORES, inputs.store)):
        for value in (value for name in kind for value in listed(params.get(name))):
            named = re.fullmatch(r"(?:\w+=)?(.*?)(?::[\d.]+)?", value)  # NAME=PATH:SHARE
            assert named is not None
            place = Path(named[1].replace("*", "a"))
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.suffix == ".zst":
                with pyarrow.CompressedOutputStream(str(place), "zstd") as file:
                    file.write(inputs.text.read_bytes())
            elif place.suffix == "" and source == inputs.text and not place.exists():
                place.mkdir()
                (place / "text.jsonl").symlink_to(source)
            elif not place.exists():
                place.symlink_to(source)
    if shown.name == "report":
        run("eval", inputs.plain, "--text", inputs.text, "--window", 16, "--max-windows", 2,
            "--output", "run/plain.results")  # fmt: skip


def listed(value: Any) -> list[str]:
    """A value, or each of several, as text."""
    values = value if isinstance(value, list | tuple) else [value]
    return [str(one) for one in values if one is not None]


# --- what is no command of ours ------------------------------------------------------------------


def code(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", *SCRIPTS], ids=lambda p: p.name)
def test_targets_scripts_and_extras_that_are_named_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"^(?: {4})?make ([a-z]+)\b", code(page), re.MULTILINE):
        assert target in targets, target
    for script, options in re.findall(r"python (benchmarks/\S+\.py)(.*)", code(page)):
        source = (ROOT / script).read_text()
        for option in re.findall(r"(--[a-z][a-z-]+)", options.split("  #")[0].split("`")[0]):
            assert f'"{option}"' in source, f"{script} {option}"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for named in re.findall(r"pip install (?:-e )?'(?:shearling|\.)\[([a-z,]+)\]'", code(page)):
        assert set(named.split(",")) <= set(extras), named
