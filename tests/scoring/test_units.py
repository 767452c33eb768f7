"""Scores of units against their definitions on whole stock models, and the choice they lead to."""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import naive
import shearling.engine.place
from places import place
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.scoring.registry import find, names
from shearling.scoring.score_units import score_units
from shearling.scoring.scores import Scores
from shearling.scoring.units.places import unit_axes
from shearling.scoring.units.statistics import Inlet, Sums, geometric_mean, obs
from tiny_models import LEADING

Models = Callable[[str], Path]
Pieces = dict[str, list[Tensor]]
Groups = tuple[tuple[str, ...], ...]
DEPTH, HEADS, HIDDEN, MLP = 5, 9, 36, 50
# Matrices whose inputs hold an axis; those in brackets share an input.
MLP_OUT: Groups = (("down_proj",), ("dense_4h_to_h",), ("fc2",), ("output_linear",))
HEADS_OUT: Groups = (("o_proj",), ("dense",), ("out_proj",))
READERS: Groups = (
    ("q_proj", "k_proj", "v_proj"),
    ("qkv_proj",),
    ("query_key_value",),
    ("gate_proj", "up_proj"),
    ("gate_up_proj",),
    ("input_linear",),
    ("dense_h_to_4h",),
    ("fc1",),
)


# Cohere's attention and MLP stand side by side behind one norm.
BESIDE: Groups = (("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four sequences of 17 tokens in a batch, the last of two."""
    monkeypatch.setattr(shearling.engine.place, "BATCH_TOKENS", 4 * 17)


# --- references ----------------------------------------------------------------------------------


class Whole:
    """One ordinary forward and backward pass over all sequences, inputs and outputs noted."""

    def __init__(self, path: Path, ids_NS: Tensor) -> None:
        self.model = naive.stock(path)
        config = self.model.config
        self.grouped = hasattr(config, "num_key_value_heads")
        self.kv: int = getattr(config, "num_key_value_heads", HEADS)
        self.head_dim = getattr(config, "head_dim", None) or HIDDEN // HEADS
        self.io: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in range(DEPTH)]
        self.after: list[Tensor] = []
        self.modules = [list(block.named_modules()) for block in naive.blocks(self.model)]
        for number, block in enumerate(naive.blocks(self.model)):
            block.register_forward_hook(lambda _, __, out: self.after.append(out.detach()))
            for name, module in block.named_modules():
                if isinstance(module, torch.nn.Linear):
                    module.register_forward_hook(self._note(number, name.split(".")[-1]))
        logits = self.model(input_ids=ids_NS, use_cache=False).logits
        predicted = ids_NS[:, 1:].flatten()
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), predicted)
        nll.backward()
        self.predicted = len(predicted)
        self.inlets, self.observed = cache(self._inlets), cache(self._observed)

    def _note(self, number: int, leaf: str) -> Any:
        def hook(module: Any, args: Any, out: Tensor) -> None:
            out.retain_grad()
            self.io[number][leaf] = (args[0].detach(), out)

        return hook

    def _inlets(self, number: int, groups: Groups) -> list[tuple[Tensor, ...]]:
        """x (T, C), W (O, C), x dL/dx (T, C) with L the summed NLL; in double."""
        found = []
        for leaves in groups:
            if leaves[0] not in self.io[number]:
                continue
            x = self.io[number][leaves[0]][0].double().flatten(0, -2)
            weights, gradient = [], torch.zeros_like(x)
            for leaf in leaves:
                (module,) = (m for n, m in self.modules[number] if n.split(".")[-1] == leaf)
                weights.append(module.weight.detach().double())
                out = self.io[number][leaf][1]
                assert out.grad is not None
                gradient += out.grad.double().flatten(0, -2) @ weights[-1] * self.predicted
            found.append((x, torch.cat(weights), x * gradient))
        return found

    def _observed(self, by: str, axis: str) -> list[list[float]]:
        if axis == "kv_heads" and by != "obs":
            each = HEADS // self.kv
            return [
                [sum(row[g * each : (g + 1) * each]) for g in range(self.kv)]
                for row in self.observed(by, "heads")
            ]
        if by == "fisher-energy":
            rows = zip(self.observed("fisher", axis), self.observed("energy", axis), strict=True)
            return [
                [
                    math.sqrt(a / sum(f) * len(f) * b / sum(e) * len(e))
                    for a, b in zip(f, e, strict=True)
                ]
                for f, e in rows
            ]
        readers = BESIDE if self.model.config.model_type == "cohere2" else READERS
        groups = {"mlp": MLP_OUT, "hidden": readers}.get(axis, HEADS_OUT)
        width = {"heads": self.head_dim}.get(axis, 1)
        width = self.head_dim * HEADS // self.kv if axis == "kv_heads" else width
        rows = []
        for number in range(DEPTH):
            h = self.after[number].double().flatten(0, -2)
            w = torch.ones(len(h)).double() if axis == "hidden" else 1 / (h**2).sum(1)
            parts = [unit_values(by, *i, w, width) for i in self.inlets(number, groups)]
            rows.append([sum(each) for each in zip(*parts, strict=True)])
        return [[sum(each) for each in zip(*rows, strict=True)]] if axis == "hidden" else rows


def unit_values(by: str, x: Tensor, W: Tensor, z: Tensor, w: Tensor, width: int) -> list[float]:
    """The definition, one unit at a time."""
    inverse = x
    if by == "obs":
        gram = (x * w[:, None]).T @ x / len(x)
        inverse = torch.linalg.inv(gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram)))
    found = []
    for start in range(0, x.shape[1], width):
        u = slice(start, start + width)
        length = (W[:, u] ** 2).sum(0)
        value = {
            "activation": lambda u=u, length=length: x[:, u].norm(dim=1).mean(),
            "wanda-sp": lambda u=u, length=length: (W[:, u].abs() * x[:, u].norm(dim=0)).sum(),
            "flap": lambda u=u, length=length: (x[:, u].var(0, correction=0) * length).sum(),
            "energy": lambda u=u, length=length: (
                (x[:, u] ** 2 * w[:, None]).mean(0) * length
            ).sum(),
            "obs": lambda u=u, length=length: torch.trace(
                W[:, u] @ torch.linalg.inv(inverse[u, u]) @ W[:, u].T
            ),
            "fisher": lambda u=u, length=length: (z[:, u].sum(1) ** 2).sum(),
        }[by]
        found.append(float(value()))
    return found


def pieces(tensors: dict[str, Tensor], whole: Whole) -> Pieces:
    """By axis, matrices (U, n) of all that goes with each unit in a block, by tensor name."""
    kv, hd = whole.kv, whole.head_dim
    found: Pieces = {"mlp": [], "heads": [], "kv_heads": [], "hidden": []}

    def add(axis: str, tensor: Tensor, units: int) -> None:
        found[axis].append(tensor.reshape(units, -1))

    def queries(tensor: Tensor) -> None:
        add("heads", tensor, HEADS)
        add("kv_heads", tensor, kv)

    for name, tensor in tensors.items():
        leaf, kind = name.split(".")[-2:]
        weight = tensor if kind == "weight" else tensor[:, None]
        if leaf in ("gate_proj", "up_proj", "dense_h_to_4h", "fc1"):
            add("mlp", weight, MLP)
        elif leaf in ("gate_up_proj", "input_linear"):
            add("mlp", weight[:MLP], MLP)
            add("mlp", weight[MLP:], MLP)
        elif leaf in ("down_proj", "dense_4h_to_h", "fc2", "output_linear") and kind == "weight":
            add("mlp", weight.T, MLP)
        elif leaf in ("o_proj", "dense", "out_proj") and kind == "weight":
            queries(weight.T)
        elif leaf in ("q_proj", "query_key_value") or (leaf in ("k_proj", "v_proj") and kv == 9):
            queries(weight)
        elif leaf in ("k_proj", "v_proj"):
            add("kv_heads", weight, kv)
        elif leaf == "qkv_proj":
            query, key, value = weight.split([HEADS * hd, kv * hd, kv * hd])
            queries(query)
            add("kv_heads", key, kv)
            add("kv_heads", value, kv)
        if leaf == "q_norm" and len(weight) == HEADS * hd:  # over all heads
            queries(weight)
        elif leaf == "k_norm" and len(weight) == kv * hd:
            add("kv_heads", weight, kv)
        if "norm" in leaf and leaf not in ("q_norm", "k_norm"):
            add("hidden", weight if weight.ndim == 2 else weight[:, None], HIDDEN)
        elif any(leaf in group for group in READERS):
            if kind == "weight":
                add("hidden", weight.T, HIDDEN)
        elif leaf not in ("q_norm", "k_norm"):  # what is left in a block writes into the stream
            add("hidden", weight, HIDDEN)
    return found


def outer_pieces(model: Any) -> list[Tensor]:
    inside = {id(p) for p in naive.blocks(model).parameters()}
    outer = [p.detach() for p in model.parameters() if id(p) not in inside]
    found = [p[:, None] if p.ndim == 1 else p for p in outer]
    return [p if len(p) == HIDDEN else p.T for p in found if HIDDEN in p.shape]


def coupled(whole: Whole, by: str, axis: str) -> list[list[float]]:
    rows = []
    for block in naive.blocks(whole.model):
        tensors = {}
        for name, parameter in block.named_parameters():
            weight = parameter.detach().double()
            if by.startswith("taylor"):
                assert parameter.grad is not None
                weight = weight * parameter.grad.double()
            tensors[name] = weight
        rows.append(pieces(tensors, whole)[axis])
    if axis == "hidden":
        rows = [[piece for row in rows for piece in row]]
        if by.startswith("magnitude"):
            rows[0] += [piece.double() for piece in outer_pieces(whole.model)]
    return [
        {
            "taylor": lambda row=row: torch.stack([p.sum(1).abs() for p in row]).sum(0),
            "taylor-element": lambda row=row: torch.cat(row, 1).abs().sum(1),
            "magnitude-l1": lambda row=row: torch.cat(row, 1).abs().sum(1),
            "magnitude-l2": lambda row=row: torch.cat(row, 1).norm(dim=1),
        }[by]().tolist()
        for row in rows
    ]


def close(found: Scores, expected: list[list[float]]) -> None:
    """Equal up to the rounding of single precision, relative to the largest of a row."""
    for row, reference in zip(found.rows, expected, strict=True):
        scale = max(map(abs, reference))
        assert list(row) == pytest.approx(reference, rel=2e-4, abs=2e-6 * scale), found.axis


# --- criteria ------------------------------------------------------------------------------------


# A formula knows no family: it is given sums over the tokens of an inlet, gradients or weights.
# What a family can get wrong is where these are, so that every variant tries each kind of them:
# between them, these criteria read all. The others read nothing else and take turns; the first
# variants of each way to name tensors try them all.
FIRST = ("fisher-energy", "obs", "flap", "activation", "taylor", "magnitude-l1")
OTHERS = tuple(name for name in names("units") if name not in (*FIRST, "random"))
IN_FULL = ("llama", "phi3", "cohere2", "gpt_neox", "opt")


def criteria_for(variant: str) -> tuple[str, ...]:
    if variant in IN_FULL:
        return FIRST + OTHERS
    return (*FIRST, OTHERS[list(LEADING).index(variant) % len(OTHERS)])


def test_the_turns_leave_nothing_out() -> None:
    """Every criterion is tried in full, and each reads what one of the first reads."""
    known = {name: find(name, "units") for name in names("units") if name != "random"}
    assert {by for variant in LEADING for by in criteria_for(variant)} == set(known)
    assert {by for v in LEADING if v not in IN_FULL for by in criteria_for(v)} == set(known)
    read = {kind for name in FIRST for part in known[name].parts for kind in part.reads}
    assert {kind for by in known.values() for part in by.parts for kind in part.reads} == read


def test_every_criterion_on_every_axis(models: Models, variant: str, ids: Tensor) -> None:
    """By definition on the whole model; the same streamed, resident, and axis by axis."""
    checkpoint = Checkpoint.open(models(variant))
    whole = Whole(models(variant), ids)
    axes = ("mlp", "heads", *(("kv_heads",) if whole.grouped else ()), "hidden")
    assert set(unit_axes(checkpoint.layout)) == set(axes)
    resident = BlockStream(checkpoint, place(True))
    for by in criteria_for(variant):
        found = score_units(resident, by, ids, axes)
        assert tuple(found) == axes
        coupling = by.startswith(("taylor", "magnitude"))
        for axis in axes:
            expected = coupled(whole, by, axis) if coupling else whole.observed(by, axis)
            assert found[axis].criterion == by
            close(found[axis], expected)
        if by in ("fisher-energy", "obs", "taylor"):
            streamed = BlockStream(checkpoint, place(False))
            assert score_units(streamed, by, ids, axes) == found
            for shell in streamed.shells:
                assert all(t.is_meta and not t.requires_grad for t in shell.parameters())
                assert not any(m._forward_pre_hooks for m in shell.modules())


@pytest.mark.parametrize("by", names("units"))
def test_an_axis_is_scored_the_same_alone(models: Models, ids: Tensor, by: str) -> None:
    stream = BlockStream(Checkpoint.open(models("llama")), place(True))
    axes = ("mlp", "heads", "kv_heads", "hidden")
    together = score_units(stream, by, ids, axes)
    for axis in axes:
        assert score_units(stream, by, ids, [axis, axis]) == {axis: together[axis]}
    assert len(together["hidden"].rows) == 1
    assert len(together["mlp"].rows) == DEPTH


def test_a_caller_without_gradients_gets_the_same_scores(models: Models, ids: Tensor) -> None:
    stream = BlockStream(Checkpoint.open(models("llama")), place(True))
    expected = score_units(stream, "fisher", ids, ["mlp", "heads"])
    with torch.no_grad():
        assert score_units(stream, "fisher", ids, ["mlp", "heads"]) == expected


def test_random_follows_the_seed(models: Models, ids: Tensor) -> None:
    stream = BlockStream(Checkpoint.open(models("llama")), place(True))

    def draw(seed: int) -> dict[str, Scores]:
        return score_units(stream, "random", ids, ["mlp", "hidden"], seed=seed)

    assert draw(0) == draw(0)
    assert draw(0)["mlp"].rows != draw(1)["mlp"].rows
    values = [value for row in draw(0)["mlp"].rows for value in row]
    assert len(set(values)) == DEPTH * MLP
    assert draw(0)["hidden"].rows[0] != draw(0)["mlp"].rows[0][:HIDDEN]


def test_no_batch_outlives_its_turn(models: Models, ids: Tensor) -> None:
    """What a batch leaves goes at once, not when the collector comes: graphs are large."""
    stream = BlockStream(Checkpoint.open(models("llama")), place(True))
    score_units(stream, "fisher-energy", ids, ["mlp", "hidden"])
    gc.collect()
    before = sum(issubclass(type(held), Tensor) for held in gc.get_objects())
    gc.disable()
    try:
        score_units(stream, "fisher-energy", ids, ["mlp", "hidden"])
        after = sum(issubclass(type(held), Tensor) for held in gc.get_objects())
    finally:
        gc.enable()
    assert after == before


def test_progress_is_told(models: Models, ids: Tensor) -> None:
    for by in set(names("units")) - {"random"}:
        heard: list[tuple[float, float]] = []
        stream = BlockStream(Checkpoint.open(models("opt")), place(True))
        score_units(stream, by, ids, ["mlp"], progress=lambda _, *told, h=heard: h.append(told))
        assert [done for done, _ in heard] == list(range(1, len(heard) + 1))
        assert {total for _, total in heard} == {len(heard)}


@pytest.mark.parametrize("width", [1, 2, 3])
def test_obs_is_the_error_of_the_best_repair(width: int) -> None:
    """Against least squares for the columns that stay, tokens weighted."""
    draw = torch.Generator().manual_seed(width)
    x = torch.randn(200, 6, generator=draw).double() @ torch.randn(6, 6, generator=draw).double()
    w = torch.rand(200, generator=draw).double()
    weight_OC = torch.randn(4, 6, generator=draw).double()
    sums = Sums(frozenset({"gram"}), width)
    sums.add(x[:90].float(), w[:90], None)
    sums.add(x[90:].float(), w[90:], None)
    found = obs(Inlet(sums.sums, sums.tokens, weight_OC), width, ridge=1e-9)
    scaled = x * w.sqrt()[:, None]
    for unit, cost in enumerate(found.tolist()):
        left = [c for c in range(6) if c // width != unit]
        solved = torch.linalg.lstsq(scaled[:, left], scaled @ weight_OC.T).solution
        error = scaled[:, left] @ solved - scaled @ weight_OC.T
        assert cost == pytest.approx(float(error.square().sum() / len(x)), rel=1e-3)


def test_nothing_is_heard() -> None:
    """A matrix no token reaches costs nothing, and a criterion without a say has none."""
    silent = Inlet({"gram": torch.zeros(4, 4).double()}, 3, torch.ones(2, 4))
    assert obs(silent, 2).tolist() == [0, 0]
    some, none = torch.tensor([0.0, 3.0, 1.0]).double(), torch.zeros(3).double()
    for mixed in (geometric_mean(some, none), geometric_mean(none, some)):
        assert mixed.argsort().tolist() == [0, 2, 1]
        assert bool(mixed.isfinite().all())
    assert geometric_mean(torch.tensor([1.0, 3.0]), torch.tensor([6.0, 2.0])).tolist() == (
        pytest.approx([math.sqrt(0.5 * 1.5), math.sqrt(1.5 * 0.5)])
    )


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "by", "axes", "message"),
    [
        ("llama", "entropy", ["mlp"], "'entropy' is not known; choose one of fisher-energy, fish"),
        ("llama", "energy", ["vocab"], "'vocab' has no units .* hidden, heads, kv_heads, mlp"),
        ("llama", "energy", ["layers"], "axis 'layers' has no units"),
        ("llama", "random", ["head_dim"], "axis 'head_dim' has no units"),
        ("gpt_neox", "fisher", ["mlp", "kv_heads"], "'kv_heads' .* choose of hidden, heads, mlp"),
        ("llama", "energy", [], "no axis was named"),
    ],
)
def test_what_cannot_be_scored_is_said(
    models: Models, ids: Tensor, variant: str, by: str, axes: list[str], message: str
) -> None:
    with pytest.raises(ShearlingError, match=message):
        score_units(BlockStream(Checkpoint.open(models(variant)), place()), by, ids, axes)


@pytest.mark.parametrize("shape", [(0, 17), (3, 1), (5,)])
def test_text_is_needed(models: Models, shape: tuple[int, ...]) -> None:
    stream, ids = BlockStream(Checkpoint.open(models("llama")), place()), torch.ones(shape).long()
    with pytest.raises(ShearlingError, match="tokens of shape .* at least 2 tokens"):
        score_units(stream, "fisher", ids, ["mlp"])
    for by in (name for name in names("units") if find(name, "units").textless):
        score_units(stream, by, ids, ["mlp"])


def poisoned(models: Models, target: Path, name: str) -> BlockStream:
    from safetensors.torch import load_file, save_file

    shutil.copytree(models("llama"), target)
    tensors = load_file(target / "model.safetensors")
    tensors[name][0, 0] = math.nan
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return BlockStream(Checkpoint.open(target), place())


def test_values_that_are_not_numbers(models: Models, tmp_path: Path, ids: Tensor) -> None:
    """The tensor is named, whatever reads it."""
    stream = poisoned(models, tmp_path / "block", "model.layers.1.mlp.up_proj.weight")
    for by in set(names("units")) - {"random"}:
        where = r"^the tensor model\.layers\.1\.mlp\.up_proj\.weight of"
        with pytest.raises(ShearlingError, match=where):
            score_units(stream, by, ids, ["mlp"])
    with pytest.raises(ShearlingError, match=r"^the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        score_units(stream, "magnitude-l2", ids, ["hidden"])
    with pytest.raises(ShearlingError, match=r"^the tensor lm_head\.weight of"):
        poisoned(models, tmp_path / "head", "lm_head.weight")
