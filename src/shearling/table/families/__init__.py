"""The architectures shearling knows, one file a family."""

from __future__ import annotations

from shearling.errors import ShearlingError
from shearling.table.families.base import Family, Home
from shearling.table.families.deepseek_v3 import DEEPSEEK_V3
from shearling.table.families.gemma import GEMMA2, GEMMA3
from shearling.table.families.glm4_moe import GLM4_MOE
from shearling.table.families.gpt_neox import GPT_NEOX
from shearling.table.families.llama import LLAMA
from shearling.table.families.mistral import MISTRAL
from shearling.table.families.mixtral import MIXTRAL
from shearling.table.families.olmoe import OLMOE
from shearling.table.families.opt import OPT
from shearling.table.families.phi3 import PHI3
from shearling.table.families.qwen2 import QWEN2
from shearling.table.families.qwen2_moe import QWEN2_MOE
from shearling.table.families.qwen3 import QWEN3
from shearling.table.families.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, GPT_NEOX, OPT,
        MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GLM4_MOE, DEEPSEEK_V3,
    )
}  # fmt: skip


def family_of(model_type: object, where: str) -> Family:
    """The family of ``model_type``, or a ShearlingError that names those we know."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        shown = repr(model_type)[:80]
        raise ShearlingError(
            f"{where} is of the architecture {shown}, which shearling does not know yet; "
            f"it knows {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "Family", "Home", "family_of"]
