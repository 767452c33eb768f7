"""Options of a cut's targets, and from targets to a size that `shearling prune` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shearling.commands.options import (
    LlamaCppPrograms,
    PlaceOptions,
    TextOptions,
    VllmProgram,
    note,
    warn,
    warn_ignored,
)
from shearling.errors import ShearlingError
from shearling.pruning.preferences import PREFERENCES

if TYPE_CHECKING:
    from shearling.engine.ranks import Ranks
    from shearling.model.checkpoint import Checkpoint
    from shearling.pruning.size import Size
    from shearling.table.values import Shape
    from shearling.targets.asked import Targets

_TIMING = "Of --speed and --latency:"


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """What the result is to reach, and under which load."""

    speed: Annotated[
        str | None,
        typer.Option(
            help="Decode speed over the source's on this machine, such as 1.3x; shapes with random "
            "weights are timed, and the one of least damage taken. With other targets, all are met."
        ),
    ] = None
    latency: Annotated[
        str | None, typer.Option(help="Time of a new token on this machine, such as 20ms.")
    ] = None
    footprint: Annotated[
        str | None,
        typer.Option(
            help="Memory of weights (as they are stored) and KV cache (16 bits) for --batch "
            "sequences of --context tokens, such as 8GB or 0.7x."
        ),
    ] = None
    prefer: Annotated[
        str | None,
        typer.Option(
            help=f"What a size or target cares for most: {', '.join(PREFERENCES)}. With speed, "
            "whole blocks give all that goes, else a third of it; default balanced."
        ),
    ] = None
    axes: Annotated[
        str | None,
        typer.Option(
            help="What a size or target may take from, such as layers,mlp,vocab; with vocab, words "
            "that the calibration text does not need go first. Default: blocks and neurons, or "
            "experts."
        ),
    ] = None
    engine: Annotated[str, typer.Option(help=f"{_TIMING} transformers, llama.cpp or vllm.")] = (
        "transformers"
    )
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time, for targets.")] = 1
    prompt: Annotated[int, typer.Option(min=1, help=f"{_TIMING} prompt tokens.")] = 128
    new: Annotated[int, typer.Option(min=1, help=f"{_TIMING} generated tokens.")] = 64
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of --footprint: tokens of each sequence; default the model's positions, at most "
            "4096.",
        ),
    ] = None
    repeats: Annotated[int, typer.Option(min=1, help=f"{_TIMING} timed rounds.")] = 5
    threads: Annotated[int | None, typer.Option(min=1, help=f"{_TIMING} CPU threads.")] = None
    llama_cpp: LlamaCppPrograms = None
    vllm: VllmProgram = None

    @property
    def given(self) -> dict[str, str | None]:
        """Targets that ask for more than a number of parameters."""
        return {
            "--speed": self.speed, "--latency": self.latency, "--footprint": self.footprint,
        }  # fmt: skip

    @property
    def asked(self) -> bool:
        """Whether there are such."""
        return any(text is not None for text in self.given.values())

    @property
    def loaded(self) -> dict[str, Any]:
        """By the names of the options, where the user said something of the load."""
        default = TargetOptions()
        names = ("engine", "batch", "prompt", "new", "context", "repeats", "threads")
        names += ("llama_cpp", "vllm")
        values = {name: (getattr(self, name), getattr(default, name)) for name in names}
        return {
            f"--{name.replace('_', '-')}": None if value == preset else value
            for name, (value, preset) in values.items()
        }


def spent(options: TargetOptions, named: Mapping[str, Any], *, several: bool) -> dict[str, Any]:
    """What :class:`shearling.pruning.size.Size` is told of how a budget is spread.

    Args:
        options: targets, of which it is said which have no effect.
        named: by option, sizes that are named themselves.
        several: whether several sizes are asked for.

    Raises:
        ShearlingError: sizes that do not go with targets.
    """
    if options.asked:
        target = next(name for name, text in options.given.items() if text is not None)
        given = [name for name, value in named.items() if value]
        if given:
            raise ShearlingError(
                f"{target} chooses a shape and {given[0]} names one; leave one of the two out."
            )
        if several:
            raise ShearlingError(
                f"{target} chooses one shape, and several sizes were asked for; give one size."
            )
    else:
        warn_ignored(options.loaded, "no target of speed, latency or footprint is given")
    return {"prefer": options.prefer, "axes": options.axes}


def met(
    source: Checkpoint,
    budget: Mapping[str, Any],
    options: TargetOptions,
    place: PlaceOptions,
    ranks: Ranks,
    text: TextOptions,
    check: Callable[[], None],
) -> Size:
    """The size that meets targets, as ``pruning`` takes it.

    Args:
        source: the model.
        budget: ``params`` and ``active_params`` that hold as well.
        options: targets.
        place: what computes.
        ranks: processes that share the work.
        text: that words are chosen by.
        check: refuses what else cannot be, before anything is timed.

    Raises:
        ShearlingError: targets that cannot be met, or an engine that is not installed.
    """
    from shearling.files.terminal import progress_bars
    from shearling.pruning.plan import Spending, parse_axes
    from shearling.pruning.preferences import require_preference
    from shearling.pruning.size import Size
    from shearling.targets import timing
    from shearling.targets.meet import meet

    targets = _targets(source, budget, options, place, ranks)
    targets.counted(source)  # raises
    check()
    axes = None if options.axes is None else parse_axes(options.axes, source)
    read = None if text.sources is None else partial(_documents, text, source)
    with progress_bars() as progress:
        timer = timing.EngineTimer(source, targets.load, progress) if targets.timed else None
        plan = meet(
            source, targets, Spending(require_preference(options.prefer), axes), timer=timer,
            documents=read, notify=note if targets.timed else warn,
        )  # fmt: skip
    changed = {axis: size for axis, size in plan.shape.items() if size != source.shape[axis]}
    return Size(shape=changed, account={"targets": plan.as_json()})


def _documents(text: TextOptions, source: Checkpoint) -> list[str]:
    from shearling.data.calibration import all_documents

    return all_documents(text.sources or (), source.tokenizer(), bos=text.bos)


def slight_cut(source: Checkpoint, options: TargetOptions) -> Shape:
    """The source with one block and a step of neurons less, as far as targets may take these.

    What refuses this cut refuses every other, so that nothing has to be timed to say so.
    """
    from shearling.pruning.plan import MULTIPLES, parse_axes
    from shearling.table.kinds import most_removable

    before, layout = source.shape, source.layout
    axes = ("layers", "expert_mlp" if layout.routed else "mlp")
    if options.axes is not None:
        axes = tuple(axis for axis in parse_axes(options.axes, source) if axis in axes)
    stays = {axis.name for axis in layout.axes if axis.rigid}
    if not most_removable(layout.kinds, before["layers"], ()):
        stays.add("layers")
    less = {axis: before[axis] - MULTIPLES.get(axis, 1) for axis in axes if axis not in stays}
    slight = before.with_(**{axis: size for axis, size in less.items() if size > 0})
    rules = source.family.legality(source.config)
    return slight if all(rule.holds(slight) for rule in rules) else before


def tell_preference(
    options: TargetOptions, source: Checkpoint, after: Shape, name: str = ""
) -> None:
    """One line on what a preference did, where both blocks and neurons go.

    Args:
        options: with the preference.
        source: the model.
        after: the sizes that were chosen.
        name: what the line begins with.
    """
    from shearling.pruning.plan import blocks_gave
    from shearling.pruning.preferences import require_preference

    share, prefer = blocks_gave(source, after), require_preference(options.prefer)
    if 0 < share < 1:
        note(
            f"{name}--prefer {prefer}: of what goes, whole blocks give {share:.0%} and neurons the "
            f"rest{PREFERENCES[prefer].costs}."
        )


def _targets(
    source: Checkpoint, budget: Mapping[str, Any], options: TargetOptions, place: PlaceOptions,
    ranks: Ranks,
) -> Targets:  # fmt: skip
    from shearling.evaluate.engines import Places
    from shearling.model.dtypes import name_of
    from shearling.targets.asked import TargetLoad, Targets

    if ranks.size > 1:
        raise ShearlingError(
            f"{ranks.size} processes were started, but targets are one process's work: each would "
            "time another shape; start one, or name the shape that it finds with --shape."
        )
    wish = place.wish(ranks)
    device = wish.torch_device()
    load = TargetLoad(
        engine=options.engine, places=Places(options.llama_cpp, options.vllm),
        batch=options.batch, prompt=options.prompt, new=options.new, context=options.context,
        dtype=name_of(wish.torch_dtype(device, source)), device=str(device),
        threads=options.threads, repeats=options.repeats,
    )  # fmt: skip
    return Targets(
        speed=options.speed, latency=options.latency, footprint=options.footprint,
        params=budget["params"], active_params=budget["active_params"], load=load,
    )  # fmt: skip
