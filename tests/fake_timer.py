"""A timer that computes what shapes take, and notes what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shearling.table.values import Shape
from shearling.targets.costs import TimedShape


class FakeTimer:
    """Seconds by a function of the shape and the batch."""

    machine: dict[str, Any] = {"cpu": "none", "engine": "fake"}  # noqa: RUF012

    def __init__(self, source: Shape, seconds: Callable[[Shape, int], float]) -> None:
        """``seconds`` of one step."""
        self.source, self.seconds = source, seconds
        self.asked: list[tuple[list[Shape], int | None]] = []

    def __call__(self, shapes: Sequence[Shape], *, batch: int | None = None) -> list[TimedShape]:
        """The source first."""
        self.asked.append((list(shapes), batch))
        whole = self.seconds(self.source, batch or 1)
        timed = [TimedShape(self.source, whole)]
        for shape in shapes:
            speed = whole / self.seconds(shape, batch or 1)
            timed.append(TimedShape(shape, whole / speed, speed, speed, speed))
        return timed


def plain(shape: Shape, batch: int = 1) -> float:
    """A cost of the form that is fitted; several sequences hide the price of neurons."""
    unit = 2e-5 if batch == 1 else 2e-6
    return 0.004 + shape["layers"] * (0.001 + unit * shape["mlp"])
