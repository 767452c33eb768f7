"""``shearling reference``: measured, predicted and given losses, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import naive
import shearling.data.store
import shearling.train.reference
from shearling.commands.reference import reference
from shearling.errors import ShearlingError
from shearling.train.reference import Reference
from shearling.train.scaling import Law

LENGTH, VOCAB = 12, 40


class Part:
    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, VOCAB, (9, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = np.asarray(rows)
        return self.ids[chosen], self.ids[chosen].clone()


class Store:
    """Stands for a token store on disk; ``other`` is the name of a model of another tokenizer."""

    length, tokenizer, domains, path = LENGTH, "a" * 64, ("code", "web"), Path("tokens")
    bos = None

    def sequences(self, domain: str, part: str) -> Part:
        assert part == "held_out"
        return Part(self.domains.index(domain))

    def check_tokenizer(self, model_dir: Path, bos: bool | None = None) -> None:
        if model_dir.name == "other":
            raise ShearlingError("that of other differs")

    @staticmethod
    def open(path: Path) -> Store:
        if path != Path("tokens"):
            raise ShearlingError(f"There is no token store at {path}")
        return Store()


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shearling.data.store, "Store", Store)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of four widths, random, and one of the smallest's size with another tokenizer."""
    root = tmp_path_factory.mktemp("family")
    for name, width in (("s", 8), ("m", 16), ("l", 32), ("xl", 64), ("other", 8)):
        torch.manual_seed(width)
        config = LlamaConfig(
            hidden_size=width, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
            intermediate_size=2 * width, num_hidden_layers=2, vocab_size=VOCAB,
            max_position_embeddings=64,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(root / name)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "reference.json"


def run(*arguments: object) -> Any:
    """stdout and stderr of a command that succeeds; what it raises otherwise."""
    app = typer.Typer()
    app.command()(reference)
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


def parameters(path: Path) -> int:
    return sum(p.numel() for p in naive.stock(path).parameters())


def file_of(path: Path, size: int, **losses: float) -> Path:
    Reference(losses, {"method": "measured", "parameters": size}).save(path)
    return path


# --- measured ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequences", [None, 4])
def test_one_model_gives_its_own_losses(
    family: dict[str, Path], output: Path, sequences: int | None
) -> None:
    few = [] if sequences is None else ["--sequences", sequences]
    result = run(family["m"], "--store", "tokens", "--output", output, *few, "--json")
    written = json.loads(output.read_text())
    assert json.loads(result.stdout)["losses"] == written["losses"]
    expected = {
        domain: naive.mean_nll(family["m"], Part(number).ids[: sequences or 9])
        for number, domain in enumerate(Store.domains)
    }
    assert written["losses"] == pytest.approx(expected, rel=2e-6)
    assert written["kind"] == "reference"
    how = written["how"]
    assert how["method"] == "measured"
    assert how["model"]["name"] == "m"
    assert how["parameters"] == parameters(family["m"])
    assert how["sequences"] == dict.fromkeys(Store.domains, sequences or 9)
    assert how["store"] == {"name": "tokens", "tokenizer": Store.tokenizer}
    assert how["length"] == LENGTH
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_a_target_means_nothing_to_one_model(family: dict[str, Path], output: Path) -> None:
    result = run(family["m"], "--store", "tokens", "--target-params", "0.5x", "--output", output)
    assert "--target-params ignored" in result.stderr
    assert "losses of m, " in result.stdout
    assert f"wrote {output}" in result.stdout


# --- by a law ------------------------------------------------------------------------------------


@pytest.fixture
def lawful(monkeypatch: pytest.MonkeyPatch) -> dict[str, Law]:
    """Measured losses that follow laws, whatever the random models say."""
    laws = {"code": Law(5, 0.3, 0.5), "web": Law(9, 0.2, 1.0)}

    def measured(model: Any, store: Any, sequences: int, **_: Any) -> dict[str, float]:
        return {domain: law(model.parameters) for domain, law in laws.items()}

    monkeypatch.setattr(shearling.train.reference, "measure", measured)
    return laws


def test_several_models_give_a_law(
    family: dict[str, Path], output: Path, lawful: dict[str, Law]
) -> None:
    models = [family[name] for name in ("l", "s", "m", "xl")]
    result = run(*models, "--store", "tokens", "--target-params", "0.5x", "--output", output)
    found = Reference.load(output)
    target = parameters(family["l"]) // 2
    assert found.how["target_parameters"] == target
    assert found.losses == pytest.approx({d: law(target) for d, law in lawful.items()}, rel=1e-7)
    assert [point["model"] for point in found.how["points"]] == ["l", "s", "m", "xl"]
    assert f"losses predicted at {target:,} parameters" in result.stdout
    assert "off by at most 0.00%" in result.stdout
    assert "warning" not in result.stderr  # the target lies between s and m


def test_measured_models_are_kept_and_can_be_used_again(
    family: dict[str, Path], output: Path, lawful: dict[str, Law]
) -> None:
    options = ["--target-params", "2k", "--output", output]
    run(family["l"], family["m"], family["xl"], "--store", "tokens", *options)
    first = Reference.load(output)
    files = [output.parent / f"reference-{i}-{n}.json" for i, n in ((1, "l"), (2, "m"), (3, "xl"))]
    assert Reference.load(files[1]).how["parameters"] == parameters(family["m"])
    output.unlink()
    some = [part for file in files[1:] for part in ("--losses", file)]
    run(family["l"], "--store", "tokens", *some, *options)
    assert Reference.load(output).losses == first.losses
    output.unlink()
    result = run("--losses", files[0], *some, *options)
    assert Reference.load(output).losses == first.losses
    assert "2,000 parameters is " in result.stderr
    assert "the law is extrapolated" in result.stderr


def test_a_law_that_does_not_fit_keeps_what_was_measured(
    family: dict[str, Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rising(model: Any, *_: Any, **__: Any) -> dict[str, float]:
        return {"web": model.parameters / 1e4}

    monkeypatch.setattr(shearling.train.reference, "measure", rising)
    with pytest.raises(ShearlingError, match="losses in web do not fall"):
        run(
            family["s"], family["m"], "--store", "tokens", "--target-params", "0.5x",
            "--output", output,
        )  # fmt: skip
    assert not output.exists()
    assert len(list(output.parent.glob("reference-*.json"))) == 2


# --- given ---------------------------------------------------------------------------------------


def test_given_losses(output: Path) -> None:
    result = run("--given", "web=2.5,code=1.25", "--output", output)
    found = Reference.load(output)
    assert found == Reference({"web": 2.5, "code": 1.25}, {"method": "given"})
    assert "web   2.5000" in result.stdout
    options = ["--sequences", 3, "--target-params", "1k", "--store", "tokens"]
    result = run("--given", "web=2.5,code=1", *options, "--output", output)
    assert "--target-params, --sequences ignored: the losses are given" in result.stderr


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing says where the losses come from"),
        (["S"], "no text to measure it on; give --store"),
        (["S", "--given", "web=1"], "--given and models were both given"),
        (["--losses", "A", "--given", "web=1"], "--given and --losses were both given"),
        (["--given", "web=1", "--store", "tokens"], "--given names web, but .* are code, web"),
        (["--given", "web=1", "--store", "elsewhere"], "no token store at elsewhere"),
        (["S", "--store", "elsewhere"], "no token store at elsewhere"),
        (["S", "M", "--store", "tokens"], "2 models were named, but not the size"),
        (["S", "S", "--store", "tokens", "--target-params", "0.5x"], "models of one size"),
        (["--losses", "A", "--target-params", "50"], "models of one size"),
        (["--losses", "A", "--losses", "B"], "not the size to predict for"),
        (["--losses", "A", "--losses", "B", "--target-params", "1.5x"], "--target-params 1.5x ask"),
        (["--losses", "A", "--losses", "B", "--target-params", "few"], "--target-params 'few' was"),
        (
            ["--losses", "B", "--losses", "C", "--target-params", "5"],
            "of c are of code, but .* web",
        ),
        (["S", "--store", "tokens", "--losses", "C", "--target-params", "5"], "of c are of code, "),
        (
            ["S", "OTHER", "M", "--store", "tokens", "--target-params", "0.5x"],
            "that of other differs",
        ),
    ],
)
def test_what_cannot_be_done(
    family: dict[str, Path], output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured before everything was checked")

    monkeypatch.setattr(shearling.train.reference, "measure", never)
    names = {"S": family["s"], "M": family["m"], "OTHER": family["other"]} | {
        "A": file_of(tmp_path / "a.json", 100, web=2.0),
        "B": file_of(tmp_path / "b.json", 200, web=1.5),
        "C": file_of(tmp_path / "c.json", 300, code=1.0),
    }
    with pytest.raises(ShearlingError, match=message):
        run(*(names.get(argument, argument) for argument in arguments), "--output", output)
    assert not output.exists()


def test_an_output_that_is_a_directory(family: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ShearlingError, match="is a directory; name a file"):
        run(family["s"], "--store", "tokens", "--output", tmp_path)


def test_a_store_without_models_is_told(tmp_path: Path, output: Path) -> None:
    files = [file_of(tmp_path / f"{n}.json", n, web=9 / n) for n in (100, 200)]
    some = [part for file in files for part in ("--losses", file)]
    result = run(*some, "--store", "tokens", "--target-params", "90", "--output", output)
    assert "--store ignored: no model is to be measured" in result.stderr
    assert Reference.load(output).losses == pytest.approx({"web": 0.1})
