"""AdamW as torch has it, in one kernel on a GPU; or with moments of eight bits, by torchao."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shearling.train.installed import check_eight_bits, no_torchao
from shearling.train.objective import Objective
from shearling.train.options import Options
from shearling.train.parallel import World

MOMENTS = ("exp_avg", "exp_avg_sq")


def groups(module: nn.Module, decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: decay on matrices alone, none on norms' gains and biases; gates apart."""
    learner = module.get_submodule("learner") if getattr(module, "learner", None) else None
    others = set() if learner is None else set(learner.parameters())
    trained = [p for p in module.parameters() if p.requires_grad and p not in others]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim < 2]
    both = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in both if group["params"]]


def build(objective: Objective, options: Options, world: World) -> torch.optim.Optimizer:
    """The optimiser of an objective's weights, and of its gates where it has some.

    Each group's ``peak`` is the rate that the schedule is a share of.

    Raises:
        ShearlingError: eight bits were asked for, and torchao is missing or ranks are several.
    """
    learner = objective.learner
    params = [*groups(objective, options.weight_decay), *(learner.groups() if learner else ())]
    given: dict[str, Any] = {"lr": options.lr, "betas": options.betas, "eps": options.eps}
    if options.optimizer == "adamw8bit":
        kind, given = (
            _eight_bits(world),
            given | {"bf16_stochastic_round": options.weight_dtype == "bfloat16"},
        )
    else:
        # On a CPU torch's own choice: its fused kernel rounds otherwise.
        kind: Any = torch.optim.AdamW
        given |= {"fused": True} if world.device.type == "cuda" else {}
    optimiser = kind(params, **given)
    for group in optimiser.param_groups:
        group["peak"] = float(group["lr"])
    return optimiser


def _eight_bits(world: World) -> Any:
    check_eight_bits(world.size)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise no_torchao() from error
    return AdamW8bit


def set_rates(optimiser: torch.optim.Optimizer, share: float) -> None:
    """Every group's rate to a share of its peak."""
    for group in optimiser.param_groups:
        rate = group["peak"] * share
        if isinstance(group["lr"], Tensor):  # as torchao keeps it
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def moments(optimiser: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """A parameter's moments by name, made where there are none yet; parts of one by dotted name."""
    state, parts = optimiser.state[parameter], {}
    new: Any = getattr(optimiser, "_new_buffer", None)  # torchao's; eight bits if large enough
    for name in MOMENTS:
        if name not in state:
            zeros = (
                torch.zeros_like(parameter) if new is None else new(parameter, name == "exp_avg")
            )
            state[name] = zeros.detach()
        moment: Any = state[name]
        if hasattr(moment, "codes"):
            parts |= {f"{name}.codes": moment.codes, f"{name}.scale": moment.scale}
        else:
            parts[name] = moment
    return parts


def go_on(optimiser: torch.optim.Optimizer, step: int) -> None:
    """Have an optimiser whose moments were read count from ``step``."""
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            place = parameter.device if group.get("fused") else torch.device("cpu")
            number = torch.tensor(float(step), device=place)
            optimiser.state[parameter]["step"] = number


def clip(parameters: list[nn.Parameter], most: float) -> Tensor:
    """Scale gradients to a norm of at most ``most``; their norm before (0-dim, float32).

    The norm of bfloat16 gradients is summed in float32.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        return nn.utils.clip_grad_norm_(parameters, most)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm
