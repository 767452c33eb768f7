"""Code that lies beside a model: no command runs it, and none asks whether to."""

from __future__ import annotations

import builtins
import json
import shutil
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from every_command import COMMANDS, Inputs, run
from shearling.errors import ShearlingError
from shearling.studio.worker import StudioWorker

CODE = 'from pathlib import Path\nPath({trace!r}).touch()\nraise SystemExit("ran")\n'
MODULES = ("configuration_odd", "modeling_odd", "tokenization_odd", "processing_odd",
           "custom_generate/generate")  # fmt: skip


class Place(Inputs):
    """Models with code beside them, and what commands need besides."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.trace = root / "the-code-ran"
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
        (path / "custom_generate").mkdir()
        for module in MODULES:
            (path / f"{module}.py").write_text(CODE.format(trace=str(self.trace)))
        odd = {"AutoProcessor": "processing_odd.Odd", "AutoImageProcessor": "processing_odd.Odd"}
        for file in ("processor_config.json", "preprocessor_config.json"):
            (path / file).write_text(json.dumps({"auto_map": odd}))
        change(path / "generation_config.json", {"custom_generate": ".", "auto_map": odd})
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


READS_TOKENIZER = ("score", "prune", "eval", "compare", "heal", "learn", "teach", "reference",
                   "pack")  # fmt: skip
# These need a converter, a judge, a browser; the demo is made of the others.
ELSEWHERE = ("export", "judge", "studio", "demo")


def call(place: Place, name: str, model: Path, tmp_path: Path) -> None:
    if name == "quantize" and find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    run(*place.arguments(name, model, tmp_path))


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
def test_tasks_do_not_run_it(place: Place, which: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    questions = tmp_path / "flock.jsonl"
    question = {"question": "How many sheep?", "choices": [" one", " two"], "label": 0}
    questions.write_text(json.dumps(question))
    arguments = ("eval", getattr(place, which), "--tasks", questions)
    if which == "known":
        run(*arguments)
    else:
        with pytest.raises(ShearlingError, match="code that is never run"):
            run(*arguments)


def test_a_gguf_file_beside_it_does_not_run_it(place: Place) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    writer = gguf.GGUFWriter(file := place.known / "flock.gguf", "llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with suppress(ShearlingError):  # there is little in it; what counts is that no code is run
        run("inspect", file)
    file.unlink()


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


def test_a_chat_template_does_not_reach_code(place: Place, tmp_path: Path) -> None:
    path = Path(shutil.copytree(place.plain, tmp_path / "template"))
    reach = f"cycler.__init__.__globals__.os.mkdir({str(place.trace)!r})"
    (path / "chat_template.jinja").write_text("{{ " + reach + " }}{{ messages }}")
    said = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Three."}]
    (tmp_path / "said.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    with pytest.raises(ShearlingError, match=r"chat template does not take .*unsafe"):
        run("pack", tmp_path / "said.jsonl", "--tokenizer", path, "--output", tmp_path / "store",
            "--workers", 1)  # fmt: skip


def test_kernels_from_the_hub_are_code(place: Place, tmp_path: Path) -> None:
    path = Path(shutil.copytree(place.root / "plain", tmp_path / "kernels"))
    change(path / "config.json", {"attn_implementation": "somebody/attention"})
    with pytest.raises(ShearlingError, match=r"somebody/attention .* remove attn_implementation"):
        call(place, "eval", path, tmp_path)
