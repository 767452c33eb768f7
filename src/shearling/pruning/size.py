"""How much of a model is left, as a user says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.choose import without
from shearling.pruning.plan import (
    Spending,
    parse_active,
    parse_axes,
    parse_layers,
    parse_params,
    parse_shape,
    shape_for,
)
from shearling.pruning.preferences import require_preference
from shearling.table.values import Keep, Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is left: one of these, or ``layers`` and ``remove`` that agree.

    Attributes:
        shape: sizes after the cut, such as ``"layers=24,mlp=1024"`` or a mapping of such.
        params: parameters of the result, such as ``"0.8x"``, ``"113M"`` or a number.
        active_params: of a mixture, parameters that one token meets, likewise.
        layers: blocks to keep.
        remove: blocks to remove, counted from 0.
        prefer: what a number of parameters cares for most, of
            :data:`shearling.pruning.preferences.PREFERENCES`; None is the default.
        axes: what it may take from, such as ``"layers,mlp,vocab"``; None takes blocks and one
            width.
        account: how a shape came about that was searched for, for the manifest.

    Raises:
        ShearlingError: nothing is given, or two that do not go together.
    """

    shape: str | Mapping[str, int] | None = None
    params: str | int | None = None
    active_params: str | int | None = None
    layers: int | None = None
    remove: tuple[int, ...] | None = None
    prefer: str | None = None
    axes: str | tuple[str, ...] | None = None
    account: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what says nothing, or too much."""
        require_preference(self.prefer)
        sizes = {
            "--shape": self.shape, "--params": self.params, "--active-params": self.active_params,
            "--layers": self.layers,
        }  # fmt: skip
        given = [name for name, value in sizes.items() if value is not None]
        if self.remove is None and not given:
            raise ShearlingError(
                "nothing says how much to cut; give --params 0.8x, --shape layers=24,mlp=1024, "
                "--layers N or --remove 14,15."
            )
        if self.remove is not None and set(given) - {"--layers"}:
            raise ShearlingError(
                f"--remove names the blocks that go itself; leave out {' and '.join(given)}."
            )
        if len(given) > 1:
            raise ShearlingError(f"{' and '.join(given)} were both given; choose one.")

    @property
    def name(self) -> str:
        """What was asked for as a file's name: ``0.8x``, ``113M`` or ``layers24-mlp1024``."""
        if self.shape is not None:
            said = _text_of(self.shape).replace("=", "").replace(",", "-")
        elif self.params is not None:
            said = f"{self.params}"
        elif self.active_params is not None:
            said = f"active-{self.active_params}"
        elif self.layers is not None:
            said = f"layers{self.layers}"
        else:
            said = "-".join(["without", *map(str, self.remove or ())])
        return "".join(said.split())

    @property
    def asked(self) -> str:
        """What was asked for as the command line says it, for messages."""
        given = {
            "--shape": None if self.shape is None else _text_of(self.shape),
            "--params": self.params, "--active-params": self.active_params,
            "--layers": self.layers,
        }  # fmt: skip
        name, value = next(((n, v) for n, v in given.items() if v is not None), ("--remove", None))
        value = value if value is not None else ",".join(map(str, self.remove or ()))
        return f"{name} {value}"

    def keep_blocks(self, source: Checkpoint) -> Keep | None:
        """The surviving blocks where ``remove`` names the others.

        Raises:
            ShearlingError: blocks that are not there, or another number than ``layers`` says.
        """
        if self.remove is None:
            return None
        depth = source.shape["layers"]
        keep = source.layout.complete(without(self.remove, depth), source.shape)
        left = len(keep.model["layers"])
        if self.layers not in (None, left):
            raise ShearlingError(
                f"--layers {self.layers} and --remove {','.join(map(str, self.remove))} disagree: "
                f"of {depth} blocks {left} would be left; give one of the two, or --layers {left}."
            )
        return keep

    @property
    def budgeted(self) -> bool:
        """Whether a number of parameters is given, for which a shape is chosen."""
        return self.params is not None or self.active_params is not None

    def spending(self, source: Checkpoint) -> Spending:
        """How a number of parameters is spread (ShearlingError for axes that cannot be)."""
        axes = None if self.axes is None else parse_axes(self.axes, source)
        return Spending(require_preference(self.prefer), axes)

    def most(self, source: Checkpoint) -> tuple[int, bool]:
        """The parameters asked for, and whether they are those that one token meets."""
        if self.active_params is None:
            return parse_params(str(self.params), source.parameters), False
        return parse_active(str(self.active_params), source), True

    def after(self, source: Checkpoint, spending: Spending | None = None) -> Shape:
        """Every axis with its size after the cut (ShearlingError if it cannot be)."""
        if self.shape is not None:
            return parse_shape(_text_of(self.shape), source)
        if self.budgeted:
            params, active = self.most(source)
            spending = spending or self.spending(source)
            return shape_for(source, params, active=active, spending=spending)
        keep = self.keep_blocks(source)
        if keep is not None:
            return source.shape.with_(layers=len(keep.model["layers"]))
        assert self.layers is not None
        return parse_layers(self.layers, source)


def _text_of(shape: str | Mapping[str, int]) -> str:
    """Sizes as --shape takes them."""
    if isinstance(shape, str):
        return shape
    return ",".join(f"{axis}={size}" for axis, size in shape.items())
