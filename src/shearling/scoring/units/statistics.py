"""What is summed over tokens of a matrix's input, and the criteria that follow from it.

Shapes: T tokens; C columns of a matrix, its input's channels; O its rows; U units of K columns
each (C = U K).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from shearling.engine.ranks import Ranks
from shearling.scoring.registry import criterion

RIDGE = 0.01  # of the mean diagonal of the Gram matrix, in ``obs``
_TINY = 1e-30


class Sums:
    """Sums over tokens of one input, in double precision; only those wanted are taken.

    ``total`` x (C), ``square`` x^2 (C), ``weighted`` w x^2 (C), ``norm`` the length of a unit's
    K entries (U), ``gram`` w x x^T (C, C), ``fisher`` the square of a unit's x . dL/dx (U).
    """

    def __init__(self, wanted: frozenset[str], width: int) -> None:
        """Start from zero; ``width`` is K."""
        self._wanted, self._width = wanted, width
        self.sums: dict[str, Tensor] = {}
        self.tokens = 0

    def add(self, x_TC: Tensor, weight_T: Tensor, gradient_TC: Tensor | None) -> None:
        """Add a batch: an input, its tokens' weights, and the loss's gradient at it, if wanted."""
        self.tokens += x_TC.shape[0]
        x, weight_T1 = x_TC.double(), weight_T.double()[:, None]
        taken: dict[str, Callable[[], Tensor]] = {
            "total": lambda: x.sum(0),
            "square": lambda: x.square().sum(0),
            "weighted": lambda: (x.square() * weight_T1).sum(0),
            "norm": lambda: self._units(x.square()).sqrt().sum(0),
            "gram": lambda: _gram(x_TC, weight_T1),
            "fisher": lambda: self._units(x * _given(gradient_TC).double()).square().sum(0),
        }
        for name in self._wanted:
            added = taken[name]()
            self.sums[name] = self.sums[name] + added if name in self.sums else added

    def add_up(self, ranks: Ranks) -> None:
        """Have every rank hold the sums over the tokens of all."""
        ranks.add(*(self.sums[name] for name in sorted(self.sums)))
        self.tokens = int(ranks.total(self.tokens))

    def _units(self, x_TC: Tensor) -> Tensor:
        """Sums over each unit's columns (T, U)."""
        return x_TC.unflatten(-1, (-1, self._width)).sum(-1)


@dataclass(frozen=True)
class Inlet:
    """What a block's matrices are known by: the sums of their shared input, and their weights.

    Attributes:
        sums: as ``Sums`` took them.
        tokens: how many they run over.
        weight_OC: the matrices, one above the other.
    """

    sums: Mapping[str, Tensor]
    tokens: int
    weight_OC: Tensor

    def energy_C(self) -> Tensor:
        """Squared length of each column."""
        return self.weight_OC.square().sum(0, dtype=torch.float64)


@criterion(
    "activation", of="units", reads=("norm",), order=70,
    says="mean activation; of a head, mean length of its output",
    work="Minitron", paper="2407.14679",
)  # fmt: skip
def activation(inlet: Inlet, width: int) -> Tensor:
    """Mean over tokens of |x|; for a head, of the length of its output.

    Minitron, arXiv 2407.14679.
    """
    return inlet.sums["norm"] / inlet.tokens


@criterion(
    "wanda-sp", of="units", reads=("square",), order=60,
    says="abs(weight) x norm of the input, summed",
    work="Wanda in FLAP's structured form", paper="2306.11695",
)  # fmt: skip
def wanda_sp(inlet: Inlet, width: int) -> Tensor:
    """|W_ij| ||X_j||_2, the norm over all tokens, summed over a unit's columns and their rows.

    Wanda, arXiv 2306.11695, in the structured form of FLAP's comparison, arXiv 2312.11983.
    """
    absolute_C = inlet.weight_OC.abs().sum(0, dtype=torch.float64)
    return _units(inlet.sums["square"].sqrt() * absolute_C, width)


@criterion(
    "flap", of="units", reads=("total", "square"), order=50,
    says="variance x square of its column's norm",
    work="FLAP", paper="2312.11983",
)  # fmt: skip
def flap(inlet: Inlet, width: int) -> Tensor:
    """Variance of x_j over tokens times ||W_:,j||^2: what a constant could not replace.

    FLAP, arXiv 2312.11983; not standardised, as every block keeps equally many.
    """
    mean_C = inlet.sums["total"] / inlet.tokens
    variance_C = (inlet.sums["square"] / inlet.tokens - mean_C.square()).clamp(min=0)
    return _units(variance_C * inlet.energy_C(), width)


@criterion(
    "energy", of="units", reads=("weighted",), order=30,
    says="its energy x square of its column's norm, long states damped",
    work="ours",
)  # fmt: skip
def energy(inlet: Inlet, width: int) -> Tensor:
    """E[w x_j^2] ||W_:,j||^2, tokens weighted by the inverse energy w of the state after the block.

    Without the weights a few tokens of huge norm would rule.
    """
    return _units(inlet.sums["weighted"] / inlet.tokens * inlet.energy_C(), width)


@criterion(
    "obs", of="units", reads=("gram",), order=40,
    whole_groups=True,
    says="what its removal costs if the others are solved anew",
    work="Optimal Brain Surgeon", paper="2208.11580",
)  # fmt: skip
def obs(inlet: Inlet, width: int, ridge: float = RIDGE) -> Tensor:
    """What a unit's removal costs once the remaining columns are solved for again.

    With G = E[w x x^T] and H = G + ridge mean(diag G) I: tr(W_u [(H^-1)_uu]^-1 W_u^T), the K x K
    block of unit u; for one column ||W_:,j||^2 / (H^-1)_jj. Optimal Brain Surgeon (Hassibi and
    Stork, 1992) for the squared error of what a block writes, as in arXiv 2208.11580.
    """
    gram_CC = inlet.sums["gram"] / inlet.tokens
    damping = ridge * gram_CC.diagonal().mean()
    if not damping > 0:  # no token reaches the matrix: nothing costs anything
        return gram_CC.new_zeros(gram_CC.shape[0] // width)
    identity_CC = torch.eye(len(gram_CC), dtype=gram_CC.dtype, device=gram_CC.device)
    factor_CC = torch.linalg.cholesky(gram_CC + damping * identity_CC)
    inverse_UKK = _blocks(torch.cholesky_inverse(factor_CC), width)
    weight_UOK = inlet.weight_OC.double().unflatten(1, (-1, width)).movedim(1, 0)
    product_UKK = weight_UOK.mT @ weight_UOK
    solved_UKK = torch.linalg.solve(inverse_UKK, product_UKK)
    return solved_UKK.diagonal(dim1=1, dim2=2).sum(-1)


@criterion(
    "fisher", of="units", reads=("fisher",), order=20,
    says="diagonal of the Fisher information of a gate on the unit",
    paper="2204.09656",
)  # fmt: skip
def fisher(inlet: Inlet, width: int) -> Tensor:
    """Sum over tokens of (x . dL/dx)^2, the product over a unit's columns, L the summed NLL.

    The diagonal of the Fisher information of a gate on the unit (arXiv 1801.05787; tokens taken
    for samples). dL/dx_j is the gradient at the matrix's output times W_:,j.
    """
    return inlet.sums["fisher"]


@criterion(
    "fisher-energy", of="units", joins=("fisher", "energy"), order=10,
    default="always",
    says="geometric mean of `fisher` and `energy`",
    work="ours",
)  # fmt: skip
def geometric_mean(first_U: Tensor, second_U: Tensor) -> Tensor:
    """exp of the mean of logarithms, each criterion divided by its mean first.

    One that is zero for all units says nothing and leaves the choice to the other.
    """
    logs = [
        torch.log((values / mean).clamp(min=_TINY)) if (mean := values.mean()) > 0 else values
        for values in (first_U, second_U)
    ]
    return torch.exp((logs[0] + logs[1]) / 2)


def _units(values_C: Tensor, width: int) -> Tensor:
    return values_C.view(-1, width).sum(1)


def _blocks(matrix_CC: Tensor, width: int) -> Tensor:
    """The K x K blocks (U, K, K) along the diagonal."""
    units = len(matrix_CC) // width
    blocks_KKU = matrix_CC.view(units, width, units, width).diagonal(dim1=0, dim2=2)
    return blocks_KKU.movedim(-1, 0).contiguous()


def _gram(x_TC: Tensor, weight_T1: Tensor) -> Tensor:
    """Product in single precision, where processors are fast; batches are summed in double."""
    x_CT = (x_TC * weight_T1.sqrt()).float().t().contiguous()
    return functional.linear(x_CT, x_CT).double()


def _given(gradient_TC: Tensor | None) -> Tensor:
    assert gradient_TC is not None, "a forward walk has no gradients"
    return gradient_TC
