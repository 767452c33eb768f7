"""LoRA (arXiv 2106.09685) through peft: beside every projection of a block, merged at the end."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any
from unittest import mock

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
    with _named_as_they_are():
        return get_peft_model(model, config)


@contextmanager
def _named_as_they_are() -> Generator[None]:
    """Keep peft from taking a name such as ``mlp.up_proj`` for that of a block's fused experts.

    For mixtures it rewrites what is asked for as if every MLP were made of experts, so that these
    get adapters and dense MLPs and shared experts get none.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # an older peft, which rewrites nothing
        yield
        return
    rewrite = "convert_peft_config_for_transformers"
    with mock.patch.object(conversion, rewrite, return_value=None, create=True):
        yield


def projections(checkpoint: Checkpoint) -> list[str]:
    """Full names of the modules in blocks that multiply states, without those of experts."""
    adapted, homes = {row.name for row in adapted_rows(checkpoint)}, checkpoint.homes
    places = checkpoint.layout.places(checkpoint.shape)
    return [
        homes[name].parameter.removesuffix(".weight")
        for name, (row, _) in places.items()
        if row.name in adapted
    ]


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
