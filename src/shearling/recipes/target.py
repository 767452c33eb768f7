"""How much is left, from what a recipe says: shares are of the recipe's source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shearling.engine.place import Wish
from shearling.errors import ShearlingError
from shearling.files.amounts import amount
from shearling.files.progress import Progress, silent
from shearling.model.checkpoint import Checkpoint
from shearling.model.dtypes import name_of
from shearling.pruning.plan import Spending, parse_params
from shearling.pruning.preferences import require_preference
from shearling.pruning.size import Size
from shearling.recipes.schema import TargetSection
from shearling.table.values import Shape
from shearling.targets import timing
from shearling.targets.asked import TargetLoad, Targets, footprint, parse_footprint
from shearling.targets.meet import Notify, meet, promised_shape

LOAD = ("engine", "batch", "prompt", "new", "context", "threads")


def size_of(
    target: TargetSection, source: Checkpoint, model: Checkpoint, *, depth_only: bool = False
) -> tuple[dict[str, Any], Shape]:
    """What ``Size`` is given, and every axis after the cut.

    Args:
        target: of one cut.
        source: of the recipe, of which shares are taken.
        model: what is cut: the source, or what was made of it.
        depth_only: only whole blocks go.

    Raises:
        ShearlingError: what no shape of the architecture meets; the nearest are named.
    """
    try:
        if target.targets:
            return _planned(target, source, model, depth_only=depth_only)
        given: dict[str, Any] = _absolute(target, source)
        if depth_only and "params" in given:
            given = {"layers": _depth_for(model, int(given["params"]))}
        after = Size(**given).after(model)
        model.family.check(model.config, after)
    except ShearlingError as error:
        raise ShearlingError(f"the recipe's target cannot be met: {error}") from error
    widths = [axis for axis in after if axis != "layers" and after[axis] != model.shape[axis]]
    if depth_only and widths:
        raise ShearlingError(
            f"the recipe's method cuts whole blocks, but its target changes {', '.join(widths)}; "
            "give layers or params, or kind: scores."
        )
    return given, after


def _planned(
    target: TargetSection, source: Checkpoint, model: Checkpoint, *, depth_only: bool
) -> tuple[dict[str, Any], Shape]:
    """A size that meets targets of memory; of time, the targets, and what operations promise.

    What takes time is timed when its stage is worked on.
    """
    asked = _absolute(target, source) | target.targets
    load = TargetLoad(**target.model_dump(include=set(LOAD)))
    if target.footprint is not None:
        whole = footprint(source, source.shape, load)
        asked["footprint"] = f"{parse_footprint(target.footprint, whole) / 10**6:.6f}MB"
    asked.pop("prefer", None)
    spending = Spending(require_preference(target.prefer), ("layers",) if depth_only else None)
    targets = Targets(**asked, load=load)
    if not targets.timed:
        plan = meet(model, targets, spending)
        return _changed(plan.as_json(), model), plan.shape
    timing.EngineTimer(model, load, silent)  # refuses what its stage would, hours later
    told = {"asked": asked, "load": target.model_dump(include=set(LOAD)), "prefer": target.prefer}
    return {"targets": told | {"axes": spending.axes}}, promised_shape(model, targets, spending)


def measured_size(
    told: Mapping[str, Any], model: Checkpoint, wish: Wish, notify: Notify, progress: Progress
) -> Size:
    """The size that a stage was told: its own, or one that meets targets of time on this machine.

    Raises:
        ShearlingError: targets that cannot be met, or an engine that is not installed.
    """
    if "targets" not in told:
        return Size(**told)
    asked = told["targets"]
    device = wish.torch_device()
    dtype = name_of(wish.torch_dtype(device, model))
    load = TargetLoad(**asked["load"], dtype=dtype, device=str(device))
    axes = None if asked["axes"] is None else tuple(asked["axes"])
    spending = Spending(require_preference(asked["prefer"]), axes)
    targets = Targets(**asked["asked"], load=load)
    timer = timing.EngineTimer(model, load, progress)
    plan = meet(model, targets, spending, timer=timer, notify=notify)
    return Size(**_changed(plan.as_json(), model))


def _changed(account: dict[str, Any], model: Checkpoint) -> dict[str, Any]:
    """What ``Size`` is given of a shape that was searched for."""
    shape = {axis: size for axis, size in account["shape"].items() if size != model.shape[axis]}
    return {"shape": shape, "account": {"targets": account}}


def _absolute(target: TargetSection, source: Checkpoint) -> dict[str, Any]:
    """A target without shares."""
    given = target.sizes
    if "shape" in given:
        given["shape"] = _sizes(given["shape"], source)
    if "params" in given:
        given["params"] = parse_params(str(given["params"]), source.parameters)
    if "active_params" in given and source.layout.routed:
        active = source.layout.count(source.shape, active=True)
        given["active_params"] = parse_params(
            str(given["active_params"]), active, "--active-params"
        )
    if "remove" in given:
        given["remove"] = tuple(given["remove"])
    return given


def _sizes(shape: Mapping[str, int | str], source: Checkpoint) -> dict[str, int]:
    """Sizes by axis, shares taken of the source's."""
    sizes: dict[str, int] = {}
    for axis, size in shape.items():
        if isinstance(size, int):
            sizes[axis] = size
            continue
        share = amount(size, ("x",))
        if share is None or share[0] > 1 or axis not in source.shape:
            raise ShearlingError(
                f"shape has {axis}: {size!r}, but a size such as 24 or a share such as 0.75x of "
                f"one of {', '.join(source.shape)} was expected."
            )
        sizes[axis] = int(share[0] * source.shape[axis])
    return sizes


def _depth_for(model: Checkpoint, params: int) -> int:
    """The most blocks with which a model has at most so many parameters."""
    for layers in range(model.shape["layers"] - 1, 0, -1):
        if model.layout.count(model.shape.with_(layers=layers)) <= params:
            return layers
    least = model.layout.count(model.shape.with_(layers=1))
    raise ShearlingError(
        f"{params:,} parameters were asked for, but one block and the embeddings alone have "
        f"{least:,}; ask for more, or cut widths as well with kind: scores."
    )
