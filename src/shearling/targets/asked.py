"""What a user may ask of a cut's result: speed, latency, memory, parameters, under a load."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import partial

from shearling.errors import ShearlingError
from shearling.evaluate.engines import NAMES, Places
from shearling.files.amounts import BYTES, amount, pointed
from shearling.model.checkpoint import Checkpoint
from shearling.model.dtypes import torch_dtype
from shearling.model.loading import check_positive, check_threads, longest_input
from shearling.pruning.plan import parse_active, parse_params
from shearling.table.cost import kv_cache_bytes, state_bytes
from shearling.table.values import Shape
from shearling.targets.search import Limit

MOST_CONTEXT = 4096  # tokens whose keys and values are counted, unless the user says


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetLoad:
    """What a result is to run, and how it is timed.

    Attributes:
        engine: ``transformers``, ``llama.cpp`` or ``vllm``.
        places: where the last two are.
        batch, prompt, new: sequences, prompt tokens, tokens after them.
        context: tokens of each sequence whose keys and values ``footprint`` counts; None takes the
            model's positions, at most 4,096.
        dtype, device: as in :class:`shearling.evaluate.speed.Workload`.
        threads: on a CPU; None leaves the engine's own choice.
        repeats: timed rounds.
    """

    engine: str = "transformers"
    places: Places | None = None
    batch: int = 1
    prompt: int = 128
    new: int = 64
    context: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None
    repeats: int = 5

    def check(self) -> None:
        """Raise ShearlingError for what cannot be timed."""
        if self.engine not in NAMES:
            raise ShearlingError(
                f"--engine {self.engine!r} was given, but one of {', '.join(NAMES)} was expected."
            )
        check_positive(
            batch=self.batch, prompt=self.prompt, new=self.new, context=self.context,
            repeats=self.repeats,
        )  # fmt: skip
        check_threads(self.threads)

    def context_of(self, source: Checkpoint) -> int:
        """Tokens of each sequence that memory is counted for.

        Raises:
            ShearlingError: more than the model has positions for.
        """
        limit = longest_input(source.config)
        if self.context is not None and limit is not None and self.context > limit:
            raise ShearlingError(
                f"--context {self.context} was given, but {source.name} has {limit} positions; "
                f"give at most {limit}."
            )
        return self.context or min(limit or MOST_CONTEXT, MOST_CONTEXT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What a result is to reach, all of it together.

    Attributes:
        speed: decode tokens a second, over the source's, such as ``"1.3x"``.
        latency: of a new token (one step of the whole batch), such as ``"20ms"``.
        footprint: weights and KV cache, such as ``"8GB"``, or ``"0.7x"`` of the source's.
        params, active_params: as in :class:`shearling.pruning.prune.Size`.
        load: under which.

    Raises:
        ShearlingError: nothing is asked for, or a load that cannot be.
    """

    speed: str | None = None
    latency: str | None = None
    footprint: str | None = None
    params: str | int | None = None
    active_params: str | int | None = None
    load: TargetLoad = field(default_factory=TargetLoad)

    def __post_init__(self) -> None:
        """Refuse what asks for nothing."""
        if not self.wanted:
            raise ShearlingError("no target was given; give --speed 1.3x or --footprint 8GB.")
        self.load.check()
        for text, read in ((self.speed, parse_speed), (self.latency, parse_latency)):
            if text is not None:
                read(text)

    @property
    def wanted(self) -> dict[str, str]:
        """What is asked for, as it was given."""
        given = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "load"}
        return {name: str(value) for name, value in given.items() if value is not None}

    @property
    def timed(self) -> bool:
        """Whether something has to be timed."""
        return self.speed is not None or self.latency is not None

    def counted(self, source: Checkpoint) -> list[Limit]:
        """The limits that follow from the table alone (ShearlingError for unreadable ones)."""
        self.load.context_of(source)
        limits = []
        if self.footprint is not None:
            whole = footprint(source, source.shape, self.load)
            most = parse_footprint(self.footprint, whole)
            of = partial(footprint, source, load=self.load)
            limits.append(Limit("--footprint", self.footprint, most, of, _bytes_up))
        if self.params is not None:
            most, text = parse_params(str(self.params), source.parameters), str(self.params)
            limits.append(Limit("--params", text, most, partial(_count, source, False), _whole))
        if self.active_params is not None:
            text = str(self.active_params)
            of = partial(_count, source, True)
            limits.append(Limit("--active-params", text, parse_active(text, source), of, _whole))
        return limits

    def seconds(self, whole: float) -> dict[str, float]:
        """Seconds of a step that may be taken at most, by target; ``whole`` are the source's."""
        limits = {}
        if self.speed is not None:
            limits["speed"] = whole / parse_speed(self.speed)
        if self.latency is not None:
            limits["latency"] = parse_latency(self.latency)
        return limits


def parse_speed(text: str) -> float:
    """Read ``1.3x`` (ShearlingError unless it is that, and above 1)."""
    given = amount(text, ("x",))
    if given is None or not given[0] > 1:
        raise ShearlingError(
            f"--speed {text!r} was given, but a factor above 1 of the source's decode speed was "
            f"expected, such as 1.3x{pointed(text)}."
        )
    return float(given[0])


def parse_latency(text: str) -> float:
    """Read ``20ms`` or ``0.02s`` as seconds (ShearlingError for anything else)."""
    given = amount(text, ("ms", "s"))
    if given is None or not given[0]:
        raise ShearlingError(
            f"--latency {text!r} was given, but a time for each new token was expected, such as "
            f"20ms{pointed(text)}."
        )
    return float(given[0] / (1000 if given[1] == "ms" else 1))


def parse_footprint(text: str, whole: int) -> int:
    """Read ``8GB``, ``512MiB`` or ``0.7x`` (of ``whole``) as bytes.

    Raises:
        ShearlingError: not of that form, or no less than the source takes.
    """
    units = {"x": whole, **BYTES}
    given = amount(text, units)
    if given is None:
        raise ShearlingError(
            f"--footprint {text!r} was given, but a size such as 8GB or a share such as 0.7x was "
            f"expected{pointed(text)}."
        )
    number, unit = given
    most = int(number * units[unit])
    if not 0 < most < whole:
        raise ShearlingError(
            f"--footprint {text} asks for {named_bytes(most)}, but the model takes "
            f"{named_bytes(whole)} already; give {'less' if most else 'more'}, such as 0.7x."
        )
    return most


def footprint(source: Checkpoint, shape: Shape, load: TargetLoad) -> int:
    """Bytes of a cut's weights in the types they are stored in, and of its KV cache in 16 bits.

    Keys and values of ``context`` tokens of every sequence of the batch; linear attention keeps a
    state instead. Of blocks of several kinds, those that take most are counted.
    """
    layout = source.layout.heaviest(shape)
    sizes = {
        row.name: torch_dtype(source.dtypes[name]).itemsize
        for name, (row, _) in source.layout.places(source.shape).items()
        if name in source.dtypes
    }
    weights = sum(layout.numbers(row, shape) * sizes[row.name] for row in layout.stored)
    around = 0 if source.wrapping is None else source.wrapping.bytes
    tokens = load.batch * load.context_of(source)
    cached = kv_cache_bytes(layout, shape, tokens) + load.batch * state_bytes(layout, shape)
    return weights + around + cached


def named_bytes(size: float) -> str:
    """Bytes as a user would give them."""
    return f"{size / 1e9:.2f}GB" if size >= 1e9 else f"{size / 1e6:.1f}MB"


def named_ms(seconds: float) -> str:
    """Seconds as milliseconds, in three digits or more."""
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def rounded(value: float | Fraction, digits: int, *, up: bool) -> str:
    """A number that a user may ask for where ``value`` is what can be had: on its safe side."""
    scale = 10**digits
    return f"{(math.ceil if up else math.floor)(Fraction(value) * scale) / scale:.{digits}f}"


def _count(source: Checkpoint, active: bool, shape: Shape) -> int:
    return source.layout.heaviest(shape, active=active).count(shape, active=active)


def _bytes_up(size: float, more: int) -> str:
    if size >= 1e9:
        return f"{rounded(Fraction(size) / 10**9, 2 + more, up=True)}GB"
    return f"{rounded(Fraction(size) / 10**6, 1 + more, up=True)}MB"


def _whole(number: float, more: int) -> str:
    return f"{number:,.0f}"
