"""Reference losses: what a model of the target's size should reach in each domain.

Measured on the source model, predicted by a scaling law from several models, or given. Losses are
means in nats per token, by domain.

Shapes: N sequences, B of a batch, S positions, T predicted tokens, D hidden.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from shearling.data.store import IGNORED, Store
from shearling.engine.place import Place
from shearling.engine.stream import BlockStream
from shearling.engine.walk import last_states
from shearling.errors import ShearlingError, told
from shearling.files.progress import Progress, silent
from shearling.files.reading import read_json
from shearling.files.writer import write_json
from shearling.model.checkpoint import Checkpoint
from shearling.model.manifest import identity
from shearling.train.results import ReferenceLosses
from shearling.train.scaling import EXPONENTS, Law, fit
from shearling.train.weights import losses_of

ADVICE = "make one with: shearling reference MODEL --store STORE --output reference.json"
MOST_PARAMETERS = 2**63
SEQUENCES = 500  # of each domain, as in Sheared LLaMA


class Held(Protocol):
    """What is asked of :class:`shearling.data.store.Store`."""

    @property
    def domains(self) -> Iterable[str]:
        """Names."""
        ...

    def sequences(self, domain: str, part: str, /) -> Any:
        """``[rows]`` gives ids and labels (n, length); ``len()`` how many there are."""
        ...


class Reference(ReferenceLosses):
    """Reference losses and where they come from, as a file that a law can be fitted to."""

    @property
    def tokenizer(self) -> str | None:
        """Hash of the tokenizer of the tokens measured, where that is known."""
        store = self.how.get("store")
        tokenizer = store.get("tokenizer") if isinstance(store, dict) else None
        return tokenizer if isinstance(tokenizer, str) else None

    @property
    def bos(self) -> int | None:
        """The token with which the sequences measured began, if they began with one."""
        store = self.how.get("store")
        return store.get("bos") if isinstance(store, dict) else None

    def save(self, path: Path) -> None:
        """Write a file that :meth:`load` reads, whole or not at all."""
        write_json(path, self.to_json())

    @staticmethod
    def load(path: Path) -> Reference:
        """Read what :meth:`save` wrote.

        Raises:
            ShearlingError: not such a file, or a loss that is no finite number of at least 0.
        """
        data = read_json(path, ADVICE)
        if data.get("kind") != "reference" or not isinstance(data.get("losses"), dict):
            raise ShearlingError(
                f"{path} is not a file of reference losses (its kind is {told(data.get('kind'))}); "
                f"{ADVICE}."
            )
        how = ReferenceLosses.from_json(data | {"losses": {}}, path).how
        losses = losses_of(data["losses"], data["losses"], f"reference losses of {path}")
        return Reference(losses, how)


@dataclass(frozen=True)
class Point:
    """Losses of one model.

    Attributes:
        model: its name.
        parameters: its size, tied ones once.
        losses: domain -> nats per token.
        tokenizer: hash of the tokenizer that made the tokens, if it is known.
    """

    model: str
    parameters: int
    losses: Mapping[str, float]
    tokenizer: str | None = None

    @staticmethod
    def load(path: Path) -> Point:
        """A file of losses measured on one model (ShearlingError if it names no size)."""
        reference = Reference.load(path)
        parameters = reference.how.get("parameters")
        whole = isinstance(parameters, int) and not isinstance(parameters, bool)
        if not whole or not 0 < parameters < MOST_PARAMETERS:
            raise ShearlingError(
                f"{path} does not say of a model of which size its losses are (how.parameters is "
                f"{repr(parameters)[:40]}); give the file of one measured model."
            )
        model = reference.how.get("model")
        name = model.get("name") if isinstance(model, dict) else model
        return Point(str(name or path.stem), parameters, reference.losses, reference.tokenizer)


def measured(
    checkpoint: Checkpoint, store: Store, sequences: int, *, place: Place, progress: Progress
) -> Reference:
    """A model's own losses, and how they came about; as :func:`measure`."""
    losses = measure(checkpoint, store, sequences, place=place, progress=progress)
    how = {
        "method": "measured",
        "model": identity(checkpoint),
        "parameters": checkpoint.parameters,
        "store": {
            "name": store.path.resolve().name,
            "tokenizer": store.tokenizer,
            **({} if store.bos is None else {"bos": store.bos}),
        },
        "sequences": {
            domain: min(sequences, len(store.sequences(domain, "held_out"))) for domain in losses
        },
        "length": store.length,
    }
    return Reference(losses, how)


def measure(
    model: str | Path | Checkpoint,
    store: Held,
    sequences: int = SEQUENCES,
    *,
    place: Place | None = None,
    progress: Progress = silent,
) -> dict[str, float]:
    """A model's own losses on the held-out part of each domain, computed in float32.

    Ranks share the sequences.

    Memory is that of the model, or of one block where it is streamed; states then lie on disk,
    8 GiB of them at a time, and the weights are read once for each 8 GiB.

    Args:
        model: a model, or where it is.
        store: tokens; the first ``sequences`` held-out sequences of each domain are taken.
        sequences: at most so many of each domain.
        place: where it runs; chosen by the memory that is free, if not given.
        progress: told the block runs done.

    Returns:
        Domain -> mean over all tokens that have a label, nats per token.

    Raises:
        ShearlingError: a domain with nothing held out or nothing to predict, tokens that the model
            does not know, or a loss that is no finite number; the domain is named.
    """
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
    text = {domain: _held_out(store, domain, sequences) for domain in store.domains}
    place = place or Place.best(checkpoint)
    ranks = place.ranks.of(max(len(ids_NS) for ids_NS, _ in text.values()))
    with torch.inference_mode(), place.running():
        walk = BlockStream(checkpoint, place)
        batches = [
            (domain, ids_BS, labels_BS)
            for domain, (ids_NS, labels_NS) in text.items()
            for ids_BS, labels_BS in zip(
                walk.batches(ranks.share(ids_NS)), walk.batches(ranks.share(labels_NS)), strict=True
            )
            if len(ids_BS)
        ]
        sums = dict.fromkeys(text, 0.0)
        done, total = 0, len(batches) * (walk.depth + 1)

        def tell(_: int) -> None:
            nonlocal done
            done += 1
            progress(f"running {checkpoint.name}", done, total)

        states = last_states(walk, [ids for _, ids, _ in batches], tell)
        for number, ((domain, ids_BS, labels_BS), h_BSD) in enumerate(
            zip(batches, states, strict=True)
        ):
            nll_BT = walk.nll(h_BSD, ids_BS)
            sums[domain] += float(
                nll_BT[(labels_BS[:, 1:] != IGNORED).to(nll_BT.device)].double().sum()
            )
            tell(number)
    sums = dict(zip(sums, ranks.totals(list(sums.values())), strict=True))
    means = {
        domain: sums[domain] / int((labels_NS[:, 1:] != IGNORED).sum())
        for domain, (_, labels_NS) in text.items()
    }
    return losses_of(means, means, f"losses of {checkpoint.name}")


def check_points(points: Sequence[Point]) -> None:
    """Raise ShearlingError unless all points are of the same domains and of one tokenizer."""
    domains = set(points[0].losses)
    for point in points:
        if set(point.losses) != domains:
            raise ShearlingError(
                f"the losses of {point.model} are of {', '.join(sorted(point.losses))}, but those "
                f"of {points[0].model} of {', '.join(sorted(domains))}; measure all on one store."
            )
    tokenizers = {point.tokenizer: point.model for point in points if point.tokenizer}
    if len(tokenizers) > 1:
        raise ShearlingError(
            f"the losses of {' and '.join(tokenizers.values())} were measured with different "
            "tokenizers, so that a token is not the same for them; measure all on one store."
        )


def predict(points: Sequence[Point], target: int) -> Reference:
    """Reference losses of a model of ``target`` parameters, by a law fitted in each domain.

    Args:
        points: losses of models of at least two sizes, of one family and tokenizer.
        target: parameters, tied ones once, as of the points.

    Returns:
        The losses; ``how`` has the laws, each point's relative error (prediction over loss, less
        1), and warnings for a person.

    Raises:
        ShearlingError: points of different domains or tokenizers, or as :func:`fit`.
    """
    check_points(points)
    laws = {
        domain: fit([(point.parameters, point.losses[domain]) for point in points], domain)
        for domain in points[0].losses
    }
    errors = {
        domain: [law(point.parameters) / point.losses[domain] - 1 for point in points]
        for domain, law in laws.items()
    }
    return Reference(
        {domain: law(target) for domain, law in laws.items()},
        {
            "method": "law",
            "target_parameters": target,
            "points": [
                {"model": p.model, "parameters": p.parameters, "losses": dict(p.losses)}
                for p in points
            ],
            "laws": {
                domain: {"a": law.a, "b": law.b, "c": law.c, "relative_errors": errors[domain]}
                for domain, law in laws.items()
            },
            "warnings": _warnings(points, target, laws),
        },
    )


def given(text: str) -> Reference:
    """Losses as a user writes them: ``c4=2.1,code=0.9``, or a JSON file of domain -> loss.

    Raises:
        ShearlingError: neither, a domain named twice, or a loss that is no finite number.
    """
    losses: dict[str, Any] = {}
    if text.endswith(".json") or os.path.isfile(text):  # Path's raises where text is long
        data = read_json(Path(text), ADVICE)
        losses = Reference.load(Path(text)).losses if data.get("kind") == "reference" else data
    else:
        for part in text.split(","):
            domain, sign, loss = (piece.strip() for piece in part.partition("="))
            if not (domain and sign) or domain in losses:
                raise ShearlingError(
                    f"--given {text!r} was given, but a loss for each domain such as "
                    "c4=2.1,code=0.9, each domain once, or a JSON file of such was expected."
                )
            losses[domain] = loss
    if not losses:
        raise ShearlingError(f"--given {text!r} gives no losses; name domains such as c4=2.1.")
    return Reference(losses_of(losses, losses, "losses given"), {"method": "given"})


def _held_out(store: Held, domain: str, sequences: int) -> tuple[Tensor, Tensor]:
    """Ids and labels (N, S) of a domain's first held-out sequences."""
    part = store.sequences(domain, "held_out")
    rows = range(min(sequences, len(part)))
    if rows:
        ids_NS, labels_NS = part[rows]
        if (labels_NS[:, 1:] != IGNORED).any():
            return ids_NS, labels_NS
    raise ShearlingError(
        f"the domain {domain} has no held-out tokens to predict in {len(rows)} sequences; hold "
        "more of it out, give it more text, or leave it out."
    )


def _warnings(points: Sequence[Point], target: int, laws: Mapping[str, Law]) -> list[str]:
    sizes = sorted({point.parameters for point in points})
    warnings = []
    if target < sizes[0] or target > sizes[-1]:
        near, side = (sizes[0], "smaller") if target < sizes[0] else (sizes[-1], "larger")
        warnings.append(
            f"the target of {target:,} parameters is {max(target / near, near / target):.2g} times "
            f"{side} than any model measured; the law is extrapolated"
        )
    if len(sizes) == 2:
        warnings.append("models of two sizes determine no constant; c is taken to be 0")
    elif len(points) == 3:
        warnings.append("three models determine the three numbers of a law; errors say little")
    for domain, law in laws.items():
        if len(sizes) > 2 and not EXPONENTS[0] * 1.01 < law.b < EXPONENTS[1] / 1.01:
            warnings.append(
                f"the exponent {law.b:.3g} in {domain} is at the limit of what is tried"
            )
    return warnings
