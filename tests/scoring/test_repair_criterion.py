"""Loss after repair, against whole stock models and least squares."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import naive
import shearling.engine.place
from places import place
from shearling.engine.moments import STRENGTHS
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.scoring.blocks.repair import repair, repairable, run_starts
from shearling.scoring.score import score_removals, score_tokens

Models = Callable[[str], Path]
DEPTH = 5
LAST = ("down_proj", "dense_4h_to_h", "fc2", "output_linear")
REPAIRABLE = [
    "llama", "llama-biases", "mistral", "qwen2-tied", "qwen3", "phi3", "gpt_neox",
    "gpt_neox-serial", "opt", "opt-bare",
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four sequences of 17 tokens in a batch, the last of fewer."""
    monkeypatch.setattr(shearling.engine.place, "BATCH_TOKENS", 4 * 17)


@pytest.fixture
def ids_NS() -> Tensor:
    return torch.randint(3, 101, (18, 17), generator=torch.Generator().manual_seed(1))


def opened(path: Path, *, resident: bool = True) -> BlockStream:
    return BlockStream(Checkpoint.open(path), place(resident))


def writer(block: nn.Module) -> nn.Linear:
    (found,) = (m for name, m in block.named_modules() if name.split(".")[-1] in LAST)
    assert isinstance(found, nn.Linear)
    return found


@torch.no_grad()
def watched(model: Any, ids_NS: Tensor, start: int, remove: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the writer before a gap, and the stream on both sides of it."""
    seen: dict[str, Tensor] = {}
    blocks = naive.blocks(model)
    handles = [
        writer(blocks[start - 1]).register_forward_pre_hook(
            lambda _, args: seen.update(x=args[0].reshape(*ids_NS.shape, -1))
        ),
        blocks[start - 1].register_forward_hook(lambda _, __, out: seen.update(before=out)),
        blocks[start + remove - 1].register_forward_hook(lambda _, __, out: seen.update(after=out)),
    ]
    model(input_ids=ids_NS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen["x"], seen["before"], seen["after"]


@torch.no_grad()
def reference(path: Path, ids_NS: Tensor, start: int, remove: int) -> float:
    """Held-out perplexity of a stock model whose writer before the gap is solved by lstsq."""
    held = torch.arange(len(ids_NS)) % 4 == 3
    x, before, after = (each.double() for each in watched(naive.stock(path), ids_NS, start, remove))
    missing, w = after - before, 1 / after.square().sum(-1)
    tokens = {
        name: (x[rows].flatten(0, 1), missing[rows].flatten(0, 1), w[rows].flatten())
        for name, rows in (("fit", ~held), ("held", held))
    }

    def solved(strength: float) -> Tensor:
        x_TK, r_TD, w_T = tokens["fit"]
        k, root = x_TK.shape[1], w_T.sqrt()[:, None]
        energy_K = (w_T[:, None] * x_TK.square()).sum(0)
        penalty_K1 = (strength * (energy_K * energy_K.mean()).sqrt()).sqrt()[:, None]
        rows = torch.cat([x_TK * root, penalty_K1 * torch.eye(k).double()])
        wanted = torch.cat([r_TD * root, r_TD.new_zeros(k, r_TD.shape[1])])
        return torch.linalg.lstsq(rows, wanted, driver="gelsd").solution

    def error(change_KD: Tensor) -> float:
        x_TK, r_TD, w_T = tokens["held"]
        return float((w_T * (r_TD - x_TK @ change_KD).square().sum(-1)).sum())

    changes = [x.new_zeros(x.shape[-1], before.shape[-1]), *map(solved, STRENGTHS)]
    model = naive.stock_without(path, range(start, start + remove))
    matrix = writer(naive.blocks(model)[start - 1])
    matrix.weight += min(changes, key=error).T.float()
    return math.exp(float(naive.token_nll(model, ids_NS[held]).mean()))


@pytest.mark.parametrize("variant", REPAIRABLE)
def test_runs(models: Models, variant: str, ids_NS: Tensor) -> None:
    path = models(variant)
    found = repair(opened(path), ids_NS, protected=(), remove=2)
    runs = found.details["runs"]
    assert list(runs) == ["1", "2", "3"]
    for start in (1, 3):
        assert runs[f"{start}"] == pytest.approx(reference(path, ids_NS, start, 2), rel=1e-4)


@pytest.mark.parametrize("by", ["repair", "greedy", "perplexity", "magnitude"])
def test_several_numbers_of_blocks_at_once(models: Models, ids_NS: Tensor, by: str) -> None:
    stream = opened(models("llama"))
    removes = [1, 3, 2, 3]
    together = score_removals(stream, by, ids_NS, removes, protected=(4,))
    alone = [score_tokens(stream, by, ids_NS, protected=(4,), remove=count) for count in removes]
    assert together == alone
    assert len({one.removal_order for one in together}) == (3 if by in ("repair", "greedy") else 1)


def test_what_follows_from_runs(models: Models, ids_NS: Tensor) -> None:
    path = models("llama")
    for remove in (1, 2, 3, 4):
        found = repair(opened(path), ids_NS, protected=(), remove=remove)
        runs = {int(start): value for start, value in found.details["runs"].items()}
        assert list(runs) == list(range(1, DEPTH - remove + 1))
        best = min(runs, key=lambda start: runs[start])
        assert found.removal_order == found.order[:remove] == tuple(range(best, best + remove))
        expected = [
            min((runs[s] for s in runs if s <= block < s + remove), default=max(runs.values()))
            for block in range(DEPTH)
        ]
        assert list(found.values) == expected
        assert found.values[0] == max(runs.values())
        assert (found.criterion, found.axis, found.protected) == ("repair", "layers", ())
    assert reference(path, ids_NS, 1, 4) == pytest.approx(runs[1], rel=1e-4)


def test_a_repair_helps(models: Models, ids_NS: Tensor) -> None:
    """So that the figures above are not those of the bare removal."""
    runs = repair(opened(models("gpt_neox")), ids_NS, protected=(), remove=1).details["runs"]
    bare = [naive.perplexity(models("gpt_neox"), ids_NS[3::4], [block]) for block in range(1, 5)]
    assert all(abs(a / b - 1) > 1e-3 for a, b in zip(runs.values(), bare, strict=True))


@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "opt"])
def test_streamed_is_resident(models: Models, variant: str, ids_NS: Tensor) -> None:
    resident, streamed = (
        repair(opened(models(variant), resident=each), ids_NS, protected=(), remove=2)
        for each in (True, False)
    )
    assert resident.values == pytest.approx(streamed.values, rel=1e-6)
    assert resident.removal_order == streamed.removal_order


@pytest.mark.parametrize(
    ("protected", "remove", "starts"),
    [
        ((), 1, [1, 2, 3, 4]),
        ((0,), 1, [1, 2, 3, 4]),
        ((2,), 1, [1, 3, 4]),
        ((2,), 2, [3]),
        ((0, 1, 4), 2, [2]),
        ((4,), 3, [1]),
    ],
)
def test_protected_blocks_stay(
    models: Models, ids_NS: Tensor, protected: tuple[int, ...], remove: int, starts: list[int]
) -> None:
    found = repair(opened(models("llama")), ids_NS, protected=protected, remove=remove)
    assert [int(start) for start in found.details["runs"]] == starts
    assert found.protected == protected
    assert set(found.removal_order).isdisjoint(protected)
    assert set(found.order) == set(range(DEPTH)) - set(protected)
    free = repair(opened(models("llama")), ids_NS, protected=(), remove=remove)
    for start, value in found.details["runs"].items():
        assert value == pytest.approx(free.details["runs"][start], rel=1e-6)


def test_a_fifth_by_default(models: Models, ids_NS: Tensor) -> None:
    found = score_tokens(opened(models("llama")), "repair", ids_NS)
    assert len(found.removal_order) == 1


def test_repairable(models: Models, variant: str) -> None:
    """A norm between the last matrix and the stream, or behind the addition, and it is not."""
    others = ("gemma2", "gemma3", "olmo2", "olmo3", "glm4", "opt-projected")
    assert repairable(Checkpoint.open(models(variant))) == (variant not in others)


@pytest.mark.parametrize(
    ("variant", "sequences", "protected", "remove", "sentence"),
    [
        ("llama", 3, (), 1, "^3 calibration sequences were given, .* --samples to 4"),
        ("llama", 0, (), 1, "^0 calibration sequences"),
        ("llama", 4, (), 5, "^no 5 neighbouring blocks behind the first of 5"),
        ("llama", 4, (1, 3), 2, "^no 2 neighbouring blocks .* --by perplexity"),
        ("gemma2", 4, (), 1, "no norm behind, which those of gemma2 are not"),
        ("opt-projected", 4, (), 1, "no norm behind, which those of opt are not"),
    ],
)
def test_what_is_refused(
    models: Models, variant: str, sequences: int, protected: tuple[int, ...], remove: int,
    sentence: str, ids_NS: Tensor,
) -> None:  # fmt: skip
    stream = opened(models(variant))
    with pytest.raises(ShearlingError, match=sentence):
        repair(stream, ids_NS[:sequences], protected=protected, remove=remove)
    with pytest.raises(ShearlingError, match=sentence):
        run_starts(stream.checkpoint, sequences, protected, remove)


@pytest.mark.parametrize(
    ("name", "value"),
    [("model.layers.2.mlp.up_proj.weight", math.nan), ("model.norm.weight", math.inf)],
)
def test_weights_that_are_not_finite(
    models: Models, ids_NS: Tensor, name: str, value: float, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(models("llama"), tmp_path / "source"))
    model = naive.stock(source)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    model.save_pretrained(source)
    with pytest.raises(ShearlingError, match=f"^the tensor {name} of .* infinite or none"):
        repair(opened(source), ids_NS, protected=(), remove=3)


def test_a_loss_beyond_all_numbers_is_still_one(
    models: Models, ids_NS: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        BlockStream, "nll", lambda self, h_BSD, ids_BS: torch.full_like(ids_BS, 2000.0).float()
    )
    found = repair(opened(models("llama")), ids_NS, protected=(), remove=1)
    assert all(1e300 < value < math.inf for value in found.values)
