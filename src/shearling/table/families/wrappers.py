"""Models that hold a language model among other parts, such as an eye: what is known of each.

The language model is one of our families under names of its own; whatever else there is stays as
it is. Images enter the stream through a projector that no table describes, so that its width stays,
and with the tokens that stand for them the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shearling.errors import ShearlingError
from shearling.table.families.base import Family

# Beginnings of names in the table -> on disk, by transformers' habits of different years.
STYLES: tuple[Mapping[str, str], ...] = (
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    {"model.": "model.language_model.", "lm_head.": "lm_head."},
    {"model.": "model.text_model.", "lm_head.": "lm_head."},
    {"model.": "model.", "lm_head.": "lm_head."},
)
_MROPE = ("mrope_section", "mrope_interleaved")


@dataclass(frozen=True)
class Wrapper:
    """One architecture around a language model.

    Attributes:
        model_type: of the whole.
        plain: the language model's configuration, every key written out, as one that stands alone
            would have it.
        frozen: further axes that stay, and why.
        stacks: ending of a name -> outputs and inputs of a matrix, of tensors that hold those of
            all experts of a block, where transformers reads experts in no other form; from what
            ``plain`` gives. On disk either may come first: transformers goes by the sizes.
    """

    model_type: str
    plain: Callable[[dict[str, Any]], dict[str, Any]] = lambda text: text
    frozen: Mapping[str, str] = field(default_factory=dict)
    stacks: Callable[[Mapping[str, Any]], Mapping[str, tuple[int, int]]] = lambda text: {}

    def within(self, family: Family) -> Family:
        """A family of language models, as it can be cut inside this."""
        frozen = {
            "hidden": f"the projector of {self.model_type}, which is not in the table, gives "
            "images the width of the stream",
            "vocab": f"{self.model_type} names the tokens that stand for images by their ids",
        }
        return replace(family, frozen={**family.frozen, **frozen, **self.frozen})

    def inputs_first(self, text: Mapping[str, Any], name: str, sizes: tuple[int, ...]) -> bool:
        """Whether a stored tensor holds experts' matrices the other way round than a model does.

        Square ones are read as they are, which is what transformers does.
        """
        return any(
            name.endswith(ending) and outputs != inputs and sizes[1:] == (inputs, outputs)
            for ending, (outputs, inputs) in self.stacks(text).items()
        )


def _named(model_type: str, **more: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Text alone has one position a token: all of a multimodal rotary table's rows are alike."""

    def plain(text: dict[str, Any]) -> dict[str, Any]:
        rope = {k: v for k, v in (text.get("rope_parameters") or {}).items() if k not in _MROPE}
        return {**text, "model_type": model_type, "rope_parameters": rope, **more}

    return plain


def _two_stacks(text: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Hubs hold the two of Qwen3-VL inputs first, transformers saves them outputs first."""
    hidden, neurons = text["hidden_size"], text["moe_intermediate_size"]
    at = ".mlp.experts."
    return {f"{at}gate_up_proj": (2 * neurons, hidden), f"{at}down_proj": (hidden, neurons)}


_WHOLE_HEADS = "its code computes the width of a head as hidden / heads"

WRAPPERS: dict[str, Wrapper] = {
    wrapper.model_type: wrapper
    for wrapper in (
        Wrapper("gemma3"),
        Wrapper("gemma4"),
        Wrapper("mistral3"),
        Wrapper("llava"),
        Wrapper("idefics3"),
        Wrapper("smolvlm"),
        Wrapper("internvl"),
        Wrapper(
            "qwen2_5_vl",
            plain=_named("qwen2"),
            frozen={"heads": _WHOLE_HEADS, "kv_heads": _WHOLE_HEADS},
        ),
        Wrapper("qwen3_vl", plain=_named("qwen3")),
        Wrapper(  # whose router has no such setting
            "qwen3_vl_moe", plain=_named("qwen3_moe", norm_topk_prob=True), stacks=_two_stacks
        ),
        Wrapper("qwen3_5"),
        Wrapper("qwen3_5_moe"),
    )
}


def is_known(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model around a language model, and of a kind that we know."""
    return str(raw.get("model_type")) in WRAPPERS


def wrapper_of(raw: Mapping[str, Any], where: str) -> Wrapper | None:
    """What is known of a model around a language model; None where config.json is of no such.

    Raises:
        ShearlingError: it is of one that is not known.
    """
    model_type = raw.get("model_type")
    if is_known(raw):
        return WRAPPERS[str(model_type)]
    if not isinstance(raw.get("text_config"), Mapping):
        return None
    shown, inner = repr(model_type)[:80], repr(raw["text_config"].get("model_type"))[:80]
    raise ShearlingError(
        f"{where} is a language model ({inner}) inside {shown}, which shearling does not know yet; "
        f"it opens those inside {', '.join(WRAPPERS)}, and plain language models, and "
        "CONTRIBUTING.md says how to add one (Playbook: add a family)."
    )
