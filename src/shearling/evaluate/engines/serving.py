"""A model on a vLLM server that gets many requests at a time: tokens go out, tokens come back.

The server batches them by itself. It is made for sequences of a certain length, since a model's
positions may be more than its memory can hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shearling.evaluate.engines.base import ITEMSIZE, Candidate
from shearling.evaluate.engines.vllm_server import VllmServer, quiet_environment

AT_A_TIME = 64  # requests, unless a number is given
GPU_SHARE = 0.85  # of its memory; log-likelihoods of whole prompts need some beside the cache
_TYPICAL = 1024  # tokens of a sequence, for which a CPU's KV cache has room
_GIB = 2**30

# A request, and what is read from the answer's best choice.
Question = tuple[Mapping[str, Any], Callable[[Any], Any]]


@dataclass(frozen=True)
class ServingOptions:
    """How a model is served.

    Attributes:
        program: of vLLM.
        device: a torch device, by name.
        dtype: what it computes in.
        at_a_time: requests.
        seed: of the server, which requests' own seeds precede.
    """

    program: Path
    device: str = "cpu"
    dtype: str = "float32"
    at_a_time: int = AT_A_TIME
    seed: int = 0

    def server(self, candidate: Candidate, context: int) -> VllmServer:
        """A server for sequences of ``context`` tokens, which starts as its context is entered."""
        return VllmServer(
            self.program, candidate, self.arguments(context), self.environment(candidate, context)
        )

    def arguments(self, context: int) -> list[str]:
        """Further options of ``vllm serve``."""
        arguments = [
            "--dtype", self.dtype, "--max-model-len", str(context),
            "--max-num-seqs", str(self.at_a_time), "--seed", str(self.seed),
            "--generation-config", "vllm",  # each request says all of it
        ]  # fmt: skip
        if self.device != "cpu":
            arguments += ["--gpu-memory-utilization", f"{GPU_SHARE:.3f}"]
        return arguments

    def environment(self, candidate: Candidate, context: int) -> dict[str, str]:
        """On a CPU it is told how much cache to set aside; what does not fit waits its turn."""
        environment = quiet_environment(self.device)
        if self.device == "cpu":
            tokens = max(context, self.at_a_time * min(context, _TYPICAL))
            size = candidate.cache_elements * tokens * ITEMSIZE[self.dtype]
            environment["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, math.ceil(1.25 * size / _GIB)))
        return environment


def ask_all(
    server: VllmServer,
    questions: Sequence[Question],
    at_a_time: int,
    done: Callable[[], None] = lambda: None,
) -> list[Any]:
    """What is read from the answer to each request, in their order.

    Args:
        server: which runs.
        questions: requests, and how their answers are read.
        at_a_time: how many are on their way.
        done: told of every answer.

    Raises:
        ShearlingError: the server failed, or an answer lacks what is to be read.
    """
    pool = ThreadPoolExecutor(at_a_time, thread_name_prefix="vllm")
    try:
        futures = [pool.submit(_ask, server, body, read) for body, read in questions]
        for future in as_completed(futures):
            future.result()
            done()
        return [future.result() for future in futures]
    finally:
        # Those that are on their way end with the server, which whoever failed will close.
        pool.shutdown(wait=False, cancel_futures=True)


def _ask(server: VllmServer, body: Mapping[str, Any], read: Callable[[Any], Any]) -> Any:
    """What ``read`` makes of the best of the server's answers to one request."""
    with server.posted(server.written(body)) as answer:
        choices = json.loads(answer.read())["choices"]
    try:
        return read(min(choices, key=lambda choice: choice["index"]))
    except (LookupError, TypeError, ValueError) as error:
        missing = "prompt_logprobs" if "prompt_logprobs" in body else "token_ids"
        raise server.failed(
            f"its answer has no {missing} that can be read; vllm 0.11 and newer give them"
        ) from error


def written_tokens(choice: Any) -> list[int]:
    """The tokens behind a prompt, of a request with ``return_token_ids``."""
    return [int(token) for token in choice["token_ids"]]
