"""How to load each of the models of a comparison with stock software."""

from __future__ import annotations

import shlex

from shearling.report.decide.selection import ComparedModel, ComparisonResults
from shearling.report.draw.markup import Markup, el
from shearling.report.draw.sections import breakable, section
from shearling.report.pages.lineage import snippet, snippets
from shearling.report.records.results import Model


def loading_section(selection: ComparisonResults) -> Markup:
    """A fold a model: transformers, vLLM and llama.cpp."""
    names = [model.name for model in selection.table.models]
    folds = [
        el(
            "details",
            el("summary", breakable(name)),
            el("div", [snippet(*one) for one in loading(candidate, model)], class_="use"),
        )
        for name, candidate, model in zip(
            names, selection.candidates, selection.table.models, strict=True
        )
    ]
    intro = (
        "Each is an ordinary checkpoint: it needs neither this toolkit nor custom code. Run these "
        "beside its directory."
    )
    return section("Load them", el("p", intro), folds)


def loading(candidate: ComparedModel, model: Model) -> list[tuple[str, str]]:
    """Lines that load a model, by what runs them."""
    where = candidate.where
    if where.endswith(".gguf"):
        return [("llama.cpp", f'llama-cli -m {shlex.quote(where)} -p "The shepherd"')]
    hints = snippets(where)
    if "/" in where:  # a hub's id, which is no directory
        hints = [(name, code.replace("serve ./", "serve ")) for name, code in hints]
    if model.manifest is not None and model.manifest.stage == "quantize":
        source = model.manifest.source.ref.name
        hints = [(name, f"{QUANTISED.get(name, '')}{code}") for name, code in hints]
        hints[-1] = (
            "llama.cpp",
            f"# it reads no torchao weights: convert {source} and let llama.cpp quantise it\n"
            f"python convert_hf_to_gguf.py {shlex.quote(source)} --outfile model.gguf\n"
            "llama-quantize model.gguf model-q4.gguf Q4_K_M",
        )
    return hints


QUANTISED = {
    "transformers": "# pip install torchao\n",
    "vLLM": "# pip install torchao\n",
}
