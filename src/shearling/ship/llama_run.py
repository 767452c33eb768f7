"""llama.cpp itself on an exported file: its log-probabilities against the model's.

It runs where it is installed: as the package ``xllamacpp``, in a process of its own, since its
libraries and torch's do not share one gladly, or as the program ``llama-server``. Both take tokens
and give the likeliest next ones with their log-probabilities.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import torch

from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.model.checkpoint import Checkpoint
from shearling.model.loading import load_model

PACKAGE, SERVER, HOME = "xllamacpp", "llama-server", "LLAMA_CPP"
SEQUENCES, LENGTH, SEED = 4, 96, 0
_LOADING = "error loading model"
_TELLING = (_LOADING, "GGML_ASSERT")  # what a server says when it ends
# Keys, values and attention in 32 bits, where the default rounds all three to 16.
_EXACT = ("-fa", "off", "-ctk", "f32", "-ctv", "f32")
LIKELIEST = 40  # next tokens that are compared
# Nats, the mean over those, that 16 bits explain; Gemma 3 with blocks of the wrong kind is 2 away.
LIMIT = 0.1
SECONDS = 600  # for all sequences; a large model on a processor is then left unproved
# What starts a server: it ends with us however we end, and holds no memory after us (on Linux).
_TIED = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):  # we have ended already
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""
# In the child: a request a line, an answer a line. Its log goes to stderr.
_CHILD = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.n_predict = int(sys.argv[2]), 1, 1
params.warmup, params.cache_ram_mib, params.verbosity = False, 0, 0
server = xllamacpp.Server(params)
for line in sys.stdin:
    reply = server.handle_completions(json.loads(line))
    reply = json.loads(reply) if isinstance(reply, (str, bytes)) else reply
    print(json.dumps(reply), file=answers, flush=True)
os._exit(0)
"""


@dataclass(frozen=True, slots=True)
class LlamaRun:
    """How far llama.cpp is from the model.

    Attributes:
        program: what ran.
        tokens: log-probabilities that were compared.
        mean, largest: of the differences, in nats; 0 where nothing was compared.
        reason: why nothing was compared, or empty.
    """

    program: str
    tokens: int = 0
    mean: float = 0.0
    largest: float = 0.0
    reason: str = ""


def run_and_compare(
    source: Checkpoint, file: Path, *, exact: bool, progress: Progress = silent
) -> LlamaRun | None:
    """Run llama.cpp on a file, if it is installed, and compare it with the model.

    Args:
        source: the model that the file was made from.
        file: the exported file.
        exact: whether its type is close enough to the source's for a difference to be a fault.
        progress: told the sequences done.

    Returns:
        None where llama.cpp is not installed.

    Raises:
        ShearlingError: it gives other log-probabilities than the rounding explains.
    """
    program = PACKAGE if find_spec(PACKAGE) else find_server()
    if program is None:
        return None
    stage = "running llama.cpp"
    length = min(LENGTH, getattr(source.config, "max_position_embeddings", LENGTH) - 1)
    generator = torch.Generator().manual_seed(SEED)
    ids_BS = torch.randint(source.shape["vocab"], (SEQUENCES, length), generator=generator)
    progress(stage, 0, SEQUENCES)
    try:
        answers = _ask(program, file, [row.tolist() for row in ids_BS])
    except (OSError, ValueError, LookupError, TypeError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return LlamaRun(Path(program).name, reason=reason)
    try:
        model = load_model(source.path)
    except ShearlingError as error:  # the model does not fit in memory
        return LlamaRun(Path(program).name, reason=str(error))
    differences: list[float] = []
    for done, (row, answer) in enumerate(zip(ids_BS, answers, strict=True)):
        with torch.inference_mode():
            expected_V = model(row[None], use_cache=False).logits[0, -1].log_softmax(-1)
        differences += [abs(float(expected_V[token]) - value) for token, value in answer.items()]
        progress(stage, done + 1, SEQUENCES)
    if not differences:
        return LlamaRun(Path(program).name, reason="it gave no probabilities")
    mean, largest = sum(differences) / len(differences), max(differences)
    if exact and not mean <= LIMIT:
        raise ShearlingError(
            f"llama.cpp runs the exported GGUF file as another model: its log-probabilities are "
            f"{mean:.2f} nats from the model's in the mean and up to {largest:.2f}; nothing was "
            "written, give another model or another version of llama.cpp."
        )
    return LlamaRun(Path(program).name, len(differences), mean, largest)


def find_server() -> str | None:
    """llama.cpp's server, or None."""
    home = os.environ.get(HOME)
    places = [Path(home), Path(home) / "build" / "bin"] if home else []
    path = os.pathsep.join([*map(str, places), os.environ.get("PATH", os.defpath)])
    return shutil.which(SERVER, path=path)


def _ask(program: str, file: Path, sequences: list[list[int]]) -> list[dict[int, float]]:
    """For each sequence the likeliest next tokens with their log-probabilities."""
    requests = [
        {
            "prompt": ids, "n_predict": 1, "temperature": 0.0, "n_probs": LIKELIEST,
            "cache_prompt": False,
        }
        for ids in sequences
    ]  # fmt: skip
    context = max(map(len, sequences)) + 16
    ask = _ask_package if program == PACKAGE else _ask_server
    return [_likeliest(reply) for reply in ask(program, file, context, requests)]


def _ask_package(
    program: str, file: Path, context: int, requests: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(file), str(context)],
        input="".join(json.dumps(request) + "\n" for request in requests), capture_output=True,
        text=True, errors="replace", timeout=SECONDS, check=False,
    )  # fmt: skip
    replies = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(replies) != len(requests):
        said = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise ValueError(said[-1] if said else f"it ended with {done.returncode}")
    return replies


def _ask_server(
    program: str, file: Path, context: int, requests: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    try:
        return _serve([program, *_EXACT], file, context, requests)
    except ValueError as error:
        if _LOADING in str(error):
            raise
        return _serve([program], file, context, requests)  # an older one, with other options


def _serve(
    program: list[str], file: Path, context: int, requests: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Start the server, and its reply to each request (ValueError if it ends before)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [
        sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *program,
        "-m", str(file), "-c", str(context), "-np", "1",
        "--host", "127.0.0.1", "--port", address.rsplit(":", 1)[1], "--no-warmup",
    ]  # fmt: skip
    until = time.monotonic() + SECONDS
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            _await(server, address, until)
            return [_complete(address, request, until) for request in requests]
        except (OSError, ValueError) as error:
            if server.poll() is None:
                raise
            raise ValueError(_last_words(log, server.returncode)) from error
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _await(server: subprocess.Popen[bytes], address: str, until: float) -> None:
    """Wait until the model is loaded (ValueError if the server dies, or takes too long)."""
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError) as error:  # still loading, or dead
            if server.poll() is not None or time.monotonic() > until:
                raise ValueError("it did not begin to answer") from error
            time.sleep(0.1)


def _complete(address: str, request: dict[str, Any], until: float) -> dict[str, Any]:
    call = urllib.request.Request(
        f"{address}/completion", json.dumps(request).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(call, timeout=max(1, until - time.monotonic())) as reply:
        return json.load(reply)


def _last_words(log: IO[bytes], status: int) -> str:
    """Why a server ended: what it says of the model, or the last that it said."""
    log.seek(0)
    lines = log.read()[-100_000:].decode(errors="replace").splitlines()
    said = [" ".join(line.split()) for line in lines if line.strip()]
    telling = (line[line.find(word) :] for line in said for word in _TELLING if word in line)
    why = next(telling, said[-1] if said else "")
    return f"it ended with {status}" + (f": {why}" if why else "")


def _likeliest(reply: dict[str, Any]) -> dict[int, float]:
    """Token -> log-probability, of the one token that was written."""
    if "choices" in reply:  # as OpenAI's API has it
        written = (reply["choices"][0].get("logprobs") or {}).get("content") or []
    else:
        written = reply.get("completion_probabilities") or []
    if not written:  # a token without text comes back without probabilities
        return {}
    tops = written[0].get("top_logprobs") or []
    return {int(top["id"]): float(top["logprob"]) for top in tops if top["logprob"] > -15}
