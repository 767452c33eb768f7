"""The architectures shearling knows, one file a family."""

from __future__ import annotations

from difflib import get_close_matches

from shearling.errors import ShearlingError
from shearling.table.families.base import Family, Home
from shearling.table.families.cohere2 import COHERE2
from shearling.table.families.deepseek_v3 import DEEPSEEK_V3, GLM4_MOE_LITE
from shearling.table.families.ernie4_5 import ERNIE4_5
from shearling.table.families.ernie4_5_moe import ERNIE4_5_MOE
from shearling.table.families.exaone4 import EXAONE4
from shearling.table.families.gemma import GEMMA2, GEMMA3
from shearling.table.families.gemma4 import GEMMA4
from shearling.table.families.glm4 import GLM4
from shearling.table.families.glm4_moe import GLM4_MOE
from shearling.table.families.gpt_neox import GPT_NEOX
from shearling.table.families.gpt_oss import GPT_OSS
from shearling.table.families.granite import GRANITE, GRANITE4
from shearling.table.families.granitemoe import GRANITEMOE
from shearling.table.families.hunyuan import HUNYUAN_DENSE
from shearling.table.families.llama import LLAMA
from shearling.table.families.minimax_m2 import MINIMAX_M2
from shearling.table.families.ministral import MINISTRAL, MINISTRAL3
from shearling.table.families.mistral import MISTRAL
from shearling.table.families.mixtral import MIXTRAL
from shearling.table.families.near import NEAREST
from shearling.table.families.olmo2 import OLMO2, OLMO3
from shearling.table.families.olmoe import OLMOE
from shearling.table.families.opt import OPT
from shearling.table.families.phi3 import PHI3
from shearling.table.families.qwen2 import QWEN2
from shearling.table.families.qwen2_moe import QWEN2_MOE
from shearling.table.families.qwen3 import QWEN3
from shearling.table.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from shearling.table.families.qwen3_moe import QWEN3_MOE
from shearling.table.families.qwen3_next import QWEN3_NEXT
from shearling.table.families.seed_oss import SEED_OSS
from shearling.table.families.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, GEMMA4, PHI3, GPT_NEOX, OPT,
        SMOLLM3, MINISTRAL, MINISTRAL3, OLMO2, OLMO3, GRANITE, GRANITE4, GLM4, COHERE2,
        EXAONE4, ERNIE4_5, HUNYUAN_DENSE, SEED_OSS,
        MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GLM4_MOE, DEEPSEEK_V3, GLM4_MOE_LITE, GPT_OSS,
        GRANITEMOE, ERNIE4_5_MOE, MINIMAX_M2,
        QWEN3_NEXT, QWEN3_5, QWEN3_5_MOE,
    )
}  # fmt: skip

_LLAMA4 = (
    "shearling does not cut: its router runs every expert on every token and weights what enters "
    "it, for which there are neither scores nor a repair of experts yet",
    "give a model of another architecture, such as qwen3_moe",
)
# What is not opened, and why; what would work.
REFUSED: dict[str, tuple[str, str]] = {
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "kimi_k2": (
        "transformers knows as deepseek_v3 alone",
        "write deepseek_v3 for model_type into its config.json",
    ),
}


def family_of(model_type: object, where: str) -> Family:
    """The family of ``model_type``, or a ShearlingError that names the nearest and the playbook."""
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    shown = repr(model_type)[:80]
    raise ShearlingError(
        f"{where} is of the architecture {shown}, which shearling does not know yet; it knows "
        f"{', '.join(FAMILIES)}{_nearest(str(model_type))}, and CONTRIBUTING.md says how to add "
        "one (Playbook: add a family)."
    )


def _nearest(model_type: str) -> str:
    """Which family comes closest: by what is known of the architecture, or else by name."""
    if model_type in NEAREST:
        near, why = NEAREST[model_type]
        return f" ({near} is the nearest, but {why})"
    named = get_close_matches(model_type, FAMILIES, n=1, cutoff=0.6)
    return f" ({named[0]} is the nearest by name)" if named else ""


def refuse(model_type: object, where: str) -> None:
    """Raise ShearlingError, with the reason, for an architecture that is known not to be opened."""
    if isinstance(model_type, str) and model_type in REFUSED:
        why, instead = REFUSED[model_type]
        raise ShearlingError(
            f"{where} is of the architecture {model_type}, which {why}; {instead}."
        )


__all__ = ["FAMILIES", "Family", "Home", "family_of", "refuse"]
