"""Defaults of a cut that are settled by what the source allows, and what is said of options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.choose import check_pattern
from shearling.pruning.missed import missed
from shearling.pruning.pattern import Pattern, pattern_of
from shearling.pruning.vocabulary.price import Documents, begin_with_words, hint
from shearling.repair.calibration import Calibration
from shearling.repair.experts import ExpertOptions
from shearling.repair.refit import HELD_OUT
from shearling.repair.rotate import refusal, require_rotatable
from shearling.scoring.registry import criteria_for, kinds
from shearling.scoring.score_experts import EXPERT_AXES
from shearling.table.axes import EXPERT_MLP, EXPERTS
from shearling.table.values import Keep, Shape

if TYPE_CHECKING:
    from shearling.pruning.prune import Criteria, Repairs
    from shearling.pruning.size import Size

Notify = Callable[[str], None]


def settle_size(
    size: Size, source: Checkpoint, read: Documents | None, notify: Notify
) -> tuple[Shape, Mapping[str, Any]]:
    """Every axis with its size after a cut, and what the manifest says of how that came about.

    ``read`` gives the text that words are chosen by.

    Raises:
        ShearlingError: it cannot be, or words are to go and there is no text to choose them by.
    """
    if not size.budgeted:
        if not size.account:
            given = {"--prefer": size.prefer, "--axes": size.axes}
            tell_ignored(notify, given, "the sizes are named")
        return size.after(source), size.account
    spending, (params, active) = size.spending(source), size.most(source)
    count = partial(source.layout.count, active=active)
    start, words = begin_with_words(source, spending, read, lambda shape: count(shape) <= params)
    if not active and spending.axes is None and (said := hint(source, read)):
        notify(said)
    account = {"vocabulary": words} if words else {}
    after = size.after(source, replace(spending, start=start))
    of = partial(source.layout.heaviest(source.shape, active=active).count, active=active)
    if short := missed(source, after, size.asked, params, of, "{:,.0f} parameters".format):
        notify(short)
    return after, account


def settle_words(
    refit: bool | None,
    source: Checkpoint,
    sizes: Sequence[Shape],
    text: Calibration | None,
) -> bool | None:
    """What the user says of a repair, or that there is none where only words go.

    What blocks compute of the words that stay is then what it was.
    """
    only = all(only_words(source.shape, after) for after in sizes)
    return False if refit is None and text is not None and only else refit


def only_words(before: Shape, after: Shape) -> bool:
    """Whether a cut takes words and nothing else."""
    return all(after[axis] == size for axis, size in before.items() if axis != "vocab")


def settle_repaired(refit: bool | None, text: Calibration | None, notify: Notify) -> bool:
    """Whether to repair: as the user says, or else wherever there is text enough."""
    if refit is False or (refit is None and text is None):
        return False
    if text is None:
        raise ShearlingError(
            "--refit runs the model on text; give --calibration FILE as well, or --no-refit."
        )
    if text.samples >= HELD_OUT:
        return True
    if refit:
        raise ShearlingError(
            f"--refit was given with --samples {text.samples}, but a repair needs at least "
            f"{HELD_OUT} to choose how strong it should be; raise --samples, or use --no-refit."
        )
    notify(
        f"the repair is left out, as it needs at least {HELD_OUT} calibration sequences and "
        f"--samples is {text.samples}."
    )
    return False


def settle_final_norm(fit: bool | None, *, repaired: bool, notify: Notify) -> bool:
    """Whether a repair fits the final norm's gain: unless the user says not to."""
    if not repaired:
        option = "--final-norm" if fit else "--no-final-norm"
        tell_ignored(notify, {option: fit}, "nothing is repaired")
    return fit is not False


def settle_experts(
    repairs: Repairs, source: Checkpoint, after: Shape, *, repaired: bool, notify: Notify
) -> ExpertOptions:
    """How experts are repaired; what is asked of experts that all stay is ignored, and told.

    Raises:
        ShearlingError: experts were to be merged without a repair, or while their neurons go.
    """
    given = {"--merge-experts": repairs.merge_experts or None, "--router": repairs.router or None}
    if after.get(EXPERTS) == source.shape.get(EXPERTS):
        tell_ignored(notify, given, "no experts go")
        return ExpertOptions()
    if not repaired:
        if repairs.merge_experts:
            raise ShearlingError(
                "--merge-experts compares experts on text and repairs what it merges; give "
                "--calibration FILE, and leave out --no-refit."
            )
        tell_ignored(notify, given, "nothing is repaired")
        return ExpertOptions()
    if repairs.merge_experts and after[EXPERT_MLP] < source.shape[EXPERT_MLP]:
        raise ShearlingError(
            f"--merge-experts was given, but {EXPERT_MLP} shrinks from {source.shape[EXPERT_MLP]} "
            f"to {after[EXPERT_MLP]}, and only whole experts can be averaged; leave one of the two "
            "out."
        )
    return ExpertOptions(router=repairs.router, merge=repairs.merge_experts)


def settle_pattern(
    source: Checkpoint, after: Shape, size: Size, criteria: Criteria, notify: Notify
) -> Pattern | None:
    """The pattern that is to be kept, if one is and there is any; what breaks it is refused."""
    if not criteria.keep_pattern:
        return None
    pattern = pattern_of(source.family, source.config)
    if pattern is None or after["layers"] == source.shape["layers"]:
        reason = "all blocks stay" if pattern else "its blocks are all of one kind to llama.cpp"
        tell_ignored(notify, {"--keep-pattern": True}, reason)
        return None
    check_pattern(pattern, after["layers"], size.remove)
    return pattern


def tell_pattern(source: Checkpoint, keep: Keep, notify: Notify) -> None:
    """Say that llama.cpp would take the blocks that stay for others, where it took all aright."""
    pattern, kept = pattern_of(source.family, source.config), keep.model.get("layers")
    if pattern is None or kept is None:
        return
    whole = range(len(pattern.kinds))
    if pattern.misread(source.config, kept) and not pattern.misread(source.config, whole):
        order = "sliding and full attention"
        if pattern.facts.unrotated is not None:
            order = "blocks with and without rotary positions"
        notify(
            f"the blocks that stay break the pattern of {order} that llama.cpp counts, so that "
            "`shearling export` will refuse the result; --keep-pattern avoids that."
        )


def settle_rotated(
    rotate: bool | None, source: Checkpoint, after: Shape, text: Calibration | None, notify: Notify
) -> bool:
    """Whether to rotate the stream: as the user says, or else wherever it is possible."""
    if after["hidden"] == source.shape["hidden"]:
        option = "--rotate" if rotate else "--no-rotate"
        tell_ignored(notify, {option: rotate}, "hidden stays")
        return False
    if rotate:
        require_rotatable(source)
        if text is None:
            raise ShearlingError(
                "--rotate takes the stream's axes from text; give --calibration FILE as well, or "
                "--no-rotate."
            )
        return True
    if rotate is None and text is not None:
        reason = refusal(source)
        if reason is None:
            return True
        notify(f"channels are cut as they are, without a rotation, because {reason}.")
    return False


def tell_unused(
    source: Checkpoint, after: Shape, criteria: Criteria, *, rotated: bool, notify: Notify
) -> None:
    """Refuse criteria that are unknown or too many; say which options speak of what is not cut."""
    by = criteria.by
    criteria_for(by, source, repaired=False)
    shrunk = {axis for axis in after if after[axis] < source.shape[axis]}
    cut = {"blocks"} if "layers" in shrunk else set()
    chosen_by_none = {"layers", "vocab", *EXPERT_AXES, *(["hidden"] if rotated else [])}
    cut |= {"units"} if shrunk - chosen_by_none else set()
    cut |= {"experts"} if shrunk & set(EXPERT_AXES) else set()
    for name in (part.strip() for part in by.split(",")) if by is not None else ():
        if cut.isdisjoint(kinds(name)):
            unit = kinds(name)[0]
            tell_ignored(notify, {f"--by {name}": name}, f"no {unit} are to be chosen")
    if "layers" not in shrunk:
        given = {"--scores": criteria.scores} | criteria.protect_given
        tell_ignored(notify, given, "all blocks stay")


def tell_ignored(notify: Notify, options: Mapping[str, Any], reason: str) -> None:
    """Say which of the options given have no effect, and why."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        notify(f"{', '.join(given)} ignored: {reason}.")
