"""Which units of the blocks, and which channels, a cut has left: part of the model's picture.

Heads have places that mean something: a block, and a group with one key/value head. A channel is
the same one in all blocks. Neurons have neither, so that their number alone is shown.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from shearling.report.draw.markup import Markup, el
from shearling.report.numbers import exact, plural, ranges
from shearling.report.records.results import Model

CELL, GAP, BETWEEN, TALL = 10, 2, 6, 10  # of a head, between two, and more between groups
WIDEST, MOST = 16, 420  # CSS pixels of a head, and of all heads of a block
BESIDE, BAR = 40, 70  # CSS pixels of a block's number with what is around it, and of its MLP
STRETCHES = 288  # of channels, if there are more: the fuller a column's colour, the fewer are left


def units_kept(source: Model, model: Model) -> tuple[Hashable, ...]:
    """What the pictures here show of a model: equal for models that look the same."""
    heads = model.kept_in_blocks("heads", source.fingerprint) or {}
    return (*heads.items(), model.kept("hidden", source.fingerprint))


def units_section(source: Model, model: Model) -> Markup | None:
    """Heads and experts in rows of blocks, and channels; None where none are known to be cut."""
    parts = _heads(source, model), _experts(source, model), _channels(source, model)
    return el("div", *parts, class_="units") if any(parts) else None


def _heads(source: Model, model: Model) -> Markup | None:
    kept = model.kept_in_blocks("heads", source.fingerprint)
    size = source.shape.get("heads", 0)
    if not kept or all(len(one) == size for one in kept.values()):
        return None
    groups = source.shape.get("kv_heads", size)
    grouped = 0 < groups < size and size % groups == 0
    each = size // groups if grouped else size  # places between gaps
    neurons = (source.shape.get("mlp", 0), model.shape.get("mlp", 0))
    left = neurons[1] / neurons[0] if neurons[0] > neurons[1] > 0 else None
    inside = (
        f", in {plural(groups, 'group')} of one key/value head" if groups > 1 and grouped else ""
    )
    beside = "" if left is None else " Beside them its MLP, which is as wide in all that stay."
    line = f"Query heads of each block{inside}.{beside}"
    blocks = range(source.shape["layers"])
    rows = [_row(block, kept.get(block, ()), size, each, left) for block in blocks]
    return _rows(line, rows, size, BAR if left is not None else 0)


def _experts(source: Model, model: Model) -> Markup | None:
    kept = model.kept_in_blocks("experts", source.fingerprint)
    size = source.shape.get("experts", 0)
    if not kept or all(len(one) == size for one in kept.values()):
        return None
    groups = source.shape.get("expert_groups", 1)
    inside = f", in {groups} groups that the router picks among" if groups > 1 else ""
    blocks = range(source.shape["layers"])
    rows = [
        _row(block, kept.get(block, ()), size, size // groups, None, "experts") for block in blocks
    ]
    return _rows(f"Experts of each block{inside}.", rows, size, 0)


def _rows(line: str, rows: Sequence[Markup], size: int, beside: int) -> Markup:
    """A sentence and a row for each block, ``size`` cells wide."""
    cells = min(WIDEST * size, MOST)
    style = f"--cells:{cells}px;--row:{cells + BESIDE + beside}px"
    return el(
        "div", el("p", line, class_="small muted"), el("ol", rows, class_="rows", style=style)
    )


def _row(
    block: int, kept: Sequence[int], size: int, each: int, left: float | None, what: str = "heads"
) -> Markup:
    gone = sorted(set(range(size)) - set(kept))
    said = f"block {block}" + (f", removed {what}: {ranges(gone)}" if kept else ", removed")
    full = el("i", style=f"width:{100 * (left or 0):.2f}%") if kept else None
    return el(
        "li",
        el("span", block, class_=None if kept else "worse"),
        _cells(size, each, gone, said),
        None if left is None else el("span", full, class_="track"),
        title=said,
    )


def _cells(size: int, each: int, gone: Sequence[int], said: str) -> Markup:
    """A square a head, those of a group close together, the removed ones hollow."""
    at = [head * (CELL + GAP) + head // each * BETWEEN for head in range(size)]
    paths = [
        el("path", d="".join(f"M{at[head]} 0h{CELL}v{TALL}h-{CELL}z" for head in of), class_=name)
        for of, name in ((sorted(set(range(size)) - set(gone)), "kept"), (gone, "gone"))
        if of
    ]
    return el(
        "svg", paths, viewBox=f"0 0 {at[-1] + CELL} {TALL}", preserveAspectRatio="none",
        role="img", aria_label=said,
    )  # fmt: skip


def _channels(source: Model, model: Model) -> Markup | None:
    kept = model.kept("hidden", source.fingerprint)
    size = source.shape.get("hidden", 0)
    if kept is None or len(kept) == size:
        return None
    said = f"{exact(len(kept))} of {exact(size)} kept"
    columns = min(size, STRETCHES)
    shares: dict[float, str] = {}
    for start, length, share in _runs(_gone_shares(size, kept, columns)):
        shares[share] = f"{shares.get(share, '')}M{start} 0h{length}v{TALL}h-{length}z"
    picture = el(
        "svg",
        [el("path", d=of, class_="lost", opacity=f"{share:.3g}") for share, of in shares.items()],
        viewBox=f"0 0 {columns} {TALL}", preserveAspectRatio="none", role="img",
        aria_label=f"{said}; the rest is in colour",
    )  # fmt: skip
    line = f"Channels of the stream by index: {said}, the same ones in every block."
    return el("div", el("p", line, class_="small muted"), picture, class_="channels")


def _gone_shares(size: int, kept: Sequence[int], columns: int) -> list[float]:
    """What is gone of each of some equal stretches of indices."""
    left, whole = [0] * columns, [0] * columns
    for index in range(size):
        whole[index * columns // size] += 1
    for index in kept:
        left[index * columns // size] += 1
    return [1 - part / full for part, full in zip(left, whole, strict=True)]


def _runs(shares: Sequence[float]) -> Iterator[tuple[int, int, float]]:
    """Start, length and value of every run of equal shares, but for those of nothing gone."""
    start = 0
    for place in range(1, len(shares) + 1):
        if place == len(shares) or shares[place] != shares[start]:
            if shares[start] > 0:
                yield start, place - start, shares[start]
            start = place
