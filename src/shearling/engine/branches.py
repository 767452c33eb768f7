"""The halves of a block that write into the residual stream, found in the table.

A branch is attention or MLP. Its writer is the matrix that ends it (o_proj, down_proj); what
reaches the stream is the writer's output, or that of the norm behind it where a family has one.
An MLP may stand beside experts: these are two branches then, which meet in one more norm.

Shapes: B sequences of a batch, S positions, D hidden, K columns of a writer.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from shearling.engine.calls import Call
from shearling.engine.pieces import Pieced
from shearling.model.checkpoint import Checkpoint
from shearling.table.axes import EXPERTS, MIXERS


@dataclass(frozen=True, slots=True)
class Branch:
    """One half of every block.

    Attributes:
        axis: whose units it consists of: ``heads``, ``linear_heads``, ``mlp`` or ``experts``.
        writer: path inside a block of the matrix that ends it; of experts, which have one each,
            of the module that adds up what they give.
        norm: path of the norm between the writer and the stream, or None.
        scale: what its output is multiplied by before it is added to the stream.
        joint: path of a norm that it goes through after that, together with another branch, or
            None.
    """

    axis: str
    writer: str
    norm: str | None
    scale: float = 1.0
    joint: str | None = None

    def scaled(self, out: Tensor) -> Tensor:
        """What is added to the stream, from the output of what ends the branch."""
        return out if self.scale == 1.0 else out * self.scale

    @property
    def end(self) -> str:
        """Path of the module whose output is added to the stream, but for the scale."""
        return self.norm or self.writer


def branches(checkpoint: Checkpoint, block: int = 0) -> tuple[Branch, ...]:
    """The branches of a block, in the order in which they run: attention, then MLP and experts.

    Linear attention is a branch like any other: what it does with tokens is its own affair.
    """
    family = checkpoint.family
    prefix, scale = f"{family.blocks}.{{}}.", family.branch_scale(checkpoint.config)
    by_axis: dict[str, Branch] = {}
    for row in checkpoint.layout.block_rows(block):
        if row.role != "linear" or "hidden" not in row.output.axes:
            continue
        if row.of_experts:
            mixture = family.mixture
            assert mixture is not None
            by_axis[EXPERTS] = Branch(EXPERTS, mixture.module, mixture.norm, scale)
            continue
        for axis in row.dims[1].axes & {*MIXERS, "mlp"}:
            writer = row.name.removeprefix(prefix).removesuffix(".weight")
            by_axis[axis] = Branch(axis, writer, family.post_norms.get(axis), scale)
    mixer = next(by_axis[axis] for axis in MIXERS if axis in by_axis)
    if "mlp" in by_axis and EXPERTS in by_axis:
        assert family.mixture is not None
        mlp, joint = by_axis["mlp"], family.post_norms.get("mlp")
        by_axis["mlp"] = replace(mlp, norm=family.mixture.beside, joint=joint)
        by_axis[EXPERTS] = replace(by_axis[EXPERTS], joint=joint)
    return mixer, *(by_axis[axis] for axis in ("mlp", EXPERTS) if axis in by_axis)


def gain_behind(block: nn.Module, half: Branch) -> Tensor | None:
    """The factor of each channel in the norms behind a branch's writer, if there are any."""
    gain_D: Tensor | None = None
    for path in filter(None, (half.norm, half.joint)):
        norm = block.get_submodule(path)
        weight_D = norm.get_parameter("weight")
        own_D = norm(weight_D.new_ones(1, len(weight_D)))[0].float()
        gain_D = own_D if gain_D is None else gain_D * own_D
    return gain_D


class Reached(Exception):
    """Ends a block's run where no more of it is needed."""


@dataclass
class Seen:
    """What passed through a block in one run.

    Attributes:
        inputs: branch axis -> what entered its writer (B, S, K).
        outputs: branch axis -> what its writer gave (B, S, D), before any norm.
        contributions: branch axis -> what was added to the stream (B, S, D), or went on to a joint
            norm.
    """

    inputs: Pieced = field(default_factory=Pieced)
    outputs: Pieced = field(default_factory=Pieced)
    contributions: Pieced = field(default_factory=Pieced)


@contextmanager
def watching(
    block: nn.Module, halves: Sequence[Branch], *, until: Branch | None = None
) -> Generator[Seen]:
    """Note what passes a block's writers; with ``until``, stop a run as that writer is reached."""
    seen = Seen()
    rows = torch.Size()

    def shaped(x: Tensor) -> Tensor:  # OPT's MLP takes all tokens of a batch in one row
        return x.view(*rows, -1)

    def start(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal rows
        rows = args[0].shape[:-1]

    hooks = [block.register_forward_pre_hook(start)]
    for half in halves:

        def enter(_: nn.Module, args: tuple[Tensor, ...], half: Branch = half) -> None:
            seen.inputs[half.axis] = shaped(args[0])
            if half is until:
                raise Reached

        def leave(_: nn.Module, args: object, out: Any, half: Branch = half) -> None:
            seen.outputs[half.axis] = shaped(_first(out))

        def add(_: nn.Module, args: object, out: Any, half: Branch = half) -> None:
            seen.contributions[half.axis] = half.scaled(shaped(_first(out)))

        hooks.append(block.get_submodule(half.writer).register_forward_pre_hook(enter))
        hooks.append(block.get_submodule(half.writer).register_forward_hook(leave))
        hooks.append(block.get_submodule(half.end).register_forward_hook(add))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class Entrance:
    """A way into a block at a writer whose inputs are known; what is before it is left out.

    The module that holds the writer then gives what the writer gives. Whether the block takes it
    from there as it would from the module itself is for the caller to try.
    """

    def __init__(self, block: nn.Module, half: Branch) -> None:
        """Nothing is known of the module around the writer yet."""
        path = half.writer.rpartition(".")[0]
        self._writer = block.get_submodule(half.writer)
        self._around = block.get_submodule(path)
        self._besides: int | None = None  # how much it gives besides: weights of attention, or None
        self._alone = True  # whether it gives a tensor, and no tuple

    @property
    def open(self) -> bool:
        """Whether the module has run, and can be stood in for."""
        return self._besides is not None and "forward" not in vars(self._around)

    @contextmanager
    def noting(self) -> Generator[None]:
        """Note how the module gives what it gives, while the whole block runs."""

        def note(_: nn.Module, args: object, out: Any) -> None:
            self._alone = isinstance(out, Tensor)
            self._besides = 0 if self._alone else len(out) - 1

        hook = self._around.register_forward_hook(note)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def entered(self, x_BSK: Tensor) -> Generator[None]:
        """Have runs of the block begin with the writer, given its inputs."""
        assert self._besides is not None
        besides = [None] * self._besides

        def forward(*args: object, **options: object) -> Any:
            out = self._writer(x_BSK)
            return out if self._alone else (out, *besides)

        vars(self._around)["forward"] = forward
        try:
            yield
        finally:
            del vars(self._around)["forward"]


def _first(out: Any) -> Tensor:
    """What a module gives, where some modules of experts give their router's choice as well."""
    return out[0] if isinstance(out, tuple) else out


def run_until(block: nn.Module, call: Call, h_BSD: Tensor) -> None:
    """Run a block that is being watched, as far as it is wanted."""
    with suppress(Reached):
        call(block, h_BSD)
