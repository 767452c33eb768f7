"""One writer solved anew: from what its outputs lack to the sums that are stored.

Shapes: B sequences of a batch, S positions; E hidden of the cut, K columns of the writer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shearling.engine.moments import Correction, Moments, correct
from shearling.engine.ranks import Ranks

ROUNDING = 1e-9  # share of a stream's squared norm; less is no fault of the cut


class WriterLack(NamedTuple):
    """What a writer's outputs lack on one batch.

    Attributes:
        held: whether the batch is held out.
        x_BSK: the writer's inputs.
        missing_BSE: what is to be added to its outputs.
        w_BS: the tokens' weights.
    """

    held: bool
    x_BSK: Tensor
    missing_BSE: Tensor
    w_BS: Tensor


@dataclass(frozen=True, slots=True)
class WriterFit:
    """A correction, and what it is worth.

    Attributes:
        correction: to the writer.
        tokens, held: how many it was solved on, and those of them that were held out.
    """

    correction: Correction
    tokens: int
    held: int

    @property
    def before(self) -> float:
        """The held-out error of a token without it."""
        return self.correction.error_before / self.held

    @property
    def after(self) -> float:
        """The same with it."""
        return self.correction.error_after / self.held

    @property
    def lacking(self) -> bool:
        """Whether anything but rounding is missing."""
        return self.correction.error_before > ROUNDING * self.held

    @property
    def changes(self) -> bool:
        """Whether held-out tokens are better off with the correction."""
        fitted = self.correction
        return fitted.strength is not None and fitted.error_after < fitted.error_before


def fit_writer(
    writer: nn.Linear,
    importance_E: Tensor | None,
    missing: Iterable[WriterLack],
    *,
    start: float,
    ranks: Ranks,
) -> WriterFit | None:
    """Solve for what a writer's outputs lack; None where that is not finite.

    Args:
        writer: the matrix; it is left as it is.
        importance_E: how often errors count an output's square.
        missing: what this rank's batches lack.
        start: the strength that is tried first.
        ranks: who share the batches.
    """
    fit, held = (Moments(writer.weight, importance_E) for _ in range(2))
    for part in missing:
        moments = held if part.held else fit
        inputs_TK = part.x_BSK.flatten(0, 1).float()
        moments.add(inputs_TK, part.missing_BSE.flatten(0, 1), part.w_BS.flatten())
    for moments in (fit, held):
        moments.add_up(ranks)
    if not (fit.finite() and held.finite()):
        return None
    tokens = fit.tokens + held.tokens  # before the one takes in the other
    correction = correct(fit, held, bias=writer.bias is not None, start=start, ranks=ranks)
    return WriterFit(correction, tokens, held.tokens)


def apply_correction(
    writer: nn.Linear, correction: Correction, path: str, stored: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """Add a correction to a writer; gives the sums in the digits that are stored.

    Args:
        writer: changed in place.
        correction: to its weight and bias.
        path: its name in the checkpoint.
        stored: gives a tensor of the checkpoint in the type that it is stored in.
    """
    sums = {}
    for name, change in (("weight", correction.weight_KD.T), ("bias", correction.bias_D)):
        parameter = getattr(writer, name)
        if parameter is None:
            continue
        full, digits = f"{path}.{name}", parameter
        if parameter.dtype != torch.float32:  # computed in fewer digits than there may be
            digits = stored(full).float()
        sums[full] = (digits + change.to(digits.dtype)).contiguous()
        setattr(writer, name, nn.Parameter(sums[full].to(parameter.dtype), requires_grad=False))
    return sums


class SolvedFiles:
    """Tensors that were solved anew, written to files while the next ones are solved."""

    def __init__(self, directory: Path, *, writes: bool) -> None:
        """Nothing is written yet; without ``writes``, nothing ever is, as another rank does it."""
        self.directory, self.writes = directory, writes
        self._files: dict[str, Path] = {}
        self._writer = ThreadPoolExecutor(1, "shearling-solved")
        self._writing: list[Future[None]] = []

    def save(self, tensors: Mapping[str, Tensor], name: str) -> None:
        """Begin to write some tensors to a file of a name."""
        if not self.writes:
            return
        file = self.directory / f"{name}.safetensors"
        for earlier in self._writing[:-1]:  # one waits at most; and a full disk is told at once
            earlier.result()
        on_host = {name: tensor.cpu() for name, tensor in tensors.items()}
        self._writing.append(self._writer.submit(save_file, on_host, file))
        self._files |= dict.fromkeys(tensors, file)

    def finish(self) -> None:
        """Wait until everything is written, or raise what went wrong with it."""
        for writing in self._writing:
            writing.result()
        self._writer.shutdown()

    def replaced(self) -> dict[str, Callable[[], Tensor]]:
        """What was solved, read from its file when it is asked for."""
        return {
            name: lambda name=name, file=file: load_file(file)[name]
            for name, file in self._files.items()
        }
