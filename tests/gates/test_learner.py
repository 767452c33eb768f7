"""Gates by themselves: their distribution, the Lagrangian, projection, and which ones win."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shearling.gates import hard_concrete
from shearling.gates.bank import GateBank, top
from shearling.gates.learner import Learner, projected
from shearling.gates.start import places
from shearling.model.checkpoint import Checkpoint
from shearling.table.values import Shape
from shearling.train.parallel import World


def test_probability_of_being_open_is_that_of_samples() -> None:
    a = torch.tensor([-3.0, -1.6, 0.0, 2.0])
    u = (torch.arange(200_000) + 0.5) / 200_000
    z = hard_concrete.sample(a[:, None], u[None])
    torch.testing.assert_close(
        (z > 0).float().mean(1), hard_concrete.open_probability(a), atol=1e-4, rtol=0
    )
    assert float(z.min()) == 0
    assert float(z.max()) == 1


def test_gradient_of_a_sample_s_mean() -> None:
    """Through the sampler, against differences of its mean."""
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    hard_concrete.sample(a, u).mean().backward()
    low, high = (hard_concrete.sample(a.detach() + d, u).mean() for d in (-1e-3, 1e-3))
    assert a.grad is not None
    assert float(a.grad) == pytest.approx(float(high - low) / 2e-3, rel=1e-3)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=30), st.floats(0.15, 0.95)
        ),
        min_size=1, max_size=4,
    )
)  # fmt: skip
def test_projection_meets_the_size_and_keeps_the_order(
    axes: list[tuple[list[float], float]],
) -> None:
    """Of axes of one row each, of any lengths, all at a time."""
    alphas = [torch.tensor([values]) for values, _ in axes]
    wanted = [torch.tensor([share * len(values)]) for values, share in axes]
    for a, wanted_R, shifted in zip(alphas, wanted, projected(alphas, wanted), strict=True):
        assert shifted.shape == a.shape
        total = float(hard_concrete.open_probability(shifted).sum())
        assert total == pytest.approx(float(wanted_R), rel=1e-4)
        order = a[0].argsort(stable=True)
        assert (shifted[0][order].diff() >= -1e-6).all()


def test_projection_of_several_rows_is_each_row_s_own() -> None:
    generator = torch.Generator().manual_seed(0)
    alphas = [torch.randn(shape, generator=generator) for shape in ((3, 7), (1, 12), (2, 5))]
    wanted = [torch.rand(len(a), generator=generator) * a.shape[1] for a in alphas]
    for a, wanted_R, shifted in zip(alphas, wanted, projected(alphas, wanted), strict=True):
        for row, one in enumerate(wanted_R):
            (alone,) = projected([a[row : row + 1]], [one[None]])
            torch.testing.assert_close(shifted[row : row + 1], alone, atol=2e-6, rtol=0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.data())
def test_top_is_sorted_and_ties_go_to_the_lower(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(values)))
    mask = top(torch.tensor([values]).float(), torch.tensor([count]))[0]
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert mask.nonzero().flatten().tolist() == sorted(expected)


def test_places_are_positive_for_what_would_stay() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0, 2.0]])
    assert places(scores, 2)[0].tolist() == pytest.approx([1.0, -2 / 3, 0.5, -1.0, -1 / 3])


@dataclass
class Setting:
    bank: GateBank
    before: Shape
    after: Shape


@pytest.fixture
def setting(model: Checkpoint) -> Setting:
    after = model.shape.with_(layers=2, hidden=20, mlp=20, heads=6)
    return Setting(GateBank(model.layout, model.shape, after), model.shape, after)


def test_the_lagrangian_against_its_formula(setting: Setting) -> None:
    learner = Learner(setting.bank, rise=4)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in (*setting.bank.log_alpha.values(), *learner.linear.values(),
                          *learner.quadratic.values()):  # fmt: skip
            parameter.add_(torch.randn_like(parameter))
    total = 0.0
    for axis, a in setting.bank.log_alpha.items():
        rows = setting.bank.rows[axis]
        begin = 1 - float(hard_concrete.open_probability(torch.tensor(5.0)))
        target = 0.5 * begin + 0.5 * (1 - rows.target / rows.units)  # half of the way, at step 2
        for r in range(rows.rows):
            closed = 1 - float(hard_concrete.open_probability(a[r].detach()).mean())
            difference = closed - target
            total += float(learner.linear[axis][r].detach()) * difference
            total += float(learner.quadratic[axis][r].detach()) * difference**2
    assert float(learner.penalty(2).detach()) == pytest.approx(total, rel=1e-4)


def test_gradients_of_drawn_gates_reach_the_parameters(setting: Setting) -> None:
    """The copies that the model computes with hand on exactly what autograd would."""
    learner = Learner(setting.bank, constraint="projection", seed=3)
    learner.draw(7)
    weights = {axis: torch.randn_like(z) for axis, z in setting.bank.values.items()}
    for axis, z in setting.bank.values.items():
        (z * weights[axis]).sum().backward()
    learner.gather(7, World())
    for axis, a in setting.bank.log_alpha.items():
        copy = a.detach().clone().requires_grad_()
        generator = torch.Generator().manual_seed(3 * 1_000_003 + 7)
        for name in setting.bank.log_alpha:
            u = torch.rand(setting.bank.log_alpha[name].shape, generator=generator)
            if name == axis:
                (hard_concrete.sample(copy, u) * weights[axis]).sum().backward()
        torch.testing.assert_close(a.grad, copy.grad)


def test_what_is_kept_is_exactly_the_target(setting: Setting, model: Checkpoint) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for a in setting.bank.log_alpha.values():
            a.copy_(torch.randn_like(a).round())  # many ties
    keep = setting.bank.keep()
    assert model.layout.cut(keep, model.shape).after == setting.after
    settled = setting.bank.settled(setting.bank.targets())
    assert settled["hidden"][0].nonzero().flatten().tolist() == list(keep.model["hidden"])
    for place, layer in enumerate(keep.model["layers"]):
        open_ = settled["mlp"][layer].nonzero().flatten().tolist()
        assert open_ == list(keep.blocks["mlp"][place])
