"""Criteria: each is one function under :func:`criterion`, which declares all that others need.

A new criterion is one function in one file in ``scoring/blocks`` or ``scoring/units``. ``--by``,
the help, the README's tables, the report and the choice of what to remove follow from what it
declares.

What a function takes and gives depends on ``of`` and ``reads``. Of blocks:

- ``text``: ``(stream, ids_NS, *, protected, progress)`` to :class:`Scores`;
- ``weights``: ``(checkpoint, *, protected, progress)`` to :class:`Scores`;
- with ``removes``, a keyword ``remove`` besides: how many blocks are to go, or None; where such a
  criterion can score for several numbers at once, ``together`` names the function that does.

Of units, on the axes asked for (U units, K columns each):

- names of sums over tokens (``SUMS``): ``(inlet, K)`` to numbers (U); one walk through the model
  gathers the sums that are asked for;
- other criteria's names in ``joins``: their numbers (U), one after another, to numbers (U);
- ``text``: ``(stream, ids_NS, axes, *, progress)`` to rows of numbers (U) by axis;
- ``weights``: ``(checkpoint, axes, *, seed, progress)`` to the same.

Of experts (E in a block):

- ``text``: ``(sums)`` to numbers (E), ``sums`` being what a block's router and experts did on it
  (:class:`shearling.scoring.experts.routed.Routed`).

Help must not wait for torch, which the functions need. So declarations are read from the source
text, without importing it: their facts are literals. A function declared anywhere else is known
once its module has been imported.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from shearling.errors import ShearlingError

if TYPE_CHECKING:
    from shearling.model.checkpoint import Checkpoint

Kind = Literal["blocks", "units", "experts"]
KINDS: tuple[Kind, ...] = ("blocks", "units", "experts")
# Sums over tokens that a walk can gather (scoring/units/statistics.py); do they take gradients?
SUMS = {
    "total": False, "square": False, "weighted": False, "norm": False, "gram": False,
    "fisher": True,
}  # fmt: skip
# First and last blocks that the "+" forms never remove (Shortened LLaMA, section 3.1).
PLUS = (4, 2)

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """What a criterion declares of itself.

    Attributes:
        name: as on the command line.
        of: what it scores.
        says: what a score is, in a few words, for tables and captions.
        reads: ``("text",)``, ``("weights",)`` or, of units, names in ``SUMS``.
        joins: of units, the criteria that it is made of, in place of ``reads``.
        work: where it is from: a method, a paper, us.
        paper: its number at arXiv.
        backward: whether a function that reads text takes gradients.
        windows: sequences and tokens of each that a cut gives it at most; all with None.
        one_pass: whether it keeps no state but those of one walk forward; criteria of blocks
            otherwise keep one for every block, and so does a walk backward.
        removes: whether it has to know how many blocks go.
        together: of such a one, a function of the same module that scores for several numbers of
            blocks at once, given them in place of ``remove``, behind the tokens.
        check: a function of the same module that refuses beforehand what cannot be scored, given
            the checkpoint, the number of sequences, the protected blocks and how many go.
        plus: whether there is a form NAME+ that never removes the blocks in ``PLUS``.
        protects: of that form, how many of the first and of the last blocks.
        additive: whether the blocks have to add to the residual stream with no norm behind.
        whole_groups: whether a key/value group is scored as one, and not as the sum of its heads.
        default: when it is chosen if none is named: ``always``, or if the cut is ``repaired``; the
            first that suits a model.
        order: place in lists; those that say nothing come last, by name.
        home: module and name of its function.
    """

    name: str
    of: Kind
    says: str
    reads: tuple[str, ...] = ()
    joins: tuple[str, ...] = ()
    work: str = ""
    paper: str = ""
    backward: bool = False
    windows: tuple[int, int] | None = None
    one_pass: bool = False
    removes: bool = False
    together: str = ""
    check: str = ""
    plus: bool = False
    protects: tuple[int, int] = (0, 0)
    additive: bool = False
    whole_groups: bool = False
    default: Literal["", "always", "repaired"] = ""
    order: int = 1000
    home: str = ""

    def __post_init__(self) -> None:
        """Refuse what would drive nothing (ValueError)."""
        known = {"text"}, {"weights"}
        summed = self.of == "units" and bool(self.reads) and set(self.reads) <= SUMS.keys()
        read = summed or set(self.reads) in known
        joined = self.of == "units" and bool(self.joins)
        if self.of not in KINDS or read == bool(self.joins) or not (read or joined):
            raise ValueError(
                f"criterion {self.name!r} is of {self.of!r} and reads {self.reads}; it must be of "
                "blocks, units or experts and read text or weights, or be of units and read some "
                f"of {', '.join(SUMS)} or join other criteria."
            )
        of_blocks = (
            self.removes, self.together, self.check, self.plus, self.windows, self.additive,
            self.one_pass,
        )  # fmt: skip
        if self.of != "blocks" and any(of_blocks):
            raise ValueError(
                f"criterion {self.name!r} is of {self.of}, but declares what is known of blocks "
                "alone: removes, together, check, plus, windows, additive or one_pass."
            )
        if self.whole_groups and not summed:
            raise ValueError(
                f"criterion {self.name!r} declares whole_groups, but takes no sums over tokens."
            )
        if self.backward and self.reads != ("text",):
            raise ValueError(
                f"criterion {self.name!r} declares backward without reading text itself; whether "
                "sums take gradients is known."
            )

    @property
    def textless(self) -> bool:
        """Whether it reads weights alone."""
        return self.reads == ("weights",)

    @property
    def parts(self) -> tuple[Criterion, ...]:
        """The criteria that it joins, or itself."""
        return tuple(find(name, self.of) for name in self.joins) or (self,)

    @property
    def sums(self) -> frozenset[str]:
        """What a walk has to gather for it: the union over its parts."""
        return frozenset(name for part in self.parts for name in part.reads if name in SUMS)

    @property
    def gradients(self) -> bool:
        """Whether the model is walked through backward as well."""
        return self.backward or any(SUMS[name] for name in self.sums)

    @property
    def function(self) -> Callable[..., Any]:
        """The function itself; imports its module."""
        return _attribute(self.home)

    @property
    def several(self) -> Callable[..., Any] | None:
        """The function that scores for several numbers of blocks at once, if there is one."""
        return (
            _attribute(f"{self.home.partition(':')[0]}:{self.together}") if self.together else None
        )

    def refuse(self, *given: Any) -> None:
        """Raise ShearlingError if ``check`` says that blocks cannot be scored so."""
        if self.check:
            _attribute(f"{self.home.partition(':')[0]}:{self.check}")(*given)

    def suits(self, checkpoint: Checkpoint | None) -> bool:
        """Whether the blocks of a model, if one is given, are such that it can score them."""
        return checkpoint is None or not self.additive or repairable(checkpoint)


_imported: dict[tuple[Kind, str], Criterion] = {}
_functions: dict[str, Callable[..., Any]] = {}


def criterion(name: str, **facts: Any) -> Callable[[Function], Function]:
    """Register a function as the criterion ``name``; ``facts`` are fields of :class:`Criterion`.

    Raises:
        ValueError: facts that do not go together, or a name that another function has.
    """

    def register(function: Function) -> Function:
        home = f"{function.__module__}:{getattr(function, '__qualname__', name)}"
        declared = Criterion(name=name, home=home, **facts)
        _add(_imported, declared)
        _functions[home] = function
        return function

    return register


def find(name: str, of: Kind) -> Criterion:
    """What the criterion ``name`` declares; of ``NAME+`` with the blocks that it protects.

    Raises:
        ShearlingError: there is no such criterion.
    """
    known = _known(of)
    if name not in known:
        raise ShearlingError(f"criterion {name!r} is not known; choose one of {', '.join(known)}.")
    return known[name]


def protection(by: str, first: int | None, last: int | None) -> tuple[int, int] | None:
    """How many of the first and last blocks stay under a criterion, if it is said; else None."""
    if first is None and last is None:
        return None
    default = find(by, "blocks").protects
    return default[0] if first is None else first, default[1] if last is None else last


def names(of: Kind) -> tuple[str, ...]:
    """All criteria of blocks or of units, as ``--by`` takes them."""
    return tuple(_known(of))


def kinds(name: str) -> tuple[Kind, ...]:
    """What a criterion scores, of ``KINDS`` (ShearlingError if it is unknown)."""
    scored = tuple(of for of in KINDS if name in _known(of))
    if not scored:
        raise ShearlingError(
            f"criterion {name!r} is not known; choose for blocks one of "
            f"{', '.join(names('blocks'))}, for units one of {', '.join(names('units'))}, for "
            f"experts one of {', '.join(names('experts'))}, or one of each, separated by commas."
        )
    return scored


def default_for(of: Kind, checkpoint: Checkpoint | None = None, *, repaired: bool = False) -> str:
    """The criterion that is used if none is named.

    Args:
        of: blocks or units.
        checkpoint: the model; without, no criterion is passed over for the model's sake.
        repaired: whether a repair, or training, follows.
    """
    for known in _known(of).values():
        wanted = known.default == "always" or (repaired and known.default == "repaired")
        if wanted and known.suits(checkpoint):
            return known.name
    raise AssertionError(f"no criterion of {of} is always a default")


def criteria_for(by: str | None, checkpoint: Checkpoint, *, repaired: bool) -> tuple[str, str, str]:
    """The criteria for blocks, units and experts that ``--by`` names, defaults filled in.

    Raises:
        ShearlingError: an unknown name, or two for the same kind of unit.
    """
    chosen: dict[Kind, str] = {}
    given = [] if by is None else [part.strip() for part in by.split(",")]
    # taylor is a name of both kinds, and stands for what the other name does not.
    for name in sorted(given, key=lambda name: len(kinds(name))):
        free = [of for of in kinds(name) if of not in chosen]
        if not free:
            raise ShearlingError(f"--by {by} names two criteria for {kinds(name)[-1]}; give one.")
        chosen |= dict.fromkeys(free, name)
    defaults = {of: default_for(of, checkpoint, repaired=repaired) for of in KINDS}
    every = defaults | chosen
    return every["blocks"], every["units"], every["experts"]


def meaning(name: str, of: Kind) -> str | None:
    """What a score is, as the start of a sentence; None for a criterion that is not known."""
    known = _known(of).get(name)
    return known.says[:1].upper() + known.says[1:] if known else None


def by_help() -> str:
    """What ``--by`` takes, in a sentence."""
    blocks, units, experts = (_listed(names(of)) for of in KINDS)
    each = "in a cut of several, one of each, separated by commas"
    return f"For blocks {blocks}; for units {units}; for experts {experts}; {each}."


def removers() -> tuple[str, ...]:
    """The criteria that have to know how many blocks go."""
    return tuple(known.name for known in _known("blocks").values() if known.removes)


def table(of: Kind) -> str:
    """The criteria as a table in Markdown, a row for each function; a form NAME+ beside NAME."""
    heads = {
        "blocks": "a block's score", "units": "a unit's score", "experts": "an expert's score",
    }  # fmt: skip
    lines = [f"| `--by` | {heads[of]} | reads | from |", "|---|---|---|---|"]
    single = sum(bool(known.default) for known in _known(of).values()) == 1
    defaults = {
        "": "",
        "always": "; the default" if single else "; the default elsewhere",
        "repaired": "; the default where a repair follows",
    }
    for known in _known(of).values():
        if known.protects == (0, 0):
            called = f"`{known.name}`" + (f", `{known.name}+`" if known.plus else "")
            says = known.says + defaults[known.default]
            lines.append(f"| {called} | {says} | {_reading(known)} | {_origin(known)} |")
    return "\n".join(lines) + "\n"


def repairable(checkpoint: Checkpoint) -> bool:
    """Whether a block ends in one matrix that adds to the stream, with no norm behind it."""
    family = checkpoint.family
    return family.additive(checkpoint.config) and not family.post_norms and family.mixture is None


def _reading(known: Criterion) -> str:
    if known.textless:
        return "weights alone"
    return "text, forward and backward" if known.gradients else "text, forward"


def _origin(known: Criterion) -> str:
    link = f"[{known.paper}](https://arxiv.org/abs/{known.paper})" if known.paper else ""
    return ", ".join(part for part in (known.work, link) if part)


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _known(of: Kind) -> dict[str, Criterion]:
    """By name, in the order of lists: what our own files declare, and what else was imported."""
    package = import_module(f"shearling.scoring.{of}")
    every = dict(_declared(package.__name__, tuple(package.__path__)))
    for key, known in _imported.items():
        if key[0] == of:
            _add(every, known)
    ordered: dict[str, Criterion] = {}
    for known in sorted(every.values(), key=lambda known: (known.order, known.name)):
        if known.plus:
            ordered[f"{known.name}+"] = replace(known, name=f"{known.name}+", protects=PLUS)
        ordered[known.name] = known
    return ordered


@cache
def _declared(package: str, path: tuple[str, ...]) -> dict[tuple[Kind, str], Criterion]:
    """The declarations in a package's files, read from their text."""
    declared: dict[tuple[Kind, str], Criterion] = {}
    for module in iter_modules(path, f"{package}."):
        spec = find_spec(module.name)
        source = spec.loader.get_source(module.name) if spec and spec.loader else ""  # ty: ignore
        if source and f"@{criterion.__name__}(" in source:  # parsing takes milliseconds
            for known in _declarations(ast.parse(source), module.name):
                _add(declared, known)
    return declared


def _declarations(module: ast.Module, name: str) -> Iterator[Criterion]:
    for function in module.body:
        if not isinstance(function, ast.FunctionDef):
            continue
        for call in function.decorator_list:
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
                continue
            if call.func.id == criterion.__name__:
                home = f"{name}:{function.name}"
                facts = {str(fact.arg): _literal(fact.value, home) for fact in call.keywords}
                yield Criterion(name=_literal(call.args[0], home), home=home, **facts)


def _literal(value: ast.expr, home: str) -> Any:
    try:
        return ast.literal_eval(value)
    except ValueError:
        raise ValueError(
            f"{home} declares a criterion with {ast.unparse(value)!r}; facts must be literals, as "
            "they are read without importing the module."
        ) from None


def _add(criteria: dict[tuple[Kind, str], Criterion], known: Criterion) -> None:
    held = criteria.setdefault((known.of, known.name), known)
    if held.home != known.home:
        raise ValueError(
            f"{known.home} is to be criterion {known.name!r} of {known.of}, but that is "
            f"{held.home}; choose another name."
        )
    criteria[known.of, known.name] = known


def _attribute(home: str) -> Callable[..., Any]:
    """What stands at ``module:name``."""
    if home not in _functions:
        module, _, name = home.partition(":")
        _functions.setdefault(home, getattr(import_module(module), name))
    return _functions[home]
