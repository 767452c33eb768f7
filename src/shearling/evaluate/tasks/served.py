"""Tasks asked of a model on a vLLM server: many requests at a time, which it batches by itself.

lm-eval's own client of such servers (``local-completions``) is not used: it needs packages that
lm-eval does not bring along, shortens and tokenises prompts otherwise than its transformers model
does, and reads answers from detokenised text. Here tokens go out and tokens come back, and all
that comes before and after is the same code that runs a model in this process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shearling.errors import ShearlingError, in_words
from shearling.evaluate.engines.base import ITEMSIZE, Candidate, candidate_of
from shearling.evaluate.engines.vllm_server import VllmServer, quiet_environment
from shearling.evaluate.tasks.engine import TaskEngine
from shearling.evaluate.tasks.harness import CountedLM
from shearling.files.progress import Progress, silent
from shearling.model.loading import load_config
from shearling.model.subject import OpenedModel

AT_A_TIME = 64  # requests, unless a number is given
CONTEXT = 4096  # tokens of a sequence that a server is made for, until a request is longer
CHUNK = 4096  # requests that lm-eval hands over at once; its padded prompts are held together
GPU_SHARE = 0.85  # of its memory; log-likelihoods of whole prompts need some beside the cache
_TYPICAL = 1024  # tokens of a sequence, for which a CPU's KV cache has room
_GIB = 2**30
# What a task may ask of sampling, by the names that both sides share.
_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class ServingOptions:
    """How a model is served: by which engine, in which type, and how much at a time."""

    engine: TaskEngine
    dtype: str = "float32"
    at_a_time: int = AT_A_TIME
    seed: int = 0


@dataclass(frozen=True)
class _Absent:
    """What lm-eval asks of a model that is not in this process."""

    config: Any
    device: str = "cpu"


class ServedScorer(CountedLM):
    """A model on a vLLM server of its own, which is ended by :meth:`close`.

    A server is made for sequences of ``CONTEXT`` tokens, since a model's positions may be more
    than its memory can hold; a longer request starts another, for twice as many or more.
    """

    def __init__(
        self, subject: OpenedModel, options: ServingOptions, *, progress: Progress = silent
    ) -> None:
        """Start the server (ShearlingError if it does not, with what its log says)."""
        config = load_config(subject.path).get_text_config()
        super().__init__(_Absent(config), subject.tokenizer(), batch=CHUNK, progress=progress)
        self._candidate, self._options = candidate_of(subject), options
        self._defaults = _generation_defaults(Path(subject.path), config)
        self._server: VllmServer | None = None
        self._context = 0
        self._server_for(min(CONTEXT, self.max_length))

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.__exit__()
            self._server = None

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        asked: list[tuple[Mapping[str, Any], Callable[[Any], Any]]] = []
        for _, context, answer in requests:
            assert answer, "an answer without tokens cannot be scored"
            self._check_answer(answer)
            whole = context + answer
            # The server wants room for a token after the prompt. transformers leaves the last one
            # out, and keeps two more of a prompt that is too long.
            kept = whole[-(self.max_length - 1) :]
            self.truncated += len(kept) < len(whole)
            length = min(len(answer), len(kept) - 1)
            body = {"prompt": kept, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
            asked.append((body, partial(_likelihood, prompt=kept, length=length)))
        return self._asked_of_server(asked)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any
    ) -> torch.Tensor:
        """Prompts (B, T), padded on the left, with what the model writes behind them."""
        mask = kwargs.pop("attention_mask").bool()
        asked = {
            "max_tokens": max_length - context.shape[1],
            "stop": [end for end in stop if end],
            "stop_token_ids": self._ends(),
            "skip_special_tokens": False,  # a stop may be one of them
            "return_token_ids": True,
            **self._sampling(kwargs),
        }
        prompts = [row[kept].tolist() for row, kept in zip(context, mask, strict=True)]
        written = self._asked_of_server(
            [(asked | {"prompt": prompt}, _written_tokens) for prompt in prompts]
        )
        longest = max(map(len, written))
        assert self.tokenizer is not None
        padding = self.tokenizer.pad_token_id
        rows = [tokens + [padding] * (longest - len(tokens)) for tokens in written]
        return torch.cat([context, torch.tensor(rows, dtype=context.dtype)], dim=1)

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        return CHUNK

    def _asked_of_server(
        self, requests: Sequence[tuple[Mapping[str, Any], Callable[[Any], Any]]]
    ) -> list[Any]:
        """What is read from the answer to each request, in their order."""
        longest = max(len(body["prompt"]) + body["max_tokens"] for body, _ in requests)
        server = self._server_for(longest)
        self._count(len(requests), len(requests))
        pool = ThreadPoolExecutor(self._options.at_a_time, thread_name_prefix="vllm")
        try:
            futures = [pool.submit(_ask, server, body, read) for body, read in requests]
            for future in as_completed(futures):
                future.result()
                self._advance(1)
            return [future.result() for future in futures]
        finally:
            # Those that are on their way end with the server, which whoever failed will close.
            pool.shutdown(wait=False, cancel_futures=True)

    def _server_for(self, longest: int) -> VllmServer:
        """The server that runs, or a new one if it is made for shorter sequences."""
        if self._server is not None and longest <= self._context:
            return self._server
        self.close()
        self._context = min(self.max_length, max(CONTEXT, 2 ** math.ceil(math.log2(longest))))
        self._listen("starting vllm", 0, 1)
        options = self._options
        assert options.engine.program is not None
        server = VllmServer(
            options.engine.program, self._candidate, _arguments(options, self._context),
            _environment(options, self._candidate, self._context),
        )  # fmt: skip
        self._server = server.__enter__()
        self._listen("starting vllm", 1, 1)
        return server

    def _ends(self) -> list[int]:
        """Tokens that end a text, as transformers' ``generate`` has them."""
        given = self._defaults.eos_token_id
        return [] if given is None else [given] if isinstance(given, int) else list(given)

    def _sampling(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """How the next token is chosen: what the task says, else what the model's directory says.

        Raises:
            ShearlingError: the task asks for something else that transformers knows.
        """
        sampled = bool(kwargs.pop("do_sample", None))
        temperature = kwargs.pop("temperature", None) or 0.0
        chosen: dict[str, Any] = {"temperature": temperature if sampled else 0.0}
        if sampled:
            chosen["seed"] = self._options.seed
        for name in _SAMPLING:
            value = kwargs.pop(name, getattr(self._defaults, name, None))
            if value is not None:
                chosen[name] = value
        beams = kwargs.pop("num_beams", None) or getattr(self._defaults, "num_beams", None) or 1
        if beams > 1:
            length_penalty = kwargs.pop("length_penalty", 1.0)
            chosen |= {"use_beam_search": True, "n": beams, "length_penalty": length_penalty}
        if kwargs:
            raise ShearlingError(
                f"{self._stage} wants text generated with {', '.join(sorted(kwargs))}, which vllm "
                "is not asked for here; run it with --engine transformers."
            )
        return chosen


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


def _likelihood(choice: Any, prompt: Sequence[int], length: int) -> tuple[float, bool]:
    """Log-likelihood (nats) of a prompt's last tokens, and whether each was the likeliest."""
    total, greedy = 0.0, True
    entries = choice["prompt_logprobs"]
    if len(entries) != len(prompt):
        raise ValueError(len(entries))
    for token, entry in zip(prompt[-length:], entries[-length:], strict=True):
        given = entry[str(token)]["logprob"]
        total += given
        greedy = greedy and given >= max(one["logprob"] for one in entry.values())
    return total, greedy


def _written_tokens(choice: Any) -> list[int]:
    return [int(token) for token in choice["token_ids"]]


def _generation_defaults(path: Path, config: Any) -> Any:
    """What transformers' ``generate`` takes where it is told nothing else."""
    from transformers import GenerationConfig

    file = path / "generation_config.json"
    if file.is_file():
        with in_words(lambda why: f"{file} is refused by transformers: {why}; repair it."):
            return GenerationConfig.from_pretrained(path, local_files_only=True)
    return GenerationConfig.from_model_config(config)


def _arguments(options: ServingOptions, context: int) -> list[str]:
    """Further options of ``vllm serve``."""
    arguments = [
        "--dtype", options.dtype, "--max-model-len", str(context),
        "--max-num-seqs", str(options.at_a_time), "--seed", str(options.seed),
        "--generation-config", "vllm",  # each request says all of it
    ]  # fmt: skip
    if options.engine.device != "cpu":
        arguments += ["--gpu-memory-utilization", f"{GPU_SHARE:.3f}"]
    return arguments


def _environment(options: ServingOptions, candidate: Candidate, context: int) -> dict[str, str]:
    """On a CPU it is told how much cache to set aside; what does not fit waits its turn."""
    environment = quiet_environment(options.engine.device)
    if options.engine.device == "cpu":
        tokens = max(context, options.at_a_time * min(context, _TYPICAL))
        size = candidate.cache_elements * tokens * ITEMSIZE[options.dtype]
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, math.ceil(1.25 * size / _GIB)))
    return environment
