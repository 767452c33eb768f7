"""Reference losses: measured against whole stock models, laws against laws that are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

import naive
import shearling.engine.walk
import shearling.engine.weights
from places import place
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.train.reference import Point, Reference, given, measure, predict
from shearling.train.scaling import Law, fit

Models = Callable[[str], Path]
BILLION = 10**9

# Sheared LLaMA (arXiv 2310.06694): losses its law predicts at 1.3B and 2.7B parameters.
DOMAINS = ("cc", "github", "book", "stackexchange", "wiki", "arxiv", "c4")
AT_1_3B = (1.9643, 0.7459, 2.1393, 1.6117, 1.7590, 1.4449, 2.1251)
AT_2_7B = (1.8712, 0.6883, 2.0325, 1.5353, 1.6297, 1.3560, 2.0328)


class Part:
    """Held-out sequences in memory, some labels of which do not count."""

    def __init__(self, seed: int, n: int, length: int = 13) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, 101, (n, length), generator=generator)
        learned = torch.rand(n, length, generator=generator) < 0.6
        self.labels = self.ids.masked_fill(~learned, -100)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Any) -> tuple[Tensor, Tensor]:
        chosen = np.asarray(rows, dtype=np.int64)
        return self.ids[chosen], self.labels[chosen]


class FakeStore:
    def __init__(self, **parts: Part) -> None:
        self.parts = parts
        self.domains = tuple(parts)

    def sequences(self, domain: str, part: str) -> Part:
        assert part == "held_out"
        return self.parts[domain]


STORE = FakeStore(web=Part(1, 400), code=Part(2, 3), books=Part(3, 7))


# --- measured ------------------------------------------------------------------------------------


@cache
def expected(path: Path, store: FakeStore, most: int) -> dict[str, float]:
    """One sequence and one token at a time, from a whole stock model."""
    model = naive.stock(path)
    means = {}
    for domain, part in store.parts.items():
        nats = []
        for ids, labels in zip(part.ids[:most], part.labels[:most], strict=True):
            with torch.no_grad():
                nll = naive.token_nll(model, ids[None])[0]
            nats += [float(nll[i]) for i in range(len(nll)) if labels[i + 1] != -100]
        means[domain] = math.fsum(nats) / len(nats)
    return means


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("variant", ["llama", "gemma2"])
def test_measured_losses_are_a_stock_models(models: Models, variant: str, stream: bool) -> None:
    found = measure(models(variant), STORE, 180, place=place(not stream))
    assert found == pytest.approx(expected(models(variant), STORE, 180), rel=2e-6)
    fewer = measure(Checkpoint.open(models(variant)), STORE, 2, place=place(not stream))
    assert fewer == pytest.approx(expected(models(variant), STORE, 2), rel=2e-6)
    assert fewer != pytest.approx(found, rel=1e-3)


def test_streamed_states_keep_within_their_space(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer batches at a time, in more walks, and the same losses; progress reaches its total."""
    steps: list[tuple[float, float]] = []
    whole = measure(models("llama"), STORE, 170, place=place(False))
    monkeypatch.setattr(shearling.engine.walk, "SCRATCH_BYTES", 1)
    loads: list[int] = []
    read = shearling.engine.weights.BlockWeights._read
    monkeypatch.setattr(
        shearling.engine.weights.BlockWeights,
        "_read",
        lambda self, index, device: (loads.append(index), read(self, index, device))[1],
    )
    found = measure(
        models("llama"), STORE, 170, place=place(False), progress=lambda _, *at: steps.append(at)
    )
    assert found == whole
    batches = 4  # of up to 157 sequences of 13 tokens: two of web, one each of the others
    assert sorted(loads) == sorted(list(range(5)) * batches)
    assert steps == [(i + 1, batches * 6) for i in range(batches * 6)]


def test_domains_with_nothing_to_measure(models: Models) -> None:
    empty = FakeStore(web=Part(1, 2), code=Part(2, 0))
    with pytest.raises(ShearlingError, match="domain code has no held-out tokens"):
        measure(models("llama"), empty)
    silent = Part(2, 4)
    silent.labels[:, 1:] = -100  # the first label predicts nothing
    with pytest.raises(ShearlingError, match=r"domain code has no held-out tokens .* 4 sequences"):
        measure(models("llama"), FakeStore(web=Part(1, 2), code=silent))


def test_a_model_that_computes_no_numbers(models: Models, tmp_path: Path) -> None:
    model = naive.stock(models("llama"))
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = math.nan
    model.save_pretrained(tmp_path / "broken")
    clean, hit = Part(1, 2), Part(2, 2)
    clean.ids[clean.ids == 50] = 51
    hit.ids[0, 0] = 50
    with pytest.raises(ShearlingError, match=r"^the tensor model\.embed_tokens\.weight of"):
        measure(tmp_path / "broken", FakeStore(web=clean, code=hit))


# --- a law ---------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@drawn(
    a=st.floats(0.1, 1),
    b=st.floats(0.03, 1.2),
    c=st.floats(0.02, 3),
    sizes=st.lists(st.integers(10, 400), min_size=3, max_size=6, unique=True),
)
def test_an_exact_law_is_found(a: float, b: float, c: float, sizes: list[int]) -> None:
    """Points on a law give it back: what it says at other sizes, and its numbers."""
    largest, smallest = max(sizes), min(sizes)
    if largest < 3 * smallest:  # too close together to tell a power from a constant
        sizes = [*sizes, 3 * smallest, 9 * smallest]
    true = Law(a * (1e6 * smallest) ** b, b, c)
    points = [(size * 10**6, true(size * 10**6)) for size in sizes]
    law = fit(points, "web")
    for size, loss in points:
        assert law(size) == pytest.approx(loss, rel=1e-9)
    assert law(smallest * 5e5) == pytest.approx(true(smallest * 5e5), rel=1e-5)
    assert law.b == pytest.approx(b, rel=1e-3)
    assert law.c == pytest.approx(c, rel=1e-2, abs=1e-3)


def error(points: list[tuple[int, float]], a: float, b: float, c: float) -> float:
    return sum(((a * n**-b + c) / loss - 1) ** 2 for n, loss in points)


@settings(max_examples=25, deadline=None)
@drawn(st.integers(0, 10**6), st.integers(3, 6))
def test_no_law_of_a_dense_grid_is_nearer(seed: int, n: int) -> None:
    """Noisy losses, some of which call for c = 0: against a and c from a quadrant's grid."""
    random = np.random.default_rng(seed)
    sizes = (10 ** np.sort(random.uniform(7, 10, n))).astype(int).tolist()
    losses = [float(8 * s**-0.06 * math.exp(random.normal(0, 0.02))) for s in sizes]
    points = list(zip(sizes, losses, strict=True))
    try:
        law = fit(points, "web")
    except ShearlingError:
        # Then no law beats a constant, of which this one has the least relative errors.
        law = Law(0.0, 1.0, sum(1 / x for x in losses) / sum(x**-2 for x in losses))
    best = min(error(points, law.a, law.b, law.c), 1e9)
    for b in np.exp(np.linspace(math.log(0.001), math.log(2), 60)).tolist():
        for c in np.linspace(0, min(losses) * 1.05, 60).tolist():
            # The best a for these is a weighted mean, cut off at 0.
            x = np.array([s**-b for s in sizes]) / losses
            a = max(0.0, float(x @ (1 - c / np.array(losses)) / (x @ x)))
            assert error(points, a, b, c) >= best * (1 - 1e-9) - 1e-14


def test_two_sizes_give_a_power_without_a_constant() -> None:
    law = fit([(7 * BILLION, 1.75), (13 * BILLION, 1.67)], "web")
    assert law.c == 0
    assert law(7 * BILLION) == pytest.approx(1.75, rel=1e-12)
    assert law(13 * BILLION) == pytest.approx(1.67, rel=1e-12)
    # Two losses at one size: their geometric mean.
    law = fit([(100, 2.0), (100, 8.0), (400, 1.0)], "web")
    assert [law(100), law(400), law(200)] == pytest.approx([4.0, 1.0, 2.0])


def test_the_papers_tables_agree_with_one_another() -> None:
    """Their 1.3B and 2.7B columns are laws' values: falling, with exponents of a family's kind."""
    small, large = (
        Point(name, size, dict(zip(DOMAINS, losses, strict=True)))
        for name, size, losses in (
            ("1.3B", 1_300_000_000, AT_1_3B),
            ("2.7B", 2_700_000_000, AT_2_7B),
        )
    )
    found = predict([small, large], 7 * BILLION)
    assert list(found.losses) == list(DOMAINS)
    for domain in DOMAINS:
        law = found.how["laws"][domain]
        by_hand = math.log(small.losses[domain] / large.losses[domain]) / math.log(2.7 / 1.3)
        assert law["b"] == pytest.approx(by_hand, rel=1e-12)
        assert 0.05 < law["b"] < 0.12
        assert found.losses[domain] == pytest.approx(
            large.losses[domain] * (2.7 / 7) ** by_hand, rel=1e-12
        )
    # A third point on a law with a constant, through both columns: both come back.
    for domain, at_1_3, at_2_7 in zip(DOMAINS, AT_1_3B, AT_2_7B, strict=True):
        x, y = 1.3**-0.3, 2.7**-0.3
        a = (at_1_3 - at_2_7) / (x - y)
        true = Law(a * BILLION**0.3, 0.3, at_1_3 - a * x)
        points = [(size * BILLION, true(size * BILLION)) for size in (7, 13, 70)]
        law = fit(points, domain)
        assert [law(1.3e9), law(2.7e9)] == pytest.approx([at_1_3, at_2_7], abs=5e-5)


@pytest.mark.parametrize(
    "points",
    [
        [(1, 2.0), (2, 2.0)],
        [(1, 2.0), (2, 2.1)],
        [(1, 2.0), (2, 2.0), (4, 2.0)],
        [(1, 2.0), (2, 2.2), (4, 2.3)],
        [(4, 2.3), (1, 2.0), (2, 2.2)],
    ],
)
def test_losses_that_do_not_fall(points: list[tuple[int, float]]) -> None:
    with pytest.raises(ShearlingError, match=r"losses in code do not fall .*2 at 1, "):
        fit(points, "code")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "of 0 size"),
        ([(7, 2.0)], "of 1 size"),
        ([(7, 2.0), (7, 1.0), (7, 3.0)], "of 1 size"),
        ([(7, 2.0), (8, 0.0)], "numbers above 0"),
        ([(7, 2.0), (8, math.nan), (9, 1.0)], "numbers above 0"),
    ],
)
def test_points_that_give_no_law(points: list[tuple[int, float]], message: str) -> None:
    with pytest.raises(ShearlingError, match=f"code .*{message}"):
        fit(points, "code")


# --- predictions ---------------------------------------------------------------------------------


def point(size: int, tokenizer: str | None = None, **losses: float) -> Point:
    return Point(f"of {size}", size, losses, tokenizer)


def on_a_law(*sizes: int) -> list[Point]:
    return [point(n, web=2 + 3 * n**-0.5, code=1 + 5 * n**-0.3) for n in sizes]


def test_predictions_and_errors() -> None:
    found = predict(on_a_law(100, 400, 1600, 6400), 900)
    assert found.losses == pytest.approx({"web": 2.1, "code": 1 + 5 * 900**-0.3}, rel=1e-7)
    assert found.how["warnings"] == []
    assert found.how["target_parameters"] == 900
    for law in found.how["laws"].values():
        assert np.abs(law["relative_errors"]).max() < 1e-9
    noisy = on_a_law(100, 400, 1600, 6400)
    noisy[1] = point(400, web=2.3, code=noisy[1].losses["code"])
    law = predict(noisy, 900).how["laws"]["web"]
    at = law["a"] * 400 ** -law["b"] + law["c"]
    assert law["relative_errors"][1] == pytest.approx(at / 2.3 - 1)
    assert abs(law["relative_errors"][1]) > 0.01


@pytest.mark.parametrize(
    ("sizes", "target", "warnings"),
    [
        ((100, 400, 1600, 6400), 100, []),
        ((100, 400, 1600, 6400), 50, ["50 parameters is 2 times smaller"]),
        ((100, 400, 1600, 6400), 9600, ["9,600 parameters is 1.5 times larger"]),
        ((100, 400, 1600), 200, ["three models"]),
        ((100, 400), 200, ["c is taken to be 0"]),
        ((100, 400), 20, ["5 times smaller", "c is taken to be 0"]),
    ],
)
def test_warnings(sizes: tuple[int, ...], target: int, warnings: list[str]) -> None:
    found = predict(on_a_law(*sizes), target).how["warnings"]
    assert len(found) == len(warnings)
    for line, part in zip(found, warnings, strict=True):
        assert part in line


def test_an_exponent_at_the_limit_is_told() -> None:
    points = [point(n, web=loss) for n, loss in ((100, 3.0), (200, 2.0), (400, 2.0), (800, 2.0))]
    found = predict(points, 300)
    assert "the exponent 2 in web is at the limit" in found.how["warnings"][0]


def test_points_that_do_not_go_together() -> None:
    with pytest.raises(ShearlingError, match="of 200 are of code, web, but those of of 100 of web"):
        predict([point(100, web=2.0), point(200, web=1.9, code=1.0)], 50)
    with pytest.raises(ShearlingError, match="different tokenizers"):
        predict([point(100, "x", web=2.0), point(200, "y", web=1.9)], 50)
    assert predict([point(100, "x", web=2.0), point(200, None, web=1.9)], 50).losses
    with pytest.raises(ShearlingError, match="losses in web are 2, nan"):
        predict([point(100, web=2.0), point(200, web=math.nan)], 50)


# --- files ---------------------------------------------------------------------------------------


def test_a_file_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "reference.json"
    found = Reference({"web": 1 / 3, "code": 2.0}, {"method": "given"})
    found.save(file)
    assert Reference.load(file) == found
    assert json.loads(file.read_text())["kind"] == "reference"


def test_points_come_from_files(tmp_path: Path) -> None:
    file = tmp_path / "one.json"
    how = {"parameters": 90, "model": {"name": "m"}, "store": {"tokenizer": "abc"}}
    Reference({"web": 2.0}, how).save(file)
    assert Point.load(file) == Point("m", 90, {"web": 2.0}, "abc")
    Reference({"web": 2.0}, {"parameters": 90}).save(file)
    assert Point.load(file) == Point("one", 90, {"web": 2.0})
    for size in (None, 0, 1.5, "90", True):
        Reference({"web": 2.0}, {"parameters": size}).save(file)
        with pytest.raises(ShearlingError, match=f"how.parameters is {size!r}"):
            Point.load(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "holds a list, but an object"),
        ('{"kind": "scores", "losses": {"web": 1}}', "its kind is 'scores'"),
        (f'{{"kind": "{"a" * 5000}", "losses": {{}}}}', r"its kind is 'a{1,400}\.\.\.\)"),
        ('{"kind": "reference"}', "is not a file of reference losses"),
        ('{"kind": "reference", "losses": {"web": NaN}}', "give nan for the domain web"),
        ('{"kind": "reference", "losses": {"web": "low"}}', "give low for the domain web"),
        ('{"kind": "reference", "losses": {"web": -1}}', "give -1 for the domain web"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "reference.json"
    file.write_text(text)
    with pytest.raises(ShearlingError, match=message):
        Reference.load(file)
    with pytest.raises(ShearlingError, match="cannot be read"):
        Reference.load(tmp_path / "nowhere.json")


def test_losses_as_given(tmp_path: Path) -> None:
    wanted = Reference({"c4": 2.1, "code": 0.9}, {"method": "given"})
    assert given("c4=2.1, code = 0.9") == wanted
    file = tmp_path / "losses.json"
    file.write_text('{"c4": 2.1, "code": 0.9}')
    assert given(str(file)) == wanted
    Reference({"c4": 2.1, "code": 0.9}, {"method": "measured"}).save(file)
    assert given(str(file)) == wanted


def test_more_losses_than_a_file_name_can_hold() -> None:
    losses = {f"domain-{i:02}": 1.5 for i in range(40)}
    assert given(",".join(f"{name}=1.5" for name in losses)).losses == losses


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("c4", "such as c4=2.1,code=0.9"),
        ("", "such as"),
        ("=2", "such as"),
        ("c4=2,c4=3", "each domain once"),
        ("c4=2,", "such as"),
        ("c4=low", "losses given give low for the domain c4"),
        ("c4=-1", "give -1"),
        ("c4=nan", "give nan"),
        ("nowhere.json", "cannot be read"),
    ],
)
def test_losses_given_wrongly(text: str, message: str) -> None:
    with pytest.raises(ShearlingError, match=message):
        given(text)


def test_an_empty_file_of_losses(tmp_path: Path) -> None:
    file = tmp_path / "losses.json"
    file.write_text("{}")
    with pytest.raises(ShearlingError, match="gives no losses"):
        given(str(file))
