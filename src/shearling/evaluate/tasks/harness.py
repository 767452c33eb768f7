"""lm-eval's model and tasks, driven from Python: nothing drawn, no more computed than counts.

Imported only where tasks are run: lm-eval takes seconds to import. Legend: B requests a batch,
T tokens of the longest, K positions whose logits are computed, V vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import json
import logging
import random
from collections.abc import Generator, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from shearling.data.seeds import folded
from shearling.engine.products import fast_products
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent

BATCH_TOKENS = 2048  # at a time, where no batch size is asked for
LOGITS_BYTES = 512 * 2**20
GENERATED_AT_A_TIME = 8
SEED = 1234  # of lm-eval's command line


class CountedLM(HFLM):
    """lm-eval's wrapper of a transformers model, which notes what it is asked and how far it is.

    Attributes:
        truncated: requests that lost their beginning, since :meth:`begin`.
        answers: texts that were written since then, of ``answer_tokens`` tokens in all.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, batch: int | str, progress: Progress = silent
    ) -> None:
        """Wrap a model; ``batch`` is lm-eval's."""
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        self._listen = progress
        self.begin("asking")

    def begin(self, stage: str) -> None:
        """Start a task: what it asks, and how much was cut off, is counted from here."""
        self._stage = stage
        self._asked = hashlib.sha256()
        self._count(0, 0)
        self.truncated = 0
        self.answers, self.answer_tokens = 0, 0

    def close(self) -> None:
        """Give back what it holds outside of this process."""

    @property
    def asked(self) -> str:
        """SHA-256 of every prompt and answer asked since :meth:`begin`, in order."""
        return self._asked.hexdigest()

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """As lm-eval's, noted, and with no bar of its own."""
        self._note(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """As lm-eval's, noted, and with no bar of its own."""
        self._note(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """As lm-eval's, noted, and with no bar of its own."""
        self._note(requests)
        self._count(len(requests), len(requests))
        written = super().generate_until(requests, disable_tqdm=True)
        self.answers += len(written)
        self.answer_tokens += sum(len(self.tok_encode(answer)) for answer in written)
        return written

    def _note(self, requests: Any) -> None:
        for request in requests:
            self._asked.update(json.dumps(request.args, default=str).encode())

    def _count(self, requests: int, work: int) -> None:
        """So many requests are asked now, and are so much work."""
        self._requests, self._work, self._done = requests, work, 0

    def _advance(self, amount: int) -> None:
        self._done += amount
        if self._work:
            # Time goes with tokens, and the longest come first, so that the share of requests
            # answered would tell too little of the time left.
            self._listen(self._stage, self._requests * self._done // self._work, self._requests)

    def _check_answer(self, answer: Sequence[int]) -> None:
        if len(answer) > self.max_length:
            raise ShearlingError(
                f"An answer of {len(answer)} tokens is longer than the model's "
                f"{self.max_length} positions, in {self._stage}; leave that task out for this "
                "model."
            )


class Scorer(CountedLM):
    """A transformers model in this process, run with no more computed than counts.

    Logits are computed from the first position that an answer needs, not of the whole prompt; a
    batch holds as many requests as fit ``BATCH_TOKENS`` unless a size is given; and progress goes
    to a listener. Answers are the same numbers that :class:`HFLM` gives, up to the order in which
    a product is summed.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, batch: int | None = None, progress: Progress = silent
    ) -> None:
        """Wrap a loaded model; ``batch`` requests at a time, or None to go by their length."""
        self._starts: dict[tuple[int, ...], int] = {}
        super().__init__(model, tokenizer, batch=batch or "auto", progress=progress)
        self._partial = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        vocab = model.config.get_text_config().vocab_size
        self._tokens = max(256, min(BATCH_TOKENS, LOGITS_BYTES // (4 * vocab)))

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> Any:
        starts: dict[tuple[int, ...], int] = {}
        for _, context, answer in requests:
            whole = context + answer
            self._check_answer(answer)
            self.truncated += len(whole) > self.max_length + 1
            fed = whole[-(self.max_length + 1) :][:-1]
            first = len(fed) - len(answer)
            key = _key(fed)
            starts[key] = min(starts.get(key, first), first)
        self._starts = starts
        self._count(len(requests), sum(map(len, starts)))
        scored = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        self._listen(self._stage, len(requests), len(requests))
        return scored

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> Any:
        keys = [_key(row) for row in inps.tolist()]
        starts = [self._starts.get(key, 0) for key in keys]
        # lm-eval reckons an answer's place from the end of the positions it is given.
        keep = {"logits_to_keep": inps.shape[1] - min(starts)} if self._partial else {}
        with torch.no_grad():
            logits_BKV = self.model(inps, use_cache=False, **keep).logits
        self._advance(sum(map(len, keys)))
        return logits_BKV

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        written = super()._model_generate(context, *args, **kwargs)
        self._advance(len(context))
        return written

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Any]) -> int:
        """Requests a batch from this one on; they are sorted, so that this only rises."""
        _, context, answer = n_reordered_requests[pos]
        return max(1, self._tokens // (len(context) + len(answer)))

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        return GENERATED_AT_A_TIME


def run_task(
    scorer: CountedLM, task: Any, *, limit: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """lm-eval's results of one task or group of tasks.

    ``simple_evaluate`` does the same and then asks the machine's compilers and pip for versions,
    which takes longer than many a task.

    Args:
        task: what ``TaskManager.load`` gives; its shots are set already.
        limit: questions of each task, from the first; None asks all.
        seed: moves lm-eval's own seeds; 0 leaves those of its command line.

    Raises:
        ShearlingError: lm-eval cannot run the task with this model.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    with quiet(), fast_products():
        loaded = TaskManager(include_defaults=False).load([task])
        _seed(seed)
        for each in loaded["tasks"].values():
            if each.get_config("num_fewshot") is None:
                each.set_config(key="num_fewshot", value=0)
            each.set_fewshot_seed(seed=SEED + seed)
        try:
            results = evaluate(lm=scorer, task_dict=loaded, limit=limit, log_samples=False)
        except ShearlingError:
            raise
        except (AssertionError, ValueError) as error:
            raise ShearlingError(
                f"lm-eval cannot run {name_of(task)} with this model: "
                f"{' '.join(str(error).split()).rstrip('.') or 'an assertion failed'}."
            ) from error
    assert results is not None  # on the only rank there is
    return dict(results)


def _seed(seed: int) -> None:
    """Seed whatever a task of lm-eval's may draw from, 0 as its command line does."""
    random.seed(seed)
    np.random.seed(folded(SEED + seed, bits=32))
    torch.manual_seed(folded(SEED + seed))


def name_of(task: Any) -> str:
    """A task's or a group's name."""
    return getattr(task, "task_name", None) or task.name


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """lm-eval's log, its prints and the bars of datasets go nowhere; errors are raised."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        # lm-eval prints to stdout, where results go.
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _key(tokens: Sequence[int]) -> tuple[int, ...]:
    """A request's tokens without the zeros that lm-eval pads with."""
    end = len(tokens)
    while end and tokens[end - 1] == 0:
        end -= 1
    return tuple(tokens[:end])
