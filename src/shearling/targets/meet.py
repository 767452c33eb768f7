"""From targets to a shape that meets them on this machine, before anything is cut.

What the table counts (parameters, bytes) is exact. What takes time is measured: a few shapes are
timed and a cost model fitted, a shape is searched for and timed itself, and where it misses, the
model is corrected by that and searched again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.plan import MULTIPLES, Spending, width_floor
from shearling.pruning.vocabulary.price import Documents, begin_with_words, hint
from shearling.table.cost import flops_per_token
from shearling.table.values import Shape
from shearling.targets.asked import (
    Targets,
    footprint,
    named_ms,
    parse_latency,
    parse_speed,
    rounded,
)
from shearling.targets.costs import CostModel, TimedShape, fitted
from shearling.targets.say import unbought
from shearling.targets.search import Limit, SearchSpace, search
from shearling.targets.timing import MANY, Timer

ROUNDS = 3  # a plan, and two more where it misses
WITHIN = 0.05  # of the time asked for
SHARE = 0.6  # of blocks, of neurons, in the shapes that are timed first
Notify = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """A shape that meets targets, and how it was found.

    Attributes:
        source: the model.
        targets: what was asked.
        space: where the shape was looked for.
        shape: the sizes after the cut.
        table: shapes that were timed, the source first; empty where nothing was.
        many: the first of them at another batch; empty where the engine cannot.
        costs: fitted to the table.
        tries: shapes that were planned and timed, with the seconds that had been predicted.
        words: what goes of the vocabulary, for the manifest.
        machine: what was timed on.
    """

    source: Checkpoint
    targets: Targets
    space: SearchSpace
    shape: Shape
    table: tuple[TimedShape, ...] = ()
    many: tuple[TimedShape, ...] = ()
    costs: CostModel | None = None
    tries: tuple[tuple[TimedShape, float], ...] = ()
    words: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def timed(self) -> TimedShape | None:
        """The planned shape as it was timed."""
        return next((one for one, _ in self.tries if one.shape == self.shape), None)

    def as_json(self) -> dict[str, Any]:
        """For the manifest: what was wanted, predicted and measured, by which table."""
        load = self.targets.load
        account: dict[str, Any] = {
            "wanted": self.targets.wanted,
            "prefer": self.space.spending.prefer,
            "shape": dict(self.shape),
            "measured": self.counted(),
            "load": {
                "engine": load.engine, "batch": load.batch, "prompt": load.prompt, "new": load.new,
                "context": load.context_of(self.source),
            },
        }  # fmt: skip
        if self.words:
            account["vocabulary"] = self.words
        if self.costs is None:
            return account
        timed = self.timed
        assert timed is not None
        predicted = {one.shape: seconds for one, seconds in self.tries}[self.shape]
        account["measured"] |= {
            "speed": timed.speed, "speed_min": timed.slowest, "speed_max": timed.fastest,
            "seconds_per_token": timed.seconds,
        }  # fmt: skip
        whole = self.table[0].seconds
        account["predicted"] = {"speed": whole / predicted, "seconds_per_token": predicted}
        account["costs"] = asdict(self.costs)
        account["table"] = [_row(one) for one in self.table]
        account["table_at_another_batch"] = [_row(one) for one in self.many]
        account["tries"] = [_row(one) | {"predicted": seconds} for one, seconds in self.tries]
        return account | {"machine": self.machine}

    def counted(self) -> dict[str, Any]:
        """What the table of the architecture says of the shape."""
        layout = self.source.layout.heaviest(self.shape)
        figures = {
            "parameters": layout.count(self.shape),
            "footprint_bytes": footprint(self.source, self.shape, self.targets.load),
        }
        if layout.routed:
            figures["active_parameters"] = layout.count(self.shape, active=True)
        return figures


def meet(
    source: Checkpoint,
    targets: Targets,
    spending: Spending,
    *,
    timer: Timer | None = None,
    documents: Documents | None = None,
    notify: Notify = lambda sentence: None,
) -> Plan:
    """The shape of least predicted damage that meets all targets, timed where they are of time.

    Args:
        source: the model.
        targets: what its cut is to reach.
        spending: what it may be taken from, and what is cared for most.
        timer: times shapes; needed for ``speed`` and ``latency``.
        documents: gives the text that words are chosen by.
        notify: told, in a sentence each, what the user should know.

    Raises:
        ShearlingError: targets that no legal shape meets (the nearest is named), words that are to
            go without a text, or whatever the timer raises.
    """
    limits = targets.counted(source)
    if spending.axes is None and (said := hint(source, documents)):
        notify(said)
    width = _width(source, targets)
    if not targets.timed:
        start, words = _begin(source, spending, documents, limits)
        space = SearchSpace(source, width, replace(spending, start=start))
        shape = search(space, limits)
        nearest = max(limits, key=lambda limit: limit.of(shape) / limit.most)
        if short := nearest.short(source, shape):
            notify(short)
        return Plan(source, targets, space, shape, words=words)
    assert timer is not None, "shapes are timed"
    return _Measuring(source, targets, spending, width, timer, notify).plan(limits, documents)


@dataclass(frozen=True)
class _Measuring:
    """Targets of time on their way to a shape."""

    source: Checkpoint
    targets: Targets
    spending: Spending
    width: str
    timer: Timer
    notify: Notify

    def plan(self, limits: list[Limit], documents: Documents | None) -> Plan:
        """Time, fit, search, and time what was found, at most three times."""
        _require_convertible(self.targets, self.spending)
        self._refuse_met()
        shapes = first_shapes(self.source, self.width, self.spending)
        table = self.timer(shapes)
        other = MANY if self.targets.load.batch < MANY else 1
        many = self._elsewhere(shapes, other)
        costs = fitted(table, self.width)
        within = [*limits, *self._of_time(costs, table[0].seconds)]
        start, words = _begin(self.source, self.spending, documents, within)
        space = SearchSpace(self.source, self.width, replace(self.spending, start=start))
        plan = Plan(
            self.source, self.targets, space, self.source.shape, tuple(table), tuple(many), costs,
            words=words, machine=self.timer.machine,
        )  # fmt: skip
        for line in unbought(table, many, self.source, self.targets.load, other):
            self.notify(line)
        return self._tried(plan, limits)

    def _elsewhere(self, shapes: list[Shape], batch: int) -> list[TimedShape]:
        """The shapes at another batch, to tell what smaller buys there; no target needs it."""
        try:
            return self.timer(shapes, batch=batch)
        except ShearlingError as error:  # another program of llama.cpp's, or more memory
            self.notify(f"nothing was timed with {batch} at a time: {error}")
            return []

    def _tried(self, plan: Plan, limits: list[Limit]) -> Plan:
        """The plan, its shape timed."""
        costs, tries = plan.costs, list(plan.tries)
        assert costs is not None
        whole = plan.table[0].seconds
        most = min(self.targets.seconds(whole).values())
        for _ in range(ROUNDS):
            try:
                shape = search(plan.space, [*limits, *self._of_time(costs, whole)])
            except ShearlingError:
                if not tries:
                    raise
                break
            if shape in [one.shape for one, _ in tries]:
                break
            if shape == self.source.shape:
                if not tries:
                    raise self._noise(costs.seconds(shape), whole, most)
                break
            _, timed = self.timer([shape])
            timed = replace(timed, seconds=whole / timed.speed)  # of the table's source
            tries.append((timed, costs.seconds(shape)))
            if abs(timed.seconds / most - 1) <= WITHIN:
                break
            costs = costs.corrected(timed)
        reached = [one for one, _ in tries if one.seconds <= (1 + WITHIN) * most]
        timed = (
            min(reached, key=lambda one: plan.space.damage(one.shape))
            if reached
            else min((one for one, _ in tries), key=lambda one: one.seconds)
        )
        if not reached:
            self.notify(
                f"{_asked(self.targets)} was not reached within {WITHIN:.0%}: the nearest that was "
                f"timed runs {timed.speed:.2f}x as fast as the source, at "
                f"{named_ms(timed.seconds)} ms a token."
            )
        return replace(plan, shape=timed.shape, tries=tuple(tries), costs=costs)

    def _refuse_met(self) -> None:
        """Time the source alone, and refuse a latency that it has (ShearlingError)."""
        if self.targets.latency is None:
            return
        (whole,) = self.timer([])
        if whole.seconds <= parse_latency(self.targets.latency):
            raise ShearlingError(
                f"--latency {self.targets.latency} was given, but {self.source.name} takes "
                f"{named_ms(whole.seconds)} ms a token already; give less, such as "
                f"{float(f'{800 * whole.seconds:.2g}'):g}ms."
            )

    def _noise(self, promised: float, whole: float, most: float) -> ShearlingError:
        """What was timed says that the source, which is too slow, is fast enough."""
        return ShearlingError(
            f"{_asked(self.targets)} needs {named_ms(most)} ms a token, and the times of other "
            f"shapes promise that of {self.source.name} as it is ({named_ms(promised)} "
            f"ms), which was measured at {named_ms(whole)} ms: they scatter too much; more "
            "--repeats, more --new or a quieter machine would help."
        )

    def _of_time(self, costs: CostModel, whole: float) -> list[Limit]:
        """Limits on the seconds of a step, by a cost model."""
        says: dict[str, Callable[[float, int], str]] = {
            "speed": lambda seconds, more: f"{rounded(whole / seconds, 2 + more, up=False)}x",
            "latency": lambda seconds, more: f"{rounded(1e3 * seconds, 2 + more, up=True)}ms",
        }
        return [
            Limit(f"--{name}", self.targets.wanted[name], most, costs.seconds, says[name])
            for name, most in self.targets.seconds(whole).items()
        ]


def promised_shape(source: Checkpoint, targets: Targets, spending: Spending) -> Shape:
    """The shape that would meet targets if time followed operations; nothing is timed.

    A latency says nothing before the machine is known. Where no shape would do, the source's own.
    """
    load, layout = targets.load, source.layout
    context = load.prompt + load.new // 2

    def flops(shape: Shape) -> float:
        return flops_per_token(layout.heaviest(shape), shape, context)

    limits = targets.counted(source)
    if targets.speed is not None:
        most = flops(source.shape) / parse_speed(targets.speed)
        limits.append(Limit("--speed", targets.speed, most, flops, lambda cost, more: str(cost)))
    try:
        return search(SearchSpace(source, _width(source, targets), spending), limits)
    except ShearlingError:
        return source.shape


def first_shapes(source: Checkpoint, width: str, spending: Spending) -> list[Shape]:
    """Shapes that tell parts of the cost apart: fewer blocks, a narrower width, and both.

    And one with fewer words, where those may go.
    """
    before, step = source.shape, MULTIPLES[width]
    shorter, narrower = {}, {}
    if spending.may_shrink("layers"):
        fewest = max(len(set(source.layout.kinds)), 1)
        shorter = {"layers": max(fewest, round(SHARE * before["layers"]))}
    if width_floor(source, width, spending) < before[width]:
        size = max(1, round(SHARE * before[width] / step)) * step
        narrower = {width: min(size, before[width])}
    changes = [shorter, narrower, shorter | narrower]
    if spending.axes is not None and "vocab" in spending.axes:
        changes.append({"vocab": max(1, round(SHARE * before["vocab"]))})
    shapes = dict.fromkeys(before.with_(**change) for change in changes)
    return [shape for shape in shapes if shape != before]


def _begin(
    source: Checkpoint,
    spending: Spending,
    documents: Documents | None,
    limits: Sequence[Limit],
) -> tuple[Shape, dict[str, Any]]:
    """The source's shape, without the cheapest words where these may go."""
    return begin_with_words(
        source, spending, documents, lambda shape: all(limit.holds(shape) for limit in limits)
    )


def _width(source: Checkpoint, targets: Targets) -> str:
    """What shrinks beside blocks: of a mixture its experts, or their neurons for speed."""
    if not source.layout.routed:
        return "mlp"
    return "expert_mlp" if targets.timed or targets.active_params is not None else "experts"


def _asked(targets: Targets) -> str:
    wanted = targets.wanted
    return " and ".join(
        f"--{name} {wanted[name]}" for name in ("speed", "latency") if name in wanted
    )


def _require_convertible(targets: Targets, spending: Spending) -> None:
    if targets.load.engine == "llama.cpp" and spending.axes and "vocab" in spending.axes:
        raise ShearlingError(
            "--axes vocab was given with --engine llama.cpp, whose converter refuses a vocabulary "
            "that was cut; leave vocab out, or time with another engine."
        )


def _row(timed: TimedShape) -> dict[str, Any]:
    return {
        "shape": dict(timed.shape), "seconds": timed.seconds, "speed": timed.speed,
        "slowest": timed.slowest, "fastest": timed.fastest,
    }  # fmt: skip
