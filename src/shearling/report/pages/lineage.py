"""Where each model comes from, step by step, and how to use the result."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from shearling.report import numbers
from shearling.report.decide.compare import AXES
from shearling.report.draw.markup import Markup, el, render
from shearling.report.draw.sections import absent, section
from shearling.report.numbers import figure, plural, ranges
from shearling.report.pages.source_damage import source_damage
from shearling.report.records.fields import describe
from shearling.report.records.records import Manifest, ProofFigures, SourceModel
from shearling.report.records.results import Model, Results

MOST = 400  # characters of a list of indices

Facts = list[tuple[str, object]]


def lineage_section(results: Results) -> Markup:
    """The chain of manifests of every model that nothing else was made of."""
    title = "Lineage"
    if not results.made:
        return absent(
            title, "No manifest yet: `shearling prune` writes one beside the model it makes."
        )
    passed_through = {step.source.ref.fingerprint for model in results.made for step in model.chain}
    last = [model for model in results.made if model.fingerprint not in passed_through]
    shown: set[str] = set()
    return section(title, [_chain(model, shown) for model in last])


def use_section(results: Results) -> Markup | None:
    """Three ways to run the primary model, which is a stock checkpoint."""
    manifest = results.primary.manifest if results.primary else None
    if manifest is None:
        return None
    if manifest.proof is not None and not manifest.proof.passed:
        warning = "The proof of surgery of this model failed: do not use it."
        return section("Use it", el("p", warning, class_="failed"))
    directory = manifest.directory or manifest.model.name
    return section(
        "Use it",
        el(
            "p",
            "The result is an ordinary checkpoint: it needs neither this toolkit nor custom code. "
            "Run these beside the directory ",
            el("code", directory),
            ".",
        ),
        el("div", [snippet(*one) for one in snippets(directory)], class_="use"),
    )


def snippets(directory: str) -> list[tuple[str, str]]:
    """How to load a model directory in transformers, vLLM and llama.cpp."""
    shell = shlex.quote(directory)
    return [
        (
            "transformers",
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained({directory!r}, dtype="auto")\n'
            f"tokenizer = AutoTokenizer.from_pretrained({directory!r})",
        ),
        ("vLLM", f"vllm serve ./{shell}"),
        (
            "llama.cpp",
            f"python convert_hf_to_gguf.py {shell} --outfile model.gguf\n"
            'llama-cli -m model.gguf -p "The shepherd"',
        ),
    ]


def snippet(name: str, code: str) -> Markup:
    """A few lines to copy, under what they are for."""
    return el("div", el("h3", name), el("pre", el("code", code), tabindex="0"))


def _chain(model: Model, shown: set[str]) -> Markup:
    """The way to one model; what an earlier chain has shown is only named again."""
    source = model.chain[0].source
    entries = [(source.ref, "source", _source_facts(source))]
    entries += [(step.model, step.stage, _step_facts(step)) for step in model.chain]
    points = []
    for ref, stage, facts in entries:
        again: Facts = [("Fingerprint", _fingerprint(ref.fingerprint)), ("Details", "as above")]
        points.append(_entry(ref.name, stage, again if ref.fingerprint in shown else facts))
        shown.add(ref.fingerprint)
    return el("ol", points, class_="lineage")


def _source_facts(source: SourceModel) -> Facts:
    return [
        ("Fingerprint", _fingerprint(source.ref.fingerprint)),
        ("Shape", _shape(source.shape)),
        ("Parameters", numbers.exact(source.parameters)),
        ("On disk", numbers.disk(source.bytes) if source.bytes is not None else None),
    ]


def _step_facts(step: Manifest) -> Facts:
    facts: Facts = [("Fingerprint", _fingerprint(step.model.fingerprint))]
    for axis, kept in step.keep.items():
        size = step.source.shape[axis]
        gone = sorted(set(range(size)) - set(kept))
        if axis == "layers":
            facts.append(("Kept", f"{len(kept)} of {size}: {_few(kept)}"))
            facts.append(("Removed", f"{len(gone)}: {_few(gone)}" if gone else "none"))
        else:
            sizes = f"{numbers.exact(len(kept))} of {numbers.exact(size)} kept"
            facts.append((AXES.get(axis, axis), f"{sizes}, without {_few(gone)}"))
    for axis, size in step.source.shape.items():  # chosen for each block apart: too many to list
        after = step.shape.get(axis, size)
        if axis not in step.keep and after != size:
            sizes = f"{numbers.exact(after)} of {numbers.exact(size)} kept in each block"
            facts.append((AXES.get(axis, axis), sizes))
    return [
        *facts,
        ("Shape", _shape(step.shape)),
        ("Parameters", numbers.exact(step.parameters)),
        ("On disk", numbers.disk(step.bytes)),
        ("Repair", _repair(step)),
        ("Held out", source_damage(step)),
        ("Unsettled", _lost(step)),
        ("Options", _options(step)),
        ("Seed", step.seed),
        ("Proof", _proof(step.proof) if step.proof or _cuts(step) else None),
        ("Made", _made(step)),
        ("Versions", describe({"shearling": step.shearling or None} | step.versions)),
    ]


def _entry(name: str, stage: str, facts: Facts) -> Markup:
    """One point of the line; a fact that is not known is not shown."""
    shown = [(key, value) for key, value in facts if value is not None and value != ""]
    pairs = [[el("dt", key), el("dd", value)] for key, value in shown]
    heading = el("h3", name, el("span", f", {stage}", class_="muted"))
    return el("li", heading, el("dl", pairs, class_="facts"))


def _fingerprint(fingerprint: str) -> Markup:
    return el("code", fingerprint[:16], title=fingerprint)


def _shape(shape: dict[str, int]) -> str:
    sizes = [(AXES.get(axis, axis), numbers.exact(size)) for axis, size in shape.items()]
    return " · ".join(f"{name} {size}" for name, size in sizes)


def _options(step: Manifest) -> str:
    """How the step was asked for; what the facts above it say already is left out."""
    apart = ("removed", "scores", "repair")
    rest = {key: one for key, one in step.options.items() if key not in apart}
    return describe(rest)


def _repair(step: Manifest) -> str:
    """What was solved anew after the cut, and how much of the damage to the stream that undid."""
    repair = step.options.get("repair")
    steps = repair.get("steps") if isinstance(repair, dict) else None
    if not isinstance(repair, dict) or not isinstance(steps, list) or not steps:
        return ""
    changed = sum(one.get("strength") is not None for one in steps)
    before = sum(one.get("error_before") or 0.0 for one in steps)
    after = sum(one.get("error_after") or 0.0 for one in steps)
    gone = f", {1 - after / before:.0%} of the held-out error gone" if before > 0 else ""
    gone += _final_norm(repair)
    return f"{changed} of {len(steps)} matrices on {repair.get('tokens', 0):,} tokens{gone}"


def _final_norm(repair: dict[str, Any]) -> str:
    """What became of the final norm's gain, where it was fitted or not to be."""
    if repair.get("final_norm") is False:
        return "; the final norm was not fitted"
    divergence = repair.get("divergence")
    if not isinstance(divergence, list) or len(divergence) != 2:
        return ""
    before, after = (figure(nats) for nats in divergence)
    words = repair.get("divergence_words")
    over = f" over {words:,} words that stand for all" if isinstance(words, int) else ""
    return f"; the final norm was fitted: {before} to {after} nats from the source{over}"


def _lost(step: Manifest) -> str:
    """How much of what gates held open the cut after them closes: little, if they had settled."""
    shares = ", ".join(f"{AXES.get(axis, axis)} {share:.1%}" for axis, share in step.lost.items())
    return f"the cut closes of what was open: {shares}" if shares else ""


def _cuts(step: Manifest) -> bool:
    return bool(step.keep or step.units or step.shape != step.source.shape)


def _few(indices: Sequence[int]) -> str:
    """Ranges of indices; a vocabulary's would fill pages."""
    text = ranges(indices)
    return text if len(text) < MOST else f"{text[:MOST].rpartition(',')[0]}, …"


def _made(step: Manifest) -> str:
    when = step.created[:16].replace("T", " ") + (" UTC" if step.created else "")
    took = f"in {numbers.seconds(step.seconds)}" if step.seconds is not None else ""
    return ", ".join(part for part in (when if step.created else "", took) if part)


def _proof(proof: ProofFigures | None) -> Markup:
    if proof is None:
        return el("span", "none recorded", class_="muted")
    details = [f"largest difference of a logit {figure(proof.max_abs_difference)}"]
    if proof.max_relative_difference is not None:
        details.append(f"relative {figure(proof.max_relative_difference)}")
    if proof.tokens is not None:
        details.append(f"over {plural(proof.tokens, 'token')}")
    if proof.loaded_with:
        details.append(f"loaded with {proof.loaded_with}")
    outcome = el("b", "passed") if proof.passed else el("b", "failed", class_="failed")
    return render([outcome, f": {', '.join(details)}"])
