"""Tasks asked of a model on a vLLM server: many requests at a time, which it batches by itself.

lm-eval's own client of such servers (``local-completions``) is not used: it needs packages that
lm-eval does not bring along, shortens and tokenises prompts otherwise than its transformers model
does, and reads answers from detokenised text. Here tokens go out and tokens come back, and all
that comes before and after is the same code that runs a model in this process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shearling.errors import ShearlingError, in_words
from shearling.evaluate.engines.base import candidate_of
from shearling.evaluate.engines.serving import Question, ServingOptions, ask_all, written_tokens
from shearling.evaluate.engines.vllm_server import VllmServer
from shearling.evaluate.tasks.harness import CountedLM
from shearling.files.progress import Progress, silent
from shearling.model.loading import load_config
from shearling.model.subject import OpenedModel

CONTEXT = 4096  # tokens of a sequence that a server is made for, until a request is longer
CHUNK = 4096  # requests that lm-eval hands over at once; its padded prompts are held together
# What a task may ask of sampling, by the names that both sides share.
_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty")


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
        asked: list[Question] = []
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
            [(asked | {"prompt": prompt}, written_tokens) for prompt in prompts]
        )
        longest = max(map(len, written))
        assert self.tokenizer is not None
        padding = self.tokenizer.pad_token_id
        rows = [tokens + [padding] * (longest - len(tokens)) for tokens in written]
        return torch.cat([context, torch.tensor(rows, dtype=context.dtype)], dim=1)

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        return CHUNK

    def _asked_of_server(self, questions: Sequence[Question]) -> list[Any]:
        """What is read from the answer to each request, in their order."""
        longest = max(len(body["prompt"]) + body["max_tokens"] for body, _ in questions)
        server = self._server_for(longest)
        self._count(len(questions), len(questions))
        return ask_all(server, questions, self._options.at_a_time, lambda: self._advance(1))

    def _server_for(self, longest: int) -> VllmServer:
        """The server that runs, or a new one if it is made for shorter sequences."""
        if self._server is not None and longest <= self._context:
            return self._server
        self.close()
        self._context = min(self.max_length, max(CONTEXT, 2 ** math.ceil(math.log2(longest))))
        self._listen("starting vllm", 0, 1)
        server = self._options.server(self._candidate, self._context)
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


def _generation_defaults(path: Path, config: Any) -> Any:
    """What transformers' ``generate`` takes where it is told nothing else."""
    from transformers import GenerationConfig

    file = path / "generation_config.json"
    if file.is_file():
        with in_words(lambda why: f"{file} is refused by transformers: {why}; repair it."):
            return GenerationConfig.from_pretrained(path, local_files_only=True)
    return GenerationConfig.from_model_config(config)
