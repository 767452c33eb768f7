"""Every criterion against its definition, computed on whole stock models."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import naive
import shearling.engine.place
from places import place
from shearling.engine.place import Place
from shearling.engine.states import States
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.scoring.blocks.magnitude import magnitude
from shearling.scoring.registry import names
from shearling.scoring.score import score, score_tokens, states_kept
from shearling.scoring.scores import Scores
from tiny_tokenizer import write_llama

Models = Callable[[str], Path]
DEPTH = 5
# Without repair, which has tests of its own and takes more text.
CRITERIA = tuple(name for name in names("blocks") if name != "repair")


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four sequences of 17 tokens in a batch, the last of two."""
    monkeypatch.setattr(shearling.engine.place, "BATCH_TOKENS", 4 * 17)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine blocks: what the + forms protect leaves three."""
    return write_llama(tmp_path_factory.mktemp("deep") / "nine", layers=9)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sheep.txt"
    path.write_text("".join(f"{n} sheep went through the gate. " for n in range(60)))
    return path


def order(values: list[float]) -> tuple[int, ...]:
    return tuple(sorted(range(len(values)), key=values.__getitem__))


def naive_taylor(path: Path, ids_NS: Tensor) -> list[float]:
    """One ordinary forward and backward pass over all sequences together."""

    def product(weight: Tensor) -> float:
        assert weight.grad is not None
        return float((weight.detach() * weight.grad).abs().double().sum())

    model = naive.stock(path)
    logits = model(input_ids=ids_NS, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids_NS[:, 1:].flatten())
    loss.backward()
    return [
        sum(
            product(weight)
            for name, weight in block.named_parameters()
            if weight.ndim == 2 or ("norm" in name and name.endswith("weight"))
        )
        for block in naive.blocks(model)
    ]


@torch.no_grad()
def naive_influence(path: Path, ids_NS: Tensor) -> list[float]:
    model = naive.stock(path)
    states: list[tuple[Tensor, Tensor]] = []
    for block in naive.blocks(model):
        block.register_forward_hook(
            lambda _module, inputs, output: states.append((inputs[0], output))
        )
    model(input_ids=ids_NS, use_cache=False)
    found = []
    for before, after in states:
        x, y = before.double().flatten(0, 1), after.double().flatten(0, 1)
        found.append(float((1 - (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean()))
    return found


def naive_magnitude(path: Path) -> list[float]:
    return [
        sum(
            float(weight.detach().abs().double().sum())
            for name, weight in block.named_parameters()
            if not name.endswith("bias")
        )
        for block in naive.blocks(naive.stock(path))
    ]


def naive_greedy(
    path: Path, ids_NS: Tensor, protected: tuple[int, ...], remove: int
) -> tuple[list[int], list[float]]:
    depth = naive.stock(path).config.num_hidden_layers
    gone: list[int] = []
    values = [math.nan] * depth
    for _ in range(remove):
        for block in set(range(depth)) - set(gone):
            values[block] = naive.perplexity(path, ids_NS, [*gone, block])
        free = [block for block in range(depth) if block not in (*gone, *protected)]
        gone.append(min(free, key=lambda block: values[block]))
    return gone, values


REMOVE = 3  # of greedy removal
TEXTED = ("perplexity", "taylor", "influence", "greedy")


@pytest.fixture(scope="module")
def resident(models: Models) -> Callable[[str, Tensor], dict[str, Scores]]:
    """Variant -> by every criterion that reads text, from one resident stream, one after another.

    Under ``small_batches``; one test compares each with its definition, another with the model
    streamed.
    """
    made: dict[str, dict[str, Scores]] = {}

    def scores(variant: str, ids: Tensor) -> dict[str, Scores]:
        if variant not in made:
            stream = BlockStream(Checkpoint.open(models(variant)), place(True))
            made[variant] = {by: score_tokens(stream, by, ids, remove=REMOVE) for by in TEXTED}
        return made[variant]

    return scores


Resident = Callable[[str, Tensor], dict[str, Scores]]


@pytest.mark.usefixtures("small_batches")
def test_perplexity(models: Models, resident: Resident, variant: str, ids: Tensor) -> None:
    path, found = models(variant), resident(variant, ids)["perplexity"]
    expected = [naive.perplexity(path, ids, [block]) for block in range(DEPTH)]
    assert list(found.values) == pytest.approx(expected, rel=1e-5)
    assert found.baseline_perplexity == pytest.approx(naive.perplexity(path, ids), rel=1e-5)
    assert found.order == order(expected)
    assert (found.criterion, found.axis, found.protected) == ("perplexity", "layers", ())


@pytest.mark.parametrize("batch", [4, 100])
def test_taylor(
    models: Models, variant: str, ids: Tensor, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shearling.engine.place, "BATCH_TOKENS", 17 * batch)
    found = score_tokens(BlockStream(Checkpoint.open(models(variant)), place()), "taylor", ids)
    expected = naive_taylor(models(variant), ids)
    assert list(found.values) == pytest.approx(expected, rel=1e-5)
    assert found.order == order(expected)


def test_taylor_sums_over_batches_before_the_absolute_value(models: Models, ids: Tensor) -> None:
    """The sum of each sequence's own score is something else, and larger."""
    whole = naive_taylor(models("llama"), ids)
    apart = [naive_taylor(models("llama"), one) for one in ids.split(1)]
    for block in range(DEPTH):
        assert whole[block] < 0.9 * sum(each[block] for each in apart) / len(ids)


def test_magnitude(models: Models, variant: str) -> None:
    found = magnitude(Checkpoint.open(models(variant)), protected=())
    expected = naive_magnitude(models(variant))
    assert list(found.values) == pytest.approx(expected, rel=1e-6)
    assert found.order == order(expected)
    assert found.baseline_perplexity is None


@pytest.mark.usefixtures("small_batches")
def test_influence(models: Models, resident: Resident, variant: str, ids: Tensor) -> None:
    found = resident(variant, ids)["influence"]
    expected = naive_influence(models(variant), ids)
    assert list(found.values) == pytest.approx(expected, rel=1e-5)
    assert found.order == order(expected)


@pytest.mark.usefixtures("small_batches")
def test_greedy(models: Models, resident: Resident, variant: str, ids: Tensor) -> None:
    path, found = models(variant), resident(variant, ids)["greedy"]
    gone, values = naive_greedy(path, ids, (), REMOVE)
    assert list(found.removal_order) == gone
    assert list(found.values) == pytest.approx(values, rel=1e-5)
    assert found.baseline_perplexity == pytest.approx(naive.perplexity(path, ids), rel=1e-5)
    left = [block for block in range(DEPTH) if block not in gone]
    assert list(found.order) == [*gone, *sorted(left, key=values.__getitem__)]


def test_greedy_never_removes_what_is_protected(models: Models, ids: Tensor) -> None:
    path = models("llama")
    stream = BlockStream(Checkpoint.open(path), place(True))
    free = score_tokens(stream, "greedy", ids, remove=3)
    protected = tuple(sorted(free.removal_order[:2]))
    found = score_tokens(stream, "greedy", ids, protected=protected, remove=3)
    gone, values = naive_greedy(path, ids, protected, 3)
    assert list(found.removal_order) == gone
    assert list(found.values) == pytest.approx(values, rel=1e-5)
    assert sorted(found.order) == [b for b in range(DEPTH) if b not in protected]


@pytest.mark.parametrize(("remove", "free"), [(0, 5), (5, 5), (4, 3)])
def test_greedy_refuses_what_cannot_be_removed(
    models: Models, ids: Tensor, remove: int, free: int
) -> None:
    stream = BlockStream(Checkpoint.open(models("llama")), place(True))
    protected = tuple(range(DEPTH - free))
    with pytest.raises(ShearlingError, match=rf"remove {remove} blocks, .* {min(free, 4)} of 5"):
        score_tokens(stream, "greedy", ids, protected=protected, remove=remove)


def test_greedy_removes_half_by_default(models: Models, ids: Tensor) -> None:
    stream = BlockStream(Checkpoint.open(models("opt")), place(True))
    assert len(score_tokens(stream, "greedy", ids).removal_order) == 2
    assert len(score_tokens(stream, "greedy", ids, protected=(0,)).removal_order) == 2


@pytest.mark.usefixtures("small_batches")
def test_streamed_equals_in_memory(
    models: Models, resident: Resident, variant: str, ids: Tensor
) -> None:
    """One resident stream served all criteria in turn; each streamed one starts afresh."""
    checkpoint = Checkpoint.open(models(variant))
    for by in TEXTED:
        streamed = BlockStream(checkpoint, place(False))
        assert score_tokens(streamed, by, ids, remove=REMOVE) == resident(variant, ids)[by]
        assert all(t.is_meta for shell in streamed.shells for t in shell.parameters())
        assert not any(t.requires_grad for shell in streamed.shells for t in shell.parameters())


@pytest.mark.parametrize("resident", [True, False])
def test_taylor_after_inference_on_the_same_stream(
    models: Models, ids: Tensor, resident: bool
) -> None:
    stream = BlockStream(Checkpoint.open(models("gemma2")), place(resident))
    alone = score_tokens(stream, "taylor", ids)
    fresh = BlockStream(Checkpoint.open(models("gemma2")), place(resident))
    score_tokens(fresh, "perplexity", ids)
    assert score_tokens(fresh, "taylor", ids) == alone
    assert all(p.grad is None for shell in fresh.shells for p in shell.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scored_in_float32(
    models: Models, ids: Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    naive.stock(models("qwen2")).to(dtype).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.dtypes.values()) == {"BF16" if dtype == torch.bfloat16 else "F16"}
    stream = BlockStream(checkpoint, place(False))
    singles = [naive.perplexity(tmp_path, ids, [block]) for block in range(DEPTH)]
    for by, expected in (
        ("perplexity", singles),
        ("taylor", naive_taylor(tmp_path, ids)),
        ("influence", naive_influence(tmp_path, ids)),
    ):
        assert list(score_tokens(stream, by, ids).values) == pytest.approx(expected, rel=1e-5)
    found = magnitude(checkpoint, protected=())
    assert list(found.values) == pytest.approx(naive_magnitude(tmp_path), rel=1e-6)


@pytest.mark.parametrize("by", CRITERIA)
def test_score_by_name(deep: Path, text: Path, by: str) -> None:
    checkpoint = Checkpoint.open(deep)
    heard: dict[str, list[tuple[float, float]]] = {}

    def progress(stage: str, done: float, total: float, /) -> None:
        heard.setdefault(stage, []).append((done, total))

    found = score(
        checkpoint, by, calibration=text, samples=3, length=20, remove=2, progress=progress
    )
    assert found.criterion == by
    assert found.protected == ((0, 1, 2, 3, 7, 8) if by.endswith("+") else ())
    assert sorted((*found.order, *found.protected)) == list(range(9))
    assert (found.baseline_perplexity is not None) == (by in ("perplexity", "greedy"))
    assert found.details["model"] == {"name": "nine", "fingerprint": checkpoint.fingerprint}
    assert found.details["calibration"] == (
        None
        if by.startswith("magnitude")
        else {"file": "sheep.txt", "samples": 3, "length": 20, "seed": 0, "bos": False}
    )
    for told in heard.values():
        done, totals = zip(*told, strict=True)
        assert list(done) == sorted(set(done))
        assert {done[-1]} == set(totals)
    assert len(heard) == (2 if by == "greedy" else 1)
    # What is protected changes no score.
    plain: Any = {"perplexity": None, "greedy": None}.get(by, by.removesuffix("+"))
    if plain and plain != by:
        unprotected = score(checkpoint, plain, calibration=text, samples=3, length=20)
        assert unprotected.values == found.values


@pytest.mark.parametrize(
    ("by", "protect", "protected"),
    [
        ("magnitude+", (1, 0), (0,)),
        ("magnitude+", (0, 0), ()),
        ("magnitude", (2, 3), (0, 1, 6, 7, 8)),
        ("taylor+", (0, 8), (1, 2, 3, 4, 5, 6, 7, 8)),
        ("influence", (0, 1), (8,)),
    ],
)
def test_protection_can_be_chosen(
    deep: Path, text: Path, by: str, protect: tuple[int, int], protected: tuple[int, ...]
) -> None:
    found = score(Checkpoint.open(deep), by, calibration=text, samples=2, length=8, protect=protect)
    assert found.protected == protected
    assert not set(found.order) & set(protected)


def test_seed_and_samples_choose_the_text(deep: Path, text: Path) -> None:
    checkpoint = Checkpoint.open(deep)

    def values(**options: int) -> tuple[float, ...]:
        chosen = {"samples": 2, "length": 16, **options}
        return score(checkpoint, "influence", calibration=text, **chosen).values

    assert values() == values(seed=0)
    assert values() != values(seed=1)
    assert values() != values(length=17)


@pytest.mark.parametrize(
    ("by", "options", "message"),
    [
        ("entropy", {}, r"criterion 'entropy' is not known; .*perplexity, taylor\+,"),
        ("", {}, "criterion '' is not known"),
        ("perplexity+", {}, r"criterion 'perplexity\+' is not known"),
        ("perplexity", {}, "criterion perplexity runs the model on text; give --calibration"),
        ("magnitude", {"protect": (5, 4)}, "first 5 and the last 4 of 9 .*--protect-first"),
        ("magnitude", {"protect": (-1, 0)}, "first -1"),
        ("magnitude+", {"remove": 4}, "4 of 9 blocks were to be removed, but only 3 are not"),
        ("influence", {"samples": 99}, r"1,910 tokens, but 99 samples of 128 .*fewer samples"),
        ("influence", {"samples": 1, "length": 65}, "65 tokens are longer than the 64 positions"),
    ],
)
def test_what_cannot_work_is_said(
    deep: Path, text: Path, by: str, options: dict[str, Any], message: str
) -> None:
    if "samples" in options:
        options = {"calibration": text} | options
    with pytest.raises(ShearlingError, match=message):
        score(Checkpoint.open(deep), by, **options)


def test_plus_needs_more_than_six_blocks(models: Models) -> None:
    with pytest.raises(ShearlingError, match="first 4 and the last 2 of 5 blocks leaves none"):
        score(Checkpoint.open(models("llama")), "magnitude+")


@pytest.mark.parametrize("by", ["perplexity", "taylor", "magnitude"])
def test_weights_that_are_not_numbers(tmp_path: Path, text: Path, by: str) -> None:
    write_llama(tmp_path, layers=2)
    model = naive.stock(tmp_path)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ShearlingError, match=r"^the tensor model\.layers\.1\.mlp\.up_proj\.weight of"
    ):
        score(Checkpoint.open(tmp_path), by, calibration=text, samples=2, length=8)


@pytest.mark.parametrize(
    ("by", "axis"),
    [("perplexity", "layers"), ("taylor", "layers"), ("influence", "layers"), ("flap", "mlp"),
     ("fisher", "mlp")],
)  # fmt: skip
def test_states_are_estimated_as_what_is_held(
    deep: Path, text: Path, by: str, axis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, most, put = Checkpoint.open(deep), 0, States.put

    def counted(self: States, key: Any, batch: int, h_BSD: Tensor) -> None:
        nonlocal most
        put(self, key, batch, h_BSD)
        held = (one for one in self._held.values() if isinstance(one, Tensor))
        most = max(most, sum(one.numel() * one.itemsize for one in held))

    monkeypatch.setattr(States, "put", counted)
    score(model, by, axis=axis, calibration=text, samples=4, length=16, place=Place.cpu())
    needed = states_kept(model, by, axis, 4 * 16).bytes
    assert needed / 2 <= most <= needed
