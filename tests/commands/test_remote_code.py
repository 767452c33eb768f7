"""Code that lies beside a model: no command runs it, and none asks whether to."""

from __future__ import annotations

import builtins
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from shearling import cli
from shearling.errors import ShearlingError
from shearling.studio.worker import StudioWorker
from tiny_tokenizer import write_llama

CODE = 'from pathlib import Path\nPath({trace!r}).touch()\nraise SystemExit("ran")\n'


class Place:
    """Directories for one command: models with code beside them, text, a store."""

    def __init__(self, root: Path) -> None:
        self.root, self.trace = root, root / "the-code-ran"
        plain = write_llama(root / "plain", layers=8)
        lines = [json.dumps({"text": f"{n} sheep on the hill. " * (n % 5 + 9)}) for n in range(40)]
        self.text = root / "text.jsonl"
        self.text.write_text("\n".join(lines))
        self.prompts = root / "prompts.txt"
        self.prompts.write_text("sheep\n")
        run("pack", self.text, "--tokenizer", plain, "--output", root / "store", "--length", 24,
            "--held-out", 0.2, "--workers", 1)  # fmt: skip
        # transformers knows the model and the tokenizer, whatever code there is besides
        self.known = self.planted("known", {}, {})
        # nothing but the code knows the model
        self.model = self.planted("model", {"model_type": "odd"}, {})
        # nothing but the code knows the tokenizer
        self.tokenizer = self.planted("tokenizer", {}, {"tokenizer_class": "OddTokenizer"})
        (self.tokenizer / "tokenizer.json").unlink()

    def planted(self, name: str, config: dict[str, Any], tokenizer: dict[str, Any]) -> Path:
        """A copy of the plain model, with code that both of its configurations name."""
        path = Path(shutil.copytree(self.root / "plain", self.root / name))
        for module in ("configuration_odd", "modeling_odd", "tokenization_odd"):
            (path / f"{module}.py").write_text(CODE.format(trace=str(self.trace)))
        change(path / "config.json", config | {"auto_map": {
            "AutoConfig": "configuration_odd.OddConfig",
            "AutoModelForCausalLM": "modeling_odd.OddModel",
        }})  # fmt: skip
        change(path / "tokenizer_config.json", tokenizer | {"auto_map": {
            "AutoTokenizer": ["tokenization_odd.OddTokenizer", None]
        }})  # fmt: skip
        return path


def change(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def run(*arguments: object) -> None:
    cli.app([str(argument) for argument in arguments], standalone_mode=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("remote"))


@pytest.fixture(autouse=True)
def nobody_to_ask(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def ask(*_: object) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr(builtins, "input", ask)
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path / "cache"))
    yield
    assert not place.trace.exists(), "code beside the model was run"


TRAIN = ("--tokens", "200", "batch=2", "eval_sequences=1")
# What each command is given; {model} is what has the code, {out} a new path.
COMMANDS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "{model}"),
    "score": ("score", "{model}", "--calibration", "{text}", "--samples", "2", "--length", "16"),
    "prune": ("prune", "{model}", "--layers", "2", "--by", "influence", "--calibration", "{text}",
              "--samples", "2", "--length", "16", "--output", "{out}"),
    "eval": ("eval", "{model}", "--text", "{text}", "--window", "16", "--max-windows", "2"),
    "compare": ("compare", "{model}", "{plain}", "--text", "{text}", "--window", "16",
                "--max-windows", "2", "--output", "{out}.html", "--no-bench"),
    "quantize": ("quantize", "{model}", "--to", "int8", "--output", "{out}"),
    "export": ("export", "{model}", "--output", "{out}.gguf"),
    "judge": ("judge", "{model}", "{plain}", "--prompts", "{prompts}", "--endpoint",
              "http://127.0.0.1:9", "--output", "{out}.json"),
    "studio": ("studio", "{model}"),
    "heal": ("heal", "{model}", "--data", "{store}", "--output", "{out}", *TRAIN),
    "learn": ("learn", "{model}", "--shape", "layers=6", "--data", "{store}", "--output", "{out}",
              "--recipe", "warm", "samples=4", "sample_length=16", *TRAIN),
    "teach": ("teach", "{model}", "--data", "{store}", "--output", "{out}", "--top", "4"),
    "reference": ("reference", "{model}", "--store", "{store}", "--output", "{out}.json"),
    "pack": ("pack", "{text}", "--tokenizer", "{model}", "--output", "{out}", "--length", "24",
             "--workers", "1"),
    "bench": ("bench", "{model}", "--prompt", "4", "--new", "2", "--repeats", "1", "--batch", "1"),
}  # fmt: skip
READS_TOKENIZER = ("score", "prune", "eval", "compare", "heal", "learn", "teach", "reference",
                   "pack")  # fmt: skip
ELSEWHERE = ("export", "judge", "studio")  # needs a converter, a judge, a browser


def call(place: Place, name: str, model: Path, tmp_path: Path) -> None:
    values = {
        "model": model, "text": place.text, "plain": place.root / "plain", "out": tmp_path / "out",
        "store": place.root / "store", "prompts": place.prompts,
    }  # fmt: skip
    if name == "quantize" and find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    run(*(argument.format(**values) for argument in COMMANDS[name]))


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ELSEWHERE])
def test_code_that_is_not_needed_is_not_run(place: Place, name: str, tmp_path: Path) -> None:
    call(place, name, place.known, tmp_path)
    for config in (tmp_path / "out").glob("*config.json"):
        assert "auto_map" not in json.loads(config.read_text())
    assert not list(tmp_path.rglob("*.py"))


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "pack"])
def test_a_model_that_needs_code_is_refused(place: Place, name: str, tmp_path: Path) -> None:
    if name == "export":
        pytest.importorskip("gguf")
    with pytest.raises(ShearlingError) as refused:
        call(place, name, place.model, tmp_path)
    for part in ("model/config.json", "modeling_odd.OddModel", "never run", "'odd'; give a model"):
        assert part in str(refused.value)


@pytest.mark.parametrize("name", READS_TOKENIZER)
def test_a_tokenizer_that_needs_code_is_refused(place: Place, name: str, tmp_path: Path) -> None:
    with pytest.raises(ShearlingError) as refused:
        call(place, name, place.tokenizer, tmp_path)
    expected = ("tokenizer_config.json", "tokenization_odd.OddTokenizer", "never run", "give a")
    for part in expected:
        assert part in str(refused.value)


@pytest.mark.parametrize("which", ["known", "model", "tokenizer"])
def test_the_process_of_a_studio_model_does_not_run_it(place: Place, which: str) -> None:
    worker = StudioWorker(getattr(place, which), dtype="float32", device="cpu", threads=1)
    try:
        if which == "known":
            worker.ready()
        else:
            with pytest.raises(ShearlingError, match="code that is never run"):
                worker.ready()
    finally:
        worker.close()


def test_kernels_from_the_hub_are_code(place: Place, tmp_path: Path) -> None:
    path = Path(shutil.copytree(place.root / "plain", tmp_path / "kernels"))
    change(path / "config.json", {"attn_implementation": "somebody/attention"})
    with pytest.raises(ShearlingError, match=r"somebody/attention .* remove attn_implementation"):
        call(place, "eval", path, tmp_path)
