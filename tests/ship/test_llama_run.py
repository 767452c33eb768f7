"""An exported file run by llama.cpp: by a program that stands in for it and knows the answers."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest
import torch

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.model.loading import load_model
from shearling.ship import llama_run
from shearling.ship.llama_run import LENGTH, LIKELIEST, SEED, SEQUENCES, run_and_compare
from tiny_tokenizer import VOCAB, write_llama

# The parts of llama-server that are asked: /health, which says 503 while it loads, and
# /completion. How it behaves is told by the name of the file.
SERVER = """#!{python}
import http.server, json, sys
arguments = sys.argv[1:]
def option(name):
    return arguments[arguments.index(name) + 1]
file = option("-m")
if "dying" in file or ("older" in file and "-fa" in arguments):
    print("error: unknown model architecture", file=sys.stderr)
    sys.exit(1)
if "crooked" in file:
    print("0.1 E load: error loading model: missing tensor 'blk.0'", file=sys.stderr)
    print("0.2 E srv: exiting due to model loading error", file=sys.stderr)
    sys.exit(1)
known, asked = json.load(open({answers!r})), []
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass
    def do_GET(self):
        asked.append(1)
        self.send_response(503 if len(asked) < 3 else 200)
        self.end_headers()
    def do_POST(self):
        given = json.loads(self.rfile.read(int(self.headers["content-length"])))
        shift = 1.0 if "other" in file else 0.0
        tops = [{{"id": int(token), "logprob": value + shift}}
                for token, value in known[json.dumps(given["prompt"])].items()]
        reply = {{"completion_probabilities": [{{"top_logprobs": tops[:given["n_probs"]]}}]}}
        if "mute" in file:
            reply = {{"completion_probabilities": []}}
        body = b"<html>" if "mumbling" in file else json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer((option("--host"), int(option("--port"))), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_llama(tmp_path_factory.mktemp("run") / "model", layers=1))


@pytest.fixture(scope="module")
def home(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of llama.cpp's, with a server that answers as the model would."""
    root = tmp_path_factory.mktemp("llama.cpp")
    length = min(LENGTH, source.config.max_position_embeddings - 1)
    draw = torch.Generator().manual_seed(SEED)
    model, answers = load_model(source.path), {}
    for row in torch.randint(VOCAB, (SEQUENCES, length), generator=draw):
        logp_V = model(row[None]).logits[0, -1].log_softmax(-1)
        best = logp_V.topk(LIKELIEST)
        told = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        answers[json.dumps(row.tolist())] = dict(told)
    (root / "answers.json").write_text(json.dumps(answers))
    program = root / "build" / "bin" / "llama-server"
    program.parent.mkdir(parents=True)
    program.write_text(SERVER.format(python=sys.executable, answers=str(root / "answers.json")))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return root


@pytest.fixture(autouse=True)
def only_the_server(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_run, "find_spec", lambda name: None)
    monkeypatch.setenv("LLAMA_CPP", str(home))


def test_a_file_that_runs_as_the_model_is_said_to(source: Checkpoint) -> None:
    steps: list[float] = []
    ran = run_and_compare(
        source, Path("right.gguf"), exact=True, progress=lambda *told: steps.append(told[1])
    )
    assert ran is not None
    assert (ran.program, ran.reason) == ("llama-server", "")
    assert 0 < ran.tokens <= SEQUENCES * LIKELIEST
    assert ran.mean <= ran.largest < 1e-4
    assert steps[-1] == SEQUENCES


def test_an_older_server_is_asked_without_the_options_that_it_does_not_know(
    source: Checkpoint,
) -> None:
    ran = run_and_compare(source, Path("older.gguf"), exact=True)
    assert ran is not None
    assert (ran.reason, ran.largest < 1e-4) == ("", True)


def test_a_file_that_runs_as_another_model_is_refused(source: Checkpoint) -> None:
    with pytest.raises(ShearlingError, match=r"another model: .* 1\.00 nats from the model's"):
        run_and_compare(source, Path("other.gguf"), exact=True)
    ran = run_and_compare(source, Path("other.gguf"), exact=False)  # a type of few bits
    assert ran is not None
    assert abs(ran.mean - 1) < 1e-3


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("dying.gguf", "it ended with 1: error: unknown model architecture"),
        ("crooked.gguf", "it ended with 1: error loading model: missing tensor 'blk.0'"),
        ("mumbling.gguf", "Expecting value"),
        ("mute.gguf", "it gave no probabilities"),
    ],
)
def test_a_program_that_fails_proves_nothing_and_refuses_nothing(
    source: Checkpoint, file: str, reason: str
) -> None:
    ran = run_and_compare(source, Path(file), exact=True)
    assert ran is not None
    assert ran.tokens == 0
    assert reason in ran.reason


def test_without_llama_cpp_nothing_is_run(source: Checkpoint, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_and_compare(source, Path("right.gguf"), exact=True) is None
