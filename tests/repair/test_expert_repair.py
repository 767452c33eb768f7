"""Repair of a mixture's router and merging of its experts, against loops and whole matrices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import naive
from places import place
from shearling.engine.experts import Experts, Routing, decided, has_experts
from shearling.engine.ranks import ALONE
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.cut import cut
from shearling.repair.experts import Corrected, ExpertOptions
from shearling.repair.merging import Fold, averaged, matched
from shearling.repair.refit import refit
from shearling.repair.router import _Quadratic, given_by, products, rerouted, steps
from shearling.table.axes import Row
from shearling.table.values import Keep, Shape
from tiny_cuts import relative
from tiny_models import MIXTURES

Models = Callable[[str], Path]
VARIANTS = ("mixtral", "gpt_oss", "deepseek_v3", "gemma4-experts")


def mixture_of(path: Path) -> tuple[Checkpoint, nn.Module, Experts]:
    """A checkpoint, its last block with experts in a stock model, and these."""
    checkpoint = Checkpoint.open(path)
    mixture = checkpoint.family.mixture
    assert mixture is not None
    blocks = list(naive.blocks(naive.stock(path)))
    block = [b for number, b in enumerate(blocks) if has_experts(checkpoint, number)][-1]
    return checkpoint, block, Experts(block, mixture)


def drawn(experts: Experts, tokens: int) -> Tensor:
    width = experts.rows.shape[1]
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("variant", MIXTURES)
@torch.no_grad()
def test_what_experts_give_is_what_the_stock_module_gives(models: Models, variant: str) -> None:
    _, _, experts = mixture_of(models(variant))
    x_TD = drawn(experts, 19)
    routing = Routing(x_TD, *decided(experts.router(x_TD)))
    expected_TD = experts.module(x_TD, routing.chosen_TP, routing.weights_TP)
    torch.testing.assert_close(given_by(experts, routing), expected_TD)
    change_DK = torch.randn_like(experts.writer(1))
    corrected_TD = given_by(Corrected(experts, {1: change_DK}), routing)
    down = experts.module.down_proj
    down[1] += change_DK.T if experts.module.is_transposed else change_DK
    expected_TD = experts.module(x_TD, routing.chosen_TP, routing.weights_TP)
    torch.testing.assert_close(corrected_TD, expected_TD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_solve_the_normal_equations(models: Models, variant: str) -> None:
    """The router's derivative as one whole matrix, and the system solved outright."""
    _, _, experts = mixture_of(models(variant))
    router = experts.router
    x_TD, weight_ED = drawn(experts, 9), experts.rows.detach()
    missing_TD = 0.1 * torch.randn(9, x_TD.shape[1], generator=torch.Generator().manual_seed(1))
    w_T = torch.rand(9, generator=torch.Generator().manual_seed(2)) + 0.5
    importance_D = torch.ones(x_TD.shape[1])
    if variant == "gemma4-experts":  # which has norms behind, so that channels count unequally
        importance_D = torch.rand(x_TD.shape[1], generator=torch.Generator().manual_seed(3)) + 0.5
    with torch.inference_mode():
        routing = Routing(x_TD.clone(), *decided(router(x_TD)))
        some = None if bool((importance_D == 1).all()) else importance_D
        batches = [products(experts, routing, missing_TD, w_T, some)]
        model = _Quadratic(experts, batches, ALONE)
        gradient_ED = model.gradient()
        curved_ED = model.curved(gradient_ED)
        found = list(steps(experts, batches, ALONE))

    def given(rows_ED: Tensor) -> Tensor:
        """What the same experts give with the weights of other rows."""
        to_send = Routing(x_TD, routing.weights_TP, routing.chosen_TP)  # x_TD has gradients
        weights_TP = rerouted(experts, rows_ED, to_send).weights_TP
        outputs = []
        for t, chosen in enumerate(routing.chosen_TP.tolist()):
            parts = [
                weights_TP[t, p] * experts.written(e, experts.neurons(e, x_TD[t : t + 1]))[0]
                for p, e in enumerate(chosen)
            ]
            outputs.append(torch.stack(parts).sum(0) * w_T[t].sqrt() * importance_D.sqrt())
        return torch.stack(outputs).detach() if not rows_ED.requires_grad else torch.stack(outputs)

    jacobian: Any = torch.autograd.functional.jacobian(given, weight_ED, vectorize=True)
    matrix = jacobian.flatten(0, 1).flatten(1).double()
    counted_TD = missing_TD * w_T.sqrt()[:, None] * importance_D.sqrt()
    right = matrix.T @ counted_TD.flatten().double()
    assert relative(gradient_ED.flatten().double(), right) < 1e-4
    assert relative(curved_ED.flatten().double(), matrix.T @ (matrix @ right)) < 1e-4
    curvature = float(right @ (matrix.T @ (matrix @ right)) / right.square().sum())
    # The most cautious step has converged.
    system = matrix.T @ matrix + 100 * curvature * torch.eye(len(right), dtype=torch.float64)
    expected = torch.linalg.solve(system, right)
    assert relative(found[-1].flatten().double(), expected) < 1e-3


def test_neurons_are_matched_best_pair_first() -> None:
    generator = torch.Generator().manual_seed(0)
    a_TK, b_TK = torch.randn(50, 13, generator=generator), torch.randn(50, 13, generator=generator)
    b_TK[:, 4] = 0.0  # one that never fires
    similar = torch.corrcoef(torch.cat([a_TK.T, b_TK.T]))[:13, 13:].nan_to_num(0.0)
    left, expected = similar.clone(), [-1] * 13
    for _ in range(13):
        i, j = divmod(int(left.argmax()), 13)
        expected[i] = j
        left[i], left[:, j] = -9.0, -9.0
    assert matched(a_TK, b_TK).tolist() == expected
    order = torch.randperm(13, generator=generator)
    assert matched(a_TK, a_TK[:, order])[torch.arange(13)].tolist() == order.argsort().tolist()


@pytest.mark.parametrize(
    ("row", "sizes", "columns"),
    [
        (Row.of("{}.{}", "linear", "expert_mlp", "hidden"), (5, 7), lambda k: ([k], slice(None))),
        (Row.of("{}.{}", "linear", "hidden", "expert_mlp"), (7, 5), lambda k: (slice(None), [k])),
        (
            Row.of("{}", "linear", "experts", "expert_mlp + expert_mlp", "hidden", stacked=1),
            (10, 7),
            lambda k: ([k, 5 + k], slice(None)),
        ),
        (
            Row.of("{}", "bias", "experts", "expert_mlp*2", stacked=1),
            (10,),
            lambda k: ([2 * k, 2 * k + 1],),
        ),
        (Row.of("{}", "bias", "experts", "hidden", stacked=1), (7,), None),
    ],
    ids=["rows", "columns", "joined", "interleaved", "outputs"],
)
def test_experts_are_averaged_by_their_tokens(row: Row, sizes: Any, columns: Any) -> None:
    tensors = {e: torch.randn(sizes, generator=torch.Generator().manual_seed(e)) for e in range(4)}
    partners = {1: [3, 0, 1, 4, 2], 2: [0, 2, 4, 1, 3]}
    folded = [Fold(e, 3, torch.tensor(partner)) for e, partner in partners.items()]
    load_E = torch.tensor([9.0, 2.0, 5.0, 3.0])
    shape = Shape({"experts": 4, "expert_mlp": 5, "hidden": 7})
    found = averaged(tensors, row, shape, folded, load_E)
    assert list(found) == [3]
    expected = 3.0 * tensors[3]
    for e, partner in partners.items():
        joined = tensors[e].clone()
        for k in range(5) if columns else ():
            joined[columns(k)] = tensors[e][columns(partner[k])]
        expected = expected + load_E[e] * joined
    torch.testing.assert_close(found[3], expected / 10.0)


def fewer(checkpoint: Checkpoint) -> Keep:
    """All experts but one, of every group where there are groups."""
    random, groups = Random(5), checkpoint.shape.get("expert_groups", 1)
    count = checkpoint.shape["experts"]
    rows = []
    for _ in range(checkpoint.shape["layers"]):
        gone = {g * (count // groups) + random.randrange(count // groups) for g in range(groups)}
        rows.append(tuple(e for e in range(count) if e not in gone))
    return Keep({}, {"experts": tuple(rows)})


def repaired(path: Path, directory: Path, options: ExpertOptions) -> Any:
    ids_NS = torch.randint(3, 101, (32, 24), generator=torch.Generator().manual_seed(3))
    checkpoint = Checkpoint.open(path)
    directory.mkdir()
    stream = BlockStream(checkpoint, place(False))
    return refit(stream, fewer(checkpoint), ids_NS, directory, experts=options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_router_moves_only_where_held_out_tokens_gain(
    models: Models, variant: str, tmp_path: Path
) -> None:
    path = models(variant)
    moved = repaired(path, tmp_path / "moved", ExpertOptions(router=True))
    stays = repaired(path, tmp_path / "stays", ExpertOptions())
    first = next(s for s in moved.steps if s.axis == "experts")
    plain = next(s for s in stays.steps if s.axis == "experts")
    assert first.error_before == plain.error_before
    assert first.error_after <= first.error_before
    routers = [n for n in moved.replaced if "router" in n or n.endswith(".gate.weight")]
    assert routers, "none of five blocks gains"
    assert not [n for n in stays.replaced if "router" in n or n.endswith(".gate.weight")]
    checkpoint = Checkpoint.open(path)
    cut(checkpoint, fewer(checkpoint), tmp_path / "out", replaced=moved.replaced)


@pytest.mark.parametrize(
    "variant", ["mixtral", "gpt_oss", "granitemoe", "glm4_moe", "gemma4-experts"]
)
def test_an_expert_with_a_twin_is_folded_into_it(
    models: Models, variant: str, tmp_path: Path
) -> None:
    """The twin has the same neurons in another order; what is left is the survivor as it was."""
    model = naive.stock(models(variant))
    checkpoint = Checkpoint.open(models(variant))
    keep = fewer(checkpoint)
    width, transposed = checkpoint.shape["expert_mlp"], variant == "gpt_oss"
    order = torch.randperm(width, generator=torch.Generator().manual_seed(7))
    both = torch.stack([2 * order, 2 * order + 1], 1).flatten()
    both = both if transposed else torch.cat([order, width + order])
    count = checkpoint.shape["experts"]
    for number, block in enumerate(naive.blocks(model)):
        for module in block.modules():
            if type(module).__name__.endswith("Experts"):
                kept = keep.blocks["experts"][number]
                (gone,) = set(range(count)) - set(kept)
                with torch.no_grad():
                    for name, tensor in module.named_parameters():
                        twin = tensor[kept[1]]
                        if "gate_up" in name:
                            twin = twin[..., both] if transposed else twin[both]
                        elif "bias" not in name:
                            twin = twin[order] if transposed else twin[:, order]
                        tensor[gone] = twin
    model.save_pretrained(tmp_path / "twins")
    repair = repaired(tmp_path / "twins", tmp_path / "solved", ExpertOptions(merge=True))
    source = Checkpoint.open(tmp_path / "twins")
    result = cut(source, keep, tmp_path / "out", replaced=repair.replaced)
    plain = cut(source, keep, tmp_path / "plain")
    writers = ("down_proj", "w2", "output_linear")
    compared = 0
    for name, tensor in dict(result.read(result.dtypes)).items():
        if ("expert" in name or "input_linear" in name) and not any(
            writer in name for writer in writers
        ):
            expected = next(t for _, t in plain.read([name]))
            torch.testing.assert_close(tensor, expected)
            compared += name in repair.replaced
    assert compared


def test_merged_experts_keep_their_width(models: Models, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(models("mixtral"))
    kept = fewer(checkpoint).blocks["experts"]
    neurons = tuple(tuple(20 * e + i for e in row for i in range(8)) for row in kept)
    keep = Keep({}, {"experts": kept, "expert_mlp": neurons})
    ids_NS = torch.randint(3, 101, (8, 9))
    stream = BlockStream(checkpoint, place())
    with pytest.raises(ShearlingError, match="while expert_mlp shrinks"):
        refit(stream, keep, ids_NS, tmp_path, experts=ExpertOptions(merge=True))
