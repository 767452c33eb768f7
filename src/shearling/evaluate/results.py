"""What measuring a model leaves behind: the result files of the kinds that models are judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from shearling.files.results import Misfit, Name, ResultFile, entry
from shearling.model.refs import ModelRef

Interval = Annotated[tuple[float, float], "a list of two numbers"]


@dataclass(frozen=True)
class Evaluation(ResultFile):
    """Perplexity of one model on one text."""

    kind: ClassVar[str] = "evaluation"
    written_by: ClassVar[str] = "`eval`, `demo`, `compare`"

    model: ModelRef = entry()
    text: Name = entry("the name of the file or directory")
    window: int = entry("tokens")
    windows: int | None = entry(absent=None)
    bos: bool = entry("whether the BOS token stands before each window", absent=False)
    tokens: int = entry("predicted")
    nll: float = entry("mean, nats a token")
    perplexity: float = entry()
    seconds: float | None = entry("of the model alone", absent=None)


@dataclass(frozen=True)
class Sample:
    """What a model said to one prompt."""

    prompt: str = entry()
    text: str = entry("the continuation alone")


@dataclass(frozen=True)
class Generations(ResultFile):
    """What one model says to some prompts."""

    kind: ClassVar[str] = "generations"
    written_by: ClassVar[str] = "`eval --prompt`, `demo`, `compare`"

    model: ModelRef = entry()
    sampling: Any = entry('`{"method": "greedy"}`, or `temperature`, `top_p`, `seed`', absent=None)
    max_new_tokens: int | None = entry(absent=None)
    dtype: str | None = entry("that the model computed in", absent=None)
    samples: tuple[Sample, ...] = entry()


@dataclass(frozen=True)
class Curve:
    """Perplexity as one criterion's order of removal is followed."""

    criterion: str = entry()
    removed: tuple[tuple[int, ...], ...] = entry("blocks, more from one to the next")
    perplexity: tuple[float, ...] = entry("without each of these; null where it is no number")

    def __post_init__(self) -> None:
        """Refuse a perplexity too few or too many."""
        if len(self.perplexity) != len(self.removed):
            raise Misfit(
                "perplexity",
                f"as many numbers as removed has lists, {len(self.removed)},",
                list(self.perplexity),
            )


@dataclass(frozen=True)
class Damage(ResultFile):
    """Curves measured on one text."""

    kind: ClassVar[str] = "damage"
    written_by: ClassVar[str] = "`demo`"

    model: ModelRef = entry()
    text: Name = entry("the name of the file or directory")
    window: int | None = entry("tokens", absent=None)
    windows: int | None = entry(absent=None)
    bos: bool = entry("whether the BOS token stands before each window", absent=False)
    curves: tuple[Curve, ...] = entry()


@dataclass(frozen=True)
class Spread:
    """A repeated measurement."""

    median: float = entry()
    min: float = entry()
    max: float = entry()


@dataclass(frozen=True)
class BenchRun:
    """Speed and memory of one model in one cell of the grid."""

    model: ModelRef = entry()
    engine: Name = entry("runs of two engines do not compare", absent="transformers")
    engine_version: str | None = entry(absent=None)
    weights: str | None = entry("what they are held in", absent=None)
    threads: int | None = entry(absent=None)
    batch: int = entry()
    prompt: int = entry("tokens")
    new: int = entry("tokens")
    repeats: int = entry("rounds")
    first_token_ms: Spread | None = entry(absent=None)
    ms_per_token: Spread | None = entry(absent=None)
    prefill_tokens_per_s: Spread = entry()
    decode_tokens_per_s: Spread = entry()
    peak_memory_bytes: int | None = entry(absent=None)


@dataclass(frozen=True)
class Bench(ResultFile):
    """Speed and memory of several models, timed in turns."""

    kind: ClassVar[str] = "bench"
    written_by: ClassVar[str] = "`bench`, `demo`, `compare`"

    machine: Any = entry(
        "`cpu`, `cores`, `memory_bytes`, `threads`, `dtype`, `device`, versions", absent=None
    )
    runs: tuple[BenchRun, ...] = entry()
    ratios: tuple[dict[str, Any], ...] = entry(
        "of each model against the first, paired round by round", absent=()
    )
    budget_notes: tuple[str, ...] = entry(
        "sentences on what a budget of time left out", absent=(), omit=True
    )


@dataclass(frozen=True)
class TaskResult:
    """One task as one model was asked it."""

    metrics: dict[str, Any] = entry("with lm-eval's names; null where it gave no number")
    primary: str | None = entry("the metric that counts", absent=None)
    shots: int | None = entry(absent=None)
    samples: int | None = entry("questions asked", absent=None)
    task_version: Any = entry(absent=None)
    limit: int | None = entry("of questions", absent=None)
    seconds: float | None = entry(absent=None)
    batch: int | None = entry(absent=None)
    prompt_sha256: str | None = entry("of all that was asked", absent=None)
    answer_tokens: float | None = entry(
        "the mean length of what the model wrote, up to where the task ends an answer",
        absent=None, omit=True,
    )  # fmt: skip
    truncated: int | None = entry("questions that were cut to the model's length", absent=None,
                                  omit=True)  # fmt: skip
    data_sha256: str | None = entry("of a file of questions", absent=None, omit=True)


@dataclass(frozen=True)
class TaskResults(ResultFile):
    """A suite of tasks, asked of one model."""

    kind: ClassVar[str] = "tasks"
    written_by: ClassVar[str] = "`eval --suite`, `eval --tasks`, `compare`"

    model: ModelRef = entry()
    suite: Name = entry()
    tasks: dict[str, TaskResult] = entry()
    average: float | None = entry("of the primary metrics", absent=None)
    versions: dict[str, Any] = entry(absent={})
    seed: int | None = entry(absent=None)
    dtype: str | None = entry(absent=None)
    batch: int | None = entry(absent=None)
    engine: Name = entry("figures of two engines do not compare", absent="transformers")
    engine_version: str | None = entry("of vllm", absent=None)


@dataclass(frozen=True)
class Repetition:
    """How much sampled text repeats itself; shares of one, None where not measured."""

    distinct: dict[str, float | None] = entry(
        "share of 1-, 2- and 3-grams that differ, by their length", absent={}
    )
    repetition_4: float | None = entry(
        "share of 4-grams that stood in the same text before", absent=None
    )
    loops: float | None = entry("share of texts that end in a loop", absent=None)


@dataclass(frozen=True)
class Degeneration(ResultFile):
    """Repetition of one model's continuations, beside that of the text that people wrote."""

    kind: ClassVar[str] = "degeneration"
    written_by: ClassVar[str] = "`eval --degeneration`, `compare`"

    model: ModelRef = entry()
    text: Name = entry("the name of the file or directory")
    prompts: int | None = entry(absent=None)
    prompt_tokens: int | None = entry("without BOS", absent=None)
    bos: bool = entry("whether each prompt follows the BOS token", absent=False)
    new_tokens: int | None = entry(absent=None)
    sampling: Any = entry("as of `generations`", absent=None)
    distinct: dict[str, float | None] = entry(
        "share of 1-, 2- and 3-grams that differ, by their length", absent={}
    )
    repetition_4: float | None = entry(
        "share of 4-grams that stood in the same text before", absent=None
    )
    loops: float | None = entry("share of continuations that end in a loop", absent=None)
    reference: Repetition | None = entry("the same of the text's own continuation", absent=None)

    @property
    def written(self) -> Repetition:
        """Of what the model wrote."""
        return Repetition(distinct=self.distinct, repetition_4=self.repetition_4, loops=self.loops)


@dataclass(frozen=True)
class Judgement(ResultFile):
    """How often a judge preferred what ``a`` said to what ``b`` said; ties count half."""

    kind: ClassVar[str] = "judgement"
    written_by: ClassVar[str] = "`judge`"

    a: ModelRef = entry("`name` and `fingerprint`")
    b: ModelRef = entry("`name` and `fingerprint`")
    judge: Name = entry()
    endpoint: str | None = entry("its host", absent=None)
    judge_options: Any = entry("that were sent with each request", absent=None)
    prompts: int | None = entry(absent=None)
    wins: int = entry("of a")
    ties: int = entry()
    losses: int = entry("of a")
    unreadable: int | None = entry("prompts with a verdict that could not be read", absent=None)
    identical: int | None = entry("ties because both answers are the same text", absent=None)
    unreadable_verdicts: int | None = entry("single replies, two a prompt", absent=None)
    first_preferred: float | None = entry(
        "share of verdicts for the answer shown first", absent=None
    )
    win_rate: float | None = entry("of a; null where no verdict could be read")
    interval: Interval | None = entry("of 95 %", absent=None)
    prompt_sha256: str | None = entry("of the judge's template", absent=None)
    prompts_file: Any = entry("`name` and `sha256`", absent=None)
    sampling: Any = entry("of the answers", absent=None)
    versions: dict[str, Any] = entry(absent={})
