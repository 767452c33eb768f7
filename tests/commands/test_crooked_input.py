"""Inputs that nobody writes on purpose: each ends soon, in one sentence, or works."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from judge_stub import Stub
from shearling.cli import main
from shearling.model import checkpoint
from shearling.model.sanity import _COUNTS
from tiny_tokenizer import write_llama

Told = Callable[..., tuple[int, str, str]]
WEIGHTS = "model.safetensors"


@pytest.fixture
def told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Told]:
    """The command line in this process: exit code, stdout, and the last line of stderr."""
    monkeypatch.delenv("SHEARLING_TRACEBACK", raising=False)
    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path / "cache"))
    handlers = {sign: signal.getsignal(sign) for sign in (signal.SIGTERM, signal.SIGINT)}

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["shearling", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(stopped.value.code or 0), out, (err.strip().splitlines() or [""])[-1]

    yield call
    for sign, handler in handlers.items():
        signal.signal(sign, handler)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("crooked") / "plain", layers=2)


@pytest.fixture
def model(plain: Path, tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(plain, tmp_path / "model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    file.write_text(
        "\n".join(json.dumps({"text": f"{n} sheep on the hill. " * 9}) for n in range(9))
    )
    return file


def change(
    model: Path, rename: Callable[[str], str], spoil: Callable = lambda tensor: tensor
) -> None:
    """Rename the tensors of a model, and do something to their values."""
    tensors = load_file(model / WEIGHTS)
    changed = {rename(name): spoil(tensor).contiguous() for name, tensor in tensors.items()}
    save_file(changed, model / WEIGHTS, metadata={"format": "pt"})


def refused(given: tuple[int, str, str], *parts: str) -> None:
    code, _, said = given
    assert code == 2
    assert said.startswith("shearling: ")
    assert said.endswith(".")
    for part in parts:
        assert part in said


# --- an output inside the source


@pytest.mark.parametrize(
    "command",
    [
        "prune {model} --shape layers=1 --calibration {text} --samples 4 --length 64",
        "prune {model} --params 0.9x,0.8x --calibration {text} --samples 4 --length 64",
        "heal {model} --data {store} --tokens 1k batch=2",
        "quantize {model} --to int8",
    ],
)
def test_nothing_is_begun_inside_a_source(
    told: Told, model: Path, text: Path, tmp_path: Path, command: str
) -> None:
    """Not even a directory to be renamed in the end, and no hour of work before the refusal."""
    store = tmp_path / "store"
    if "heal" in command:
        assert told("pack", text, "--tokenizer", model, "--output", store, "--length", 16)[0] == 0
    before, began = sorted(model.rglob("*")), model.stat().st_mtime_ns
    words = command.format(model=model, text=text, store=store).split()
    code, out, said = told(*words, "--output", model / "a" / "b")
    refused((code, out, said), "lies inside the source", "name a directory elsewhere")
    assert sorted(model.rglob("*")) == before
    assert model.stat().st_mtime_ns == began


# --- Ctrl-C


def test_ctrl_c_is_one_line_and_130(told: Told, plain: Path, monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(checkpoint, "stored_tensors", interrupted)
    code, out, said = told("inspect", plain)
    assert (code, out) == (130, "")
    assert said == "shearling: interrupted; nothing half-written was left behind."


def test_ctrl_c_inside_a_library_s_call_is_no_fault_of_the_input(
    told: Told, plain: Path, monkeypatch
) -> None:
    """A library that makes an error of its own out of the interrupt changes nothing."""

    def interrupted(*_: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise RuntimeError("the tokenizer fell over") from error

    monkeypatch.setattr(checkpoint, "stored_tensors", interrupted)
    assert told("inspect", plain)[::2] == (
        130, "shearling: interrupted; nothing half-written was left behind.",
    )  # fmt: skip


def test_ctrl_c_while_it_starts_is_one_line_and_130() -> None:
    script = (
        "import sys, signal; sys.argv = ['shearling', '--version']\n"
        "import builtins; real = builtins.__import__\n"
        "def slow(name, *rest):\n"
        "    if name == 'typer': signal.raise_signal(signal.SIGINT)\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = slow\n"
        "import shearling.cli\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "shearling: interrupted before anything was begun.\n"


# --- bombs


def test_a_gzip_of_one_gigantic_line(told: Told, plain: Path, tmp_path: Path) -> None:
    """A gigabyte of one document in a megabyte; it is never held whole."""
    bomb = tmp_path / "bomb.jsonl.gz"
    zeros = gzip.compress(b"a" * 2**24, 6)
    bomb.write_bytes(gzip.compress(b'{"text": "') + zeros * 64 + gzip.compress(b'"}\n'))
    for command in (
        ("pack", bomb, "--tokenizer", plain, "--output", tmp_path / "s", "--workers", "1",
         "--length", "32"),
        ("eval", plain, "--text", bomb, "--window", "16"),
    ):  # fmt: skip
        begun = time.perf_counter()
        refused(told(*command), "bomb.jsonl.gz", "line")
        assert time.perf_counter() - begun < 10
    assert not (tmp_path / "s" / "store.json").exists()


LOOPING = "{% for a in range(10**5) %}{% for b in range(10**5) %}{% endfor %}{% endfor %}"
GROWING = (
    "{% set n = namespace(s='a' * 1000) %}"
    "{% for a in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}"
)
CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ewe."}]


@pytest.mark.parametrize("template", [LOOPING, GROWING, "{{ 9 ** 9 ** 9 ** 9 }}"])
def test_a_template_without_end(
    told: Told, model: Path, text: Path, tmp_path: Path, monkeypatch, template: str
) -> None:
    from shearling.model import templates

    monkeypatch.setattr(templates, "SECONDS", 0.3)
    (model / "chat_template.jinja").write_text(template)
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": CHAT}))
    begun = time.perf_counter()
    refused(told("pack", chats, "--tokenizer", model, "--output", tmp_path / "s", "--workers", "1",
                 "--length", "32"), "template")  # fmt: skip
    assert time.perf_counter() - begun < 10


def test_a_tokenizer_of_gigabytes(told: Told, model: Path, text: Path) -> None:
    with (model / "tokenizer.json").open("r+b") as file:
        file.truncate(3 * 10**9)  # no block of the disk is taken
    refused(told("eval", model, "--text", text, "--window", "16"), "tokenizer.json", "3,000 MB")


# --- models that are not what they seem


@pytest.mark.parametrize(
    "rename",
    [lambda name: name.removeprefix("model."), lambda name: f"language_model.{name}",
     lambda name: name.replace("model.", "model.language_model.", 1)],
    ids=["base model", "wrapper", "newer wrapper"],
)  # fmt: skip
@pytest.mark.parametrize("command", ["inspect", "prune"])
def test_names_that_differ_by_a_prefix_are_no_damage(
    told: Told, model: Path, tmp_path: Path, rename: Callable[[str], str], command: str
) -> None:
    change(model, rename)
    more = ("--remove", "1", "--output", tmp_path / "out") if command == "prune" else ()
    given = told(command, model, *more)
    refused(given, "base model or a multimodal wrapper", "save_pretrained")
    assert "fetch" not in given[2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_accuracy_of_weights_that_are_no_numbers(
    told: Told, model: Path, tmp_path: Path, value: float
) -> None:
    pytest.importorskip("lm_eval")
    tensors = load_file(model / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    pens, suite = tmp_path / "pens.jsonl", tmp_path / "suite.yaml"
    question = {"question": "Which?", "choices": ["ewe", "ram"], "label": 0}
    pens.write_text(json.dumps(question))
    suite.write_text("tasks:\n  - {name: pens, file: pens.jsonl}\n")
    given = told("eval", model, "--suite", suite)
    refused(given, "model.layers.1.mlp.up_proj.weight", "infinite or none")


def test_a_model_of_zeros_is_measured_and_cut(
    told: Told, model: Path, text: Path, tmp_path: Path
) -> None:
    change(model, lambda name: name, torch.zeros_like)
    code, out, said = told("eval", model, "--text", text, "--window", "16", "--json")
    assert code == 0, said
    perplexity = json.loads(out)["evaluations"][0]["perplexity"] if "evaluations" in out else None
    assert perplexity is None or abs(perplexity - 260) < 1e-2  # of 260 tokens, all alike
    code, _, said = told(
        "prune", model, "--remove", "1", "--no-refit", "--output", tmp_path / "out"
    )
    assert code == 0, said


def test_a_symlink_to_itself(
    told: Told, plain: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    refused(told("inspect", loop), "loop")
    refused(told("eval", plain, "--text", loop, "--window", "16"), "loop")
    refused(told("prune", plain, "--remove", "1", "--output", loop), "loop")
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("config.json")
    refused(told("inspect", model), "config.json")


@pytest.mark.parametrize(("key", "value"), [("num_labels", 10**9), ("num_hidden_layers", 10**7),
                                           ("max_position_embeddings", 10**30)])  # fmt: skip
def test_sizes_that_no_memory_holds(told: Told, model: Path, key: str, value: int) -> None:
    assert key == "num_hidden_layers" or value > _COUNTS[key]
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    begun = time.perf_counter()
    refused(told("inspect", model), key)
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize("command", ["bench", "compare", "studio"])
@pytest.mark.parametrize("threads", [10**12, 10**6])
def test_more_threads_than_there_can_be(
    told: Told, plain: Path, text: Path, tmp_path: Path, command: str, threads: int
) -> None:
    more = ()
    if command == "compare":
        more = (plain, "--text", text, "--bench", "--output", tmp_path / "c.html")
    begun = time.perf_counter()
    refused(told(command, plain, *more, "--threads", threads), f"threads is {threads}")
    assert time.perf_counter() - begun < 5


# --- templates that raise


def test_a_template_that_raises_in_judge(
    stub: Stub, told: Told, model: Path, plain: Path, tmp_path: Path
) -> None:
    (model / "chat_template.jinja").write_text("{{ raise_exception('Roles must alternate.') }}")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Who?\n")
    given = told("judge", model, plain, "--prompts", prompts, "--endpoint", stub.address,
                 "--output", tmp_path / "j.json", "--max-new-tokens", "2")  # fmt: skip
    refused(given, "Roles must alternate")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(told: Told, model: Path) -> None:
    (model / "config.json").chmod(0)
    refused(told("inspect", model), "config.json", "Permission denied")
