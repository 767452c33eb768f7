"""All abilities of one model, as a result file."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shearling.data.bos import opening
from shearling.data.seeds import LARGEST
from shearling.errors import ShearlingError
from shearling.evaluate.abilities.items import Item
from shearling.evaluate.abilities.kinds import ABILITIES, beginning
from shearling.evaluate.abilities.results import Abilities, AbilityFigures
from shearling.evaluate.abilities.scoring import Scored, score_items
from shearling.evaluate.degeneration import BATCH, continue_all, repetition
from shearling.evaluate.generation import Sampling
from shearling.evaluate.intervals import around, standard_error, wilson
from shearling.files.progress import Progress, silent
from shearling.model.loading import check_positive
from shearling.model.manifest import ref, versions
from shearling.model.subject import OpenedModel

WRITING = "free writing"
TEXTS, NEW_TOKENS, TEMPERATURE, TOP_P = 16, 64, 0.8, 0.95


@dataclass(frozen=True)
class Asking:
    """What is asked, and how.

    Attributes:
        seed: of the items and of free writing.
        limit: ask the first so many items of each ability; None asks all.
        bos: whether a BOS stands before each prompt; None follows the tokenizer.
        batch: items at a time; None goes by their length. No figure depends on it.

    Raises:
        ShearlingError: a setting out of range.
    """

    seed: int = 0
    limit: int | None = None
    bos: bool | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be asked."""
        check_positive(limit=self.limit, batch=self.batch)
        if not 0 <= self.seed <= LARGEST:
            raise ShearlingError(f"seed is {self.seed}, but it must be from 0 to {LARGEST}.")

    def items(self) -> dict[str, list[Item]]:
        """Every ability's, by its name."""
        return {one.name: one.items(self.seed, self.limit) for one in ABILITIES}

    def beginnings(self) -> list[str]:
        """Of texts to be written on."""
        count = min(TEXTS, self.limit or TEXTS)
        return [beginning(Random(f"shearling {self.seed} {WRITING} {n}"), n) for n in range(count)]

    def sampling(self) -> Sampling:
        """Of free writing."""
        return Sampling(NEW_TOKENS, TEMPERATURE, TOP_P, self.seed)

    def digest(self) -> str:
        """SHA-256 of all that is asked, a BOS aside."""
        items = [[one.prompt, one.answer] for of in self.items().values() for one in of]
        asked = [items, self.beginnings(), NEW_TOKENS, self.sampling().as_json()]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def measure_abilities(
    subject: OpenedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asking: Asking | None = None,
    *,
    dtype: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """The ``abilities`` file of a model in memory.

    Args:
        subject: the model as it was opened.
        asking: what is asked; by default all, of seed 0.
        dtype: what the model computes in, for the file.

    Raises:
        ShearlingError: as :func:`shearling.evaluate.abilities.scoring.score_items`.
    """
    asking = asking or Asking()
    started = time.perf_counter()
    by_name = asking.items()
    items = [item for of in by_name.values() for item in of]
    scored = score_items(
        model, tokenizer, items, bos=asking.bos, batch=asking.batch, progress=progress
    )
    answers = iter(scored)
    figures = {name: figures_of([next(answers) for _ in of]) for name, of in by_name.items()}
    figures[WRITING] = _free_writing(model, tokenizer, asking, progress)
    return Abilities(
        model=ref(subject),
        seed=asking.seed,
        limit=asking.limit,
        bos=opening(tokenizer, asking.bos) is not None,
        asked_sha256=asking.digest(),
        abilities=figures,
        sampling=asking.sampling().as_json(),
        seconds=time.perf_counter() - started,
        dtype=dtype,
        versions=versions(),
    ).to_json()


def figures_of(scored: Sequence[Scored]) -> AbilityFigures:
    """Of the items of one ability."""
    rate = statistics.fmean(one.exact for one in scored)
    losses = tuple(one.nll for one in scored)
    nll = statistics.fmean(losses)
    return AbilityFigures(
        exact=rate,
        exact_interval=wilson(rate, len(scored)),
        nll=nll,
        nll_interval=around(nll, standard_error(losses)),
        tokens=statistics.fmean(one.tokens for one in scored),
        expected_tokens=statistics.fmean(one.expected_tokens for one in scored),
        losses=losses,
        lengths=tuple(one.expected_tokens for one in scored),
    )


def _free_writing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asking: Asking, progress: Progress
) -> AbilityFigures:
    """How much of sampled text repeats. All prompts are as long as the shortest."""
    bos = opening(tokenizer, asking.bos)
    rows = [
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for text in asking.beginnings()
    ]
    length = min(map(len, rows))
    before = [] if bos is None else [bos]
    prompts_NP = torch.tensor([[*before, *row[:length]] for row in rows])
    texts = continue_all(
        model, tokenizer, prompts_NP, asking.sampling(), batch=asking.batch or BATCH,
        progress=progress,
    )  # fmt: skip
    losses = tuple(repetition([text])["repetition_4"] or 0.0 for text in texts)
    return AbilityFigures(
        repetition_4=statistics.fmean(losses),
        tokens=statistics.fmean(map(len, texts)),
        losses=losses,
    )
