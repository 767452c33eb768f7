"""The two that are compared: a model that answers here, or answers made elsewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from shearling.errors import ShearlingError
from shearling.evaluate.generation import Sampling, encode, generate
from shearling.files.progress import Progress
from shearling.files.writer import file_digest
from shearling.judge.kept import KeptAnswer, KeptLines, key_of
from shearling.judge.prompts import read_answers
from shearling.model.loading import load_model
from shearling.model.subject import open_subject


class Side(Protocol):
    """A or B."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    @property
    def fingerprint(self) -> str:
        """What tells it from all others."""
        ...

    @property
    def parameters(self) -> int:
        """Of the model; none where there is none to run."""
        ...

    def run_on(self, device: str, dtype: str) -> None:
        """Answer there, and compute in that."""
        ...

    def missing(self, prompts: Sequence[str]) -> int:
        """How many prompts are still to be answered."""
        ...

    def answers(self, prompts: Sequence[str], progress: Progress) -> list[str]:
        """An answer to each prompt, in their order."""
        ...


@dataclass(frozen=True)
class File:
    """Answers in a ``.jsonl``, to all prompts and maybe more."""

    file: Path
    found: dict[str, str]

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.file.stem

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the file."""
        return file_digest(self.file)

    @property
    def parameters(self) -> int:
        """None are run."""
        return 0

    def run_on(self, device: str, dtype: str) -> None:
        """Nothing is run."""

    def missing(self, prompts: Sequence[str]) -> int:
        """None, or a ShearlingError that shows the first prompt without an answer."""
        for prompt in prompts:
            if prompt not in self.found:
                raise ShearlingError(
                    f"{self.file} has no answer to the prompt {_short(prompt)!r}; it must answer "
                    "every prompt, in the same words."
                )
        return 0

    def answers(self, prompts: Sequence[str], progress: Progress) -> list[str]:
        """As they are."""
        self.missing(prompts)
        return [self.found[prompt] for prompt in prompts]


class Answering:
    """A model; what it has answered is kept in a file of the directory ``kept``."""

    def __init__(self, model: str, kept: Path, sampling: Sampling, dtype: str) -> None:
        """Open the model; its weights are read only if an answer is missing."""
        self._subject = open_subject(model)
        self._sampling, self._dtype, self._device = sampling, dtype, "cpu"
        name = re.sub(r"[^\w.-]+", "-", self.name)
        self.kept = KeptLines(kept / f"{name}-{self.fingerprint[:12]}.jsonl", KeptAnswer)

    @property
    def name(self) -> str:
        """The model's."""
        return self._subject.name

    @property
    def fingerprint(self) -> str:
        """The model's."""
        return self._subject.fingerprint

    @property
    def parameters(self) -> int:
        """The model's."""
        return self._subject.parameters

    def run_on(self, device: str, dtype: str) -> None:
        """Answer on another device than the processor, or in another type."""
        self._device, self._dtype = device, dtype

    def missing(self, prompts: Sequence[str]) -> int:
        """How many answers are not kept."""
        return sum(self.kept.get(self._key(prompt)) is None for prompt in prompts)

    def answers(self, prompts: Sequence[str], progress: Progress) -> list[str]:
        """Answer what is missing, keeping each answer as soon as it is there.

        Raises:
            ShearlingError: the model cannot be loaded, or a prompt is too long for it.
        """
        missing = [prompt for prompt in prompts if self.kept.get(self._key(prompt)) is None]
        if missing:
            self._answer(missing, progress)
        return [self._kept(prompt) for prompt in prompts]

    def _answer(self, missing: Sequence[str], progress: Progress) -> None:
        model = load_model(self._subject.path, dtype=self._dtype, device=self._device)
        tokenizer = self._subject.tokenizer()
        chat = bool(tokenizer.chat_template)
        for prompt in missing:  # before hours are spent on those that fit
            encode(model, tokenizer, prompt, self._sampling.max_new_tokens, chat=chat)
        stage = f"answers of {self.name}"
        for i, prompt in enumerate(missing):
            progress(stage, i, len(missing))
            [sample] = generate(model, tokenizer, [prompt], sampling=self._sampling, chat=chat)
            record = {"prompt": prompt, "answer": sample["text"], "chat": chat}
            self.kept.add(self._key(prompt), record | asdict(self._sampling))
        progress(stage, len(missing), len(missing))

    def _key(self, prompt: str) -> str:
        return key_of(self.fingerprint, prompt, asdict(self._sampling), self._dtype)

    def _kept(self, prompt: str) -> str:
        line = self.kept.get(self._key(prompt))
        assert line is not None
        return str(line["answer"])


def open_side(model: str, kept: Path, sampling: Sampling, dtype: str) -> Side:
    """A model, or a ``.jsonl`` of answers made elsewhere.

    Raises:
        ShearlingError: neither can be opened.
    """
    path = Path(model)
    if path.suffix == ".jsonl" and not path.is_dir():
        return File(path, read_answers(path))
    return Answering(model, kept, sampling, dtype)


def _short(prompt: str, most: int = 60) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= most else f"{line[: most - 2]} …"
