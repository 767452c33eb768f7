"""LoRA (arXiv 2106.09685) through peft: beside every projection of a block, merged at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from shearling.model.checkpoint import Checkpoint
from shearling.table.axes import EXPERTS, Row
from shearling.train.installed import no_peft
from shearling.train.parallel import whole

_BASE = "base_model.model."


def add(model: Any, checkpoint: Checkpoint, *, rank: int, alpha: int) -> Any:
    """The model with adapters beside each projection; all but these are frozen.

    Raises:
        ShearlingError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise no_peft() from error
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        target_modules=projections(checkpoint),
    )  # fmt: skip
    return get_peft_model(model, config)


def projections(checkpoint: Checkpoint) -> list[str]:
    """Names of the matrices in a block that multiply states, as the table has them."""
    rows = adapted_rows(checkpoint)
    return sorted({row.name.removesuffix(".weight").rsplit(".", 1)[-1] for row in rows})


def adapted_rows(checkpoint: Checkpoint) -> list[Row]:
    """Matrices that adapters stand beside: not those of experts, nor what chooses these."""
    return [
        row
        for row in checkpoint.layout.block_rows()
        if row.role == "linear" and not row.of_experts and EXPERTS not in row.output.axes
    ]


def reader(model: nn.Module) -> Callable[[str], Tensor]:
    """A function of a stock parameter's name: its value, with what adapters add to it.

    Sharded parameters are put together, so that every rank has to ask for the same names.
    """
    # Some routers keep a bias among the buffers.
    parameters = dict(model.named_buffers()) | dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())

    def read(name: str) -> Tensor:
        if name in parameters:
            return whole(parameters[name].detach())
        if _BASE + name in parameters:
            return whole(parameters[_BASE + name].detach())
        owner, _, leaf = (_BASE + name).rpartition(".")
        base = whole(parameters[f"{owner}.base_layer.{leaf}"].detach())
        if leaf != "weight":
            return base
        layer: Any = modules[owner]
        a_RK, b_DR = (
            whole(getattr(layer, side)["default"].weight.detach()) for side in ("lora_A", "lora_B")
        )
        return base + layer.scaling["default"] * (b_DR @ a_RK)

    return read
